"""A thermal set of many molecules: ``python -m benchmarks.thermal_set QM9.npz FOLDER [--molecules 30000]``.

Molecules are drawn at random from the training and the validation split of QM9, for the training and the validation
set; molecules of the test split are never among them. Minima of each are found (``benchmarks.thermal_wells``) and
drawn with their populations at 300 K; about each that is drawn the molecule is displaced (``ase_enf.data.displaced``:
Hamiltonian Monte Carlo on MMFF94 with the forces of GFN2-xTB there). With ``--attempts 0`` it is displaced about its
published geometry. Writes ``FOLDER/thermal.npz`` in the compact format and prints the cost; finished pieces in FOLDER
are reused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
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
from benchmarks.thermal_wells import populations, wells

TEMPERATURE = 300.0  # K
EACH = 3  # structures of a molecule
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
    parser.add_argument("--attempts", type=int, default=12, help="embedded conformers of a molecule")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    molecules = read_npz(options.data)
    if molecules.split is None:
        raise SystemExit(f"{options.data}: has no split, so that test molecules cannot be kept out")
    rows = chosen(molecules, VALID, options.valid) + chosen(molecules, TRAIN, options.molecules)
    parts = [rows[start : start + PIECE] for start in range(0, len(rows), PIECE)]
    tasks = [
        (
            part,
            options.data,
            options.folder / f"piece_{k * PIECE:06d}_{len(part)}.npz",
            options.calculator,
            options.attempts,
        )
        for k, part in enumerate(parts)
    ]
    pieces: list[Piece] = []
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        parallel = stack.enter_context(context.Pool(options.processes)).imap if options.processes > 1 else map
        for path in tqdm(parallel(make, tasks), total=len(tasks), unit="piece", dynamic_ncols=True):
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


def make(task: tuple[list[int], str, Path, str, int]) -> Path:
    """Makes and saves a piece, unless its file exists."""
    rows, data, path, method, attempts = task
    if not path.exists():
        save(piece(read_npz(data), rows, method, attempts), path)
    return path


def piece(molecules: MoleculeTable, rows: list[int], method: str, attempts: int) -> Piece:
    """Displaces some molecules, leaving out those that MMFF94 or the other method cannot describe."""
    frames: list[Atoms] = []
    splits: list[int] = []
    left_out, start = 0, time.process_time()
    for row, atoms in zip(rows, molecules.to_atoms(rows), strict=True):
        try:
            found = drawn(atoms, method, attempts, row) if attempts else about(atoms, method, row)
        except (DataError, CalculatorSetupError, RuntimeError, ValueError):
            left_out += 1
            continue
        for frame in found:
            frame.info = {key: atoms.info[key] for key in ("qm9_index",) if key in atoms.info}
        frames += found
        splits += [int(molecules.split[row])] * len(found)
    return Piece(from_atoms(frames, splits), left_out, time.process_time() - start)


def about(atoms: Atoms, method: str, seed: int) -> list[Atoms]:
    """Returns structures displaced about the geometry of a molecule."""
    return displaced(atoms, forces(atoms, method), TEMPERATURE, EACH, seed=seed)


def drawn(atoms: Atoms, method: str, attempts: int, seed: int) -> list[Atoms]:
    """Returns structures displaced about minima that are drawn with their populations."""
    found = wells(atoms, method, TEMPERATURE, attempts, seed)
    if not found:
        raise DataError(f"{atoms.symbols}: no minimum by {method} was found")
    counts = np.random.default_rng(seed).multinomial(EACH, populations(found, TEMPERATURE))
    return [
        frame
        for well, count in zip(found, counts, strict=True)
        if count
        for frame in displaced(well.atoms, well.forces, TEMPERATURE, int(count), seed=seed)
    ]


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
