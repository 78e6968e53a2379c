"""Clenshaw-Curtis quadrature on [0, 1] with an error estimate from its nested rules."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Doubling the intervals is assumed to reduce the error by the same factor as the previous doubling, within these
# bounds; tests/test_honesty.py compares the resulting estimate with the true error on paths of the shipped flows.
LEAST_REDUCTION, REDUCTION = 3.0, 6.0
# Factor for three times the intervals: that of second order.
REDUCTION_BY_THIRDS = 9.0


class Integral(NamedTuple):
    """An integral and its estimated error."""

    value: Tensor  # (...)
    error: Tensor  # (...), not negative


def clenshaw_curtis(intervals: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rule that integrates the Chebyshev interpolant on [0, 1] (Clenshaw and Curtis 1960).

    Nodes are ½ − ½ cos(kπ/n), k = 0..n, denser at both ends; those of n/2 intervals are among those of n. The rule is
    exact for polynomials of degree n and in practice as accurate as Gauss's with as many nodes (Trefethen 2008).

    Args:
        intervals: Even number n of intervals.

    Returns:
        Nodes in ascending order and weights, shape (n + 1,) each, float64.

    Raises:
        ValueError: If n is odd or not positive.

    Example:
        >>> nodes, weights = clenshaw_curtis(8)
        >>> f"{(weights * nodes**8).sum():.15f}"  # 1/9
        '0.111111111111111'
    """
    if intervals < 2 or intervals % 2:
        raise ValueError(f"quadrature intervals={intervals}: must be even and positive")
    angle = torch.arange(intervals + 1, dtype=torch.float64) * (math.pi / intervals)
    order = torch.arange(1, intervals // 2 + 1, dtype=torch.float64)
    coefficient = 2.0 / (4.0 * order.square() - 1.0)
    coefficient[-1] /= 2.0
    weights = (1.0 - torch.cos(2.0 * angle[:, None] * order) @ coefficient) / intervals
    weights[[0, -1]] /= 2.0
    # sin² keeps all digits near 0, where cos would lose them.
    return torch.sin(angle / 2.0).square(), weights


def integrate(values: Tensor) -> Integral:
    """Integrates over [0, 1] from values at the nodes of :func:`clenshaw_curtis`, and estimates the error.

    If doubling the intervals reduces the error c-fold, the error of Q_n is at most |Q_n − Q_{n/2}| / (c − 1). Three
    bounds follow:

    * with c = |Q_{n/2} − Q_{n/4}| / |Q_n − Q_{n/2}|, kept between 3 (a peak or kink that is just resolved) and 6;
    * from the coarser difference alone, with c = 6: |Q_{n/2} − Q_{n/4}| / 30;
    * if 6 divides n, from the rule on every third node: |Q_n − Q_{n/3}| / 8.

    The largest is returned, because one difference may be small by accident, but rarely all of them: those to n/2 and
    n/4 sometimes are, for a feature narrower than the distance of the nodes. A feature between the nodes stays unseen.

    Args:
        values: Values at the nodes, shape (n + 1, ...), n divisible by 8.

    Returns:
        Integral and estimated error, shape (...) each.

    Raises:
        ValueError: If n is not a positive multiple of 8.

    Example:
        >>> integrate(torch.exp(clenshaw_curtis(8)[0])).value  # e − 1
        tensor(1.7183, dtype=torch.float64)
    """
    check_intervals(len(values) - 1)
    fine, half, quarter = (rule(values[::step]) for step in (1, 2, 4))
    last, before = (fine - half).abs(), (half - quarter).abs()
    # before / last may be 0 / 0, but an error that is not finite must stay so.
    seen = torch.where(last > 0, before / last, REDUCTION).clamp(LEAST_REDUCTION, REDUCTION)
    error = torch.maximum(last / (seen - 1), before / (REDUCTION * (REDUCTION - 1)))
    if (len(values) - 1) % 6 == 0:
        error = torch.maximum(error, (fine - rule(values[::3])).abs() / (REDUCTION_BY_THIRDS - 1))
    return Integral(fine, error)


def check_intervals(intervals: int) -> None:
    """Raises ``ValueError`` if a number of intervals lacks the nested rules that :func:`integrate` needs."""
    if intervals < 8 or intervals % 8:
        raise ValueError(f"quadrature intervals={intervals}: must be a positive multiple of 8")


def rule(values: Tensor) -> Tensor:
    """Integrates over [0, 1] from values (n + 1, ...), n even, at the nodes of :func:`clenshaw_curtis`."""
    weights = clenshaw_curtis(len(values) - 1)[1].to(values)
    return torch.tensordot(weights, values, dims=1)
