"""Table 1: flows on DW4 and LJ13 by the number of training samples, beside the paper's figures and the entropy.

python -m benchmarks.tables.particles --work FOLDER [--only E-NF dw4 ...] [--jobs 2]

A cell is one training: system, method, objective, number of samples, seed. Cells are independent; finished ones are
kept in the folder, a stopped one goes on from its last save, and the tables show whatever is finished. All finished
cells are in ``results/table1_cells.csv`` too, and ``--cells`` takes them from there into another folder.
``--scale 0.1`` tries everything with a tenth of the steps, and leaves its tables in the folder. The row of the paper's
own budget, ``--only E-NF-as-published``, takes hours a cell and is run only where it is named; the tables say how far
an unfinished cell has come.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ase.units import kB
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.files import atomic_write, brief
from ase_enf.data import mcmc, particles, samples
from ase_enf.data.samples import Samples
from ase_enf.flow.model import ENF
from ase_enf.sampling.sampler import GenerationError
from ase_enf.scoring.reweight import ReweightingError, reweight
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import STATE_FILE
from ase_enf.training.log import LOG_FILE
from ase_enf.training.loop import train
from benchmarks import report

FLOW_MATCHING, NLL = "flow_matching", "nll"
OBJECTIVES = {FLOW_MATCHING: "flow matching", NLL: "maximum likelihood"}
# Steps by the number of training samples, the same for every method; the best validation decides where a run ends.
STEPS = {
    ("dw4", FLOW_MATCHING): {100: 1000, 1000: 2000, 10_000: 4000, 100_000: 16_000},
    ("dw4", NLL): {100: 300, 1000: 500, 10_000: 500, 100_000: 500},
    ("lj13", FLOW_MATCHING): {10: 400, 100: 800, 1000: 1200, 10_000: 2000},
    ("lj13", NLL): {10: 100, 100: 200, 1000: 250, 10_000: 250},
}
BATCH = {("dw4", FLOW_MATCHING): 256, ("dw4", NLL): 100, ("lj13", FLOW_MATCHING): 128, ("lj13", NLL): 50}
# Of maximum likelihood, above the paper's because the runs are shorter; flow matching has the defaults.
RATES = {"Simple dynamics": 3e-3, "Kernel dynamics": 1e-2, "E-NF": 3e-3}
VALIDATIONS = 6  # in a run
# The paper's steps, batches and rate, by maximum likelihood; its epochs are 1000 / 300 / 50 / 6 of DW4 and 500 / 1000 /
# 300 / 50 of LJ13.
AS_PUBLISHED = "E-NF-as-published"
PUBLISHED_STEPS = {
    "dw4": {100: 1000, 1000: 3000, 10_000: 5000, 100_000: 6000},
    "lj13": {10: 500, 100: 1000, 1000: 3000, 10_000: 5000},
}
PUBLISHED_BATCH, PUBLISHED_RATE, PUBLISHED_VALIDATIONS = 100, 5e-4, 40
# Samples that decide, are tested, give the effective sample size: a likelihood of LJ13 takes ten times one of DW4.
VALID, TEST, REWEIGHTED = {"dw4": 256, "lj13": 64}, {"dw4": 1000, "lj13": 250}, {"dw4": 1000, "lj13": 500}
SWEEPS = 5000  # of the entropy of LJ13

WIDTH = {"features": "none", "hidden": 32, "layers": 3}  # the paper's
METHODS = {
    "GNF": {"network": "gnn", "attention": False},
    "GNF-att": {"network": "gnn"},
    "GNF-att-aug": {"network": "gnn", "augment": True},
    "GNF-att-aug-128": {"network": "gnn", "augment": True, "hidden": 128},  # not the paper's: what width does for it
    "Simple dynamics": {"network": "simple", "hidden": 50},
    "Kernel dynamics": {"network": "kernel", "hidden": 50, "layers": 10},  # as published
    AS_PUBLISHED: {"radial": 0},
    "E-NF-16-radial": {"radial": 16},  # ours: radial functions of each distance beside its square
    "E-NF": {"radial": 0},  # the paper's network
}
RATES |= {"E-NF-16-radial": RATES["E-NF"], AS_PUBLISHED: PUBLISHED_RATE}
BOTH = ("Simple dynamics", "Kernel dynamics", "E-NF-16-radial", "E-NF")  # trained by maximum likelihood too
ROWS = [(method, objective) for method in METHODS for objective in OBJECTIVES if objective != NLL or method in BOTH]
ROWS = [(method, NLL if method == AS_PUBLISHED else objective) for method, objective in ROWS]
PAPER = {  # DW4, then LJ13
    "GNF": (11.93, 11.31, 10.38, 7.95, 43.56, 42.84, 37.17, 36.49),
    "GNF-att": (11.65, 11.13, 9.34, 7.83, 43.32, 36.22, 33.84, 32.65),
    "GNF-att-aug": (8.81, 8.31, 7.90, 7.61, 41.09, 31.50, 30.74, 30.93),
    "Simple dynamics": (9.58, 9.51, 9.53, 9.47, 33.67, 33.10, 32.79, 32.99),
    "Kernel dynamics": (8.74, 8.67, 8.42, 8.26, 35.03, 31.49, 31.17, 31.25),
    "E-NF": (8.31, 8.15, 7.69, 7.48, 33.12, 30.99, 30.56, 30.41),
}
SIZES = {system: tuple(steps) for (system, objective), steps in STEPS.items() if objective == FLOW_MATCHING}
PAPER = {"dw4": {m: v[:4] for m, v in PAPER.items()}, "lj13": {m: v[4:] for m, v in PAPER.items()}}
GOALS = {"dw4": 0.05, "lj13": 0.5}  # nats that E-NF with all the data should come near the entropy
NOTHING = 0.25  # nats from the Gaussian: hardly anything was learned
KINDS = (set(SIZES), set(METHODS), set(OBJECTIVES), {str(size) for sizes in SIZES.values() for size in sizes})
MISSING = "–"
SETTINGS_FILE = "settings.json"


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
    def steps(self) -> int:
        """How long it is trained."""
        published = self.method == AS_PUBLISHED
        return (PUBLISHED_STEPS[self.system] if published else STEPS[self.system, self.objective])[self.size]

    @property
    def batch(self) -> int:
        """How many samples a step has."""
        return PUBLISHED_BATCH if self.method == AS_PUBLISHED else BATCH[self.system, self.objective]

    @property
    def validations(self) -> int:
        """How often it is validated."""
        return PUBLISHED_VALIDATIONS if self.method == AS_PUBLISHED else VALIDATIONS

    @property
    def largest(self) -> bool:
        """Whether there are no more samples than it has."""
        return self.size == max(SIZES[self.system])

    @property
    def part(self) -> slice:
        """Which training samples it has: runs of other seeds have others, where there are enough for all."""
        start = self.seed * self.size
        start = start if start + self.size <= max(SIZES[self.system]) else 0
        return slice(start, start + self.size)

    @property
    def copies(self) -> int:
        """How often an epoch has each sample: flow matching fills its batches, as each copy has another noise."""
        short = self.objective == FLOW_MATCHING and self.size < self.batch
        return math.lcm(self.size, self.batch) // self.size if short else 1

    def config(self, scale: float, out: Path) -> TrainConfig:
        """Returns how it is trained, with the part ``scale`` of the steps."""
        steps = max(round(self.steps * scale), 2)
        every = -(-steps // self.validations)
        run = {"steps": steps, "warmup": steps // 10, "validate_every": every, "seed": self.seed}
        run |= {"batch_size": self.batch, "validation_size": VALID[self.system], "device": "cpu", "out": str(out)}
        run |= {"objective": self.objective, "dimension": particles.resolve(self.system).dimension}
        run |= {"adjoint": False}  # these batches fit into memory: the gradient in up to a quarter of the time
        run |= {"learning_rate": RATES[self.method]} if self.objective == NLL else {}
        return TrainConfig(**WIDTH | METHODS[self.method] | run)


def main() -> None:
    """Runs what is missing and writes ``results/table1*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and finished cells")
    words = sorted(set().union(*KINDS))
    parser.add_argument("--only", nargs="*", choices=words, default=[], help="systems, methods, objectives, sizes")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell of the table (default: 3)")
    parser.add_argument(
        "--test", type=int, help=f"test samples (default: {TEST['dw4']} of DW4, {TEST['lj13']} of LJ13)"
    )
    parser.add_argument("--cells", type=Path, help="CSV of finished cells to take over: table1_cells.csv of a run")
    parser.add_argument("--no-run", action="store_true", help="run nothing; write the tables of what is finished")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the steps (default: 1)")
    options = parser.parse_args()
    test = TEST if options.test is None else dict.fromkeys(TEST, options.test)
    if not (options.scale > 0 and min(options.jobs, options.seeds) >= 1 and min(test.values()) >= 2):
        raise SystemExit("--scale must be positive, --jobs and --seeds at least 1, --test at least 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the pool takes its processes with it
    cells = [cell for cell in every_cell(options.seeds) if chosen(cell, options.only)]
    cells = [cell for cell in cells if cell.method != AS_PUBLISHED or AS_PUBLISHED in options.only]
    cells = [] if options.no_run else cells
    open_folder(options.work, options.scale, test)
    if options.cells and (others := take_cells(options.cells, options.work)):
        print(f"{options.cells}: {others} cells are of another budget, --scale or --test, and stay there")
    try:
        for system in {cell.system for cell in cells}:
            ground(system, options.work, options.scale)
            data(system, options.work, test[system])
        if failed := run(cells, options.work, options.scale, options.jobs):
            raise SystemExit("\n".join(["these cells failed:", *failed]))
    finally:
        write_tables(options.work, options.seeds, options.scale)


def every_cell(seeds: int) -> list[Cell]:
    """Returns all cells, those of the first seed first, so that a table has early one run of everything."""
    places = [(system, size) for system in SIZES for size in SIZES[system]]
    return [Cell(system, *row, size, seed) for seed in range(seeds) for system, size in places for row in ROWS]


def chosen(cell: Cell, only: Iterable[str]) -> bool:
    """Whether a cell is among the systems, methods, objectives and sizes named; of a kind not named all are."""
    values, wanted = (cell.system, cell.method, cell.objective, str(cell.size)), set(only)
    return all(value in wanted or not wanted & kind for value, kind in zip(values, KINDS, strict=True))


def open_folder(work: Path, scale: float, test: Mapping[str, int]) -> None:
    """Makes the folder; ends the program if it is of another scale or number of test samples."""
    path, settings = work / SETTINGS_FILE, {"scale": scale, "test": dict(test)}
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{work}: holds cells of another --scale or --test; use another folder")
    write_json(path, settings)


def digest(cell: Cell, work: Path) -> str:
    """Returns what stands for everything that was chosen for a cell: one of another digest is another experiment."""
    folder = json.loads((work / SETTINGS_FILE).read_text())
    chosen = [folder["scale"], folder["test"][cell.system], VALID[cell.system], cell.validations, WIDTH]
    chosen += [METHODS[cell.method], cell.steps, cell.batch, cell.copies]
    chosen += [RATES[cell.method]] if cell.objective == NLL else []
    chosen += [REWEIGHTED[cell.system]] if cell.largest else []
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:12]


def finished(cell: Cell, work: Path) -> dict[str, Any] | None:
    """Returns the figures of a cell that was run, None before that; ends the program if they are of another budget."""
    path = work / f"{cell.name}.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found and found.get("settings") != digest(cell, work):
        raise SystemExit(f"{path}: of another budget than now; remove it and its run, or use another folder")
    return found


def take_cells(source: Path, work: Path) -> int:
    """Writes the cells of a CSV into the folder, where it has not those; returns how many are of other settings."""
    rows = pd.read_csv(source, comment="#", dtype={"settings": str, "curve": str}).fillna({"curve": ""})
    others = 0
    for row in rows.to_dict("records"):
        cell = Cell(**{field.name: row[field.name] for field in fields(Cell)})
        if row["settings"] != digest(cell, work):
            others += 1
        elif not (path := work / f"{cell.name}.json").exists():
            curve = [[float(number) for number in point.split(":")] for point in row["curve"].split()]
            write_json(path, row | {"curve": curve})
    return others


def write_json(path: Path, content: Any) -> None:
    """Writes whole or not at all."""
    with atomic_write(path) as handle:
        handle.write(json.dumps(content).encode())


def data(system: str, work: Path, test: int) -> dict[str, Samples]:
    """Returns train, valid and test samples, drawn once; fewer training samples are a first part of the same."""
    path = work / f"{system}.npz"
    if not path.exists():
        sizes = {"train": max(SIZES[system]), "valid": VALID[system], "test": test}
        samples.save(path, samples.dataset(system, sizes, seed=0))
    return samples.load(path)


def ground(system: str, work: Path, scale: float) -> dict[str, float]:
    """Returns ln Z and the entropy with their errors, computed once: DW4 by quadrature, LJ13 by replica exchange."""
    path = work / f"{system}_entropy.json"
    if not path.exists():
        exact, sweeps = system == "dw4", max(round(SWEEPS * scale), 20)
        found = particles.quadrature(system) if exact else mcmc.free_energy(system, seed=0, sweeps=sweeps)
        keys = ("log_z", "log_z_stderr", "entropy", "entropy_stderr")
        keys += () if exact else ("log_z_ti", "log_z_ti_stderr")
        write_json(path, {key: getattr(found, key, 0.0) for key in keys})  # the quadrature has no errors
    return json.loads(path.read_text())


def run(cells: Sequence[Cell], work: Path, scale: float, jobs: int) -> list[str]:
    """Runs the cells that are not finished, each in a process of its own, and returns what went wrong."""
    waiting = [cell for cell in cells if not finished(cell, work)]
    failed = []
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, max_tasks_per_child=1)
    try:
        running = {pool.submit(run_cell, cell, work, scale): cell.name for cell in waiting}
        with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="cell", dynamic_ncols=True) as bar:
            for future in as_completed(running):
                bar.set_postfix_str(running[future])
                bar.update(1)
                if error := future.exception():  # one that fails must not end the others
                    failed.append(f"{running[future]}: {brief(error)}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
    return failed


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    torch.set_num_threads(1)


def run_cell(cell: Cell, work: Path, scale: float) -> None:
    """Trains, or goes on, scores the test samples, and writes the result."""
    if finished(cell, work):
        return
    sets = samples.load(work / f"{cell.system}.npz")
    flow, curve = trained(cell, sets, work / "runs" / cell.name, scale)
    flow.use_backend("auto")
    start = time.perf_counter()
    test, truth = sets["test"], ground(cell.system, work, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the integration error is in the result
        scores = ase_enf.score(flow, test.to_atoms(), trace="exact", progress=False)
    log_q = scores.log_likelihood.to_numpy()
    good = np.isfinite(log_q)
    # log p - log q varies less than log q alone, and its mean is the distance to the entropy.
    nll, gap = pd.Series(-log_q[good]), pd.Series((-test.energies - truth["log_z"] - log_q)[good])
    result = asdict(cell) | {
        "nll": float(nll.mean()),
        "nll_stderr": float(nll.sem()),
        "gap": float(gap.mean()),
        "gap_stderr": float(gap.sem()),
        "lost": int((~good).sum()),
        "integration_rms": float(np.sqrt(np.mean(np.square(scores.stderr[good])))),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "best_step": flow.provenance["step"],
        "test_s": time.perf_counter() - start,
        "train_s": curve[-1][0],
        "curve": curve,
        "ess": effective_sample_size(flow, cell) if cell.largest else None,
        "processor": torch.backends.cpu.get_cpu_capability(),  # what the seconds are of
        "settings": digest(cell, work),
    }
    write_json(work / f"{cell.name}.json", result)


def trained(cell: Cell, sets: Mapping[str, Samples], folder: Path, scale: float) -> tuple[ENF, list[list[float]]]:
    """Returns the best weights, and seconds and validation NLL along the run."""
    config = cell.config(scale, folder)
    resume = (folder / STATE_FILE).exists()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first save
    atoms = particles.to_atoms(cell.system, sets["train"].positions[cell.part]) * cell.copies
    source = f"{cell.size} samples of {cell.system}, {sets['train'].info['sha256'][:16]}"
    flow = train(config, atoms, sets["valid"].to_atoms(), resume=resume, progress=False, source=source)
    with (folder / LOG_FILE).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["valid_nll"]]
    return flow, [[float(row["elapsed_s"]), float(row["valid_nll"])] for row in rows]


def effective_sample_size(flow: ENF, cell: Cell) -> float:
    """Returns the part of the drawn samples that counts, NaN for a flow that cannot be integrated or weighed."""
    calculator, n = particles.DW4() if cell.system == "dw4" else particles.LJ13(), REWEIGHTED[cell.system]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reweight(flow, calculator, n, 1 / kB, seed=cell.seed, progress=False)
    except (GenerationError, ReweightingError):
        return math.nan
    return found.effective_sample_size / n


def write_tables(work: Path, seeds: int, scale: float) -> None:
    """Writes a table of each system that has finished cells, and the figure."""
    results = pd.DataFrame([found for cell in every_cell(seeds) if (found := finished(cell, work))])
    if results.empty:
        return
    curves = results.curve.map(lambda points: " ".join(f"{seconds:.1f}:{nll:.4f}" for seconds, nll in points))
    folder = report.RESULTS if scale == 1 else work
    report.write_csv(results.assign(curve=curves), "table1_cells", folder)
    truths = {system: ground(system, work, scale) for system in SIZES if system in results.system.unique()}
    # -log p of the same samples as a control variate: the same expectation, a smaller error.
    results["nll"] = results.gap + results.system.map({system: truth["entropy"] for system, truth in truths.items()})
    for system, truth in truths.items():
        mine = results[results.system == system]
        title = f"Table 1: negative log-likelihood on {system.upper()}, nats"
        text = notes(system, mine, truth, base_entropy(work, system), scale)
        unfinished = (so_far(cell, work, scale) for cell in every_cell(seeds) if cell.system == system)
        text = "\n".join([text, *(f"* {line}" for line in [projected(system, mine), *unfinished] if line)])
        report.write_results(table(system, mine, seeds), f"table1_{system}", title, text, folder)
    draw(results, truths, folder / "table1.png")


def so_far(cell: Cell, work: Path, scale: float) -> str:
    """Says how far a cell that is not finished has come, how fast its NLL still falls, and how long it takes in all."""
    log = work / "runs" / cell.name / LOG_FILE
    if (work / f"{cell.name}.json").exists() or not log.exists():
        return ""
    with log.open(newline="") as file:
        rows = [
            {key: float(row[key] or "nan") for key in ("step", "valid_nll", "elapsed_s")}
            for row in csv.DictReader(file)
        ]
    points = [row for row in rows if math.isfinite(row["valid_nll"])]
    if not rows:
        return ""
    steps, last = max(round(cell.steps * scale), 2), rows[-1]
    words = f"{cell.method} by {OBJECTIVES[cell.objective]}, {cell.size} samples, seed {cell.seed}: not finished, "
    words += f"{last['step']:.0f} of {steps} steps in {last['elapsed_s'] / 60:.0f} of about "
    words += f"{last['elapsed_s'] / last['step'] * steps / 60:.0f} minutes"
    if points:
        words += f"; NLL of {VALID[cell.system]} validation samples {points[-1]['valid_nll']:.3f}"
    if len(points) > 1:
        fall = (points[-1]["valid_nll"] - points[-2]["valid_nll"]) / (points[-1]["step"] - points[-2]["step"])
        words += f", which changes by {100 * fall:+.3f} in 100 steps"
    return words


def projected(system: str, results: pd.DataFrame) -> str:
    """Says how long the cells of the paper's own budget take, by how long our cells of maximum likelihood took."""
    known = results[(results.system == system) & (results.objective == NLL) & (results.method == "E-NF-16-radial")]
    seconds = known[known.processor == clock(results)].groupby("size").train_s.mean()
    hours = []
    for size, steps in PUBLISHED_STEPS[system].items():
        done = Cell(system, "E-NF-16-radial", NLL, size, 0)
        share = steps * min(PUBLISHED_BATCH, size) / (done.steps * min(done.batch, size))
        hours.append(f"{seconds[size] * share / 3600:.1f}" if size in seconds else MISSING)
    return f"the paper's own budget, {AS_PUBLISHED}: about {' / '.join(hours)} hours a cell, by the steps above"


def base_entropy(work: Path, system: str) -> float:
    """Returns the entropy of the Gaussian that is as wide as the training samples: what the base has learned alone."""
    test = json.loads((work / SETTINGS_FILE).read_text())["test"]
    positions = data(system, work, test[system])["train"].positions
    dimensions = particles.resolve(system).degrees_of_freedom
    variance = np.square(positions).sum() / (len(positions) * dimensions)
    return 0.5 * dimensions * math.log(2 * math.pi * math.e * variance)


def over_seeds(system: str, results: pd.DataFrame, key: str) -> pd.DataFrame:
    """Returns mean, standard error and number of runs of all rows and sizes; NaN and zero runs for what is missing."""
    rows = pd.MultiIndex.from_tuples([(*row, size) for row in ROWS for size in SIZES[system]])
    numbers = results[results.system == system].astype({key: float})
    found = numbers.groupby(["method", "objective", "size"])[key].agg(["mean", "sem", "count"])
    return found.reindex(rows.sort_values()).fillna({"count": 0})


def figure_of(combined: pd.Series, seeds: int, digits: int = 3, unit: float = 1.0) -> str:
    """Returns mean ± error, with the number of runs where some are missing."""
    if not combined["count"]:
        return MISSING
    error = f" ± {unit * combined['sem']:.{digits}f}" if combined["count"] > 1 else ""
    runs = "" if combined["count"] == seeds else f" (runs: {combined['count']:.0f})"
    return f"{unit * combined['mean']:.{digits}f}{error}{runs}"


def table(system: str, results: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """Returns ours, a row for each method and objective, beside the paper's."""
    sizes, most, rows = SIZES[system], max(SIZES[system]), []
    nll, gap, ess = (over_seeds(system, results, key) for key in ("nll", "gap", "ess"))
    seconds = over_seeds(system, results[results.processor == clock(results)], "train_s")
    for method, objective in ROWS:
        row = {"method": method, "trained by": OBJECTIVES[objective]}
        row |= {str(size): figure_of(nll.loc[method, objective, size], seeds) for size in sizes}
        published = PAPER[system].get(method.removesuffix("-as-published"), ())
        printed = [f"{value:.2f}" for value in published] or [MISSING] * len(sizes)
        row |= {f"paper, {size}": value for size, value in zip(sizes, printed, strict=True)}
        row[f"above the entropy, {most}"] = figure_of(gap.loc[method, objective, most], seeds)
        row[f"ESS, {most}, %"] = figure_of(ess.loc[method, objective, most], seeds, 1, 100.0)
        means = [seconds["mean"].loc[method, objective, size] for size in sizes]
        row["training, s"] = " / ".join(f"{mean:.0f}" if math.isfinite(mean) else MISSING for mean in means)
        rows.append(row)
    return pd.DataFrame(rows)


def clock(results: pd.DataFrame) -> str:
    """Returns the kind of processor that ran most cells: seconds of different kinds are not to be averaged."""
    return next(iter(results.processor[results.train_s.notna()].mode()), "")


def notes(system: str, results: pd.DataFrame, truth: Mapping[str, float], base: float, scale: float = 1.0) -> str:
    """Returns what a reader must know, with the verdicts."""
    how = "quadrature, to rounding"
    if system != "dw4":
        how = f"replica exchange and BAR, {round(SWEEPS * scale)} sweeps of {mcmc.LADDERS} ladders"
        if ti := truth.get("log_z_ti"):
            how += (
                f"; ln Z {truth['log_z']:.4f} ± {truth['log_z_stderr']:.4f}, by thermodynamic integration {ti:.4f} ± "
                f"{truth['log_z_ti_stderr']:.4f}"
            )
    budgets = "; ".join(
        f"{words} {' / '.join(f'{steps * scale:.0f}' for steps in STEPS[system, key].values())} of {BATCH[system, key]}"
        for key, words in OBJECTIVES.items()
    )
    published = " / ".join(str(steps) for steps in PUBLISHED_STEPS[system].values())
    processors = ", ".join(sorted(results.processor.unique()))
    rates = ", ".join(f"{method} {rate:g}" for method, rate in RATES.items() if method in BOTH)
    text = f"""Floor: the entropy, **{truth["entropy"]:.4f} ± {truth["entropy_stderr"]:.4f}** nats ({how}).
No expected NLL on samples of exp(-U) is below it. A Gaussian as wide as the samples, which a flow starts from, has
{base:.2f}.

NLL with the exact trace: the entropy plus the mean of -U - ln Z - log q over the test samples, which has the
expectation of the mean of -log q and a smaller error, {results.gap_stderr.min():.3f} for the best flow and \
{results.gap_stderr.max():.3f} for the worst instead of {results.nll_stderr.mean():.3f}.
± over training runs, which differ in their seeds and, but for the largest number, in their samples; the same seed draws
other samples on another kind of processor (these cells: {processors}). Integration error of one score: rms
{results.integration_rms.max():.2g} at worst; scores not finite, left out: {results.lost.sum()}.

One rule for all: 3 layers of 32 (Simple 50 Gaussians; Kernel 50 and 10; GNF-att-aug-128, which the paper has not, 3 of
128), averaged weights, the best of {VALIDATIONS} validations on {VALID[system]} samples; steps by samples: {budgets}
(of fewer samples, all of them; flow matching fills the batch with copies, which have other noise).
E-NF has the paper's network; E-NF-16-radial has 16 radial functions of each distance beside its square, which the
paper's has not. E-NF-as-published is E-NF by maximum likelihood with the paper's steps ({published}), batches of
{PUBLISHED_BATCH} and rate, {PUBLISHED_RATE:g}.
Flow matching: Muon and AdamW. Maximum likelihood: as in the paper (dopri5 at 1e-4, regulariser 1e-3, AdamW with
amsgrad), but by back-propagation through the solver, which is faster here than the adjoint, with far fewer steps and
higher rates ({rates}).

Simple and kernel dynamics are restricted fields: they cannot follow the target of flow matching, so that maximum
likelihood is their fair row. ESS: Kish's, of {REWEIGHTED[system]} samples without clipping. Seconds: of one thread by
the wall, by number of samples, validations included, of the runs on {clock(results)} processors.
"""
    if system == "lj13":
        text += """
The paper's 30.4 is far below the entropy of this system at equilibrium, so it cannot be an NLL on equilibrium samples
of exp(-U): its data was a single biased chain that is not to be had. The paper's figures stand here for their order;
the values are not comparable.

A GNF stays on a plateau, the field of the Gaussian, for hundreds of steps: whether it leaves it within the budget is
most of what its rows show.
"""
    return "\n".join([text, *(f"* {line}" for line in verdicts(system, results, base))])


def verdicts(system: str, results: pd.DataFrame, base: float) -> list[str]:
    """Says which method is best in each column, how near the floor E-NF comes, and when flow matching overtakes."""
    lines, most = [], max(SIZES[system])
    combined = over_seeds(system, results, "nll").dropna(subset="mean")
    alone = results.groupby(["method", "objective", "size"]).gap_stderr.mean()  # the error of one run
    for size in SIZES[system]:
        column = combined[combined.index.get_level_values(2) == size].sort_values("mean")
        if len(column) > 1:
            names = [f"{method} by {OBJECTIVES[objective]}" for method, objective, _ in column.index]
            words = f"best of {len(column)} rows with {size} samples: {names[0]}"
            errors = column["sem"].fillna(alone)
            near = column["mean"] - column["mean"].iat[0] < 2 * np.hypot(errors, errors.iat[0])
            if near.sum() > 1:
                words += ", not to be told apart from " + " and ".join(np.array(names)[near][1:])
            lines.append(words)
    gaps = over_seeds(system, results, "gap")
    for method in ("E-NF", "E-NF-16-radial"):
        gap = gaps.loc[method, FLOW_MATCHING, most]
        if math.isfinite(gap["mean"]):
            verdict = f"the goal of {GOALS[system]} is {'reached' if gap['mean'] <= GOALS[system] else 'missed'}"
            error = f" ± {gap['sem']:.3f}" if gap["count"] > 1 else ""
            words = f"{gap['mean']:.3f}{error} nats above the entropy; {verdict}"
            lines.append(f"{method} by flow matching, {most} samples: {words}")
    lines += [
        f"{method} by {OBJECTIVES[objective]}, {most} samples: hardly better than the Gaussian"
        for method, objective in ROWS
        if abs(combined["mean"].get((method, objective, most), math.inf) - base) < NOTHING
    ]
    races = ((method, race(results, method, most)) for method in BOTH)
    return lines + [f"{method}, {most} samples: {words}" for method, words in races if words]


def race(results: pd.DataFrame, method: str, size: int) -> str:
    """Says when flow matching was first as good as all of maximum likelihood, in runs on the same samples.

    Validations have the same noise along a run, but not in another run: the ends are compared by the exact test, and
    what came before by how far its validation was from the best.
    """
    part = results[(results.method == method) & (results["size"] == size) & results.curve.map(bool)]
    fast, slow = (part[part.objective == key].set_index(["seed", "processor"]) for key in OBJECTIVES)
    times, runs = [], fast.index.intersection(slow.index)  # also on one kind of processor
    for run in runs:
        ahead = slow.gap[run] - fast.gap[run]
        seconds, _ = min(slow.curve[run], key=lambda point: point[1])
        least = min(value for _, value in fast.curve[run])
        times += [(when, seconds) for when, value in fast.curve[run] if value - least <= ahead][:1]
    words = f"flow matching becomes as good as maximum likelihood at its best in {len(times)} of {len(runs)} runs"
    quicker = ", after at most {:.0f} s instead of {:.0f} s".format(*np.mean(times, axis=0)) if times else ""
    return f"{words}{quicker}" if len(runs) else ""


def draw(results: pd.DataFrame, truths: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draws NLL against the number of samples, one panel a system, with the entropy as the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(truths) + 2.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(truths), squeeze=False)[0]
    for axes, (system, truth) in zip(panels, truths.items(), strict=True):
        combined = over_seeds(system, results, "nll")
        for method, objective in ROWS:
            line = combined.xs((method, objective))
            style = {"color": f"C{[*METHODS].index(method)}", "ls": "-", "label": method}
            if objective == NLL:
                style |= {"ls": "--", "mfc": "white", "label": f"{method}, {OBJECTIVES[NLL]}"}
            axes.errorbar(line.index, line["mean"], line["sem"].fillna(0), marker="o", ms=3.5, capsize=2, **style)
        if system == "dw4":  # the paper's LJ13 is of other samples
            axes.plot(SIZES[system], PAPER[system]["E-NF"], "kx:", ms=4, label="E-NF, paper")
        axes.axhline(truth["entropy"], color="black", lw=1.0, label="entropy")
        axes.set(xscale="log", xlabel="training samples", ylabel="test NLL, nats", title=system.upper())
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
