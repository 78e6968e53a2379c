"""Commands that are killed by SIGKILL at random moments, continued, and compared with an undisturbed run."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from ase.io.formats import UnknownFileTypeError

import ase_enf
from ase_enf.atoms import io
from ase_enf.atoms.io import write_structures
from ase_enf.cli.outputs import GrowingTable
from ase_enf.data import qm9, thermal
from ase_enf.data.walkers import Walkers
from ase_enf.ensemble import study
from ase_enf.training import loop
from ase_enf.training.config import TrainConfig
from benchmarks.reliability.forked import Counters, run

MODEL = "dw4"
MOLECULES, ROWS, BATCH = 64, 20, 4
FLUSH = 0.02  # seconds between two flushes, where a user has 1 (.db) or 30 (.traj, .json)
CHECKPOINT, SWEEPS, PART = 10, 10, 4  # steps, sweeps and draws between two saves; 500, 100 and 500 by default
UNTIMED = ("examples_per_s", "elapsed_s")
GENERATED = ("extxyz", "xyz", "db", "traj")
SCORED = ("csv", "extxyz", "db", "traj")
IN_PLACE = ("extxyz", "db", "traj")

KILL_NOTES = (
    "Commands ended by SIGKILL at random moments of their work, gone on with (`--append --start K`, `--resume`, or the "
    "same command again for `boltzmann` and for scores in place), and compared with an undisturbed run. Each is a "
    "child of a process that has imported everything: no kill is spent on the seconds of imports, in which there is "
    f"nothing to lose. The tasks are tiny, and save accordingly often: `.db` and `.traj` are flushed every {FLUSH} s "
    f"(1 s and 30 s for a user), checkpoints are {CHECKPOINT} steps apart (500), states of the walkers {SWEEPS} sweeps "
    f"(100), parts of the draws {PART} (500). In place: the output is the file that is scored, {ROWS} molecules of 3 "
    "atoms by `qm9-small`; all else is `dw4`, or trained by the command.\n\n"
    "Lost: work that was done a second time, the most of any kill; draws of `boltzmann` are counted when their part is "
    "finished. Wrong: other structures, scores (by more than 0.001 "
    "nats), weights, log rows or reports than those of the undisturbed run; more lost than one such interval (one "
    f"structure of `.extxyz` and `.xyz`, a batch of {BATCH} rows of `.csv`, {4 * BATCH} structures of `.db` and "
    "`.traj`); a file that is scored in place and, after the kill, neither what it was nor whole with all scores; or "
    "half-written files left behind."
)


class Killed(NamedTuple):
    """Result of killing one command."""

    what: str
    after: float  # seconds
    done: str  # work at the kill
    lost: dict[str, int]  # what of that was done once more
    wrong: str  # "" where all is as if nothing had happened


def worst(many: Sequence[Killed]) -> str:
    """Returns, as text, the largest loss in one of many kills."""
    units = dict.fromkeys(unit for one in many for unit in one.lost)
    return ", ".join(f"{max(one.lost.get(unit, 0) for one in many)} {unit}" for unit in units)


class Task(NamedTuple):
    """A command that is killed.

    Args:
        counters: Counters of its work.
        work: Name of each unit of work → the most of it that a kill may lose.
        begin: Folder → words of the command that writes into it.
        go_on: Folder → words of the command that continues there; None if nothing is left to do.
        differs: Two folders → how they differ, as text; "" if they do not.
    """

    counters: Counters
    work: dict[str, int]
    begin: Callable[[Path], list[str]]
    go_on: Callable[[Path], list[str] | None]
    differs: Callable[[Path, Path], str]


def hasten() -> None:
    """Makes saves and flushes frequent, so that kills of short work fall between many of them."""
    io.COMMIT_SECONDS = io.FLUSH_SECONDS = FLUSH
    io.FlushClock.due = lambda clock: clock.age() > FLUSH
    thermal.SAVE_EVERY, study.PART = SWEEPS, PART
    thermal.run = partial(thermal.run, leapfrog=6, burn_in=50)
    study.default_training = lambda *_: TrainConfig(
        features="given", hidden=16, layers=2, batch_size=16, steps=60, validation_size=4, checkpoint_every=CHECKPOINT,
        log_every=CHECKPOINT, validate_every=60, warmup=5,
    )  # fmt: skip


def frames_of(path: Path) -> list[Atoms]:
    """Returns the structures of a file; none if it does not exist or is empty."""
    try:
        return read(path, index=":") if path.exists() and path.stat().st_size else []
    except (UnknownFileTypeError, StopIteration):
        return []


def same(one: Sequence[Atoms], other: Sequence[Atoms]) -> bool:
    """Whether two lists hold the same structures, in order."""
    return len(one) == len(other) and all(
        (a.numbers == b.numbers).all() and np.allclose(a.positions, b.positions, atol=1e-6)
        for a, b in zip(one, other, strict=True)
    )


def generate(suffix: str, _: Path) -> Task:
    """``generate`` to a file of this ending."""

    def words(folder: Path, start: int = 0) -> list[str]:
        size = ["--steps", "8", "--churn", "0", "--batch-size", str(BATCH), "-n", str(MOLECULES - start)]
        return ["generate", MODEL, *size, "--start", str(start), "-o", str(folder / f"m.{suffix}")]

    def go_on(folder: Path) -> list[str] | None:
        kept = len(frames_of(folder / f"m.{suffix}"))
        return None if kept == MOLECULES else [*words(folder, kept), "--append"]

    def differs(one: Path, other: Path) -> str:
        here, there = (frames_of(folder / f"m.{suffix}") for folder in (one, other))
        return "" if same(here, there) else f"{len(here)} structures, or others"

    counters = Counters([(io.GrowingFile, "add", lambda *_: 1)])
    return Task(counters, {"molecules": _flush(suffix)}, words, go_on, differs)


def _flush(suffix: str) -> int:
    """Returns how many structures a kill may lose: the one being written, or two flushes of two batches each."""
    return 1 if suffix in ("extxyz", "xyz") else 4 * BATCH


def score(suffix: str, work: Path) -> Task:
    """``score`` to a file of this ending."""
    source = work / "source.extxyz"
    flat = np.random.default_rng(0).normal(size=(ROWS, 4, 3)) * [2.0, 2.0, 0.0]
    write(source, [Atoms("X4", positions) for positions in flat])

    def words(folder: Path, start: int = 0) -> list[str]:
        quick = ["--trace", "hutchinson", "--importance-samples", "1", "--max-stderr", "1e9", "--steps", "2"]
        place = ["--batch-size", str(BATCH), "--start", str(start), "-o", str(folder / f"s.{suffix}")]
        return ["score", MODEL, str(source), *quick, *place]

    def go_on(folder: Path) -> list[str] | None:
        kept = len(scores_of(folder / f"s.{suffix}"))
        return None if kept == ROWS else [*words(folder, kept), "--append"]

    def differs(one: Path, other: Path) -> str:
        here, there = (scores_of(folder / f"s.{suffix}") for folder in (one, other))
        # Rounding differs if a batch begins at another structure.
        alike = len(here) == len(there) and np.allclose(here, there, atol=1e-3)
        return "" if alike else f"{len(here)} rows, or others"

    if suffix == "csv":
        counters = Counters([(GrowingTable, "add", lambda _, part: len(part))])
        return Task(counters, {"rows": BATCH}, words, go_on, differs)
    counters = Counters([(io.GrowingFile, "add", lambda *_: 1)])
    return Task(counters, {"rows": _flush(suffix)}, words, go_on, differs)


def score_in_place(suffix: str, work: Path) -> Task:
    """``score`` of a file of this ending that writes the scores into the same file."""
    source, rng = work / f"source.{suffix}", np.random.default_rng(0)
    frames = [molecule(name) for name in ("H2O", "HCN")] * (ROWS // 2)
    for atoms in frames:
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
    write_structures(source, frames)

    def words(folder: Path) -> list[str]:
        path = folder / f"s.{suffix}"
        if not path.exists():
            shutil.copyfile(source, path)
        quick = ["--trace", "hutchinson", "--probes", "1", "--importance-samples", "1", "--max-stderr", "1e9"]
        place = ["--steps", "2", "--batch-size", str(BATCH), "-o", str(path), "--overwrite"]
        return ["score", "qm9-small", str(path), *quick, *place, "--device", "cpu"]

    def go_on(folder: Path) -> list[str] | None:
        path = folder / f"s.{suffix}"
        if path.read_bytes() == source.read_bytes():
            return words(folder)
        if len(scores_of(path)) < ROWS:
            raise ValueError("the input is lost")
        return None

    def differs(one: Path, other: Path) -> str:
        here, there = (folder / f"s.{suffix}" for folder in (one, other))
        if not same(frames_of(here), frames_of(there)):
            return "other structures"
        alike = np.allclose(scores_of(here), scores_of(there), atol=1e-3)
        return "" if alike else "other scores"

    counters = Counters([(io.GrowingFile, "add", lambda *_: 1)])
    return Task(counters, {"rows": _flush(suffix)}, words, go_on, differs)


def scores_of(path: Path) -> list[float]:
    """Returns the log-likelihoods in a file that ``score`` wrote."""
    if path.suffix == ".csv":
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return [float(row["log_likelihood"]) for row in csv.DictReader(file)]
    frames = qm9.load(path) if path.suffix == ".db" and frames_of(path) else frames_of(path)  # ASE leaves info out
    return [float(atoms.info["enf_log_likelihood"]) for atoms in frames]


def train(steps: int, _: Path) -> Task:
    """``train``, with this many steps."""
    data = Path(ase_enf.__file__).parents[1] / "tests" / "data" / "qm9_sample.npz"

    def words(folder: Path) -> list[str]:
        small = ["--hidden", "16", "--layers", "2", "--batch-size", "8", "--validation-size", "2", "--device", "cpu"]
        often = ["--checkpoint-every", str(CHECKPOINT), "--log-every", str(CHECKPOINT), "--validate-every", "40"]
        source = ["--data", str(data), "--qm9-split", "--n-atoms", "15"]
        return ["train", *source, *small, *often, "--steps", str(steps), "--out", str(folder / "run")]

    def go_on(folder: Path) -> list[str] | None:
        saved = (folder / "run" / "state.pt").exists()
        return ["train", "--resume", str(folder / "run")] if saved else words(folder)

    def differs(one: Path, other: Path) -> str:
        ours, theirs = (torch.load(run_ / "run" / "state.pt", weights_only=True)["model"] for run_ in (one, other))
        if not all(torch.equal(ours[name], theirs[name]) for name in theirs):
            return "other weights"
        return "" if log_rows(one / "run") == log_rows(other / "run") else "another log"

    counters = Counters([(loop, "train_step", lambda *_: 1)])
    return Task(counters, {"steps": CHECKPOINT}, words, go_on, differs)


def log_rows(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of the log of a run, without times."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in UNTIMED} for row in csv.DictReader(file)]


def boltzmann(_: str, work: Path) -> Task:
    """``boltzmann``: walkers, training, draws and their weights."""
    source = work / "water.xyz"
    write(source, molecule("H2O"))

    def words(folder: Path) -> list[str]:
        return ["boltzmann", str(source), "-n", "32", "--draws", "12", "-o", str(folder / "study")]

    def differs(one: Path, other: Path) -> str:
        for name in ("thermal.extxyz", "samples.extxyz", "report.md"):
            if (one / "study" / name).read_bytes() != (other / "study" / name).read_bytes():
                return f"another {name}"
        return ""

    functions = [
        (Walkers, "sweep", lambda *_, **__: 1),
        (loop, "train_step", lambda *_: 1),
        (study, "reweight", lambda _, __, count, *___, **____: count),
    ]
    return Task(Counters(functions), {"sweeps": SWEEPS, "steps": CHECKPOINT, "draws": PART}, words, words, differs)


COMMANDS: dict[str, Callable[[Path], Task]] = {
    **{f"generate .{suffix}": partial(generate, suffix) for suffix in GENERATED},
    **{f"score .{suffix}": partial(score, suffix) for suffix in SCORED},
    **{f"score .{suffix} in place": partial(score_in_place, suffix) for suffix in IN_PLACE},
    "train": partial(train, 80),
    "boltzmann": partial(boltzmann, ""),
}


def litter(folder: Path) -> list[str]:
    """Returns temporary files that a kill has left behind."""
    ends, parts = (".part", "-journal", ".lock"), (".part.", ".unfinished-")
    names = [path.name for path in folder.rglob("*")]
    return sorted(name for name in names if name.endswith(ends) or any(part in name for part in parts))


def kill(what: str, count: int, seed: int, work: Path, log: Path | None = None) -> list[Killed]:
    """Kills a command at ``count`` random moments and continues it each time.

    If the command has already ended at a moment, another moment is drawn.

    Args:
        what: A key of ``COMMANDS``.
        count: Number of kills.
        seed: Seed of their moments.
        work: An empty folder.
        log: A file of JSON lines; a command with at least as many kills in it is not run again.
    """
    if log and log.exists():
        known = [Killed(**json.loads(line)) for line in log.read_text().splitlines()]
        if len(ours := [one for one in known if one.what == what]) >= count:
            return ours
    found = _kill(what, count, seed, work)
    if log:
        with log.open("a") as file:
            file.writelines(f"{json.dumps(one._asdict())}\n" for one in found)
    return found


def _kill(what: str, count: int, seed: int, work: Path) -> list[Killed]:
    task, log = COMMANDS[what](work), work / "said.txt"
    rng = random.Random(f"{what} {seed}")
    whole = work / "whole"
    whole.mkdir()
    first = run(task.begin(whole), task.counters, log)
    found: list[Killed] = []
    while len(found) < count:
        folder, after = work / "killed", rng.uniform(0.0, first.seconds)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        cut = run(task.begin(folder), task.counters, log, after)
        if not cut.killed:
            continue
        done = ", ".join(f"{n} of {of} {unit}" for n, of, unit in zip(cut.counts, first.counts, task.work, strict=True))
        try:
            lost, wrong = gone_on(task, folder, whole, log, cut.counts, first.counts)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            lost, wrong = {}, " ".join(str(error).split())
        found.append(Killed(what, round(after, 3), done, lost, wrong))
    return found


def gone_on(
    task: Task, folder: Path, whole: Path, log: Path, cut: tuple[int, ...], first: tuple[int, ...]
) -> tuple[dict[str, int], str]:
    """Continues where a command was killed, and returns what was lost and any fault."""
    words = task.go_on(folder)
    more = run(words, task.counters, log).counts if words else (0,) * len(cut)
    # A unit may be written but not counted yet, or vice versa.
    lost = {unit: max(a + b - c, 0) for unit, a, b, c in zip(task.work, cut, more, first, strict=True)}
    wrong = task.differs(folder, whole)
    if left := litter(folder):
        wrong = wrong or f"left behind: {', '.join(left)}"
    for unit, most in task.work.items():
        if lost[unit] > most:
            wrong = wrong or f"{lost[unit]} {unit} lost, more than {most}"
    return lost, wrong
