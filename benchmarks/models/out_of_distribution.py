"""Detection of unusual frames by likelihood: ``python -m benchmarks.models.out_of_distribution --work FOLDER``.

FOLDER is that of ``benchmarks.models.free_energies``, whose flows have learned the ensemble of a molecule at 300 K.
They score frames of walkers at 300, 600 and 1,000 K; those at 300 K were not used for training. ROC-AUC is the
probability that a hot frame has a lower likelihood than a frame at 300 K.

Molecules of different size are compared by likelihood per dimension. In an ensemble at temperature T, an energy that is
quadratic in d = 3M − 6 coordinates has <U> = d kT / 2, and a flow trained at T_0 has −log p = U / kT_0 + const., so

    T_frame = T_0 [1 + 2 (<log p>_0 − log p) / d]

is T on average; <>_0 is the mean over frames at T_0. All molecules together are ranked by it. Writes
``results/out_of_distribution``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

import ase_enf
from ase_enf.chem.mmff import conformers
from ase_enf.data import thermal
from ase_enf.ensemble.calculators import calculator
from benchmarks.models.free_energies import BURN_IN, LEAPFROG, MOLECULES, TEMPERATURE, built, folder_of
from benchmarks.report import write_results

HOT = (600.0, 1000.0)
Floats = NDArray[np.float64]


def main() -> None:
    """Computes the missing scores and writes ``results/out_of_distribution``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks.models.free_energies")
    parser.add_argument("--only", nargs="*", choices=list(MOLECULES), help="some of the molecules (default: all)")
    parser.add_argument("-n", type=int, default=96, help="frames at each temperature (default: 96)")
    parser.add_argument("--seed", type=int, default=7, help="of the hot walkers; not that of the training set")
    parser.add_argument("--out", type=Path, help="another folder than results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, pooled = [], {}
    for name in options.only or MOLECULES:
        folder, (atoms, _) = folder_of(options.work, name), built(MOLECULES[name])
        scores = {kelvin: scored(folder, atoms, kelvin, options) for kelvin in (TEMPERATURE, *HOT)}
        seen = apparent(scores, 3 * len(atoms) - 6)
        pooled[name] = seen
        lines += [(name, f"{len(atoms)}", *row(kelvin, scores[kelvin], seen)) for kelvin in scores]
    together = {kelvin: np.concatenate([seen[kelvin] for seen in pooled.values()]) for kelvin in (TEMPERATURE, *HOT)}
    for kelvin in HOT:
        lines.append(("all together", "", f"{kelvin:g}", "", temperature(together[kelvin]), auc(together, kelvin)))
    columns = ["molecule", "atoms", "frames at, K", "log p, nats", "T of a frame, K", "ROC-AUC against 300 K"]
    write_results(pd.DataFrame(lines, columns=columns), "out_of_distribution", TITLE, notes(options), options.out)


def scored(folder: Path, atoms: Atoms, kelvin: float, options: argparse.Namespace) -> Floats:
    """Returns log-likelihoods of frames at a temperature, which are saved in the folder of the molecule."""
    path = folder / f"scores_{kelvin:g}_{options.n}_{options.seed}.npy"
    if not path.exists():
        flow = ase_enf.load(folder / "flow" / "model.safetensors")
        frames = held_out(folder, atoms, options) if kelvin == TEMPERATURE else hot(folder, atoms, kelvin, options)
        table = ase_enf.score(flow, frames, trace="exact", max_stderr=1.0, progress=True)
        np.save(path, table.log_likelihood.to_numpy())
    return np.load(path)


def held_out(folder: Path, atoms: Atoms, options: argparse.Namespace) -> list[Atoms]:
    """Returns frames of the walkers not used for training, evenly spaced in the last tenth."""
    with np.load(folder / "thermal.npz") as file:
        positions = file["positions"].reshape(-1, len(atoms), 3)
    last = positions[-len(positions) // 10 :]
    chosen = np.linspace(0, len(last) - 1, options.n).round().astype(int)
    return [Atoms(atoms.numbers, last[k]) for k in chosen]


def hot(folder: Path, atoms: Atoms, kelvin: float, options: argparse.Namespace) -> list[Atoms]:
    """Returns frames of walkers at another temperature."""
    found = thermal.run(
        conformers(atoms, 8, options.seed), calculator("gfn2", atoms), kelvin, options.n, seed=options.seed,
        leapfrog=LEAPFROG, burn_in=BURN_IN, out=folder / f"thermal_{kelvin:g}_{options.seed}.npz", progress=True,
    )  # fmt: skip
    return found.frames


def apparent(scores: dict[float, Floats], dimension: int) -> dict[float, Floats]:
    """Returns T_frame of each frame, K; see the module."""
    usual = scores[TEMPERATURE].mean()
    return {kelvin: TEMPERATURE * (1.0 + 2.0 * (usual - log_p) / dimension) for kelvin, log_p in scores.items()}


def row(kelvin: float, log_p: Floats, seen: dict[float, Floats]) -> tuple[str, str, str, str]:
    """Returns the cells of one temperature."""
    area = "" if kelvin == TEMPERATURE else auc(seen, kelvin)
    return f"{kelvin:g}", f"{log_p.mean():.1f} ± {log_p.std(ddof=1):.1f}", temperature(seen[kelvin]), area


def temperature(seen: Floats) -> str:
    """Returns mean and spread of T_frame."""
    return f"{seen.mean():.0f} ± {seen.std(ddof=1):.0f}"


def auc(seen: dict[float, Floats], kelvin: float) -> str:
    """Returns the probability that a hot frame seems hotter than one at 300 K, with equal ones counted half."""
    hotter, usual = seen[kelvin], seen[TEMPERATURE]
    return f"{mannwhitneyu(hotter, usual).statistic / (len(hotter) * len(usual)):.4f}"


TITLE = "Frames of a simulation that are unlike the training set"


def notes(options: argparse.Namespace) -> str:
    """Returns what a reader must know."""
    return (
        f"Flows of one molecule each at {TEMPERATURE:g} K (GFN2-xTB; [free energies](free_energies.md)), exact trace; "
        f"{options.n} frames at each temperature, of Hamiltonian Monte Carlo, of which those of {TEMPERATURE:g} K were "
        "held out of training. ± is the standard deviation over frames. T of a frame is "
        "300 K [1 + 2 (⟨log p⟩ − log p) / (3M − 6)], with ⟨log p⟩ the mean over the frames of 300 K: what the "
        "likelihood says of the temperature of a frame if all motions were harmonic. The last rows rank the frames of "
        "all molecules together by it."
    )


if __name__ == "__main__":
    main()
