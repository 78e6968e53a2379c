"""One row of the report, and the standard errors of fractions and ratios."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Metric(NamedTuple):
    """One row of the report.

    Attributes:
        metric: Name.
        value: The figure; NaN when the denominator is 0.
        stderr: One standard error of it, over the structures; NaN where it cannot be estimated.
        denominator: What was divided by: the number of structures, atoms or distances.
        definition: Numerator, denominator and standard error in words.
    """

    metric: str
    value: float
    stderr: float
    denominator: int
    definition: str


def fraction(name: str, successes: NDArray[np.bool_], definition: str) -> Metric:
    """The fraction of independent structures that succeed, with the binomial standard error √(p (1 − p) / n)."""
    n = len(successes)
    p = ratio(successes.sum(), n)
    return Metric(name, p, float(np.sqrt(p * (1 - p) / n)) if n else np.nan, n, f"{definition}; binomial stderr")


def ratio(numerator: float, denominator: float) -> float:
    """The quotient; NaN when the denominator is 0."""
    return float(numerator / denominator) if denominator else np.nan


def ratio_stderr(sums: NDArray[np.number], sizes: NDArray[np.number]) -> float:
    """Standard error of Σ_i s_i / Σ_i n_i over independent i; NaN for fewer than two."""
    n, total = len(sums), sizes.sum()
    if n < 2 or not total:
        return np.nan
    residual = sums - sums.sum() / total * sizes
    return float(np.sqrt(n / (n - 1) * np.sum(residual**2)) / total)
