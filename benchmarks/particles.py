"""Table 1: six flows on DW4 and LJ13 by the number of training samples, beside the paper's figures and the entropy.

python -m benchmarks.particles --work FOLDER [--only E-NF dw4 ...] [--jobs 2]

A cell is one training: system, method, objective, number of samples, seed. Cells are independent; finished ones are
kept in the folder, a stopped one goes on from its last save, and the tables show whatever is finished. ``--scale 0.1``
tries everything with a tenth of the steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from ase.units import kB
from tqdm import tqdm

import ase_enf
from ase_enf.data import mcmc, particles, samples
from ase_enf.data.samples import Samples
from ase_enf.files import atomic_write, brief
from ase_enf.generate import GenerationError
from ase_enf.model import ENF
from ase_enf.reweight import ReweightingError, reweight
from ase_enf.train import LOG_FILE, STATE_FILE, TrainConfig, train
from benchmarks import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOW_MATCHING, NLL = "flow_matching", "nll"
OBJECTIVES = {FLOW_MATCHING: "flow matching", NLL: "maximum likelihood"}
# Steps by the number of training samples, the same for every method; the best validation decides where a run ends.
STEPS = {
    ("dw4", FLOW_MATCHING): {100: 1000, 1000: 2000, 10_000: 3000, 100_000: 4000},
    ("dw4", NLL): {100: 300, 1000: 500, 10_000: 500, 100_000: 500},
    ("lj13", FLOW_MATCHING): {10: 400, 100: 800, 1000: 1200, 10_000: 2000},
    ("lj13", NLL): {10: 100, 100: 200, 1000: 250, 10_000: 250},
}
BATCH = {("dw4", FLOW_MATCHING): 256, ("dw4", NLL): 100, ("lj13", FLOW_MATCHING): 128, ("lj13", NLL): 50}
SETTINGS = {FLOW_MATCHING: {}, NLL: {"learning_rate": 3e-3}}
VALIDATIONS, VALID, REWEIGHTED = 20, 256, 1000  # in a run; samples that decide; samples of the effective sample size
SWEEPS = 5000  # of the entropy of LJ13

WIDTH = {"features": "none", "hidden": 32, "layers": 3}  # the paper's
METHODS = {
    "GNF": {"network": "gnn", "attention": False},
    "GNF-att": {"network": "gnn"},
    "GNF-att-aug": {"network": "gnn", "augment": True},
    "Simple dynamics": {"network": "simple", "hidden": 50},
    "Kernel dynamics": {"network": "kernel", "hidden": 50, "layers": 10},  # as published
    "E-NF": {"radial": 16},
}
BOTH = ("Simple dynamics", "Kernel dynamics", "E-NF")  # trained by maximum likelihood too
ROWS = [(method, objective) for method in METHODS for objective in OBJECTIVES if objective != NLL or method in BOTH]
PAPER = {
    "dw4": {
        "GNF": (11.93, 11.31, 10.38, 7.95),
        "GNF-att": (11.65, 11.13, 9.34, 7.83),
        "GNF-att-aug": (8.81, 8.31, 7.90, 7.61),
        "Simple dynamics": (9.58, 9.51, 9.53, 9.47),
        "Kernel dynamics": (8.74, 8.67, 8.42, 8.26),
        "E-NF": (8.31, 8.15, 7.69, 7.48),
    },
    "lj13": {
        "GNF": (43.56, 42.84, 37.17, 36.49),
        "GNF-att": (43.32, 36.22, 33.84, 32.65),
        "GNF-att-aug": (41.09, 31.50, 30.74, 30.93),
        "Simple dynamics": (33.67, 33.10, 32.79, 32.99),
        "Kernel dynamics": (35.03, 31.49, 31.17, 31.25),
        "E-NF": (33.12, 30.99, 30.56, 30.41),
    },
}
SIZES = {system: tuple(STEPS[system, FLOW_MATCHING]) for system in PAPER}
GOALS = {"dw4": 0.05, "lj13": 0.5}  # nats that E-NF with all the data should come near the entropy
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One training."""

    system: str
    method: str
    objective: str
    size: int
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.system}_{self.method.replace(' ', '-')}_{self.objective}_{self.size}_{self.seed}"

    @property
    def largest(self) -> bool:
        """Whether there are no more samples than it has."""
        return self.size == max(SIZES[self.system])

    def config(self, scale: float, out: Path) -> TrainConfig:
        """Returns how it is trained, with the part ``scale`` of the steps."""
        kind = self.system, self.objective
        steps = max(round(STEPS[kind][self.size] * scale), 2)
        run = {"steps": steps, "warmup": steps // 10, "validate_every": -(-steps // VALIDATIONS), "seed": self.seed}
        run |= {"batch_size": BATCH[kind], "validation_size": VALID, "device": "cpu", "out": str(out)}
        run |= {"objective": self.objective, "dimension": particles.resolve(self.system).dimension}
        return TrainConfig(**WIDTH | METHODS[self.method] | SETTINGS[self.objective] | run)


Results = Mapping[Cell, Mapping[str, Any]]


def main() -> None:
    """Runs what is missing and writes ``results/table1*``."""
    names = [*SIZES, *METHODS, *OBJECTIVES, *sorted({str(size) for sizes in SIZES.values() for size in sizes})]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and finished cells")
    parser.add_argument("--only", nargs="*", choices=names, default=[], help="systems, methods, objectives or sizes")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell of the table (default: 3)")
    parser.add_argument("--test", type=int, default=1000, help="test samples (default: 1000)")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the steps (default: 1)")
    options = parser.parse_args()
    if not (options.scale > 0 and min(options.jobs, options.seeds) >= 1 and options.test >= 2):
        raise SystemExit("--scale must be positive, --jobs and --seeds at least 1, --test at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the pool takes its processes with it
    failed: list[str] = []
    cells = [cell for cell in every_cell(options.seeds) if chosen(cell, options.only)]
    try:
        open_folder(options.work, options.scale, options.test)
        for system in {cell.system for cell in cells}:
            ground(system, options.work, options.scale)
            data(system, options.work, options.test)
        failed = run(cells, options.work, options.scale, options.jobs)
    finally:
        write_tables(options.work, options.seeds, options.scale)
    if failed:
        raise SystemExit("\n".join(["these cells failed:", *failed]))


def every_cell(seeds: int) -> list[Cell]:
    """Returns all cells, those of the first seed first, so that a table has early one run of everything."""
    return [
        Cell(system, method, objective, size, seed)
        for seed in range(seeds)
        for system, sizes in SIZES.items()
        for size in sizes
        for method, objective in ROWS
    ]


def chosen(cell: Cell, only: Iterable[str]) -> bool:
    """Whether a cell is among the systems, methods, objectives and sizes named; of a kind not named all are."""
    wanted = set(only)
    kinds = ((cell.system, SIZES), (cell.method, METHODS), (cell.objective, OBJECTIVES))
    sizes = wanted - {*SIZES, *METHODS, *OBJECTIVES}
    return all(value in wanted or not wanted & set(known) for value, known in kinds) and (
        not sizes or str(cell.size) in sizes
    )


def open_folder(work: Path, scale: float, test: int) -> None:
    """Makes the folder, and refuses one that holds cells of other settings.

    Raises:
        SystemExit: If it does.
    """
    settings = {"scale": scale, "test": test, "valid": VALID, "methods": METHODS, "settings": SETTINGS}
    settings["steps"] = [[*kind, BATCH[kind], *steps.values()] for kind, steps in STEPS.items()]
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(settings)):
        raise SystemExit(f"{work}: holds cells of another --scale, --test or budget; use another folder")
    write_json(path, settings)


def write_json(path: Path, content: Any) -> None:
    """Writes whole or not at all."""
    with atomic_write(path) as handle:
        handle.write(json.dumps(content).encode())


def data(system: str, work: Path, test: int) -> dict[str, Samples]:
    """Returns train, valid and test samples, drawn once; fewer training samples are a first part of the same."""
    path = work / f"{system}.npz"
    if not path.exists():
        sizes = {"train": max(SIZES[system]), "valid": VALID, "test": test}
        samples.save(path, samples.dataset(system, sizes, seed=0))
    return samples.load(path)


def ground(system: str, work: Path, scale: float) -> dict[str, float]:
    """Returns ln Z and the entropy with their errors, computed once: DW4 by quadrature, LJ13 by replica exchange."""
    path = work / f"{system}_entropy.json"
    if not path.exists():
        if system == "dw4":
            exact = particles.quadrature(system)
            found = {"log_z": exact.log_z, "log_z_stderr": 0.0, "entropy": exact.entropy, "entropy_stderr": 0.0}
        else:
            estimate = mcmc.free_energy(system, seed=0, sweeps=max(round(SWEEPS * scale), 20))._asdict()
            found = {key: estimate[key] for key in ("log_z", "log_z_stderr", "entropy", "entropy_stderr")}
        write_json(path, found)
    return json.loads(path.read_text())


# Cells


def run(cells: Sequence[Cell], work: Path, scale: float, jobs: int) -> list[str]:
    """Runs the cells that are not finished, and returns what went wrong."""
    waiting = [(cell, work, scale) for cell in cells if not (work / f"{cell.name}.json").exists()]
    failed = []
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        multiprocessing.get_context("spawn").Pool(jobs, _begin) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", dynamic_ncols=True) as bar,
    ):
        for name, error in pool.imap_unordered(_attempt, waiting):
            bar.set_postfix_str(name)
            bar.update(1)
            failed += [f"{name}: {error}"] if error else []
    return failed


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    torch.set_num_threads(1)


def _attempt(job: tuple[Cell, Path, float]) -> tuple[str, str | None]:
    """Runs a cell; its failure must not end the others."""
    try:
        run_cell(*job)
    except Exception as error:  # whatever training or scoring may raise
        return job[0].name, brief(error)
    return job[0].name, None


def run_cell(cell: Cell, work: Path, scale: float) -> None:
    """Trains, or goes on, scores the test samples, and writes the result."""
    path = work / f"{cell.name}.json"
    if path.exists():
        return
    sets = samples.load(work / f"{cell.system}.npz")
    flow, curve = trained(cell, sets, work / "runs" / cell.name, scale)
    flow.use_kernel("auto")
    start = time.perf_counter()
    test, truth = sets["test"], ground(cell.system, work, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the integration error is in the result
        scores = ase_enf.score(flow, test.to_atoms(), trace="exact", progress=False)
    log_q = scores.log_likelihood.to_numpy()
    good = np.isfinite(log_q)
    # log p - log q varies less than log q alone, and its mean is the distance to the entropy.
    gap = (-test.energies - truth["log_z"] - log_q)[good]
    result = asdict(cell) | {
        **mean_and_error("nll", -log_q[good]),
        **mean_and_error("gap", gap),
        "lost": int((~good).sum()),
        "integration_rms": float(np.sqrt(np.mean(np.square(scores.stderr[good])))),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "best_step": flow.provenance["step"],
        "test_s": time.perf_counter() - start,
        "train_s": curve[-1][0],
        "curve": curve,
        "ess": effective_sample_size(flow, cell) if cell.largest else None,
    }
    write_json(path, result)


def trained(cell: Cell, sets: Mapping[str, Samples], folder: Path, scale: float) -> tuple[ENF, list[list[float]]]:
    """Returns the best weights, and seconds and validation NLL along the run."""
    config = cell.config(scale, folder)
    resume = (folder / STATE_FILE).exists()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first save
    atoms = particles.to_atoms(cell.system, sets["train"].positions[: cell.size])
    if cell.objective == FLOW_MATCHING:  # a batch of few samples is as good as any other if each comes with more noises
        atoms = atoms * -(-config.batch_size // len(atoms))
    source = f"{cell.size} samples of {cell.system}, {sets['train'].info['sha256'][:16]}"
    flow = train(config, atoms, sets["valid"].to_atoms(), resume=resume, progress=False, source=source)
    with (folder / LOG_FILE).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["valid_nll"]]
    return flow, [[float(row["elapsed_s"]), float(row["valid_nll"])] for row in rows]


def mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    """Returns ``name`` and ``name_stderr``."""
    return {name: float(values.mean()), f"{name}_stderr": float(values.std(ddof=1) / math.sqrt(len(values)))}


def effective_sample_size(flow: ENF, cell: Cell) -> float:
    """Returns the part of the drawn samples that counts, NaN for a flow that cannot be integrated or weighed."""
    calculator = particles.DW4() if cell.system == "dw4" else particles.LJ13()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reweight(flow, calculator, REWEIGHTED, 1 / kB, seed=cell.seed, progress=False)
    except (GenerationError, ReweightingError):
        return math.nan
    return found.effective_sample_size / REWEIGHTED


# Tables and figure


def write_tables(work: Path, seeds: int, scale: float) -> None:
    """Writes a table of each system that has finished cells, and the figure."""
    results = read_results(work, seeds)
    systems = [system for system in SIZES if any(cell.system == system for cell in results)]
    truths = {system: ground(system, work, scale) for system in systems}
    for system, truth in truths.items():
        title = f"Table 1: negative log-likelihood on {system.upper()}, nats"
        tables.write_results(table(system, results, seeds), f"table1_{system}", title, notes(system, results, truth))
    if systems:
        draw(results, truths, tables.RESULTS / "table1.png")


def read_results(work: Path, seeds: int) -> dict[Cell, dict[str, Any]]:
    """Returns the finished cells."""
    paths = {cell: work / f"{cell.name}.json" for cell in every_cell(seeds)}
    return {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.exists()}


def over_seeds(
    results: Results, key: str, system: str, method: str, objective: str, size: int
) -> tuple[float, float, int]:
    """Returns mean, standard error and number of runs; NaN where there are none, an error of NaN for one."""
    row = (system, method, objective, size)
    found = [r[key] for c, r in results.items() if (c.system, c.method, c.objective, c.size) == row]
    values = np.array([value for value in found if value is not None and math.isfinite(value)])
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()) if len(values) else math.nan, error, len(values)


def figure_of(combined: tuple[float, float, int], seeds: int, digits: int = 3, unit: float = 1.0) -> str:
    """Returns mean ± error, with the number of runs where some are missing."""
    value, error, count = combined
    if not count:
        return MISSING
    text = f"{unit * value:.{digits}f}" + (f" ± {unit * error:.{digits}f}" if count > 1 else "")
    return text if count == seeds else f"{text} (runs: {count})"


def table(system: str, results: Results, seeds: int) -> pd.DataFrame:
    """Returns ours, a row for each method and objective, beside the paper's."""
    rows, most = [], max(SIZES[system])
    for method, objective in ROWS:
        place = system, method, objective
        row = {"method": method, "trained by": OBJECTIVES[objective]}
        row |= {str(size): figure_of(over_seeds(results, "nll", *place, size), seeds) for size in SIZES[system]}
        row |= {f"paper, {size}": value for size, value in zip(SIZES[system], PAPER[system][method], strict=True)}
        row[f"above the entropy, {most}"] = figure_of(over_seeds(results, "gap", *place, most), seeds)
        row[f"ESS, {most}, %"] = figure_of(over_seeds(results, "ess", *place, most), seeds, 1, 100.0)
        seconds = [over_seeds(results, "train_s", *place, size)[0] for size in SIZES[system]]
        row["training, s"] = " / ".join(f"{value:.0f}" if math.isfinite(value) else MISSING for value in seconds)
        rows.append(row)
    return pd.DataFrame(rows)


def notes(system: str, results: Results, truth: Mapping[str, float]) -> str:
    """Returns what a reader must know, with the verdicts."""
    mine = {cell: result for cell, result in results.items() if cell.system == system}
    entropy = f"{truth['entropy']:.4f} ± {truth['entropy_stderr']:.4f}"
    how = "quadrature, to rounding" if system == "dw4" else f"replica exchange and BAR, {SWEEPS} sweeps of 64 ladders"
    error = np.mean([result["nll_stderr"] for result in mine.values()])
    rough = max(result["integration_rms"] for result in mine.values())
    lost = sum(result["lost"] for result in mine.values())
    budgets = "; ".join(
        f"{words} {' / '.join(map(str, STEPS[system, key].values()))} of {BATCH[system, key]}"
        for key, words in OBJECTIVES.items()
    )
    lines = [
        f"Floor: the entropy, **{entropy}** nats ({how}), below which no expected NLL on samples of exp(-U) can be.",
        f"NLL with the exact trace, mean over the test samples, ± over training runs (same samples, other seeds); the "
        f"test samples, the same for all, add {error:.3f}. Not so to the column above the entropy, "
        f"<-U - ln Z - log q>, where most of that cancels. Integration error of one score: rms {rough:.2g} at worst; "
        f"scores that are not finite: {lost}.",
        f"One rule for all: 3 layers of 32 (Simple 50 Gaussians; Kernel 50 and 10), weights averaged, the best of "
        f"{VALIDATIONS} validations on {VALID} samples; steps by samples: {budgets}. E-NF has soft edges and 16 radial "
        "functions of each distance beside its square, which the paper's has not. Flow matching: Muon and AdamW; "
        "maximum likelihood as in the paper (dopri5 at 1e-4, adjoint, regulariser 1e-3, AdamW with amsgrad) with "
        "fewer steps.",
        f"Simple and kernel dynamics are restricted fields: they cannot follow the target of flow matching, so that "
        f"maximum likelihood is their fair row. ESS: Kish's, of {REWEIGHTED} samples without clipping. Seconds: of one "
        "thread by the wall, by number of samples, validations included.",
    ]
    if system == "lj13":
        lines.append(
            "The paper's figures are below the entropy of this system at equilibrium, so they cannot be an NLL on "
            "equilibrium samples of exp(-U): its data was a single biased chain that is not to be had. They stand here "
            "for their order; the rows are not comparable in value."
        )
    return "\n\n".join(lines) + "\n\n" + "\n".join(f"* {line}" for line in verdicts(system, mine))


def verdicts(system: str, results: Results) -> list[str]:
    """Says whether E-NF is best in each column, how near the floor it comes, and how much faster flow matching is."""
    lines, most = [], max(SIZES[system])
    for size in SIZES[system]:
        means = {row: over_seeds(results, "nll", system, *row, size)[0] for row in ROWS}
        means = {row: value for row, value in means.items() if math.isfinite(value)}
        if len({method for method, _ in means}) > 1:
            method, objective = min(means, key=means.__getitem__)
            lines.append(f"best of {size} samples: {method} by {OBJECTIVES[objective]}")
    gap, _, count = over_seeds(results, "gap", system, "E-NF", FLOW_MATCHING, most)
    if count:
        words = "reached" if gap <= GOALS[system] else "missed"
        lines.append(
            f"E-NF by flow matching, {most} samples: {gap:.3f} nats above the entropy; {GOALS[system]} {words}"
        )
    for method in BOTH:
        if times := time_to_same(results, method, most):
            lines.append(f"{method}, {most} samples: {times}")
    return lines


def time_to_same(results: Results, method: str, size: int) -> str:
    """Says when flow matching first validated as well as the whole of maximum likelihood did."""
    ratios, never = [], 0
    for cell, slow in results.items():
        if (cell.method, cell.objective, cell.size) != (method, NLL, size):
            continue
        fast = results.get(Cell(cell.system, method, FLOW_MATCHING, size, cell.seed))
        if fast:
            seconds, best = min(slow["curve"], key=lambda point: point[1])
            reached = [when for when, value in fast["curve"] if value <= best]
            never += not reached
            ratios += [(reached[0], seconds)] if reached else []
    words = []
    if ratios:
        fast_s, slow_s = np.mean(ratios, axis=0)
        words.append(
            f"flow matching validates as maximum likelihood at its best after {fast_s:.0f} s instead of {slow_s:.0f} s "
            f"({len(ratios)} run(s))"
        )
    if never:
        words.append(f"flow matching never validates as well as maximum likelihood at its best ({never} run(s))")
    return "; ".join(words)


def draw(results: Results, truths: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draws NLL against the number of samples, one panel a system, with the entropy as the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(truths) + 1.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(truths), squeeze=False)[0]
    for axes, (system, truth) in zip(panels, truths.items(), strict=True):
        _panel(axes, system, results, truth["entropy"])
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, system: str, results: Results, entropy: float) -> None:
    for method, objective in ROWS:
        values = np.array([over_seeds(results, "nll", system, method, objective, size) for size in SIZES[system]])
        label = method if objective == FLOW_MATCHING else f"{method}, {OBJECTIVES[NLL]}"
        style = {"marker": "o", "ms": 3.5, "lw": 1.4, "ls": "-" if objective == FLOW_MATCHING else "--"}
        axes.errorbar(
            SIZES[system], values[:, 0], np.nan_to_num(values[:, 1]), color=f"C{[*METHODS].index(method)}", label=label,
            capsize=2, **style,
        )  # fmt: skip
    if system == "dw4":  # the paper's LJ13 is on other samples
        axes.plot(SIZES[system], PAPER[system]["E-NF"], color="black", ls=":", marker="x", ms=4, label="E-NF, paper")
    axes.axhline(entropy, color="black", lw=1.0, label="entropy")
    axes.set(xscale="log", xlabel="training samples", ylabel="test NLL, nats", title=system.upper())


if __name__ == "__main__":
    main()
