"""Where this package keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Returns the folder of downloads, compact copies and compiled kernels, which need not exist.

    It is the one that ``ASE_ENF_CACHE`` names, or else the platform's cache folder (``$XDG_CACHE_HOME/ase-enf`` or
    ``~/.cache/ase-enf`` on Linux).

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    if chosen := os.environ.get("ASE_ENF_CACHE"):
        return Path(chosen).expanduser().absolute()
    return user_cache_path("ase-enf", appauthor=False).absolute()
