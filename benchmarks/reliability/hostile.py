"""How long ``load`` takes to refuse damaged weights, and how much memory: those of the kind "weights" of the fuzz."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.reliability.fuzz import DONE, REFUSED, flow, weights


class Load(NamedTuple):
    """What many damaged files did together."""

    files: int
    loaded: int
    refused: int
    longest: float  # seconds of the slowest one
    more: float  # MiB by which the peak memory of the process grew


def loads(count: int, first: int) -> Load:
    """Loads so many damaged files, of the seeds from ``first`` on."""
    flow("dw4")  # what the first one imports is not counted
    before, times, ways = _peak(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            _, (call,) = weights(np.random.default_rng([seed, 3]), Path(folder))
            began = time.perf_counter()
            ways.append(call())
            times.append(time.perf_counter() - began)
    return Load(count, ways.count(DONE), ways.count(REFUSED), max(times), _peak() - before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
