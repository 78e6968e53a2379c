"""Structures to files, with their provenance, by the file's ending."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.constraints import FixAtoms, FixCartesian
from ase.io import write
from ase.io.extxyz import (
    REV_PROPERTY_NAME_MAP,
    SPECIAL_3_3_KEYS,
    key_val_dict_to_str,
    key_val_str_to_dict,
    per_config_properties,
)
from ase.io.formats import UnknownFileTypeError, filetype, ioformats
from ase.io.trajectory import TrajectoryWriter
from ase.spacegroup import Spacegroup
from numpy.typing import NDArray

from ase_enf.atoms.files import brief, real_path, replaced, require_folder

# What of ours ase.db can select by; everything else of ours is in the row's data alone.
_KEYS = ("log_likelihood", "log_likelihood_stderr", "log_likelihood_kind", "seed", "index")
_PREFIX = "enf_"
_SCORE_KEYS = _KEYS[:3]
_STREAMED = (".extxyz", ".xyz")
_COMPRESSED = (".gz", ".bz2", ".xz")
KEEP_INFO = (*_STREAMED, ".db", ".traj")
"""Endings whose formats keep ``info``."""

COMMIT_SECONDS = 1.0
_SQLITE = b"SQLite format 3\0"

# ASE writes the elements or the number of atoms of the first structure for all.
_ONE_FORMULA = ("netcdftrajectory", "proteindatabank", "xsf", "xtd")
# The arrays that ASE's own formats keep.
_ASE_ARRAYS = ("numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges")
# What extended xyz means by itself: info and columns of these names would be taken for that.
_XYZ_KEYS = ("Lattice", "Properties", "pbc")
_XYZ_COLUMNS = ("symbols", "species", "pos", "Z", "move_mask")


def check_output(path: str | os.PathLike[str], count: int = 1) -> Path:
    """Returns ``path`` if structures can be written there, before anything is computed for it.

    Raises:
        FileNotFoundError: If its folder does not exist.
        OSError: If it is a folder, or nothing can be written to its folder.
        ValueError: If ASE does not know its ending, or cannot write that format, or not so many structures.

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
    """Raises what `write_structures` would raise of these structures, before anything is computed for them.

    Args:
        path: Where to.
        atoms: Structures.

    Raises:
        ValueError: If the format cannot hold an entry of ``info`` or ``arrays``.

    Example:
        >>> from ase.build import molecule
        >>> check_structures("m.extxyz", [molecule("H2O")])
    """
    path = Path(path)
    for item in atoms:
        if path.suffix == ".db":
            _row(item)
        else:
            _storable(item, path, {})


def keeps_info(path: str | os.PathLike[str]) -> bool:
    """Whether the format of a file's ending, compressed or not, keeps ``info``.

    Example:
        >>> keeps_info("m.extxyz.gz"), keeps_info("m.pdb")
        (True, False)
    """
    return _ending(Path(path)) in KEEP_INFO


def _ending(path: Path) -> str:
    """Returns the ending that names the format, in lower case, below that of a compression."""
    return (Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix).lower()


class GrowingFile:
    """A file of structures that keeps what was added to it, whatever ends the work.

    ``.extxyz`` and ``.xyz`` are written structure by structure, and rows of a ``.db`` are committed every second: even
    a killed process leaves all but the last of them. Any other format is written when the file is closed, also by an
    exception. Nothing is there before the first structure; an old file is replaced by the first one, or continued.

    Args:
        path: Where to; see :func:`write_structures`.
        append: Whether an old file is continued: ``.extxyz``, ``.xyz``, ``.db`` or ``.traj``.
        whole: Whether an old file stays until the new one is complete, and an exception leaves it as it was, as must be
            where it is the source of what is written.

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

    def __init__(self, path: str | os.PathLike[str], append: bool = False, whole: bool = False) -> None:
        self.path = check_output(path)
        if append:
            check_append(self.path)
        self.count = 0  # structures that are in the file
        self.can_append = self.path.suffix in KEEP_INFO
        self._append = append
        self._whole = whole and not append
        self._lost: dict[str, None] = {}
        self._waiting: list[Atoms] = []  # of a format that is written at the end
        self._database: Any = None
        self._uncommitted, self._committed_at = 0, 0.0

    def __enter__(self) -> GrowingFile:
        return self

    def add(self, atoms: Atoms) -> None:
        """Adds one structure.

        Raises:
            ValueError: See :func:`write_structures`.
            OSError: If there is no room for it; what was added before stays.
        """
        if self._whole:
            self._waiting.append(atoms)
        elif self.path.suffix == ".db":
            self._add_row(atoms)
        elif self.path.suffix in _STREAMED:
            self._add_frame(_storable(atoms, self.path, self._lost))
        else:
            check_output(self.path, len(self._waiting) + 1)
            self._waiting.append(_storable(atoms, self.path, self._lost))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._database is not None:
            self._commit()
        if self._whole:
            self.count = write_structures(self.path, self._waiting) if kind is None else 0
        elif self._waiting:
            suffix = "".join(self.path.suffixes)
            with replaced(self.path, suffix) as part, _explained(self.path):
                if self._append and self.path.exists():
                    shutil.copyfile(self.path, part)
                    with TrajectoryWriter(part, mode="a") as trajectory:  # write(append=True) would lose them
                        for atoms in self._waiting:
                            trajectory.write(atoms)
                else:
                    write(part, self._waiting)
            self.count = len(self._waiting)
        _warn_of(self._lost, self.path)

    def _add_frame(self, atoms: Atoms) -> None:
        text = io.StringIO()
        with _explained(self.path):
            write(text, atoms, format="extxyz")
            fresh = not self.count and not self._append
            with open(self.path, "wb" if fresh else "ab", buffering=0) as handle:
                end = handle.tell()
                try:
                    if end and not self.count and not _ends_line(self.path):
                        handle.write(b"\n")
                    _write_whole(handle, text.getvalue().encode())
                except BaseException:
                    handle.truncate(end)
                    if fresh:
                        real_path(self.path).unlink()
                    raise
        self.count += 1

    def _add_row(self, atoms: Atoms) -> None:
        from ase.db import connect

        keys, data = _row(atoms)
        with _explained(self.path):
            if self._database is None:
                if not self.count and not self._append:
                    for ending in ("", "-journal"):  # a journal of the old content would be taken for one of the new
                        real_path(self.path).with_name(real_path(self.path).name + ending).unlink(missing_ok=True)
                self._database = connect(self.path)
                self._database.__enter__()
                self._committed_at = time.monotonic()
            try:
                self._database.write(atoms, key_value_pairs=keys, data=data)
            except BaseException as error:
                with suppress(sqlite3.Error):
                    self._database.__exit__(type(error), error, None)  # takes back half a row, and what is with it
                self._database, self._uncommitted = None, 0
                if not self.count and not self._append:
                    real_path(self.path).unlink(missing_ok=True)
                raise
        self._uncommitted += 1
        if time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        database, self._database = self._database, None
        with _explained(self.path):
            database.__exit__(None, None, None)
        self.count, self._uncommitted = self.count + self._uncommitted, 0


def check_append(path: str | os.PathLike[str]) -> None:
    """Raises ``ValueError`` for a file to which no structures can be added.

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
            if handle.read(len(_SQLITE)) not in (_SQLITE, b""):
                raise ValueError(f"{path}: is no ASE database; nothing can be added to it")


def _ends_line(path: Path) -> bool:
    """Whether the last line of a file that is not empty is complete."""
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"


def _write_whole(handle: FileIO, content: bytes) -> None:
    """Writes all of the content without a buffer, by a single call of the system if that takes it all."""
    rest = memoryview(content)
    while rest:
        rest = rest[handle.write(rest) :]


def _warn_of(lost: Iterable[str], path: Path) -> None:
    """Names what a format did not keep."""
    if named := ", ".join(lost):
        remedy = ".db" if keeps_info(path) else ", ".join(KEEP_INFO)
        warnings.warn(f"{path}: this format {named}; use {remedy} to keep it", stacklevel=3)


def write_structures(path: str | os.PathLike[str], atoms: Iterable[Atoms]) -> int:
    """Writes structures in the format of the file's ending; the file appears when it is complete.

    ``.extxyz`` (and ``.xyz``, in the same extended format) keeps ``info`` and is written as the structures come.
    ``.db`` becomes an ASE database whose rows have ``log_likelihood`` and its companions as keys, the other entries of
    ``info`` that can be keys as well, and all of ``info`` in ``data["info"]``; arrays that ASE has no column for are in
    ``data["arrays"]``. Any other ending goes to ``ase.io.write``; all but ``.traj`` drop ``info``. What a format does
    not keep is named in a warning.

    Args:
        path: Where to; an existing file is replaced.
        atoms: Structures, possibly a generator.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the path is a folder, or nothing can be written there.
        ValueError: If ASE does not know the ending or cannot write these structures so, if ``.db`` cannot hold an entry
            of ``info``, or extended xyz one of ``arrays``.

    Warns:
        UserWarning: If the format does not keep all of the structures.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_structures(f"{folder}/two.extxyz", [molecule("H2O"), molecule("CH4")])
        2
    """
    path = check_output(path, len(atoms) if isinstance(atoms, Sized) else 1)
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
    """Turns every error of ASE's writers, which have their own for each format, into one line."""
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
    with open(part, "w", encoding="utf-8") as handle:
        for item in atoms:
            with _explained(path):
                write(handle, item, format="extxyz")
            count += 1
        with _explained(path):
            handle.flush()
            os.fsync(handle.fileno())
    return count


def _storable(atoms: Atoms, path: Path, lost: dict[str, None]) -> Atoms:
    """Returns what the format of a path reads back as these atoms, and adds to ``lost`` what it does not keep."""
    if _ending(path) in _STREAMED:
        return _extended(atoms, lost)
    arrays = [f"arrays[{name!r}]" for name in atoms.arrays if name not in _ASE_ARRAYS]
    if _ending(path) == ".traj":
        lost |= {f"keeps no {name}": None for name in arrays}
        return _with(atoms, _plain(atoms.info, "info"), atoms.arrays)  # a file with a date in it cannot be read again
    if atoms.info:
        lost["keeps no info (seed, model, scores …)"] = None
    lost |= {f"may lose {name}": None for name in [*arrays, *_constraints(atoms)]}  # some keep one or the other
    return atoms


def _constraints(atoms: Atoms) -> list[str]:
    """Returns the kinds of the constraints."""
    return [type(constraint).__name__ for constraint in atoms.constraints]


def _extended(atoms: Atoms, lost: dict[str, None]) -> Atoms:
    """Returns what extended xyz reads back as these atoms: a copy where something would change."""
    kept = {FixAtoms.__name__, FixCartesian.__name__}
    lost |= {f"keeps no {kind}": None for kind in _constraints(atoms) if kind not in kept}
    results = getattr(atoms.calc, "results", {})
    named = _named(atoms.info, "info")
    known = [f"info[{key!r}]" for key in named if key in results]
    known += [f"arrays[{name!r}]" for name in atoms.arrays if _property(name) in results]
    lost |= {f"keeps no {name} beside the calculator's": None for name in known}
    written = {key: _written(key, value) for key, value in named.items() if key not in results}
    info = {key: value for key, value in written.items() if value is not None}
    arrays = {name: _column(name, array) for name, array in atoms.arrays.items() if _property(name) not in results}
    lost |= {f"keeps no info[{key!r}]": None for key, value in written.items() if value is None}
    moved = [f"info[{key!r}]" for key in info if key in per_config_properties and key not in SPECIAL_3_3_KEYS]
    moved += [f"arrays[{name!r}]" for name in arrays if _property(name) in all_properties]
    lost |= {f"moves {name} to a calculator's results": None for name in moved}
    return _with(atoms, info, arrays)


def _with(atoms: Atoms, info: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Atoms:
    """Returns the atoms with another ``info`` and other arrays: a copy where something differs."""
    same_info = info.keys() == atoms.info.keys() and all(info[key] is value for key, value in atoms.info.items())
    if same_info and arrays.keys() == atoms.arrays.keys() and all(arrays[k] is v for k, v in atoms.arrays.items()):
        return atoms
    copy = atoms.copy()
    copy.info, copy.arrays, copy.calc = info, arrays, atoms.calc
    return copy


def _property(name: str) -> str:
    """Returns under which name extended xyz reads a column."""
    return REV_PROPERTY_NAME_MAP.get(name, name)


def _column(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Returns what extended xyz reads back as an array of the atoms."""
    if _property(name) in all_properties and array.dtype.kind not in "iuf":
        problem = f"under the name of a result the type {array.dtype}"
    elif re.search(r"""[\s:=\\"'{}\[\]]|^$""", name) or name in _XYZ_COLUMNS:
        problem = "a column of that name"
    elif array.ndim > 2 or 0 in array.shape[1:]:
        problem = f"the shape {array.shape}"
    elif array.dtype.kind not in "biufOSU":
        problem = f"the type {array.dtype}"
    elif array.dtype.kind in "OSU" and (bad := [text for text in array.flat if not _is_word(text)]):
        problem = f"{_shown(bad[0])}, only texts without blanks"
    elif array.dtype.kind in "iu" and (bad := array[np.abs(array.astype(float)) >= 2**31]).size:
        problem = f"{bad[0]}, only numbers of 32 bits"
    else:
        return array.astype(np.int64) if array.dtype.kind == "u" else array
    raise ValueError(f"arrays[{name!r}]: extended xyz cannot hold {problem}; remove or rename it, or write .db")


def _is_word(text: Any) -> bool:
    """Whether a text is a column of its own."""
    return isinstance(text, str) and text.split() == [text]


def _written(key: str, value: Any) -> Any:
    """Returns what extended xyz reads back as an entry of ``info``, None if nothing is."""
    if key in _XYZ_KEYS or not (key in SPECIAL_3_3_KEYS or _holds_key(key)):
        return None
    try:
        plain = value.symbol if isinstance(value, Spacegroup) else _plain(value, key)
        if key in per_config_properties and np.asarray(plain).dtype.kind not in "iuf":
            return None  # the file could not be read again: ASE takes it for a result
        if key in SPECIAL_3_3_KEYS:
            return _matrix(key, np.asarray(plain))
        if plain is None or isinstance(plain, str):
            return _read_back(plain)
        if isinstance(plain, float) or (isinstance(plain, int) and abs(plain) < 2**63) or _is_row(plain):
            return value
        written = _encoded(plain)
        key_val_str_to_dict(key_val_dict_to_str({"key": written}))
    except (TypeError, ValueError):  # what JSON does not know, and lists that are no array
        return None
    return written


def _matrix(key: str, value: NDArray[Any]) -> NDArray[Any] | None:
    """Returns a value that extended xyz takes for one of 3 x 3, None if it is of another shape."""
    shapes = ((3, 3), (6,)) if key == "stress" else ((3, 3),)  # ASE writes the six of a stress as nine
    return value if value.dtype.kind in "if" and value.shape in shapes else None


def _is_row(value: Any) -> bool:
    """Whether ASE writes numbers as they are: none would swallow the next entry, and one would become a number."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "bif":
        return False
    return value.ndim == 0 or (value.ndim == 1 and len(value) > 1)


@functools.lru_cache(maxsize=4096)
def _holds_key(key: str) -> bool:
    """Whether extended xyz reads a key of ``info`` back."""
    entry = {key: "x", "next": "y"}
    return key.splitlines() == [key] and key_val_str_to_dict(key_val_dict_to_str(entry)) == entry


def _encoded(value: Any) -> str:
    """Returns a value as the text that extended xyz reads as JSON."""
    return f"_JSON {json.dumps(value, default=np.ndarray.tolist)}".replace("\\", "\\\\")


@functools.lru_cache(maxsize=4096)  # most molecules of a file say the same
def _read_back(value: str | None) -> str | None:
    """Returns a text that is read back as the value: by themselves "007" and "F" become a number and False, None True.

    An empty string would even swallow the next entry, and the backslashes of SMILES vanish.
    """
    encoded = _encoded(value)
    verbatim = value is not None and "\\" not in value and value.splitlines() == [value]
    for written in (value, encoded) if verbatim else (encoded,):
        try:
            back = key_val_str_to_dict(key_val_dict_to_str({"key": written}))["key"]
        except (KeyError, ValueError):  # ASE's parser stumbles over some quotes and words
            continue
        if type(back) is type(value) and back == value:
            return written
    return None


def _write_database(part: Path, path: Path, atoms: Iterable[Atoms]) -> int:
    count = 0
    with _transaction(part, path) as database:
        for item in atoms:
            keys, data = _row(item)
            with _explained(path):
                database.write(item, key_value_pairs=keys, data=data)
            count += 1
    return count


@contextmanager
def _transaction(part: Path, path: Path) -> Iterator[Any]:
    """Opens a database for rows that are committed together: one by one, writing takes forty times as long."""
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


def _row(atoms: Atoms) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the keys and the data of a row of a database."""
    info = _plain(atoms.info, "info")
    arrays = {name: array for name, array in atoms.arrays.items() if name not in _ASE_ARRAYS}
    own = {key: info[_PREFIX + key] for key in _KEYS if _PREFIX + key in info}
    # The same without prefix, as rows of a database have it, would be that of an earlier score.
    earlier = _SCORE_KEYS if _PREFIX + _SCORE_KEYS[0] in info else ()
    keys = {key: value for key, value in info.items() if not key.startswith(_PREFIX) and key not in earlier} | own
    data = {"info": info} | ({"arrays": _plain(arrays, "arrays")} if arrays else {})
    return {key: value for key, value in keys.items() if _is_key(key, value)}, data


def _plain(value: Any, name: str) -> Any:
    """Returns a value as plain Python and arrays of numbers, which is what ase.db and JSON know."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return value.astype(value.dtype.newbyteorder("="), copy=False)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "mMV":  # times would become bare numbers
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item, f"{name}[{key!r}]") for key, item in _named(value, name).items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float | complex) or hasattr(value, "ase_objtype"):
        return value
    if hasattr(value, "todict"):
        return _plain(value.todict(), name)
    raise ValueError(
        f"{name} = {_shown(value)}: the file would hold no {type(value).__name__}; remove it, or make it numbers and "
        "texts"
    )


def _named(values: dict[Any, Any], name: str) -> dict[str, Any]:
    """Returns a dictionary with texts as keys."""
    named = {str(key): value for key, value in values.items()}
    if len(named) < len(values):
        raise ValueError(f"{name}: two of its keys are the same as texts ({_shown(list(values))}); rename one")
    return named


def _shown(value: Any) -> str:
    """Returns the beginning of a value in one line."""
    return " ".join(repr(value).split())[:60]


def _is_key(key: str, value: Any) -> bool:
    """Whether ase.db takes an entry as a key to select by, and its rows still work with an attribute of that name."""
    from ase.db.core import check
    from ase.db.row import AtomsRow

    if key.startswith("_") or hasattr(AtomsRow, key):
        return False
    try:
        check({key: value})
    except ValueError:
        return False
    return True
