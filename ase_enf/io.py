"""Structures to files, with their provenance, by the file's ending."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ase import Atoms
from ase.io import write
from ase.io.formats import UnknownFileTypeError, filetype, ioformats

from ase_enf.files import require_folder

# What ase.db can select by; everything else of ours goes into the row's data.
_KEYS = ("log_likelihood", "log_likelihood_stderr", "log_likelihood_kind", "seed", "index")
_STREAMED = (".extxyz", ".xyz")


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


def write_structures(path: str | os.PathLike[str], atoms: Iterable[Atoms]) -> int:
    """Writes structures in the format of the file's ending; the file appears when it is complete.

    ``.extxyz`` (and ``.xyz``, in the same extended format) keeps ``info`` and is written as the structures come.
    ``.db`` becomes an ASE database whose rows have ``log_likelihood`` and its companions as keys and all of ``info``
    in ``data["info"]``. Any other ending goes to ``ase.io.write``, which may drop ``info``.

    Args:
        path: Where to; an existing file is replaced.
        atoms: Structures, possibly a generator.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If ASE does not know the ending.

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
        many = list(atoms)
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
            write(handle, item, format="extxyz")
            count += 1
        handle.flush()
        os.fsync(handle.fileno())
    return count


def _write_database(path: Path, atoms: Iterable[Atoms]) -> int:
    from ase.db import connect

    count = 0
    with connect(path) as database:  # one transaction: row by row it is forty times slower
        for item in atoms:
            keys = {key: item.info[f"enf_{key}"] for key in _KEYS if f"enf_{key}" in item.info}
            database.write(item, key_value_pairs=keys, data={"info": dict(item.info)})
            count += 1
    return count
