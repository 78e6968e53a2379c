"""One row of the report, and the standard errors of fractions and ratios."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Metric(NamedTuple):
    """One row of the report.

    Attributes:
        metric: Name of the metric.
        value: Its value; NaN if the denominator is 0.
        stderr: Its standard error over the structures; NaN where it cannot be estimated.
        denominator: The number of structures, atoms or distances that it is a fraction of.
        definition: Numerator, denominator and standard error in words.
    """

    metric: str
    value: float
    stderr: float
    denominator: int
    definition: str


def fraction(name: str, successes: NDArray[np.bool_], definition: str) -> Metric:
    """Returns the fraction of structures that succeed, with the binomial standard error √(p (1 − p) / n).

    Args:
        name: Name of the metric.
        successes: Whether each of n structures succeeds, shape (n,).
        definition: Numerator and denominator in words.
    """
    n = len(successes)
    p = ratio(successes.sum(), n)
    return Metric(name, p, float(np.sqrt(p * (1 - p) / n)) if n else np.nan, n, f"{definition}; binomial stderr")


def ratio(numerator: float, denominator: float) -> float:
    """Returns the quotient; NaN if the denominator is 0."""
    return float(numerator / denominator) if denominator else np.nan


def ratio_stderr(sums: NDArray[np.number], sizes: NDArray[np.number]) -> float:
    """Returns the standard error of Σ_i s_i / Σ_i n_i over N independent structures i.

    √(N/(N−1) Σ_i (s_i − R n_i)²) / Σ_i n_i,  R = Σ_i s_i / Σ_i n_i (Cochran 1977, section 6.3)

    Args:
        sums: s_i, shape (N,).
        sizes: n_i, shape (N,).

    Returns:
        The standard error; NaN if N < 2 or all sizes are 0.
    """
    n, total = len(sums), sizes.sum()
    if n < 2 or not total:
        return np.nan
    residual = sums - sums.sum() / total * sizes
    return float(np.sqrt(n / (n - 1) * np.sum(residual**2)) / total)
