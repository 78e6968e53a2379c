"""Writing structures and their provenance to files, in the format of the file's ending."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import write
from ase.io.formats import UnknownFileTypeError, filetype, ioformats
from ase.io.trajectory import TrajectoryWriter

from ase_enf.atoms.extxyz import constraint_kinds, extended, with_content
from ase_enf.atoms.files import (
    brief,
    ends_line,
    real_path,
    remove_abandoned,
    replaced,
    require_folder,
    room_for,
    write_whole,
)
from ase_enf.atoms.formula import check_elements, of_elements
from ase_enf.atoms.plain import as_plain
from ase_enf.atoms.rows import ASE_ARRAYS, SQLITE, database_row

_STREAMED = (".extxyz", ".xyz")
_COMPRESSED = (".gz", ".bz2", ".xz")
KEEP_INFO = (*_STREAMED, ".db", ".traj")
"""Endings whose formats keep ``info``."""

COMMIT_SECONDS = 1.0
FLUSH_SECONDS = 30.0
"""Seconds after which a file that is written whole is written anew, with what has come since."""

# Formats in which ASE writes the elements or the number of atoms of the first structure for all.
_ONE_FORMULA = ("netcdftrajectory", "proteindatabank", "xsf", "xtd")


def check_output(path: str | os.PathLike[str], count: int = 1) -> Path:
    """Checks, before anything is computed, that structures can be written to a path.

    Raises:
        FileNotFoundError: If its folder does not exist.
        OSError: If it is a folder, or nothing can be written to its folder.
        ValueError: If ASE does not know its ending, cannot write that format, or not that many structures in it.

    Example:
        >>> check_output("m.extxyz").suffix
        '.extxyz'
    """
    path = require_folder(path)
    if path.suffix == ".db":
        return path
    try:
        known = ioformats.get(filetype(str(path), read=False))  # filetype may answer with any unknown ending
    except UnknownFileTypeError:
        known = None
    if not path.suffix or known is None:
        raise ValueError(f"{path}: ASE knows no format of that ending; use .extxyz, .db, .traj or another")
    if (known.single or known.name in _ONE_FORMULA) and count > 1:
        raise ValueError(f"{path}: the format {known.name} holds one structure, not {count}; use .extxyz or .db")
    if not known.can_write:
        raise ValueError(
            f"{path}: ASE reads the format {known.name} of that ending but cannot write it; use .extxyz or .db"
        )
    if known.name == "db":
        raise ValueError(f"{path}: a database ends in .db and is not compressed; use .db or .extxyz")
    if path.suffix in _COMPRESSED and (known.name == "json" or not known.acceptsfd):
        raise ValueError(
            f"{path}: ASE cannot compress the format {known.name}; leave {path.suffix} out, or use .extxyz"
        )
    return path


def check_structures(path: str | os.PathLike[str], atoms: Iterable[Atoms]) -> None:
    """Raises, before anything is computed, the errors that ``write_structures`` would raise for some structures.

    Args:
        path: File to write.
        atoms: The structures.

    Raises:
        ValueError: If the format cannot hold an entry of ``info`` or ``arrays``.

    Example:
        >>> from ase.build import molecule
        >>> check_structures("m.extxyz", [molecule("H2O")])
    """
    path = Path(path)
    for item in atoms:
        if path.suffix == ".db":
            database_row(item)
        else:
            _storable(item, path, {})


def keeps_info(path: str | os.PathLike[str]) -> bool:
    """Whether the format of a file, compressed or not, keeps ``info``.

    Example:
        >>> keeps_info("m.extxyz.gz"), keeps_info("m.pdb")
        (True, False)
    """
    return _ending(Path(path)) in KEEP_INFO


def _ending(path: Path) -> str:
    """Returns the ending that sets the format, in lower case, ignoring that of a compression."""
    return (Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix).lower()


class FlushClock:
    """Decides when to rewrite a file that can only be written as a whole, so that it takes at most a tenth of the time.

    Example:
        >>> FlushClock().due()
        False
    """

    def __init__(self) -> None:
        self._ended, self._took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time to write."""
        return self.age() > max(FLUSH_SECONDS, 9 * self._took)

    def age(self) -> float:
        """Returns the seconds since the last writing."""
        return time.monotonic() - self._ended

    @contextmanager
    def running(self) -> Iterator[None]:
        """Takes the time of one writing."""
        began = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took = self._ended - began


class GrowingFile:
    """A file of structures that is saved as it grows, whatever ends the work.

    ``.extxyz`` and ``.xyz`` are written structure by structure, and rows of a ``.db`` are committed every second, so
    that even a killed process loses only the last of them. Any other format is written every half minute, less often if
    that takes long, and when the file is closed, also by an exception. The file is created, or an existing one
    replaced, with the first structure.

    Args:
        path: File to write; see :func:`write_structures`.
        append: Whether to continue an existing file: ``.extxyz``, ``.xyz``, ``.db`` or ``.traj``.
        called: Name of the file in errors and warnings; its path when None.

    Raises:
        ValueError: If structures cannot be written, or added, to such a file.

    Warns:
        UserWarning: When it is closed, if the format does not keep all of the structures.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder, GrowingFile(f"{folder}/m.extxyz") as file:
        ...     file.add(molecule("H2O"))
        ...     (file.path.read_text().splitlines()[0], file.count)
        ('3', 1)
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = False, called: Path | None = None) -> None:
        self.path = check_output(path)
        remove_abandoned(self.path.parent)
        self._called = called or self.path
        if append:
            check_append(self.path)
        self.count = 0  # structures that are in the file
        self.can_append = self.path.suffix in KEEP_INFO
        self._append = append
        self._lost: dict[str, None] = {}
        self._waiting: list[Atoms] = []  # of a format that is written whole
        self._unwritten = 0  # of those, structures that are not in the file yet
        self._clock = FlushClock()
        self._database: Any = None
        self._uncommitted, self._committed_at = 0, 0.0

    def __enter__(self) -> GrowingFile:
        return self

    def add(self, atoms: Atoms) -> None:
        """Adds one structure.

        Raises:
            ValueError: See :func:`write_structures`.
            OSError: If there is no room for it; earlier structures are kept.
        """
        check_elements(atoms, self.count + self._unwritten + self._uncommitted)
        if self.path.suffix == ".db":
            self._add_row(atoms)
        elif self.path.suffix in _STREAMED:
            self._add_frame(_storable(atoms, self.path, self._lost))
        else:
            check_output(self.path, len(self._waiting) + 1)
            self._waiting.append(_storable(atoms, self.path, self._lost))
            self._unwritten += 1
            if self._clock.due():
                self._write_waiting()

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._commit()
        if self._unwritten:
            self._write_waiting()
        _warn_of(self._lost, self._called)

    def _write_waiting(self) -> None:
        """Writes the waiting structures after those to keep; only ``.traj`` continues its file."""
        with (
            self._clock.running(),
            replaced(self.path, "".join(self.path.suffixes)) as part,
            _explained(self._called),
        ):
            if self._append and self.path.exists():
                shutil.copyfile(self.path, part)
                with TrajectoryWriter(part, mode="a") as trajectory:  # write(append=True) would lose them
                    for atoms in self._waiting:
                        trajectory.write(atoms)
            else:
                write(part, self._waiting)
        self.count, self._unwritten = self.count + self._unwritten, 0
        if self.can_append:
            self._append, self._waiting = True, []

    def _add_frame(self, atoms: Atoms) -> None:
        text = io.StringIO()
        with _explained(self._called):
            write(text, atoms, format="extxyz")
            fresh = not self.count and not self._append
            with open(self.path, "wb" if fresh else "ab", buffering=0) as handle:
                end = handle.tell()
                try:
                    if end and not self.count and not ends_line(self.path):
                        handle.write(b"\n")
                    write_whole(handle, text.getvalue().encode())
                except BaseException:
                    handle.truncate(end)
                    if fresh:
                        real_path(self.path).unlink()
                    raise
        self.count += 1

    def _add_row(self, atoms: Atoms) -> None:
        from ase.db import connect

        keys, data = database_row(atoms)
        with _explained(self._called):
            if self._database is None:
                if not self.count and not (self._append and _has_content(self.path)):
                    _begin_database(self.path)
                self._database = connect(self.path)
                self._database.__enter__()
                self._committed_at = time.monotonic()
            try:
                self._database.write(atoms, key_value_pairs=keys, data=data)
            except BaseException as error:
                with suppress(sqlite3.Error):
                    self._database.__exit__(type(error), error, None)  # rolls back to the last commit
                self._database, self._uncommitted = None, 0
                if not self.count and not self._append:
                    real_path(self.path).unlink(missing_ok=True)
                raise
        self._uncommitted += 1
        if time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        database, self._database = self._database, None
        with _explained(self._called):
            database.__exit__(None, None, None)
        self.count, self._uncommitted = self.count + self._uncommitted, 0


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _begin_database(path: Path) -> None:
    """Replaces a file by an empty database, atomically with all of its tables."""
    from ase.db import connect

    with replaced(path, ".db") as part:
        connect(part).count()
        # A journal of the old content would be taken for one of the new.
        real_path(path).with_name(real_path(path).name + "-journal").unlink(missing_ok=True)


def check_append(path: str | os.PathLike[str]) -> None:
    """Raises ``ValueError`` if structures cannot be added to a file.

    Example:
        >>> check_append("m.pdb")
        Traceback (most recent call last):
        ValueError: m.pdb: structures cannot be added to such a file; use .extxyz, .xyz, .db, .traj
    """
    path = Path(path)
    if path.suffix not in KEEP_INFO:
        raise ValueError(f"{path}: structures cannot be added to such a file; use {', '.join(KEEP_INFO)}")
    if path.suffix == ".db" and path.exists():
        with path.open("rb") as handle:
            if handle.read(len(SQLITE)) not in (SQLITE, b""):
                raise ValueError(f"{path}: is no ASE database; nothing can be added to it")


def _warn_of(lost: Iterable[str], path: Path) -> None:
    """Warns about what a format did not keep."""
    if named := ", ".join(lost):
        remedy = ".db" if keeps_info(path) else ", ".join(KEEP_INFO)
        warnings.warn(f"{path}: this format {named}; use {remedy} to keep it", stacklevel=3)


def write_structures(path: str | os.PathLike[str], atoms: Iterable[Atoms]) -> int:
    """Writes structures in the format of the file's ending; the file appears when it is complete.

    ``.extxyz`` (and ``.xyz``, in the same extended format) keeps ``info`` and is written as the structures arrive.
    ``.db`` is an ASE database. The keys of its rows are ``log_likelihood`` and related results, and other entries of
    ``info`` that can be keys; all of ``info`` is in ``data["info"]``, and arrays for which ASE has no column are in
    ``data["arrays"]``. Any other format is written by ``ase.io.write``; all but ``.traj`` drop ``info``. A warning
    names what a format does not keep.

    Args:
        path: File to write; an existing one is replaced.
        atoms: Structures, possibly a generator.

    Returns:
        The number of structures written.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the path is a folder, or nothing can be written there.
        ValueError: If ASE does not know the ending or cannot write these structures in that format, if ``.db`` cannot
            hold an entry of ``info``, or extended xyz one of ``arrays``.

    Warns:
        UserWarning: If the format does not keep all of the structures.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_structures(f"{folder}/two.extxyz", [molecule("H2O"), molecule("CH4")])
        2
    """
    path, atoms = check_output(path, len(atoms) if isinstance(atoms, Sized) else 1), of_elements(atoms)
    lost: dict[str, None] = {}  # in the order of their discovery
    with replaced(path, "".join(path.suffixes)) as part:  # ASE knows the format by the endings
        if path.suffix == ".db":
            count = _write_database(part, path, atoms)
        elif path.suffix in _STREAMED:
            count = _write_stream(part, path, (_storable(item, path, lost) for item in atoms))
        else:
            count = _write_all(part, path, [_storable(item, path, lost) for item in atoms])
    _warn_of(lost, path)
    return count


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the errors of ASE's writers, which differ between formats, into a ``ValueError`` of one line."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = f"OSError: {error.strerror}" if isinstance(error, OSError) and error.strerror else brief(error)
        raise OSError(f"{path}: cannot be written ({reason}); make room there, or name another folder") from error
    except Exception as error:
        message = f"{path}: ASE cannot write these structures in this format ({brief(error)}); use .extxyz or .db"
        raise ValueError(message) from error


def _write_all(part: Path, path: Path, many: list[Atoms]) -> int:
    check_output(path, len(many))
    with _explained(path):
        write(part, many)
    return len(many)


def _write_stream(part: Path, path: Path, atoms: Iterable[Atoms]) -> int:
    count = 0
    with room_for(path), open(part, "w", encoding="utf-8") as handle:  # closing writes too
        for item in atoms:
            with _explained(path):
                write(handle, item, format="extxyz")
            count += 1
        with _explained(path):
            handle.flush()
            os.fsync(handle.fileno())
    return count


def _storable(atoms: Atoms, path: Path, lost: dict[str, None]) -> Atoms:
    """Returns atoms in the form that a format reads back, and adds to ``lost`` what it does not keep."""
    if _ending(path) in _STREAMED:
        return extended(atoms, lost)
    arrays = [f"arrays[{name!r}]" for name in atoms.arrays if name not in ASE_ARRAYS]
    if _ending(path) == ".traj":
        lost |= {f"keeps no {name}": None for name in arrays}
        return with_content(
            atoms, as_plain(atoms.info, "info"), atoms.arrays
        )  # a file with a date in it cannot be read again
    if atoms.info:
        lost["keeps no info (seed, model, scores …)"] = None
    lost |= {f"may lose {name}": None for name in [*arrays, *constraint_kinds(atoms)]}  # some keep one or the other
    return atoms


def _write_database(part: Path, path: Path, atoms: Iterable[Atoms]) -> int:
    count = 0
    with _transaction(part, path) as database:
        for item in atoms:
            keys, data = database_row(item)
            with _explained(path):
                database.write(item, key_value_pairs=keys, data=data)
            count += 1
    return count


@contextmanager
def _transaction(part: Path, path: Path) -> Iterator[Any]:
    """Opens a database for rows that are committed together; one by one, they take forty times as long."""
    from ase.db import connect

    database = connect(part)
    with _explained(path):
        database.__enter__()
    try:
        yield database
    except BaseException as error:
        with suppress(sqlite3.Error):  # a full disk refuses the rollback too
            database.__exit__(type(error), error, None)
        raise
    with _explained(path):
        database.__exit__(None, None, None)
