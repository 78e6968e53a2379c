"""The folder of a run: its files, a lock that admits one run at a time, and the protection of other files."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from ase_enf.atoms.files import make_folder
from ase_enf.training.log import LOG_COLUMNS, LOG_FILE

try:
    import fcntl
except ImportError:  # Windows, where no other run is kept out
    fcntl = None

STATE_FILE, BEST_FILE, LAST_FILE, CONFIG_FILE = "state.pt", "model.safetensors", "last.safetensors", "config.json"
LONG_FILE = "last-long.safetensors"  # the longer average, where there are two
LOCK_FILE = "run.lock"
RUN_FILES = (STATE_FILE, BEST_FILE, LAST_FILE, LONG_FILE, CONFIG_FILE, LOG_FILE, LOCK_FILE)
# What remains of a file when a process is killed while writing it.
_PART = re.compile(r"\.(state\.pt|(model|last|last-long)\.safetensors|(config|data)\.json|log\.csv)\..+\.part")


class FolderLock:
    """Keeps other runs out of a folder from :meth:`take` to the end of the ``with`` block.

    The lock is one of the system (``flock``) on ``run.lock``, which ends with the process, however that ends. A file
    that a killed process leaves behind stops nobody, and the next run removes it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[str] | None = None

    def take(self, folder: Path) -> None:
        """Takes the folder, creating it if necessary, and removes files that a killed run left half written.

        Raises:
            ValueError: If another run has it, or another kind of file has the name of the lock.
        """
        self._path = make_folder(folder) / LOCK_FILE
        check_ours(self._path, lambda text: text.startswith("process "))
        self._file = _open_locked(self._path)
        self._file.truncate(0)
        self._file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {datetime.datetime.now():%Y-%m-%d %H:%M}\n"
        )
        self._file.flush()
        for path in folder.iterdir():
            if _PART.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()  # while it is still locked: nobody else can have taken it
            self._file.close()


def _open_locked(path: Path) -> IO[str]:
    """Opens a file and locks it; if its owner has removed it in the meantime, a new one is opened."""
    while True:
        file = open(path, "a+")
        _lock(file, path.parent)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def _lock(file: IO[str], folder: Path, shared: bool = False) -> None:
    """Locks a file, if the file system has locks; without them no other run is kept out."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "by another process"
        file.close()
        raise ValueError(
            f"{folder}: a run is in progress there ({owner}); wait for its end, or choose another folder"
        ) from None
    except OSError:  # the file system has no locks
        pass


def check_unlocked(folder: Path) -> None:
    """Makes sure that no run is in progress in a folder.

    Raises:
        ValueError: If there is one.
    """
    with contextlib.suppress(FileNotFoundError), open(folder / LOCK_FILE) as file:
        _lock(file, folder, shared=True)  # the processes of torchrun look at the same time


def check_new_run(folder: str | os.PathLike[str]) -> None:
    """Makes sure that a new run replaces nothing in its folder except the first files of a run that never saved.

    Raises:
        ValueError: If the folder holds a run, finished or in progress, or another kind of file under a name that a run
            needs.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; name the folder of the run")
    check_unlocked(folder)
    check_no_run(folder)
    check_ours(folder / LOCK_FILE, lambda text: text.startswith("process "))
    check_ours(folder / CONFIG_FILE, lambda text: {"objective", "features", "out"} <= dict(json.loads(text)).keys())
    check_ours(folder / LOG_FILE, lambda text: text.startswith(",".join(LOG_COLUMNS[:4])))


def check_no_run(folder: Path) -> None:
    """Makes sure that no run has saved anything in a folder.

    Raises:
        ValueError: If one has.
    """
    if any((folder / name).exists() for name in (STATE_FILE, BEST_FILE, LAST_FILE, LONG_FILE)):
        how = f"--resume {folder}, or resume=True in Python, continues it"
        raise ValueError(f"{folder}: already holds a run; resume it, or choose another folder ({how})")


def check_ours(path: Path, recognise: Callable[[str], bool]) -> None:
    """Makes sure that a file that is to be replaced is missing, empty, or recognised by its text.

    Raises:
        ValueError: If it is another kind of file.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError, ValueError, TypeError):  # no file, no text, no JSON
        if not (text := path.read_text()) or recognise(text):
            return
    raise ValueError(
        f"{path}: is not a file of a run, and a run would replace it; move it away, or choose another folder"
    )
