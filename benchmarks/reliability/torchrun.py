"""Trainings of two processes, of which one is killed by SIGKILL: the other ends as well, and the run is resumed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ase_enf.training.folder import STATE_FILE
from ase_enf.training.log import LOG_FILE, read_log
from benchmarks.reliability.kill import CHECKPOINT, Task, litter, train

RANKS, STEPS = 2, 200
LIMIT = 60.0  # seconds in which everything must have ended
PATIENCE = 600.0  # seconds for starts and whole trainings, which wait for other work of the machine

TORCHRUN_NOTES = (
    f"`torchrun --standalone --nproc_per_node={RANKS} -m ase_enf train` on a CPU (gloo): {STEPS} steps of a tiny flow, "
    f"a checkpoint every {CHECKPOINT}. At a random moment between the start of the log and the last step, one process "
    "is ended by SIGKILL: that of rank 0 and that of rank 1 in turn. Everything must then end by itself; `--resume`, "
    "or the same command again where nothing was saved yet, goes on by torchrun.\n\n"
    f"Wrong: a process that lives {LIMIT:.0f} s later; not exactly one line of `ase-enf`, with how to continue, or a "
    "traceback of its own; half-written files or a lock left behind when the resumed run has ended; "
    "weights or log rows other than those of an undisturbed run of as many processes. Torchrun adds about {lines} "
    "lines of its own: its traceback, and which process failed first."
)


class Lost(NamedTuple):
    """What came of the kill of one process."""

    rank: int
    after: float  # seconds of training
    saved: bool  # whether there was something to resume
    seconds: float  # until all processes had ended
    lines: int  # of the whole output after the kill
    wrong: str  # "" where all is as if nothing had happened


def start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts ``ase-enf`` by torchrun, with its output in a file."""
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*module, "-m", "ase_enf", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def ranks_of(supervisor: int) -> dict[int, int]:
    """Returns rank → process for the children of torchrun that are alive."""
    found = {}
    for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(OSError):  # it ends at this moment
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry.removeprefix(b"RANK="))] = int(child)
    return found


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Waits for a condition, and returns how long that took.

    Raises:
        TimeoutError: If it does not come true.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what} after {seconds:.0f} s")
        time.sleep(0.01)
    return time.monotonic() - began


def end(run: subprocess.Popen[bytes], ranks: dict[int, int]) -> int:
    """Kills what is left of a training, and returns how many processes that were."""
    left = [process for process in (run.pid, *ranks.values()) if is_alive(process)]
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    run.wait()
    return len(left)


def is_alive(process: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finish(words: Sequence[str], log: Path) -> None:
    """Runs a command by torchrun to its end.

    Raises:
        RuntimeError: If it fails.
        TimeoutError: If it hangs.
    """
    run = start(words, log)
    try:
        wait_for(lambda: run.poll() is not None, PATIENCE, "not at an end")
    finally:
        end(run, ranks_of(run.pid) if run.poll() is None else {})
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {log.read_text()[-300:]}")


def faults(said: str) -> str:
    """Returns what is wrong with the output of a training of which a process was killed; "" if nothing is."""
    ours = [line for line in said.splitlines() if line.startswith("ase-enf: ")]
    if len(ours) != 1:
        return f"{len(ours)} lines of ase-enf: {' / '.join(ours)}"
    if "--resume" not in ours[0]:
        return f"does not say how to continue: {ours[0]}"
    tracebacks = said.count("Traceback (most recent call last)")
    return f"{tracebacks} tracebacks" if tracebacks > 1 else ""  # one is torchrun's


def kills(count: int, seed: int, work: Path) -> list[Lost]:
    """Kills one process of a training at ``count`` random moments, and resumes the training each time.

    If the training has already ended at a moment, another moment is drawn.

    Args:
        count: Number of kills, of rank 0 and rank 1 in turn.
        seed: Seed of their moments.
        work: An empty folder.
    """
    task, rng = train(STEPS, work), random.Random(seed)
    whole, log = work / "whole", work / "said.txt"
    whole.mkdir()
    finish(task.begin(whole), log)
    seconds = float(read_log(whole / "run" / LOG_FILE)["elapsed_s"][-1])
    found: list[Lost] = []
    while len(found) < count:
        folder = work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lost = _kill(task, folder, whole, len(found) % RANKS, rng.uniform(0.0, seconds), log)
        if lost:
            print(lost, flush=True)
            found.append(lost)
    return found


def _kill(task: Task, folder: Path, whole: Path, rank: int, after: float, log: Path) -> Lost | None:
    """Kills one process once; returns None if the training had come to its last step."""
    run = start(task.begin(folder), log)
    wait_for((folder / "run" / LOG_FILE).exists, PATIENCE, "no training begun")
    time.sleep(after)
    ranks = ranks_of(run.pid)
    if len(ranks) == RANKS:
        os.kill(ranks[rank], signal.SIGKILL)
    seconds, wrong = LIMIT, ""
    with contextlib.suppress(TimeoutError):
        seconds = wait_for(lambda: run.poll() is not None and not any(map(is_alive, ranks.values())), LIMIT, "alive")
    if left := end(run, ranks):
        wrong = f"{left} processes were alive after {LIMIT:.0f} s"
    if len(ranks) < RANKS or STEPS in read_log(folder / "run" / LOG_FILE)["step"]:
        return None
    said = log.read_text()
    wrong = wrong or faults(said)
    saved = (folder / "run" / STATE_FILE).exists()
    try:
        finish(task.go_on(folder) or [], log)
        wrong = wrong or task.differs(folder, whole)
        if found := litter(folder):
            wrong = wrong or f"left behind: {', '.join(found)}"
    except (RuntimeError, TimeoutError, ValueError, KeyError, OSError) as error:
        wrong = wrong or " ".join(str(error).split())
    return Lost(rank, round(after, 2), saved, round(seconds, 2), len(said.splitlines()), wrong)
