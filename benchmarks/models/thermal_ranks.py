"""Does -kT log p rank structures of one molecule by energy? python -m benchmarks.models.thermal_ranks MODEL --data QM9

Molecules of the test split of QM9, in a random order, of which at least ``--wells`` conformers are found
(``benchmarks.thermal_wells``: embedded, and relaxed by GFN2-xTB). Each is asked twice: of its conformers at their
minima, and of structures displaced about its most probable minimum as at 300 K (``ase_enf.data.displaced``). Writes
``results/thermal_ranks_MODEL``; scores are saved in ``--work`` after every molecule. GFN2-xTB comes from tblite.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, CalculatorSetupError
from ase.units import kB
from scipy.stats import spearmanr

import ase_enf
from ase_enf.data import DataError, qm9
from ase_enf.data.displaced import displaced
from ase_enf.ensemble.calculators import calculator
from ase_enf.flow.model import ENF
from benchmarks.common import measured_molecules, open_work
from benchmarks.report import write_results
from benchmarks.thermal_wells import Well, wells

TEMPERATURE, FRAMES, ATTEMPTS, METHOD = 300.0, 8, 40, "gfn2"
# Conformers whose energies differ by less are taken for one, eV: mirror images, and what relaxed to the same minimum.
SAME = 1e-3
LARGEST = 1.0  # error of a score that is not refined, nats: kT log p then errs by less than most energies differ
MINIMA, THERMAL = "conformers at their minima", "frames about one minimum"
NOTES = (
    "Spearman: rank correlation of -log p with the energy by GFN2-xTB among structures of one molecule, the mean and "
    "the median over molecules and the share of molecules with 0.8 or more. Slope: of -kT log p against that energy by "
    "least squares, one if p is the Boltzmann density; its median. Spearman of F: against the harmonic free energy of "
    "the minima. ± is the standard error over molecules. Picked: energy of the structure of the highest score above "
    "the lowest, and at random, the mean of all."
)


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors, features='given'")
    parser.add_argument("--data", help="QM9 in any form (default: what ASE_ENF_QM9 names)")
    parser.add_argument("-n", type=int, default=50, help="molecules (default: 50)")
    parser.add_argument("--wells", type=int, default=5, help="conformers that a molecule needs (default: 5)")
    parser.add_argument(
        "--most", type=int, default=10, help="conformers of a molecule scored, the lowest (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps structures and scores")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    if not flow.config.types_given:
        raise SystemExit(f"{options.model}: features={flow.features!r}; conformers are scored by a 'given' model")
    folder = open_work(
        options.work, flow, seed=options.seed, wells=options.wells, most=options.most, attempts=ATTEMPTS, frames=FRAMES
    )
    test = qm9.load(options.data, split="test")
    found, tried = measured_molecules(
        folder, test, options.n, options.seed, lambda atoms, k: scored(flow, atoms, k, options)
    )
    table = pd.DataFrame([row(found, kind) for kind in (MINIMA, THERMAL)])
    errors = np.concatenate([entry[kind]["stderr"] for entry in found for kind in (MINIMA, THERMAL)])
    notes = (
        f"{len(found)} molecules of {tried} tried, seed {options.seed}; exact log p(x | graph or types) in float32, "
        f"stated error {np.median(errors):.2g} nats (median), {errors.max():.2g} (largest). {NOTES}"
    )
    name = Path(options.model).stem
    write_results(table, f"thermal_ranks_{name}", f"Ranking structures of a molecule by energy: `{name}`", notes)


def scored(flow: ENF, atoms: Atoms, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns energies and scores of a molecule; nothing if it has too few conformers or cannot be described."""
    try:
        minima = lowest(wells(atoms, METHOD, TEMPERATURE, ATTEMPTS, seed), options.most)
        if len(minima) < options.wells:
            return {}
        best = min(minima, key=lambda well: well.free_energy)
        frames = displaced(best.atoms, best.forces, TEMPERATURE, FRAMES, seed=seed)
        energies = [energy(frame) for frame in frames]
    except (DataError, CalculatorSetupError, CalculationFailed, RuntimeError, ValueError):
        return {}
    structures = [well.atoms for well in minima] + frames
    table = ase_enf.score(flow, structures, trace="exact", max_stderr=LARGEST, progress=False)
    logs, errors, split = table.log_likelihood.tolist(), table.stderr.tolist(), len(minima)
    return {
        "formula": str(atoms.symbols),
        MINIMA: {
            "energy": [energy(well.atoms) for well in minima],
            "free_energy": [well.free_energy for well in minima],
            "log_likelihood": logs[:split],
            "stderr": errors[:split],
        },
        THERMAL: {"energy": energies, "log_likelihood": logs[split:], "stderr": errors[split:]},
    }


def lowest(found: list[Well], most: int) -> list[Well]:
    """Returns different minima by increasing energy."""
    ordered = sorted(((energy(well.atoms), k) for k, well in enumerate(found)))
    kept: list[tuple[float, int]] = []
    for here, k in ordered:
        if not kept or here - kept[-1][0] > SAME:
            kept.append((here, k))
    return [found[k] for _, k in kept[:most]]


def energy(atoms: Atoms) -> float:
    """Returns the energy of a structure, eV."""
    here = atoms.copy()
    here.calc = calculator(METHOD, here)
    return float(here.get_potential_energy())


def row(found: list[dict[str, Any]], kind: str) -> dict[str, str]:
    """Returns the row of one kind of structures."""
    groups = [entry[kind] for entry in found]
    ranks = np.array([spearmanr(group["energy"], np.negative(group["log_likelihood"])).statistic for group in groups])
    kt = kB * TEMPERATURE
    slopes = [np.polyfit(group["energy"], -kt * np.array(group["log_likelihood"]), 1)[0] for group in groups]
    free = [
        spearmanr(group["free_energy"], np.negative(group["log_likelihood"])).statistic
        for group in groups
        if "free_energy" in group
    ]
    picked = [group["energy"][int(np.argmax(group["log_likelihood"]))] - min(group["energy"]) for group in groups]
    mean = [np.mean(group["energy"]) - min(group["energy"]) for group in groups]
    return {
        "structures": kind,
        "of a molecule": f"{np.mean([len(group['energy']) for group in groups]):.1f}",
        "Spearman": spread(ranks),
        "median": f"{np.median(ranks):.2f}",
        "0.8 or more": f"{np.sum(ranks >= 0.8)} of {len(ranks)}",
        "slope": f"{np.median(slopes):.2f}",
        "Spearman of F": spread(np.array(free)) if free else "",
        "picked, eV": spread(np.array(picked), 3),
        "at random, eV": spread(np.array(mean), 3),
    }


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Returns a mean and its standard error.

    Example:
        >>> spread(np.array([0.5, 1.5]))
        '1.00 ± 0.50'
    """
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    main()
