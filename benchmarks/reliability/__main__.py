"""Behaviour under malformed input, kills and long requests: ``python -m benchmarks.reliability STAGE [STAGE ...]``.

``fuzz`` tries malformed inputs, ``--each`` of every kind. ``kill`` ends each command by SIGKILL at ``--kills`` random
moments and continues it. ``torchrun`` ends one of two processes that train together, ``--kills`` times, and resumes
the training. ``memory`` measures the peak memory of long requests, and ``load`` time and memory of loading
damaged weights. Failures are listed with the seed that reproduces them.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from statistics import median

import pandas as pd

from benchmarks.reliability.fuzz import DONE, KINDS, REFUSED, SECONDS, fuzz
from benchmarks.reliability.hostile import loads
from benchmarks.reliability.kill import COMMANDS, KILL_NOTES, Killed, hasten, kill, worst
from benchmarks.reliability.memory import peaks
from benchmarks.reliability.torchrun import TORCHRUN_NOTES, kills
from benchmarks.report import write_results


def main() -> None:
    """Runs the stages and writes ``results/reliability_STAGE``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=("fuzz", "kill", "torchrun", "memory", "load"))
    parser.add_argument("--each", type=int, default=400, help="malformed inputs of each kind (default: 400)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--log", type=Path, default=None, help="of fuzz or kill, which go on from there")
    parser.add_argument("--kills", type=int, default=10, help="of each command, or of torchrun (default: 10)")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if "fuzz" in options.stages:
        write_fuzz(options)
    if "kill" in options.stages:
        write_kills(options)
    if "torchrun" in options.stages:
        write_torchrun(options)
    if "memory" in options.stages:
        write_memory()
    if "load" in options.stages:
        write_load(options)


def write_fuzz(options: argparse.Namespace) -> None:
    """Tries malformed inputs of every kind."""
    rows, wrong = [], []
    for kind in options.kinds:
        ended = fuzz(kind, options.each, options.seed, options.log)
        found = [end for end in ended if end.how not in (DONE, REFUSED)]
        ways = Counter(end.how for end in ended if end.how in (DONE, REFUSED))
        wrong += found
        rows.append(
            {"kind": kind, "inputs": options.each, **{way: ways[way] for way in (DONE, REFUSED)}, "wrong": len(found)}
        )
        print(rows[-1], *found, sep="\n", flush=True)
    notes = (
        "Calls that were done, refused in one line (exit code 2 of the command line; ValueError, TypeError or OSError "
        "in Python, CalculatorError of a calculator), and wrong: a traceback, another exception or exit code, or no "
        f"end within {SECONDS} s of the processor. An input of some kinds is tried by two or three calls. Seeds "
        f"{options.seed} to {options.seed + options.each - 1} of each kind. Inputs that were taken out of the log "
        "(--log) after a fault of theirs was mended were tried again."
    )
    listed = [f"* {end.kind}, seed {end.seed}: {end.tried}: {end.how}" for end in wrong]
    table = pd.DataFrame(rows)
    write_results(table, "reliability_fuzz", "Malformed inputs", "\n".join([notes, *([""] if listed else []), *listed]))


def write_memory() -> None:
    """Measures the memory of long requests."""
    table = pd.DataFrame(
        [(peak.request, f"{peak.molecules:,}", f"{peak.mib:.0f}") for peak in peaks()],
        columns=["request", "molecules", "peak of the process, MiB"],
    )
    notes = (
        "A flow of 4 atoms and a few weights, so that what is kept of molecules is seen, not the network. `generate`: "
        "`igenerate`, molecule by molecule; `score`: a list of structures, and the table of all of them."
    )
    write_results(table, "reliability_memory", "Memory of long requests", notes)


def write_load(options: argparse.Namespace) -> None:
    """Measures time and memory of refusing damaged weights."""
    found = loads(options.each, options.seed)
    row = {
        "files": found.files,
        "loaded": found.loaded,
        "refused": found.refused,
        "wrong": found.files - found.loaded - found.refused,
        "slowest, s": f"{found.longest:.2f}",
        "memory that was added, MiB": f"{found.more:.0f}",
    }
    notes = (
        "Weights of `dw4` with flipped bits, cut off, with noise, text or repetition inside, or with a header of "
        "absurd values. Loaded: what is left is whole weights. "
        f"Seeds {options.seed} to {options.seed + options.each - 1}."
    )
    write_results(pd.DataFrame([row]), "reliability_load", "Damaged weights", notes)


def write_kills(options: argparse.Namespace) -> None:
    """Kills every command repeatedly, each time in a child of this process."""
    hasten()
    found: list[Killed] = []
    for what in options.commands:
        with tempfile.TemporaryDirectory() as work:
            found += kill(what, options.kills, options.seed, Path(work), options.log)
        print(*found[-options.kills :], sep="\n", flush=True)
    rows = []
    for what in options.commands:
        ours = [one for one in found if one.what == what]
        rows.append((what, len(ours), worst(ours), sum(one.wrong != "" for one in ours)))
    table = pd.DataFrame(rows, columns=["command", "kills", "lost at most", "wrong"])
    listed = [f"* {one.what}, killed after {one.after} s, {one.done} done: {one.wrong}" for one in found if one.wrong]
    write_results(
        table, "reliability_kill", "Killed commands", "\n".join([KILL_NOTES, *([""] if listed else []), *listed])
    )


def write_torchrun(options: argparse.Namespace) -> None:
    """Kills one of two processes that train together, repeatedly."""
    with tempfile.TemporaryDirectory() as work:
        found = kills(options.kills, options.seed, Path(work))
    rows = []
    for rank in sorted({one.rank for one in found}):
        ours = [one for one in found if one.rank == rank]
        seconds = [one.seconds for one in ours]
        row = (rank, len(ours), sum(not one.saved for one in ours), f"{median(seconds):.1f}", f"{max(seconds):.1f}")
        rows.append((*row, sum(one.wrong != "" for one in ours)))
    names = [
        "rank killed",
        "kills",
        "of these before the first save",
        "all had ended after, s: median",
        "at most",
        "wrong",
    ]
    listed = [f"* rank {one.rank}, killed after {one.after} s: {one.wrong}" for one in found if one.wrong]
    notes = TORCHRUN_NOTES.format(lines=round(median(one.lines for one in found)) - 1)
    table = pd.DataFrame(rows, columns=names)
    write_results(
        table, "reliability_torchrun", "One process killed", "\n".join([notes, *([""] if listed else []), *listed])
    )


if __name__ == "__main__":
    main()
