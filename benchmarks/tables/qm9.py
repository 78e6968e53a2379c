"""Table 2: E-NF, GNF-att and GNF-att-aug with equal budgets, and the shipped models.

python -m benchmarks.tables.qm9 --data QM9.npz --work FOLDER

Trains the three methods for ``--steps`` batches of 64 molecules each, on the published training split, draws ``-n``
molecules from each and from the shipped models (from the latter also by their default sampler, with fresh noise at each
step), and scores ``--test`` molecules of the test split. Everything is saved in the folder, so that a second run
continues. ``--only ROW ... --no-table`` divides the work among processes.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase import Atoms

import ase_enf
from ase_enf import metrics, plot
from ase_enf.chem.bonds import stability
from ase_enf.data import qm9
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import STATE_FILE
from ase_enf.training.loop import train
from benchmarks.common import draw_in_pieces, open_work, percent, score_in_pieces
from benchmarks.report import RESULTS, write_results

SOLVER = Solver("midpoint", steps=16, warp=1.5)
METHODS = {
    "GNF-att": {"network": "gnn"},
    "GNF-att-aug": {"network": "gnn", "augment": True},
    "E-NF": {},
}
MODELS = ["qm9", "qm9-small"]
PAPER = [
    ("GNF-att", "-28.2", "72", "0.3", "", "", ""),
    ("GNF-att-aug", "-29.3", "75", "0.5", "", "", ""),
    ("E-NF", "-59.7", "85", "4.9", "40.2", "", ""),
]
COLUMNS = ("NLL, nats", "atoms stable, %", "molecules stable, %", "valid, %", "unique, %", "novel, %")


@dataclass(frozen=True)
class Row:
    """Samples and scores of one method."""

    name: str
    flow: ENF
    solver: Solver
    atoms: list[Atoms]
    scores: pd.DataFrame
    speed: float  # molecules a second


def main() -> None:
    """Measures the missing rows and writes ``results/table2``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="QM9 in any form")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and pieces")
    parser.add_argument("--steps", type=int, default=1500, help="training batches of 64 molecules (default: 1500)")
    parser.add_argument("-n", type=int, default=10_000, help="molecules to draw (default: 10000)")
    parser.add_argument("--renewed", type=int, default=None, help="molecules to draw with fresh noise (default: as -n)")
    parser.add_argument("--test", type=int, default=1024, help="test molecules to score, at random (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="seed of training, samples and scores (default: 0)")
    parser.add_argument("--models", nargs="*", default=MODELS, help=f"shipped names or paths (default: {MODELS})")
    parser.add_argument("--only", nargs="*", help="some of the methods and models (default: all)")
    parser.add_argument("--no-table", action="store_true", help="do the work and write no table")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    everything = [*METHODS, *options.models]
    if unknown := set(options.only or ()) - set(everything):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(everything)}")
    test = qm9.load(options.data, split="test")
    rows = []
    for name in everything:
        if options.only is None or name in options.only:
            flow = trained(name, options) if name in METHODS else ase_enf.load(name, "cpu")
            rows.append(measure(name, flow, test, options))
            if name not in METHODS and isinstance(flow.sampling_solver, StochasticSampler):
                rows.append(redrawn(rows[-1], options))
    if not options.no_table:
        write_table(rows, options)


def trained(name: str, options: argparse.Namespace) -> ENF:
    """Returns the trained flow of a method; starts or resumes the training if it is not finished."""
    folder = budget_folder(name, options)
    paper = {"parameterisation": "velocity", "times": "power", "time_power": 1.3}
    config = TrainConfig(steps=options.steps, seed=options.seed, ema_decay=0.998, warmup=200, out=str(folder), **paper)
    train_atoms = qm9.load(options.data, split="train")
    valid_atoms = qm9.load(options.data, split="valid")
    config = replace(config, **METHODS[name])
    return train(config, train_atoms, valid_atoms, resume=(folder / STATE_FILE).exists(), source="QM9, train split")


def budget_folder(name: str, options: argparse.Namespace) -> Path:
    """Returns the folder of the run and pieces of a method, a different one for each budget."""
    return options.work / f"{Path(name).stem}_{options.steps}_seed{options.seed}"


def measure(name: str, flow: ENF, test: list[Atoms], options: argparse.Namespace) -> Row:
    """Draws and scores molecules in pieces."""
    flow.use_backend("auto")
    work = open_work(budget_folder(name, options) / "pieces", flow, seed=options.seed, solver=SOLVER)
    atoms, speed = _drawn(flow, SOLVER, work, options)
    order = np.random.default_rng(options.seed).permutation(len(test))[: options.test].tolist()
    how = {"trace": "hutchinson", "probes": 1, "importance_samples": 1, "max_stderr": math.inf, "batch_size": 64}
    scores = score_in_pieces(flow, test, order, options.seed, work, how)
    return Row(name, flow, SOLVER, atoms, scores, speed)


def redrawn(row: Row, options: argparse.Namespace) -> Row:
    """Returns the row with molecules drawn by the default sampler of its flow."""
    solver = row.flow.sampling_solver
    work = open_work(budget_folder(row.name, options) / "renewed", row.flow, seed=options.seed, solver=solver)
    atoms, speed = _drawn(row.flow, solver, work, options, options.renewed)
    return replace(row, solver=solver, atoms=atoms, speed=speed)


def _drawn(
    flow: ENF, solver: Solver | StochasticSampler, work: Path, options: argparse.Namespace, n: int | None = None
) -> tuple[list[Atoms], float]:
    """Returns molecules, and how many are drawn per second."""
    start = time.perf_counter()
    ase_enf.generate(flow, 128, seed=options.seed, solver=solver, batch_size=128)
    speed = 128 / (time.perf_counter() - start)
    return draw_in_pieces(flow, n or options.n, options.seed, work, solver), speed


def write_table(rows: list[Row], options: argparse.Namespace) -> None:
    """Writes our values and those of the paper, and the gallery of Figure 5 for the last row."""
    table = [(f"{name}, paper", *figures, "") for name, *figures in PAPER]
    budgets = []
    for row in rows:
        label = f"{row.name}, {options.steps} steps" if row.name in METHODS else f"E-NF, `{row.name}` as shipped"
        stochastic = isinstance(row.solver, StochasticSampler)
        renewed = f"; noise renewed ({row.solver}), {len(row.atoms)} samples" if stochastic else ""
        table.append((label + renewed, *_figures(row), f"{row.speed:.0f}"))
        if not renewed:
            budgets.append(_budget(label, row.flow))
    result = pd.DataFrame(table, columns=["method", *COLUMNS, "molecules/s"])
    notes = (
        f"NLL: of {len(rows[0].scores)} molecules of the test split at random, the bound with one draw of q and one "
        "Rademacher probe each, noise of its own for every molecule; error over molecules. Samples: "
        f"{options.n}, seed {options.seed}, {SOLVER}, which draws from the density whose NLL stands beside; a row with "
        "renewed noise has molecules of the same flow that are not exactly of that density. Valid: sanitised by RDKit, "
        "represented by the largest fragment, "
        "of all; unique and novel (not in the train split): of the valid. The paper's validity is the one that EDM "
        f"published for it. Budgets: {'; '.join(budgets)}. "
        "The paper trained by maximum likelihood for 30 epochs and more."
    )
    write_results(result, "table2", "Table 2: generation of QM9 molecules", notes)
    last = rows[-1].atoms
    stable = [item for item, good in zip(last, stability(last).stable, strict=True) if good]
    plot.gallery(last[:12] + stable[:12], RESULTS / "gallery_table2.png", dpi=110)  # Figure 5: any, then stable


def _figures(row: Row) -> tuple[str, ...]:
    report = metrics.evaluate(row.atoms, reference="qm9")
    finite = row.scores[np.isfinite(row.scores.log_likelihood)].log_likelihood
    lost = f" ({len(row.scores) - len(finite)} not finite)" if len(finite) < len(row.scores) else ""
    return (
        f"{-finite.mean():.1f} ± {finite.sem():.1f}{lost}",
        percent(report, "atom_stability"),
        percent(report, "molecule_stability"),
        percent(report, "validity_largest_fragment"),
        percent(report, "uniqueness_largest_fragment"),
        percent(report, "novelty_largest_fragment"),
    )


def _budget(label: str, flow: ENF) -> str:
    about = flow.provenance
    parameters = sum(p.numel() for p in flow.parameters())
    return f"{label}: {parameters / 1000:.0f} k parameters, {about['epoch']:.1f} epochs, {about['hours']:.2f} h"


if __name__ == "__main__":
    main()
