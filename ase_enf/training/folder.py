"""The folder of a run: which files are in it, and that a run replaces none of somebody else."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from ase_enf.training.log import LOG_COLUMNS, LOG_FILE

STATE_FILE, BEST_FILE, LAST_FILE, CONFIG_FILE = "state.pt", "model.safetensors", "last.safetensors", "config.json"


def check_new_run(folder: str | os.PathLike[str]) -> None:
    """Makes sure that a new run replaces nothing in its folder but the beginnings of one that never saved.

    Raises:
        ValueError: If the folder holds a run, or a file of somebody else under a name that a run needs.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; name the folder of the run")
    if any((folder / name).exists() for name in (STATE_FILE, BEST_FILE, LAST_FILE)):
        raise ValueError(f"{folder}: already holds a run; resume it, or choose another folder")
    check_ours(folder / CONFIG_FILE, lambda text: {"objective", "features", "out"} <= dict(json.loads(text)).keys())
    check_ours(folder / LOG_FILE, lambda text: text.startswith(",".join(LOG_COLUMNS[:4])))


def check_ours(path: Path, recognise: Callable[[str], bool]) -> None:
    """Makes sure that a file, which is to be replaced, is not there, is empty, or has a text that is recognised.

    Raises:
        ValueError: If it is somebody else's.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError, ValueError, TypeError):  # no file, no text, no JSON
        if not (text := path.read_text()) or recognise(text):
            return
    raise ValueError(f"{path}: is no file of a run, and a run would replace it; move it away, or choose another folder")
