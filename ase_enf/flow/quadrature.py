"""Clenshaw-Curtis quadrature on [0, 1] with an error estimate from its nested rules."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Doubling the intervals is assumed to cut the error by the factor that the doubling before did, within these bounds;
# tests/test_honesty.py compares the resulting estimate with the true error along the paths of the shipped flows.
LEAST_REDUCTION, REDUCTION = 3.0, 6.0


class Integral(NamedTuple):
    """An integral and its estimated error."""

    value: Tensor  # (...)
    error: Tensor  # (...), of the absolute value


def clenshaw_curtis(intervals: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rule that integrates the Chebyshev interpolant on [0, 1] (Clenshaw and Curtis 1960).

    Nodes are ½ − ½ cos(kπ/n), k = 0..n, denser at both ends; those of n/2 intervals are among those of n. The rule is
    exact for polynomials of degree n and in practice as accurate as Gauss's on as many nodes (Trefethen 2008).

    Args:
        intervals: Even number n of intervals.

    Returns:
        Nodes in rising order and weights, shape (n + 1,) each, float64.

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
    """Integrates over [0, 1] what is known at the nodes of :func:`clenshaw_curtis`, with an error estimate.

    If doubling the nodes cuts the error c-fold, the error of Q_n is at most |Q_n − Q_{n/2}| / (c − 1). The factor c is
    read off two differences, c = |Q_{n/2} − Q_{n/4}| / |Q_n − Q_{n/2}|, and kept between 3, as where a narrow peak or a
    kink is just resolved, and 6 (``REDUCTION``). From the coarser difference alone, with c = 6, the error is at most
    |Q_{n/2} − Q_{n/4}| / 30. The larger of the two bounds is returned, because two differences are seldom both small
    by accident. A feature between the nodes of all three rules stays unseen.

    Args:
        values: Shape (n + 1, ...), n divisible by 8.

    Raises:
        ValueError: If n is not.

    Example:
        >>> integrate(torch.exp(clenshaw_curtis(8)[0])).value  # e − 1
        tensor(1.7183, dtype=torch.float64)
    """
    check_intervals(len(values) - 1)
    fine, half, quarter = (rule(values[::step]) for step in (1, 2, 4))
    last, before = (fine - half).abs(), (half - quarter).abs()
    # before / last may be 0 / 0; an error that is not finite has to stay so.
    seen = torch.where(last > 0, before / last, REDUCTION).clamp(LEAST_REDUCTION, REDUCTION)
    return Integral(fine, torch.maximum(last / (seen - 1), before / (REDUCTION * (REDUCTION - 1))))


def check_intervals(intervals: int) -> None:
    """Raises a ``ValueError`` unless so many intervals have the nested rules that :func:`integrate` needs."""
    if intervals < 8 or intervals % 8:
        raise ValueError(f"quadrature intervals={intervals}: must be a positive multiple of 8")


def rule(values: Tensor) -> Tensor:
    """Integrates over [0, 1] what is known at the nodes of :func:`clenshaw_curtis`, shape (n + 1, ...) with n even."""
    weights = clenshaw_curtis(len(values) - 1)[1].to(values)
    return torch.tensordot(weights, values, dims=1)
