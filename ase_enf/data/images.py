"""All structures of any file that ASE reads, with all of their entries; or one line that says why that fails."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from ase_enf.atoms.files import brief
from ase_enf.atoms.rows import SQLITE
from ase_enf.data import DataError

if TYPE_CHECKING:
    from ase.db.row import AtomsRow

RECORDS = (".mol", ".sdf")
"""Endings of files of which ASE reads only the first molecule."""


def read_images(source: Path) -> Iterator[Atoms]:
    """Yields all structures of a file that ASE reads, in its order.

    Args:
        source: The file; for a database, its keys and data, which ``ase.io.read`` would drop, are in ``info``.

    Yields:
        The structures, as ASE reads them.

    Raises:
        DataError: If the file is damaged, or its format is not one that ASE reads.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Atoms("He").write(f"{folder}/he.xyz")
        ...     [str(atoms.symbols) for atoms in read_images(Path(f"{folder}/he.xyz"))]
        ['He']
    """
    yield from _database_images(source) if source.suffix == ".db" else _file_images(source)


def _file_images(source: Path) -> Iterator[Atoms]:
    """Yields all structures of a file that ``ase.io`` reads."""
    from ase.io import iread
    from ase.io.formats import filetype, get_compression

    try:
        root, _ = get_compression(str(source))
        if Path(root).suffix.lower() in RECORDS:
            yield from _record_images(source)
        elif filetype(str(source)) == "extxyz":
            yield from _xyz_images(source)
        else:
            yield from iread(source, index=":", do_not_split_by_at_sign=True)
    except DataError:
        raise
    except Exception as error:  # ASE's readers have many kinds of errors for damaged files
        raise DataError(
            f"{source}: ASE cannot read it to the end ({brief(error)}); give a whole file that ASE reads, a folder or "
            "archive of raw files, or an .npz"
        ) from error


def _record_images(source: Path) -> Iterator[Atoms]:
    """Yields all records of an SDF or MOL file; ASE silently reads only the first."""
    from ase.io import read
    from ase.io.formats import open_with_compression

    with open_with_compression(str(source)) as handle:
        records = re.split(r"^\$\$\$\$[^\n]*\n?", handle.read(), flags=re.MULTILINE)
    for number, record in enumerate(records if records[-1].strip() else records[:-1], start=1):
        if len(re.findall(r"^M  END", record, re.MULTILINE)) > 1:
            raise DataError(f"{source}: record {number} holds several molecules; divide them by lines of $$$$")
        atoms = read(io.StringIO(record), format="sdf")
        if not len(atoms):  # ASE's result for V3000
            raise DataError(f"{source}: record {number} holds no atoms that ASE reads; write it as V2000")
        yield atoms


def _xyz_images(source: Path) -> Iterator[Atoms]:
    """Yields the structures of an extended xyz file."""
    from ase.io import read
    from ase.io.formats import open_with_compression

    with open_with_compression(str(source)) as handle:
        for frame in _frames(handle, source):
            yield read(io.StringIO(frame), format="extxyz")


def _frames(lines: Iterator[str], source: Path) -> Iterator[str]:
    """Yields the text of each structure of an xyz file; ASE would stop at a blank line between two."""
    frame: list[str] = []
    number, missing = -1, 0  # structures are counted from zero, as ase.io.read does
    for line in lines:
        if missing:
            frame.append(line)
            missing -= 1
        elif frame and line.lstrip().startswith("VEC"):  # rows of the cell, which follow the atoms
            frame.append(line)
        elif line.strip():
            if frame:
                yield "".join(frame)
            number += 1
            frame, missing = [line], _n_atoms(line, number, source) + 1  # and the comment line
    if frame:
        yield "".join(frame)


def _n_atoms(line: str, number: int, source: Path) -> int:
    """Returns the number of atoms, with which a structure of an xyz file begins."""
    if not re.fullmatch(r"\d+", line.strip()):
        raise DataError(
            f"{source}: structure {number} must open with its number of atoms, found {line.strip()[:60]!r}; "
            "correct or remove it"
        )
    return int(line)


def _database_images(source: Path) -> Iterator[Atoms]:
    """Yields all structures of an ASE database, with the keys and the data that ``ase.io.read`` drops."""
    from ase.db import connect

    with source.open("rb") as handle:
        if handle.read(len(SQLITE)) != SQLITE:  # connect would turn an empty file into a database
            raise DataError(f"{source}: is no ASE database; give one, or name the file by its format")
    try:
        with connect(source) as database:
            for row in database.select():
                atoms = row.toatoms()
                rest = dict(row.data)
                info = rest.pop("info", {})
                if _are_arrays(rest.get("arrays"), len(atoms)):
                    for name, array in rest.pop("arrays").items():
                        atoms.set_array(name, np.array(array))
                atoms.info |= {**info, **rest, **_own_keys(row, info)}
                yield atoms
    except Exception as error:  # sqlite's errors, and ASE's for a table that is not its own
        raise DataError(f"{source}: cannot be read as an ASE database ({brief(error)}); write it again") from error


def _own_keys(row: AtomsRow, info: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a row as they were written, without those that ``info`` has already.

    ASE computes properties such as ``row.charge``, which hide a key of the same name. Where ``ase_enf.atoms.rows`` made
    a key from an entry ``enf_...``, the entry is kept and the key left out.
    """
    keys = {key: vars(row)[key] for key in row.key_value_pairs}
    return {
        key: value
        for key, value in keys.items()
        if f"enf_{key}" not in info and not (key in info and np.array_equal(info[key], value))
    }


def _are_arrays(value: Any, n: int) -> bool:
    """Whether an entry of a row's data has the form that ``ase_enf.atoms.rows`` gives it: arrays of n atoms by name."""
    return isinstance(value, dict) and all(
        isinstance(array, list | np.ndarray) and len(array) == n for array in value.values()
    )
