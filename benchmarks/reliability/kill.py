"""Commands killed by SIGKILL at random moments, gone on with, and compared with an undisturbed run."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from ase.io.formats import UnknownFileTypeError

MODEL = "dw4"
FAST = ["--steps", "8", "--churn", "0", "--batch-size", "4"]
N = 200
UNTIMED = ("examples_per_s", "elapsed_s")


class Killed(NamedTuple):
    """What became of one command."""

    what: str
    seed: int
    after: float  # seconds
    kept: str  # of the work, at the kill
    wrong: str  # "" where all is as if nothing had happened


def run(words: list[str], seconds: float | None = None) -> float:
    """Runs ase-enf, kills it after ``seconds`` if it runs that long, and returns how long it ran.

    Raises:
        RuntimeError: If it fails by itself.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "ase_enf", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    began = time.monotonic()
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}: {said.strip()[-300:]}")
    return time.monotonic() - began


def litter(folder: Path) -> list[str]:
    """Returns what is left of files that were being written."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith((".part", "-journal", ".lock-journal")))


def frames_of(path: Path) -> list[Atoms]:
    """Returns the structures of a file, none where there is no file, or nothing in it."""
    try:
        return read(path, index=":") if path.exists() and path.stat().st_size else []
    except (UnknownFileTypeError, StopIteration):
        return []


def same(one: list[Atoms], other: list[Atoms]) -> bool:
    """Whether two lists hold the same structures, in order."""
    return len(one) == len(other) and all(
        (a.numbers == b.numbers).all() and np.allclose(a.positions, b.positions, atol=1e-6)
        for a, b in zip(one, other, strict=True)
    )


def generate(folder: Path, suffix: str, seconds: float | None) -> tuple[str, str, float]:
    """Kills ``generate``, appends what is missing, and returns what was kept and what is wrong."""
    path, words = folder / f"molecules.{suffix}", ["generate", MODEL, *FAST]
    took = run([*words, "-n", str(N), "-o", str(path)], seconds)
    kept = len(frames_of(path))
    if kept < N:
        again = ["--append"] if path.exists() else []
        run([*words, "-n", str(N - kept), "--start", str(kept), "-o", str(path), *again])
    found = frames_of(path)
    wrong = "" if same(found, reference(folder.parent, suffix)) else f"{len(found)} structures, or others"
    left = litter(folder)
    return f"{kept} of {N}", wrong or (f"left behind: {', '.join(left)}" if left else ""), took


def reference(work: Path, suffix: str) -> list[Atoms]:
    """Returns what an undisturbed ``generate`` writes in this format."""
    path = work / f"whole.{suffix}"
    if not path.exists():
        run(["generate", MODEL, *FAST, "-n", str(N), "-o", str(path)])
    return frames_of(path)


def score(folder: Path, suffix: str, seconds: float | None) -> tuple[str, str, float]:
    """Kills ``score``, appends what is missing, and returns what was kept and what is wrong."""
    reference(folder.parent, "extxyz")
    source, path = folder.parent / "whole.extxyz", folder / f"scores.{suffix}"
    words = ["score", MODEL, str(source), "--trace", "hutchinson", "--draws", "1", "--tolerance", "1e9", "--batch-size"]
    words += ["4", "--steps", "8"]
    took = run([*words, "-o", str(path)], seconds)
    kept = len(scores_of(path))
    if kept < N:
        again = ["--append"] if path.exists() else []
        run([*words, "--start", str(kept), "-o", str(path), *again])
    whole = folder.parent / f"scores.{suffix}"
    if not whole.exists():
        run([*words, "-o", str(whole)])
    here, there = scores_of(path), scores_of(whole)
    # A batch that begins elsewhere rounds otherwise.
    wrong = "" if len(here) == len(there) and np.allclose(here, there, atol=1e-2) else f"{len(here)} rows, or others"
    left = litter(folder)
    return f"{kept} of {N}", wrong or (f"left behind: {', '.join(left)}" if left else ""), took


def scores_of(path: Path) -> list[float]:
    """Returns the log-likelihoods in a file that ``score`` wrote."""
    if path.suffix == ".csv":
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return [float(row["log_likelihood"]) for row in csv.DictReader(file)]
    return [float(atoms.info["log_likelihood"]) for atoms in frames_of(path)]


def train(folder: Path, suffix: str, seconds: float | None) -> tuple[str, str, float]:
    """Kills ``train``, resumes it, and returns what was kept and what is wrong."""
    del suffix
    data = Path(__file__).parents[2] / "tests" / "data" / "qm9_sample.npz"
    words = ["train", "--data", str(data), "--qm9-split", "--hidden", "16", "--layers", "2", "--steps", "120"]
    words += ["--batch-size", "16", "--validation-size", "4", "--checkpoint-every", "10", "--log-every", "10"]
    words += ["--validate-every", "60", "--device", "cpu"]
    out, whole = folder / "run", folder.parent / "whole_run"
    took = run([*words, "--out", str(out)], seconds)
    rows = len(log_rows(out))
    if (out / "state.pt").exists():
        run(["train", "--resume", str(out)])
    elif out.exists():  # nothing was saved yet
        run([*words, "--out", str(folder / "anew")])
        out = folder / "anew"
    else:
        run([*words, "--out", str(out)])
    if not whole.exists():
        run([*words, "--out", str(whole)])
    ours, theirs = (torch.load(run_ / "state.pt", weights_only=True)["model"] for run_ in (out, whole))
    wrong = "" if all(torch.equal(ours[name], theirs[name]) for name in theirs) else "other weights"
    wrong = wrong or ("" if log_rows(out) == log_rows(whole) else "another log")
    left = litter(out)
    return f"{rows} of 12 rows", wrong or (f"left behind: {', '.join(left)}" if left else ""), took


def log_rows(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's log, without times."""
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in UNTIMED} for row in csv.DictReader(file)]


Verb = Callable[[Path, str, float | None], tuple[str, str, float]]
VERBS: dict[str, tuple[Verb, str]] = {
    "generate .extxyz": (generate, "extxyz"),
    "generate .traj": (generate, "traj"),
    "generate .db": (generate, "db"),
    "score .csv": (score, "csv"),
    "score .extxyz": (score, "extxyz"),
    "train": (train, ""),
}


def kill(what: str, count: int, seed: int, work: Path) -> list[Killed]:
    """Kills a command at ``count`` random moments of its life."""
    verb, suffix = VERBS[what]
    rng = random.Random(f"{what} {seed}")
    first = work / "undisturbed"
    first.mkdir()
    _, wrong, whole = verb(first, suffix, None)
    if wrong:
        return [Killed(what, seed, whole, "all, undisturbed", wrong)]
    found = []
    for k in range(count):
        folder = work / f"killed{k}"
        folder.mkdir()
        after = rng.uniform(0.0, whole)
        try:
            kept, wrong, _ = verb(folder, suffix, after)
        except (RuntimeError, ValueError, KeyError) as error:
            kept, wrong = "?", " ".join(str(error).split())
        found.append(Killed(what, seed, round(after, 2), kept, wrong))
    return found
