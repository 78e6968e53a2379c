"""A file of scored structures that replaces the file they come from, and that can be continued after a kill."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ase_enf.cli.outputs import xyz_last_lines

if TYPE_CHECKING:
    from ase import Atoms

try:
    import fcntl
except ImportError:  # Windows: files are not locked there
    fcntl = None


class InPlaceFile:
    """Scored structures that replace the file they were read from, in one step when all are scored.

    Until then they are collected in a hidden file beside it, by ``GrowingFile``, and the original is not touched.
    Whatever ends the work, the same request finds the hidden file and continues after its last structure. Hidden files
    of other requests, or of an earlier content of the original, are kept until this request is finished.

    Args:
        path: The file.
        request: Text that identifies what the scores depend on, besides the content of the file.

    Raises:
        ValueError: If another process is scoring the file, or, at the end, if the file has changed.
    """

    can_append = True

    def __init__(self, path: str, request: str) -> None:
        from ase_enf.atoms.files import real_path, remove_abandoned
        from ase_enf.atoms.io import KEEP_INFO, GrowingFile

        self._target = real_path(path)
        self._lock = _locked(self._target)
        remove_abandoned(self._target.parent)
        self._content = _digest(self._target)
        key = hashlib.sha256(f"{request}{self._content}".encode()).hexdigest()[:8]
        name = f".{self._target.name[:150]}.unfinished-"
        # The ending tells GrowingFile the format.
        self.path = self._target.with_name(f"{name}{key}{_ending(self._target)}")
        beside = self._target.parent.glob(f"{glob.escape(name)}*")
        self.others = sorted(path for path in beside if not path.name.startswith(self.path.name))
        found = _structures(self.path)
        self.start = len(found)
        self.finite = all(math.isfinite(atoms.info.get("enf_log_likelihood", math.nan)) for atoms in found)
        continued = bool(found) and self.path.suffix in KEEP_INFO
        self._before = self.start if continued else 0
        self._file = GrowingFile(self.path, continued, called=self._target)
        for atoms in () if continued else found:
            self._file.add(atoms)

    @property
    def count(self) -> int:
        """Number of scored structures in the hidden file, including those of earlier processes."""
        return self._before + self._file.count

    def __enter__(self) -> InPlaceFile:
        return self

    def add(self, atoms: Atoms) -> None:
        """Adds one structure; see ``GrowingFile.add``."""
        self._file.add(atoms)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            self._file.__exit__()
            if kind is None:
                self._take_place()

    def _take_place(self) -> None:
        if _digest(self._target) != self._content:
            raise ValueError(
                f"{self._target}: has changed while it was scored, and stays as it is; the scored structures are in "
                f"{self.path}: move that file where it is wanted"
            )
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        for other in self.others:  # they belong to the content that is replaced
            other.unlink(missing_ok=True)
        os.replace(self.path, self._target)


def _locked(path: Path) -> IO[bytes]:
    """Opens a file and, where the file system can lock it, keeps other processes from scoring it until it is closed."""
    file = path.open("rb")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path}: another process is scoring it; wait for its end") from None
    except OSError:  # the file system has no locks
        pass
    return file


def _ending(path: Path) -> str:
    return "".join(path.suffixes[-2 if path.suffix in (".gz", ".bz2", ".xz") else -1 :])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _structures(path: Path) -> list[Atoms]:
    """Returns the structures that an earlier process left in a file; none if it does not exist."""
    from ase_enf.data import DataNotFoundError, qm9

    if path.suffix in (".extxyz", ".xyz") and path.exists():
        _cut(path)
    try:
        return qm9.load(path) if path.exists() and path.stat().st_size else []
    except DataNotFoundError:  # a database without rows
        return []


def _cut(path: Path) -> None:
    """Removes an incomplete structure, which a kill may leave, from the end of an xyz file."""
    with path.open("r+b") as file:
        end = 0
        for line in xyz_last_lines(file):
            if not line.endswith(b"\n"):
                break
            end = file.tell()
        file.truncate(end)
