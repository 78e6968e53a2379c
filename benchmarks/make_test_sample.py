"""Draws the sample of QM9 that the tests use.

python -m benchmarks.make_test_sample QM9.npz -o tests/data/qm9_sample.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ase_enf.data.compact import SPLITS, MoleculeTable, read_npz, write_npz

SIZES = {"train": 400, "valid": 100, "test": 100}


def draw(table: MoleculeTable, seed: int = 0) -> MoleculeTable:
    """Draws molecules without replacement from each split.

    Args:
        table: QM9, with ``split``.
        seed: Seed of the draw, which alone determines the sample.

    Returns:
        400 molecules of train, 100 of valid and 100 of test, in the order of the table.
    """
    generator = np.random.default_rng(seed)
    rows = np.concatenate(
        [
            generator.choice(np.flatnonzero(table.split == code), SIZES[name], replace=False)
            for code, name in enumerate(SPLITS)
        ]
    )
    return take(table, np.sort(rows))


def take(table: MoleculeTable, rows: np.ndarray) -> MoleculeTable:
    """Returns the molecules of a table at given rows, shape (K,), in that order."""
    starts = np.cumsum(table.n_atoms, dtype=np.int64) - table.n_atoms
    atoms = np.concatenate([np.arange(starts[row], starts[row] + table.n_atoms[row]) for row in rows])
    return MoleculeTable(
        table.numbers[atoms],
        table.positions[atoms],
        *(None if column is None else column[rows] for column in table[2:]),
    )


def main() -> None:
    """Reads the source, draws the sample and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="QM9 as .npz, with its split")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the sample to write (.npz)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    arguments = parser.parse_args()
    write_npz(draw(read_npz(arguments.source), arguments.seed), arguments.output)


if __name__ == "__main__":
    main()
