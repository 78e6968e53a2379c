"""The compact form of many small molecules: concatenated arrays in one ``.npz``, a dozen times faster than raw files.

==============  ===========  ========================================================================
array           shape        meaning
==============  ===========  ========================================================================
``numbers``     (N,)         atomic numbers of all molecules, concatenated, 0 for "X"; N = Σ ``n_atoms``
``positions``   (N, 3)       their positions, Å, float32
``n_atoms``     (B,)         atoms in each molecule
``gdb_index``   (B,)         optional: 1-based number in GDB-9, ``info["qm9_index"]``
``split``       (B,)         optional: 0 train, 1 valid, 2 test, 3 excluded
``smiles``      (B,)         optional: SMILES as published, ``info["qm9_smiles"]``
``mu``, ...     (B,) each    optional: ``mu``, ``alpha``, ``homo``, ``lumo``, ``gap``, ``Cv`` as published, orbital
                             energies in Hartree; in ``info`` of these names in the units of
                             ``ase_enf.data.properties``
==============  ===========  ========================================================================

The last six may also be in a file beside it, whose name ends in ``_properties.npz``, with their own ``gdb_index``.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from ase_enf.atoms.files import atomic_write, brief
from ase_enf.data import DataError, DataNotFoundError
from ase_enf.data.properties import UNITS, from_published, property_table, to_published

SPLITS = ("train", "valid", "test")
"""Names of the codes 0, 1 and 2 of a split; code 3 marks the excluded molecules."""

EXCLUDED = 3

_REQUIRED = ("numbers", "positions", "n_atoms")
_KINDS = {"numbers": "iu", "positions": "f", "n_atoms": "iu", "gdb_index": "iu", "split": "iu", "smiles": "U"}
_KINDS |= dict.fromkeys(UNITS, "f")
_BESIDE = "_properties.npz"


class MoleculeTable(NamedTuple):
    """B molecules with N atoms in all, in the layout of the module's table."""

    numbers: NDArray[np.uint8]  # (N,)
    positions: NDArray[np.float32]  # (N, 3), Å
    n_atoms: NDArray[np.int16]  # (B,)
    gdb_index: NDArray[np.int32] | None = None  # (B,)
    split: NDArray[np.uint8] | None = None  # (B,)
    smiles: NDArray[np.str_] | None = None  # (B,)
    mu: NDArray[np.float32] | None = None  # (B,) as all that follow, in published units
    alpha: NDArray[np.float32] | None = None
    homo: NDArray[np.float32] | None = None
    lumo: NDArray[np.float32] | None = None
    gap: NDArray[np.float32] | None = None
    Cv: NDArray[np.float32] | None = None

    def to_atoms(self, rows: Iterable[int] | None = None) -> list[Atoms]:
        """Returns molecules as ``Atoms``.

        Args:
            rows: Indices of the molecules, in the wanted order; by default all of them.

        Returns:
            Non-periodic molecules with ``info["qm9_index"]``, ``info["qm9_smiles"]`` and the properties, where the
            table has them.

        Example:
            >>> table = MoleculeTable(np.array([1, 1, 2]), np.zeros((3, 3)), np.array([2, 1]), np.array([7, 8]))
            >>> [(atoms.symbols.get_chemical_formula(), atoms.info) for atoms in table.to_atoms([1, 0])]
            [('He', {'qm9_index': 8}), ('H2', {'qm9_index': 7})]
        """
        stops = np.cumsum(self.n_atoms, dtype=np.int64)
        starts = stops - self.n_atoms
        positions = self.positions.astype(float)
        return [
            Atoms(
                numbers=self.numbers[starts[row] : stops[row]],
                positions=positions[starts[row] : stops[row]],
                info=self._info(row),
            )
            for row in (range(len(self.n_atoms)) if rows is None else rows)
        ]

    def _info(self, row: int) -> dict[str, Any]:
        """Returns what the table knows about a molecule besides its atoms, as plain Python values."""
        info: dict[str, Any] = {}
        if self.gdb_index is not None:
            info["qm9_index"] = int(self.gdb_index[row])
        if self.smiles is not None and self.smiles[row]:
            info["qm9_smiles"] = str(self.smiles[row])
        columns = ((name, getattr(self, name)) for name in UNITS)
        return info | {name: from_published(name, column[row]) for name, column in columns if column is not None}


def from_atoms(atoms: Sequence[Atoms], split: str | Sequence[int] | None = None) -> MoleculeTable:
    """Packs molecules into a table.

    Args:
        atoms: Non-periodic molecules; positions in Å are rounded to float32.
        split: The split that all of them belong to, or a code for each.

    Returns:
        The table, with indices and SMILES if every molecule has them in its ``info``.

    Raises:
        DataError: If a molecule is periodic or of unknown elements, or the split is unknown or of another length.

    Example:
        >>> table = from_atoms([Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), Atoms("He")], split="valid")
        >>> table.n_atoms.tolist(), table.split.tolist(), table.gdb_index
        ([2, 1], [1, 1], None)
    """
    for row, molecule in enumerate(atoms):
        # First, because the symbols of an unknown element raise an IndexError.
        _check_elements(molecule.numbers, f"molecule {row}")
        if molecule.pbc.any():
            raise DataError(f"molecule {row} ({molecule.symbols}) is periodic: the compact form has no cell")
    return MoleculeTable(
        numbers=np.array([z for molecule in atoms for z in molecule.numbers], dtype=np.uint8),
        positions=np.concatenate([np.zeros((0, 3)), *(molecule.positions for molecule in atoms)]).astype(np.float32),
        n_atoms=np.array([len(molecule) for molecule in atoms], dtype=np.int16),
        gdb_index=_info_column(atoms, "qm9_index", np.int32),
        split=_codes(split, len(atoms)),
        smiles=_info_column(atoms, "qm9_smiles", np.str_),
        **_property_columns(atoms),
    )


def read_npz(path: str | Path) -> MoleculeTable:
    """Reads a compact file.

    Args:
        path: The ``.npz``.

    Returns:
        Its table, with the properties of a file beside it; unknown arrays are ignored.

    Raises:
        DataNotFoundError: If there is no such file.
        DataError: If the file is cut short, damaged, of another layout, or inconsistent.

    Example:
        >>> read_npz("tests/data/qm9_sample.npz").n_atoms.shape
        (600,)
    """
    try:
        # Opened here, because numpy does not close its own handle if the file is damaged.
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in MoleculeTable._fields if name in archive.files}
    except FileNotFoundError as error:
        raise DataNotFoundError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, TypeError) as error:
        # TypeError: a bare .npy array under this name is no context manager.
        raise DataError(f"{path}: cannot be read as .npz, truncated or damaged? ({brief(error)})") from error
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise DataError(f"{path}: holds no {', '.join(missing)}; a compact file needs {', '.join(_REQUIRED)}")
    table = _checked(MoleculeTable(**arrays), str(path))
    beside = Path(path).with_name(Path(path).stem + _BESIDE)
    return _joined(table, beside) if table.gdb_index is not None and table.gap is None and beside.is_file() else table


def _joined(table: MoleculeTable, beside: Path) -> MoleculeTable:
    """Returns a table with the properties of its molecules from another file, NaN where that file has none."""
    try:
        with open(beside, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("gdb_index", *UNITS) if name in archive.files}
        known = arrays.pop("gdb_index")
        order = np.argsort(known)
        place = order[np.minimum(np.searchsorted(known, table.gdb_index, sorter=order), len(order) - 1)]
        found = known[place] == table.gdb_index
        columns = {name: np.where(found, column[place], np.nan).astype(np.float32) for name, column in arrays.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{beside}: is no table of properties by gdb_index ({brief(error)}); repair or remove it"
        ) from error
    return table._replace(**columns)


def write_npz(table: MoleculeTable, path: str | Path, **extra: Any) -> None:
    """Writes a compact file, which appears only when it is complete.

    Args:
        table: The molecules.
        path: The ``.npz`` to write or to replace.
        **extra: Further arrays to store with the table.

    Raises:
        DataError: If the table is inconsistent.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_npz(from_atoms([Atoms("He")]), f"{folder}/he.npz")
        ...     read_npz(f"{folder}/he.npz").numbers.tolist()
        [2]
    """
    arrays = {name: value for name, value in _checked(table, "table")._asdict().items() if value is not None}
    if table.split is not None:
        arrays["split_names"] = np.array(SPLITS)
    with atomic_write(path) as handle:
        np.savez_compressed(handle, **arrays, **extra)


def _checked(table: MoleculeTable, name: str) -> MoleculeTable:
    """Returns the table, after checking that its arrays fit together."""
    n, molecules = int(table.n_atoms.sum()), len(table.n_atoms)
    shapes = dict.fromkeys(table._fields, (molecules,)) | {"numbers": (n,), "positions": (n, 3)}
    for field, array in table._asdict().items():
        shape = shapes[field]
        if array is not None and array.shape != shape:
            raise DataError(f"{name}: {field} has shape {array.shape}, but n_atoms asks for {shape}")
        if array is not None and array.dtype.kind not in _KINDS[field]:
            raise DataError(f"{name}: {field} holds {array.dtype}, which is no {field}")
    _check_elements(table.numbers, name)
    if molecules and table.n_atoms.min() < 1:
        raise DataError(f"{name}: n_atoms holds {table.n_atoms.min()}; every molecule needs an atom")
    if not np.isfinite(table.positions).all():
        raise DataError(f"{name}: positions hold values that are not finite")
    return table


def _check_elements(numbers: NDArray[np.integer], name: str) -> None:
    """Raises for atomic numbers that are no element; 0 ("X") is that of particles in models without elements."""
    unknown = numbers[(numbers < 0) | (numbers >= len(chemical_symbols))]
    if len(unknown):
        elements = len(chemical_symbols) - 1
        raise DataError(
            f"{name}: numbers holds {unknown[0]}, which is no element; give 1 to {elements}, 0 for particles"
        )


def _codes(split: str | Sequence[int] | None, n: int) -> NDArray[np.uint8] | None:
    """Returns a split's code for each of n molecules."""
    if split is None:
        return None
    if isinstance(split, str):
        if split not in SPLITS:
            raise DataError(f"split {split!r} is none of {', '.join(SPLITS)}")
        return np.full(n, SPLITS.index(split), dtype=np.uint8)
    codes = np.asarray(split)
    if codes.shape != (n,) or not np.isin(codes, range(EXCLUDED + 1)).all():
        raise DataError(f"split must give one code of 0 to {EXCLUDED} for each of the {n} molecules")
    return codes.astype(np.uint8)


def _property_columns(atoms: Sequence[Atoms]) -> dict[str, NDArray[np.float32]]:
    """Returns the properties that every molecule has, in published units."""
    values = property_table(atoms, tuple(UNITS))
    return {
        name: to_published(name, column).astype(np.float32)
        for name, column in zip(UNITS, values.T, strict=True)
        if len(atoms) and np.isfinite(column).all()
    }


def _info_column(atoms: Sequence[Atoms], key: str, dtype: type) -> NDArray[Any] | None:
    """Returns an entry of the ``info`` of all molecules; None unless every molecule has it."""
    if not atoms or any(key not in molecule.info for molecule in atoms):
        return None
    return np.array([molecule.info[key] for molecule in atoms], dtype=dtype)
