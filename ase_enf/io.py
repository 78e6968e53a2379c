"""Structures to files, with their provenance, by the file's ending."""

from __future__ import annotations

import functools
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import write
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict
from ase.io.formats import UnknownFileTypeError, filetype, ioformats

from ase_enf.files import require_folder

# What of ours ase.db can select by; everything else of ours is in the row's data alone.
_KEYS = ("log_likelihood", "log_likelihood_stderr", "log_likelihood_kind", "seed", "index")
_PREFIX = "enf_"
_STREAMED = (".extxyz", ".xyz")
KEEP_INFO = (*_STREAMED, ".db", ".traj")
"""Endings whose formats keep ``info``."""


def check_output(path: str | os.PathLike[str], count: int = 1) -> Path:
    """Returns ``path`` if structures can be written there, before anything is computed for it.

    Raises:
        FileNotFoundError: If its folder does not exist.
        ValueError: If ASE does not know its ending, or cannot write that format.

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
    if known.single and count > 1:
        raise ValueError(f"{path}: the format {known.name} holds one structure, not {count}; use .extxyz or .db")
    if not known.can_write:
        raise ValueError(
            f"{path}: ASE reads the format {known.name} of that ending but cannot write it; use .extxyz or .db"
        )
    return path


def keeps_info(path: str | os.PathLike[str]) -> bool:
    """Whether the format of a file's ending, compressed or not, keeps ``info``.

    Example:
        >>> keeps_info("m.extxyz.gz"), keeps_info("m.pdb")
        (True, False)
    """
    return _ending(Path(path)) in KEEP_INFO


def _ending(path: Path) -> str:
    """Returns the ending that names the format, below that of a compression."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".bz2", ".xz") else path.suffix


def write_structures(path: str | os.PathLike[str], atoms: Iterable[Atoms]) -> int:
    """Writes structures in the format of the file's ending; the file appears when it is complete.

    ``.extxyz`` (and ``.xyz``, in the same extended format) keeps ``info`` and is written as the structures come.
    ``.db`` becomes an ASE database whose rows have ``log_likelihood`` and its companions as keys, the other entries of
    ``info`` that can be keys as well, and all of ``info`` in ``data["info"]``. Any other ending goes to
    ``ase.io.write``; all but ``.traj`` drop ``info``, with a warning.

    Args:
        path: Where to; an existing file is replaced.
        atoms: Structures, possibly a generator.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If ASE does not know the ending, or extended xyz cannot hold an entry of ``info``.

    Warns:
        UserWarning: If the format keeps no ``info``.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_structures(f"{folder}/two.extxyz", [molecule("H2O"), molecule("CH4")])
        2
    """
    path = check_output(path)
    with _whole(path) as part:
        if path.suffix == ".db":
            return _write_database(part, atoms)
        if path.suffix in _STREAMED:
            return _write_stream(part, atoms)
        many = [_storable(item) for item in atoms] if _ending(path) in _STREAMED else list(atoms)
        if not keeps_info(path) and any(item.info for item in many):
            warnings.warn(
                f"{path}: this format keeps no info (seed, model, scores …); use {', '.join(KEEP_INFO)} to keep it",
                stacklevel=2,
            )
        write(part, many)
        return len(many)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path of the same endings, renamed at the end."""
    part = path.with_name(f".{uuid.uuid4().hex}.{path.name}")  # the whole name: the format of m.extxyz.gz is in it
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_stream(path: Path, atoms: Iterable[Atoms]) -> int:
    count = 0
    with open(path, "w") as handle:
        for item in atoms:
            write(handle, _storable(item), format="extxyz")
            count += 1
        handle.flush()
        os.fsync(handle.fileno())
    return count


def _storable(atoms: Atoms) -> Atoms:
    """Returns what extended xyz reads back as these atoms: a copy where its texts would change."""
    info = {key: _quoted(key, value) for key, value in atoms.info.items()}
    if all(info[key] is value for key, value in atoms.info.items()):
        return atoms
    copy = atoms.copy()
    copy.info, copy.calc = info, atoms.calc
    return copy


def _quoted(key: str, value: Any) -> Any:
    """Returns what extended xyz reads back as the value."""
    if not (value is None or isinstance(value, str)):
        return value
    if (written := _read_back(value)) is None:
        raise ValueError(f"info[{key!r}] = {value!r}: extended xyz cannot hold it; remove it, or write .db or .traj")
    return written


@functools.lru_cache(maxsize=4096)  # most molecules of a file say the same
def _read_back(value: str | None) -> str | None:
    """Returns a text that is read back as the value: by themselves "007" and "F" become a number and False, None True.

    An empty string would even swallow the next entry, and the backslashes of SMILES vanish.
    """
    encoded = f"_JSON {json.dumps(value)}".replace("\\", "\\\\")
    for written in (encoded,) if value is None or "\\" in value else (value, encoded):
        try:
            back = key_val_str_to_dict(key_val_dict_to_str({"key": written}))["key"]
        except (KeyError, ValueError):  # ASE's parser stumbles over some quotes and words
            continue
        if type(back) is type(value) and back == value:
            return written
    return None


def _write_database(path: Path, atoms: Iterable[Atoms]) -> int:
    from ase.db import connect

    count = 0
    with connect(path) as database:  # one transaction: row by row it is forty times slower
        for item in atoms:
            keys = {
                key: value for key, value in item.info.items() if not key.startswith(_PREFIX) and _is_key(key, value)
            }
            keys |= {key: item.info[_PREFIX + key] for key in _KEYS if _PREFIX + key in item.info}
            database.write(item, key_value_pairs=keys, data={"info": dict(item.info)})
            count += 1
    return count


def _is_key(key: str, value: Any) -> bool:
    """Whether ase.db takes an entry as a key to select by."""
    from ase.db.core import check

    try:
        check({key: value})
    except ValueError:
        return False
    return True
