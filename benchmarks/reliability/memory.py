"""Peak memory of long requests, each in its own process, with a very small flow."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import NamedTuple

import numpy as np
from ase import Atoms

from ase_enf.flow.config import ENFConfig
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import igenerate
from ase_enf.scoring.score import score

COUNTS = {"score": (1_000, 10_000), "generate": (10_000, 100_000)}


class Peak(NamedTuple):
    """Peak memory of a process."""

    request: str
    molecules: int
    mib: float


def peaks() -> list[Peak]:
    """Measures every request at both of its sizes."""
    return [measured(request, count) for request, counts in COUNTS.items() for count in counts]


def measured(request: str, count: int) -> Peak:
    """Runs a request in its own process."""
    words = [sys.executable, "-m", "benchmarks.reliability.memory", request, str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return Peak(request, count, float(done.stdout.split()[-1]))


def main() -> None:
    """Runs a request and prints its peak memory in MiB."""
    request, count = sys.argv[1], int(sys.argv[2])
    flow = ENF(ENFConfig(features="none", hidden=4, layers=1, sizes={4: 1}))
    if request == "generate":
        for _ in igenerate(flow, count, solver=Solver("euler", steps=1)):
            pass
    else:
        rng = np.random.default_rng(0)
        structures = [Atoms("H4", rng.normal(size=(4, 3))) for _ in range(count)]
        assert len(score(flow, structures, solver=Solver("rk4", steps=4), max_stderr=1e9)) == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
