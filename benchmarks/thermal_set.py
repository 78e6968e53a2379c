"""A thermal set of many molecules: ``python -m benchmarks.thermal_set QM9.npz FOLDER [--molecules 30000]``.

Molecules are drawn at random from the training and the validation split of QM9, for the training and the validation
set; molecules of the test split are never among them. Each is displaced twice about its published geometry as at 300 K
(``ase_enf.data.displaced``: Hamiltonian Monte Carlo on MMFF94 with the forces of GFN2-xTB at that geometry). Writes
``FOLDER/thermal.npz`` in the compact format and prints the cost; finished pieces in FOLDER are reused.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorSetupError
from tqdm import tqdm

from ase_enf.atoms.files import atomic_write
from ase_enf.chem.mmff import MMFF94
from ase_enf.data import DataError
from ase_enf.data.compact import MoleculeTable, from_atoms, read_npz
from ase_enf.data.displaced import displaced
from ase_enf.ensemble.calculators import calculator

TEMPERATURE = 300.0  # K
EACH = 2  # structures of a molecule
PIECE = 500
TRAIN, VALID = 0, 1


class Piece(NamedTuple):
    """Result for some molecules."""

    table: MoleculeTable
    left_out: int
    seconds: float  # of the processor


def main() -> None:
    """Makes the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="QM9 in the compact form, with its split")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--molecules", type=int, default=30_000)
    parser.add_argument("--valid", type=int, default=500)
    parser.add_argument("--calculator", default="gfn2")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    molecules = read_npz(options.data)
    if molecules.split is None:
        raise SystemExit(f"{options.data}: has no split, so that test molecules cannot be kept out")
    rows = chosen(molecules, VALID, options.valid) + chosen(molecules, TRAIN, options.molecules)
    pieces: list[Piece] = []
    for start in tqdm(range(0, len(rows), PIECE), unit="piece", dynamic_ncols=True):
        part = rows[start : start + PIECE]
        path = options.folder / f"piece_{start:06d}_{len(part)}.npz"
        if not path.exists():
            save(piece(molecules, part, options.calculator), path)
        pieces.append(load(path))
        joined = join([found.table for found in pieces])
        with atomic_write(options.folder / "thermal.npz") as handle:
            handle.write(packed(joined))
    left_out, seconds = sum(found.left_out for found in pieces), sum(found.seconds for found in pieces)
    train = int((joined.split == TRAIN).sum())
    print(
        f"{train} structures for training, {len(joined.n_atoms) - train} for validation, of {len(rows) - left_out} "
        f"molecules; {left_out} of {len(rows)} left out (no parameters, or refused); {seconds:.0f} s of one core"
    )


def chosen(molecules: MoleculeTable, split: int, count: int) -> list[int]:
    """Returns rows of a split in a random order; a smaller number gives the first of a larger one."""
    rows = np.flatnonzero(molecules.split == split)
    return np.random.default_rng(split).permutation(rows)[:count].tolist()


def piece(molecules: MoleculeTable, rows: list[int], method: str) -> Piece:
    """Displaces some molecules, leaving out those that MMFF94 or the other method cannot describe."""
    frames: list[Atoms] = []
    splits: list[int] = []
    left_out, start = 0, time.process_time()
    for row, atoms in zip(rows, molecules.to_atoms(rows), strict=True):
        try:
            found = displaced(atoms, forces(atoms, method), TEMPERATURE, EACH, seed=row)
        except (DataError, CalculatorSetupError, RuntimeError, ValueError):
            left_out += 1
            continue
        for frame in found:
            frame.info = {key: atoms.info[key] for key in ("qm9_index",) if key in atoms.info}
        frames += found
        splits += [int(molecules.split[row])] * len(found)
    return Piece(from_atoms(frames, splits), left_out, time.process_time() - start)


def forces(atoms: Atoms, method: str) -> np.ndarray:
    """Returns the forces of a method, eV/Å, after checking that MMFF94, which is cheaper, can describe the molecule."""
    MMFF94(atoms).surface(atoms.positions)
    here = atoms.copy()
    here.calc = calculator(method, here)
    return here.get_forces()


def packed(table: MoleculeTable) -> bytes:
    """Returns the bytes of a compact file with everything that training needs."""
    buffer = io.BytesIO()
    known = {name: value for name, value in table._asdict().items() if value is not None}
    np.savez_compressed(buffer, **known)
    return buffer.getvalue()


def save(found: Piece, path: Path) -> None:
    """Saves a piece."""
    buffer = io.BytesIO()
    known = {name: value for name, value in found.table._asdict().items() if value is not None}
    np.savez(buffer, **known, left_out=found.left_out, seconds=found.seconds)
    with atomic_write(path) as handle:
        handle.write(buffer.getvalue())


def load(path: Path) -> Piece:
    """Reads a piece."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    left_out, seconds = int(arrays.pop("left_out")), float(arrays.pop("seconds"))
    return Piece(MoleculeTable(**arrays), left_out, seconds)


def join(tables: list[MoleculeTable]) -> MoleculeTable:
    """Joins tables."""
    columns = [None if column[0] is None else np.concatenate(column) for column in zip(*tables, strict=True)]
    return MoleculeTable(*columns)


if __name__ == "__main__":
    main()
