"""Builds the reference that ships with the package from the training split of QM9, and evaluates QM9 itself.

    python -m benchmarks.build_qm9_reference QM9.npz -o ase_enf/data/qm9_reference.npz

QM9.npz holds ``numbers`` (concatenated atomic numbers), ``positions`` (concatenated, Å), ``n_atoms`` and ``split`` (0
is train). The metrics of the training split itself are written to ``benchmarks/results/`` as well. They are the best
that a model of this data can reach, and correspond to the row "data" of the paper's Table 2 (99 % of atoms and 95.2 %
of molecules stable).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms

from ase_enf import metrics

RESULTS = Path(__file__).parent / "results"
SUBSET = 10_000  # as many as the paper generates: uniqueness depends on the number


def read_train(path: Path) -> list[Atoms]:
    """Returns the training split in the order of the file.

    Args:
        path: QM9 as .npz.

    Returns:
        Structures, positions in Å.
    """
    with np.load(path, allow_pickle=False) as data:
        numbers, positions = data["numbers"], data["positions"]
        ends = np.cumsum(data["n_atoms"], dtype=np.int64)
        train = np.flatnonzero(data["split"] == 0)
    starts = np.concatenate([[0], ends[:-1]])
    return [Atoms(numbers[i:j], positions[i:j]) for i, j in zip(starts[train], ends[train], strict=True)]


def write_table(whole: pd.DataFrame, subset: pd.DataFrame, folder: Path) -> None:
    """Writes the metrics of the whole split and of the subset as CSV and Markdown.

    Args:
        whole: Report on the whole training split.
        subset: Report on its first 10,000 molecules.
        folder: Folder for the two files.
    """
    first = f"first {subset.attrs['n_structures']:,} in file order"
    table = pd.concat([whole.assign(molecules="all of train"), subset.assign(molecules=first)], ignore_index=True)
    table = table[["molecules", *whole.columns]]
    table.to_csv(folder / "qm9_data_metrics.csv", index=False, float_format="%.6g")
    head = [
        "# QM9's own training split, by our metrics",
        "",
        "Command: `python -m benchmarks.build_qm9_reference QM9.npz -o ase_enf/data/qm9_reference.npz`. "
        f"RDKit {whole.attrs['rdkit']}, ASE {whole.attrs['ase']}. The paper's figures for the data (Table 2): 99 % of "
        "atoms and 95.2 % of molecules stable. No novelty: this is the reference.",
        "",
        "| molecules | metric | value | stderr | denominator | definition |",
        "|---|---|---|---|---|---|",
    ]
    rows = [
        f"| {where} | {metric} | {value:.5f} | {stderr:.5f} | {denominator} | {definition} |"
        for where, metric, value, stderr, denominator, definition in table.itertuples(index=False)
    ]
    (folder / "qm9_data_metrics.md").write_text("\n".join([*head, *rows, ""]), encoding="utf-8")


def main() -> None:
    """Reads QM9 and writes the reference, the CSV and the Markdown."""
    parser = argparse.ArgumentParser(description="Build the shipped reference of QM9's training split.")
    parser.add_argument("qm9", type=Path, help="QM9 as .npz")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the reference to write, .npz")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the metrics of the data")
    options = parser.parse_args()
    atoms = read_train(options.qm9)
    seen = metrics.survey(atoms)
    reference = metrics.as_reference(seen)._replace(name="QM9 train split")
    metrics.write_reference(reference, options.output)
    subset = metrics.evaluate(atoms[:SUBSET])
    options.results.mkdir(parents=True, exist_ok=True)
    write_table(metrics.evaluate(seen), subset, options.results)


if __name__ == "__main__":
    main()
