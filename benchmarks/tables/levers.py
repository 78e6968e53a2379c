"""What brings a flow of particles closer to exp(-U): short trainings that each differ in one setting.

python -m benchmarks.tables.levers --work FOLDER [--systems dw4] [--only aligned ...]

All rows have the same samples, steps and seed and are scored on the same test samples, so that a difference from the
first row has a smaller error than the rows themselves. Finished trainings and results are saved in the folder.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ase.units import kB

import ase_enf
from ase_enf.atoms.files import atomic_write
from ase_enf.data import particles
from ase_enf.data.samples import Samples
from ase_enf.flow.model import ENF
from ase_enf.scoring.reweight import reweight
from ase_enf.training import build
from ase_enf.training.config import TrainConfig
from ase_enf.training.distributed import process_group
from ase_enf.training.environment import training_environment
from ase_enf.training.folder import BEST_FILE, STATE_FILE, FolderLock
from ase_enf.training.loop import complete, train
from benchmarks.models.particle_measures import CALCULATORS, effective, figure, sem
from benchmarks.models.particle_models import TRUTH, drawn
from benchmarks.report import write_results
from benchmarks.tables.alignment import AlignedFlowMatching
from benchmarks.tables.table1.runs import ground


@dataclass(frozen=True)
class Lever:
    """The setting that a row changes."""

    title: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of TrainConfig
    length: float = 1.0  # times the steps
    aligned: bool = False  # see ``alignment``
    likelihood: bool = False  # whether steps of maximum likelihood follow


BASE = "base"
LEVERS = {
    BASE: Lever("velocity, times u^1.3, 32 x 3"),
    "times": Lever("velocity, times Beta(1, 1.8)", {"times": "beta", "time_power": 1.8}),
    "denoising": Lever("denoising, times Beta(1, 1.8)", {"parameterisation": "denoising"}),
    "endpoint": Lever("endpoint, times Beta(1, 1.8)", {"parameterisation": "endpoint"}),
    "width": Lever("width 64", {"hidden": 64}),
    "layers": Lever("5 layers", {"layers": 5}),
    "aligned": Lever("aligned noise", aligned=True),
    "twice": Lever("twice the steps", length=2.0),
    "likelihood": Lever("then 100 steps of maximum likelihood", likelihood=True),
}
# The last stage, from the averaged weights of the first; it costs about as much.
LAST = {"objective": "nll", "steps": 100, "batch_size": 256, "learning_rate": 2e-4, "ema_decay": 0.97, "warmup": 10}
LAST |= {"adjoint": False, "regularisation": 0.0}
# Steps, batch, test samples, samples reweighted.
BUDGETS = {"dw4": (4000, 256, 1000, 1000), "lj13": (2000, 128, 250, 250)}


def main() -> None:
    """Trains and measures the missing rows and writes ``results/levers``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for samples, runs and figures")
    parser.add_argument("--systems", nargs="*", choices=list(BUDGETS), default=list(BUDGETS), help="default: all")
    parser.add_argument("--only", nargs="*", choices=list(LEVERS), help="some of the rows (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and reweighting (default: 0)")
    parser.add_argument("--no-run", action="store_true", help="run nothing; write the table of what is finished")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for system in [] if options.no_run else options.systems:
        sets = drawn(system, options.work)
        for name in LEVERS:
            if options.only is None or name in options.only:
                measured(system, name, sets, options)
    write_table(options)


def place(system: str, name: str, options: argparse.Namespace) -> Path:
    """Returns the folder of a row."""
    return options.work / f"lever_{system}_{name}_seed{options.seed}"


def measured(system: str, name: str, sets: Mapping[str, Samples], options: argparse.Namespace) -> None:
    """Starts or resumes the training of a row, and saves its test scores and weights."""
    path = place(system, name, options) / "figures.npz"
    if path.exists():
        return
    folder, lever = place(system, name, options), LEVERS[name]
    if lever.likelihood:
        start = place(system, BASE, options) / "run"
        if not (start / BEST_FILE).exists():
            raise SystemExit(f"{name} continues {BASE}; run that first")
        flow = trained_further(system, start / BEST_FILE, sets, folder / "run", options.seed)
    else:
        flow = trained(system, lever, sets, folder / "run", options.seed)
    flow.use_backend("auto")
    _, _, tested, n = BUDGETS[system]
    chosen = slice(tested)
    atoms = particles.to_atoms(system, sets["test"].positions[chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the integration error is far below what rows differ by
        log_q = ase_enf.score(flow, atoms, trace="exact", progress=False).log_likelihood.to_numpy()
        found = reweight(flow, CALCULATORS[system](), n, 1.0 / kB, seed=options.seed, progress=False)
    with atomic_write(path) as handle:
        gap = -sets["test"].energies[chosen] - log_q
        weights = sum(parameter.numel() for parameter in flow.parameters())
        about = np.array([weights, flow.provenance["hours"]])
        np.savez(handle, gap=gap, log_weights=found.log_weights, about=about)


def trained(system: str, lever: Lever, sets: Mapping[str, Samples], out: Path, seed: int) -> ENF:
    """Returns the averaged weights at the end of a training."""
    steps, batch, _, _ = BUDGETS[system]
    steps = round(lever.length * steps)
    fields = {"hidden": 32, "layers": 3} | dict(lever.fields)
    config = TrainConfig(
        features="none",
        dimension=particles.resolve(system).dimension,
        steps=steps,
        batch_size=batch,
        muon_weight_decay=0.0,
        warmup=steps // 10,
        validate_every=steps,
        validation_size=64,
        seed=seed,
        out=str(out),
        device="cpu",
        **fields,
    ).resolved()
    going_on = (out / STATE_FILE).exists()
    if not going_on:
        shutil.rmtree(out, ignore_errors=True)  # killed before its first save
    structures = sets["train"].to_atoms(), sets["valid"].to_atoms()
    prepare = build.resume if going_on else build.begin
    with training_environment(config.precision), process_group(config.device) as ranks, FolderLock() as lock:
        run = prepare(config, *structures, ranks, f"{len(sets['train'])} samples of {system}", lock)
        if lever.aligned:
            run.objective = run.stepper.objective = AlignedFlowMatching(config.times, config.time_power)
        return complete(run, progress=None)


def trained_further(system: str, start: Path, sets: Mapping[str, Samples], out: Path, seed: int) -> ENF:
    """Returns the averaged weights after steps of maximum likelihood that start from other weights."""
    going_on = (out / STATE_FILE).exists()
    if not going_on:
        shutil.rmtree(out, ignore_errors=True)
    steps = LAST["steps"]
    config = TrainConfig(
        **LAST, init_from=str(start), validate_every=steps, validation_size=64, seed=seed, out=str(out), device="cpu"
    )
    structures = sets["train"].to_atoms(), sets["valid"].to_atoms()
    return train(config, *structures, resume=going_on)


def write_table(options: argparse.Namespace) -> None:
    """Writes the finished rows, each with its difference from the first row of its system."""
    lines = []
    for system in BUDGETS:
        truth = ground(system, options.work, 1.0, *TRUTH.get(system, (0, 0)))
        first: np.ndarray | None = None
        for name in LEVERS:
            path = place(system, name, options) / "figures.npz"
            if not path.exists():
                continue
            with np.load(path) as archive:
                gap, log_weights, (weights, hours) = (archive[key] for key in ("gap", "log_weights", "about"))
            first = gap if first is None and name == BASE else first
            change = "" if name == BASE or first is None else figure((gap - first).mean(), sem(gap - first))
            above = figure(gap.mean() - truth["log_z"], sem(gap))
            size = f"{100 * effective(log_weights):.1f} of {len(log_weights)}"
            lines.append(
                (system, LEVERS[name].title, above, change, size, f"{weights / 1000:.1f} k", f"{60 * hours:.0f}")
            )
    columns = ["system", "what", "NLL above the entropy, nats", "against the first", "ESS, %", "weights", "minutes"]
    write_results(pd.DataFrame(lines, columns=columns), "levers", "What brings a flow nearer to exp(-U)", notes())


def notes() -> str:
    """Returns what a reader must know."""
    budgets = "; ".join(
        f"{system} {steps} steps of {batch}, {tested} test samples, {n} reweighted"
        for system, (steps, batch, tested, n) in BUDGETS.items()
    )
    return (
        f"One training each: {budgets}. 100,000 training samples, averaged weights at the end, exact trace, no "
        "clipping. ± is over test samples, not over trainings; the difference to the first row of a system is of the "
        "same test samples. Minutes: of one thread by the wall, beside other work. Aligned: noise turned and "
        "renumbered towards its data (`benchmarks/tables/alignment.py`). Maximum likelihood: of batches of "
        f"{LAST['batch_size']}, AdamW at {LAST['learning_rate']:g} falling to zero, no regulariser."
    )


if __name__ == "__main__":
    main()
