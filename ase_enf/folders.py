"""The folder for files that this package can make or download again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Returns the folder for downloads, compact copies and compiled kernels, which need not exist yet.

    The environment variable ``ASE_ENF_CACHE`` sets it; otherwise it is the cache folder of the platform
    (``$XDG_CACHE_HOME/ase-enf`` or ``~/.cache/ase-enf`` on Linux).

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    if chosen := os.environ.get("ASE_ENF_CACHE"):
        return Path(chosen).expanduser().absolute()
    return user_cache_path("ase-enf", appauthor=False).absolute()
