"""Runs of the cells: each is run once, continues where it stopped, and is saved in a folder."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
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
from ase_enf.training.folder import STATE_FILE
from ase_enf.training.log import LOG_FILE
from ase_enf.training.loop import train
from benchmarks.tables.table1.cells import OBJECTIVES, REWEIGHTED, SIZES, SWEEPS, VALID, Cell

SETTINGS_FILE = "settings.json"


def open_folder(work: Path, scale: float, test: Mapping[str, int]) -> None:
    """Creates the folder; ends the program if an existing one has another scale or number of test samples."""
    path, wanted = work / SETTINGS_FILE, {"scale": scale, "test": dict(test)}
    if path.exists() and settings(work) != wanted:
        raise SystemExit(f"{work}: holds cells of another --scale or --test; use another folder")
    write_json(path, wanted)


def settings(work: Path) -> dict[str, Any]:
    """Returns the scale and the numbers of test samples of a folder."""
    return json.loads((work / SETTINGS_FILE).read_text())


def digest(cell: Cell, work: Path) -> str:
    """Returns a hash of all settings of a cell; with another hash it is a different experiment."""
    folder = settings(work)
    choices = cell.choices(folder["scale"], folder["test"][cell.system])
    return hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:12]


def finished(cell: Cell, work: Path) -> dict[str, Any] | None:
    """Returns the results of a finished cell, or None; ends the program if their budget is another."""
    path = work / f"{cell.name}.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found and found.get("settings") != digest(cell, work):
        raise SystemExit(f"{path}: of another budget than now; remove it and its run, or use another folder")
    return found


def take_cells(source: Path, work: Path) -> int:
    """Writes the cells of a CSV that are missing in the folder; returns the number of cells with other settings."""
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
    """Writes a JSON file atomically."""
    with atomic_write(path) as handle:
        handle.write(json.dumps(content).encode())


def data(system: str, work: Path, test: int) -> dict[str, Samples]:
    """Returns training, validation and test samples, drawn once; fewer training samples are the first of all."""
    path = work / f"{system}.npz"
    if not path.exists():
        sizes = {"train": max(SIZES[system]), "valid": VALID[system], "test": test}
        samples.save(path, samples.dataset(system, sizes, seed=0))
    return samples.load(path)


def ground(
    system: str, work: Path, scale: float, sweeps: int = SWEEPS, ladders: int = mcmc.LADDERS
) -> dict[str, float]:
    """Returns ln Z and the entropy with errors, computed once: DW4 by quadrature, LJ by replica exchange."""
    path = work / f"{system}_entropy.json"
    if not path.exists():
        exact, sweeps = system == "dw4", max(round(sweeps * scale), 20)
        if exact:
            found = particles.quadrature(system)
        else:
            found = mcmc.free_energy(system, seed=0, sweeps=sweeps, ladders=ladders)
        keys = ("log_z", "log_z_stderr", "entropy", "entropy_stderr")
        keys += () if exact else ("log_z_ti", "log_z_ti_stderr")
        write_json(path, {key: getattr(found, key, 0.0) for key in keys})  # the quadrature has no errors
    return json.loads(path.read_text())


def run(cells: Sequence[Cell], work: Path, scale: float, jobs: int) -> list[str]:
    """Runs the unfinished cells, each in its own process, and returns their errors."""
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
    """Starts or resumes the training, scores the test samples, and writes the result."""
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
    """Returns the best weights, and the time and validation NLL along the run."""
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
    """Returns the effective fraction of drawn samples; NaN for a flow that cannot be integrated or weighted."""
    calculator, n = particles.DW4() if cell.system == "dw4" else particles.LJ13(), REWEIGHTED[cell.system]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reweight(flow, calculator, n, 1 / kB, seed=cell.seed, progress=False)
    except (GenerationError, ReweightingError):
        return math.nan
    return found.effective_sample_size / n


def so_far(cell: Cell, work: Path, scale: float) -> str:
    """Returns, as text, the progress of an unfinished cell, how fast its NLL still falls, and its total time."""
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
    steps, last = cell.scaled_steps(scale), rows[-1]
    words = f"{cell.method} by {OBJECTIVES[cell.objective]}, {cell.size} samples, seed {cell.seed}: not finished, "
    words += f"{last['step']:.0f} of {steps} steps in {last['elapsed_s'] / 60:.0f} of about "
    words += f"{last['elapsed_s'] / last['step'] * steps / 60:.0f} minutes"
    if points:
        words += f"; NLL of {VALID[cell.system]} validation samples {points[-1]['valid_nll']:.3f}"
    if len(points) > 1:
        fall = (points[-1]["valid_nll"] - points[-2]["valid_nll"]) / (points[-1]["step"] - points[-2]["step"])
        words += f", which changes by {100 * fall:+.3f} in 100 steps"
    return words
