"""Time and memory that ``load`` takes to refuse damaged weights, as made by the kind "weights" of ``fuzz``."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.reliability.fuzz import DONE, REFUSED, flow, weights


class Load(NamedTuple):
    """Result for many damaged files."""

    files: int
    loaded: int
    refused: int
    longest: float  # seconds of the slowest one
    more: float  # MiB by which the peak memory of the process grew


def loads(count: int, first: int) -> Load:
    """Loads damaged files, with seeds from ``first`` on."""
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
