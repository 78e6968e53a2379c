"""Effective sample size of a flow of thermal structures at 300 K: python -m benchmarks.models.thermal_weights MODEL

Molecules of the test split of QM9, in a random order, are drawn from a flow of molecular graphs and weighted for the
Boltzmann distribution of GFN2-xTB (tblite), which the flow was never told. Draws with other bonds than those of the
graph have no weight. Writes ``results/thermal_weights_MODEL``; each molecule is saved in ``--work``.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms

import ase_enf
from ase_enf.chem.convert import PerceptionError
from ase_enf.chem.graph import graph_of_atoms
from ase_enf.data import qm9
from ase_enf.ensemble.calculators import OUTSIDE, OneMolecule, calculator
from ase_enf.flow.model import ENF
from ase_enf.scoring.reweight import ReweightingError
from benchmarks.common import measured_molecules, open_work
from benchmarks.report import write_results

TEMPERATURE, METHOD = 300.0, "gfn2"
NOTES = (
    "Drawn from the flow itself, weights unclipped. Effective sample size: of Kish, over all draws. Outside: draws "
    "with other bonds than those of the molecule, or without an energy. Spread: standard deviation of log w, nats, "
    "without the highest and the lowest hundredth; a flow that is the Boltzmann density has none."
)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors of a flow of molecular graphs")
    parser.add_argument("--data", help="QM9 in any form (default: what ASE_ENF_QM9 names)")
    parser.add_argument("--molecules", type=int, default=10, help="molecules of the test split (default: 10)")
    parser.add_argument("-n", type=int, default=1000, help="draws of each (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what was measured")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    if not flow.config.graph:
        raise SystemExit(f"{options.model}: is no flow of molecular graphs; name one, such as qm9-thermal")
    folder = open_work(options.work, flow, seed=options.seed, n=options.n)
    test = qm9.load(options.data, split="test")
    found, tried = measured_molecules(
        folder, test, options.molecules, options.seed, lambda atoms, _: weighted(flow, atoms, options.n, options.seed)
    )
    table = pd.DataFrame([row(entry) for entry in found])
    sizes = np.array([entry["size"] / entry["draws"] for entry in found])
    notes = (
        f"{len(found)} molecules of {tried} tried, seed {options.seed}, {options.n} draws each; median effective "
        f"sample size {np.median(sizes):.2%}. {NOTES}"
    )
    name = Path(options.model).stem
    write_results(table, f"thermal_weights_{name}", f"Weights for GFN2-xTB at 300 K: `{name}`", notes)


def weighted(flow: ENF, atoms: Atoms, n: int, seed: int) -> dict[str, Any]:
    """Returns what the weights of a molecule are worth; nothing if it has no graph or no energy."""
    try:
        smiles = graph_of_atoms(atoms).smiles
        bound = OneMolecule(atoms, calculator(METHOD, atoms), ordered=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of failed energies and few effective samples, which the table tells
            result = ase_enf.reweight(flow, bound, n, TEMPERATURE, seed=seed, molecule=atoms)
    except (PerceptionError, ReweightingError):
        return {}
    inside = np.isfinite(result.energies) & (result.energies < OUTSIDE)
    logs = result.log_weights[inside]
    if not len(logs):
        return {}
    low, high = np.quantile(logs, (0.01, 0.99))
    return {
        "smiles": smiles,
        "atoms": len(atoms),
        "draws": n,
        "outside": int(n - inside.sum()),
        "size": result.effective_sample_size,
        "spread": float(logs[(logs >= low) & (logs <= high)].std()),
        "error": float(math.sqrt(np.mean(np.square(result.log_prob_error[inside])))),
    }


def row(entry: dict[str, Any]) -> dict[str, str]:
    """Returns a molecule as a row of the table.

    Example:
        >>> entry = {"smiles": "O", "atoms": 3, "draws": 100, "outside": 1, "size": 12.34, "spread": 1.5, "error": 0.01}
        >>> row(entry)["effective sample size"]
        '12.3 of 100'
    """
    return {
        "molecule": f"`{entry['smiles']}`",
        "atoms": str(entry["atoms"]),
        "effective sample size": f"{entry['size']:.1f} of {entry['draws']}",
        "outside": str(entry["outside"]),
        "spread of log w, nats": f"{entry['spread']:.1f}",
        "integration error, nats": f"{entry['error']:.2g}",
    }


if __name__ == "__main__":
    main()
