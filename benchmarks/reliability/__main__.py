"""What happens when things go wrong: ``python -m benchmarks.reliability fuzz kill memory load``.

``fuzz`` tries malformed inputs, ``--each`` of every kind; ``kill`` ends commands by SIGKILL at ``--kills`` random
moments each, and goes on with them; ``memory`` measures the peak of long requests, ``load`` time and memory
of loading damaged weights. What went wrong is listed with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import pandas as pd

from benchmarks.reliability.fuzz import KINDS, SECONDS, fuzz
from benchmarks.reliability.hostile import loads
from benchmarks.reliability.kill import VERBS, kill
from benchmarks.reliability.memory import peaks
from benchmarks.report import write_results


def main() -> None:
    """Runs the stages and writes ``results/reliability_STAGE``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=("fuzz", "kill", "memory", "load"))
    parser.add_argument("--each", type=int, default=400, help="malformed inputs of each kind (default: 400)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--kills", type=int, default=100, help="of each command (default: 100)")
    parser.add_argument("--commands", nargs="+", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if "fuzz" in options.stages:
        write_fuzz(options)
    if "kill" in options.stages:
        write_kills(options)
    if "memory" in options.stages:
        write_memory()
    if "load" in options.stages:
        write_load(options)


def write_fuzz(options: argparse.Namespace) -> None:
    """Tries malformed inputs of every kind."""
    rows, wrong = [], []
    for kind in options.kinds:
        ways, found = fuzz(kind, options.each, options.seed)
        wrong += found
        rows.append({"kind": kind, "inputs": options.each, **ways, "wrong": len(found)})
        print(rows[-1], *found, sep="\n", flush=True)
    notes = (
        "Calls that were done, refused in one line (exit code 2 of the command line; ValueError, TypeError or OSError "
        f"in Python), and wrong: a traceback, another exception or exit code, or no end within {SECONDS} s of the "
        "processor. Seeds "
        f"{options.seed} to {options.seed + options.each - 1} of each kind."
    )
    listed = [f"* {f.kind}, seed {f.seed}: {f.tried}: {f.happened}" for f in wrong]
    table = pd.DataFrame(rows).fillna(0).astype({name: int for name in ("inputs", "done", "refused", "wrong")})
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
    """Measures how damaged weights are refused."""
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
    """Kills every command."""
    found = []
    for what in options.commands:
        with tempfile.TemporaryDirectory() as work:
            found += kill(what, options.kills, options.seed, Path(work))
        print(*found[-options.kills :], sep="\n", flush=True)
    table = pd.DataFrame(found)
    counted = table.groupby("what", sort=False).agg(
        kills=("wrong", "size"), wrong=("wrong", lambda w: int((w != "").sum()))
    )
    listed = [f"* {f.what}, killed after {f.after} s, kept {f.kept}: {f.wrong}" for f in found if f.wrong]
    notes = (
        "Commands ended by SIGKILL at a random moment and gone on with (`--append --start K`, `--resume`). "
        "Wrong: other structures, scores, weights or log rows than those of an undisturbed run, or files left behind."
    )
    write_results(
        counted.reset_index(),
        "reliability_kill",
        "Killed commands",
        "\n".join([notes, *([""] if listed else []), *listed]),
    )


if __name__ == "__main__":
    main()
