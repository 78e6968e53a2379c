"""Structures of any file that ASE reads: all of them, with all of their entries, or one clear line about the file."""

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
"""Endings of files of which ASE reads the first molecule alone."""


def read_images(source: Path) -> Iterator[Atoms]:
    """Yields all structures of a file that ASE reads, in its order.

    Args:
        source: The file; a database keeps what ``ase.io.read`` would leave behind, its keys and data, in ``info``.

    Yields:
        The structures, as ASE gives them.

    Raises:
        DataError: The file is damaged or of no kind that ASE reads.

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
    except Exception as error:  # each of ASE's readers has its own errors for a damaged file
        raise DataError(
            f"{source}: ASE cannot read it to the end ({brief(error)}); give a whole file that ASE reads, a folder or "
            "archive of raw files, or an .npz"
        ) from error


def _record_images(source: Path) -> Iterator[Atoms]:
    """Yields the records of an SDF or MOL file, of which ASE takes the first and says nothing of the others."""
    from ase.io import read
    from ase.io.formats import open_with_compression

    with open_with_compression(str(source)) as handle:
        records = re.split(r"^\$\$\$\$[^\n]*\n?", handle.read(), flags=re.MULTILINE)
    for number, record in enumerate(records if records[-1].strip() else records[:-1], start=1):
        if len(re.findall(r"^M  END", record, re.MULTILINE)) > 1:
            raise DataError(f"{source}: record {number} holds several molecules; divide them by lines of $$$$")
        atoms = read(io.StringIO(record), format="sdf")
        if not len(atoms):  # what ASE makes of V3000
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
    """Yields the texts of the structures of an xyz file; at a blank line between two, ASE takes the file to be over."""
    frame: list[str] = []
    number, missing = 0, 0
    for line in lines:
        if missing:
            frame.append(line)
            missing -= 1
        elif frame and line.lstrip().startswith("VEC"):  # rows of the cell, after the atoms
            frame.append(line)
        elif line.strip():
            if frame:
                yield "".join(frame)
            number += 1
            frame, missing = [line], _n_atoms(line, number, source) + 1  # with the comment
    if frame:
        yield "".join(frame)


def _n_atoms(line: str, number: int, source: Path) -> int:
    """Returns the number of atoms that opens a structure of an xyz file."""
    if not re.fullmatch(r"\d+", line.strip()):
        raise DataError(
            f"{source}: structure {number} must open with its number of atoms, found {line.strip()[:60]!r}; "
            "correct or remove it"
        )
    return int(line)


def _database_images(source: Path) -> Iterator[Atoms]:
    """Yields all structures of an ASE database, with the keys and the data that ``ase.io.read`` leaves behind."""
    from ase.db import connect

    with source.open("rb") as handle:
        if handle.read(len(SQLITE)) != SQLITE:  # connect would make a database of an empty file
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
    """Returns the keys of a row as they were written, without those that ``info`` holds already.

    ASE computes properties such as ``row.charge``, which hide a key of that name. A key that ``ase_enf.atoms.rows``
    made of an entry ``enf_...`` is left out for that entry.
    """
    keys = {key: vars(row)[key] for key in row.key_value_pairs}
    return {
        key: value
        for key, value in keys.items()
        if f"enf_{key}" not in info and not (key in info and np.array_equal(info[key], value))
    }


def _are_arrays(value: Any, n: int) -> bool:
    """Whether an entry of a row's data is what ``ase_enf.atoms.rows`` puts there: arrays of n atoms by name."""
    return isinstance(value, dict) and all(
        isinstance(array, list | np.ndarray) and len(array) == n for array in value.values()
    )
