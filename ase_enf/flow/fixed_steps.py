"""Fixed-step ODE solvers that never wait for results, so a GPU receives the next step before it finishes this one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# (t, y) → dy/dt
Derivative = Callable[[Tensor, Tensor], Tensor]


def euler(f: Derivative, start: Tensor, end: Tensor, y: Tensor) -> Tensor:
    """Returns Δy of one step of Euler's method (first order)."""
    return (end - start) * f(start, y)


def midpoint(f: Derivative, start: Tensor, end: Tensor, y: Tensor) -> Tensor:
    """Returns Δy of one step of the midpoint method (second order)."""
    step = end - start
    half = 0.5 * step
    return step * f(start + half, y + half * f(start, y))


def rk4(f: Derivative, start: Tensor, end: Tensor, y: Tensor) -> Tensor:
    """Returns Δy of one step of the 3/8 rule (fourth order; Kutta 1901)."""
    step = end - start
    k1 = f(start, y)
    k2 = f(start + step * (1 / 3), y + step * k1 * (1 / 3))
    k3 = f(start + step * (2 / 3), y + step * (k2 - k1 * (1 / 3)))
    k4 = f(end, y + step * (k1 - k2 + k3))
    return (k1 + 3 * (k2 + k3) + k4) * step * 0.125


STEPS = {"euler": euler, "midpoint": midpoint, "rk4": rk4}
# A step of length h for y' = λ y, λ < 0, is stable if h |λ| is below this.
STABLE = {"euler": 2.0, "midpoint": 2.0, "rk4": 2.785}


def refine(grid: Tensor, times: Tensor) -> Tensor:
    """Returns the grid from the first to the last of ``times`` that stops at all of them, in their direction.

    Args:
        grid: Times of steps, shape (S,).
        times: Times to add, monotonic, shape (T,).

    Returns:
        Times of steps, monotonic.

    Example:
        >>> refine(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.8, 0.2])).tolist()
        [0.800000011920929, 0.5, 0.20000000298023224]
    """
    low, high = times.min(), times.max()
    together = torch.cat([grid[(grid > low) & (grid < high)], times]).unique()
    return together if times[0] < times[-1] else together.flip(0)


def longest_steps(grid: Tensor, times: Tensor) -> Tensor:
    """Returns, for each of ``times``, the longer of the two steps that end and begin there on the refined grid.

    Args:
        grid: Times of steps before :func:`refine`, shape (S,).
        times: Ascending times, shape (T,), T > 1.

    Returns:
        Lengths of steps, shape (T,).

    Example:
        >>> longest_steps(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.25, 0.375, 1.0])).tolist()
        [0.125, 0.125, 0.5]
    """
    stops = refine(grid, times)
    steps = stops.diff()
    at = torch.searchsorted(stops, times)
    before, after = (at - 1).clamp(min=0), at.clamp(max=len(steps) - 1)
    return torch.maximum(steps[before], steps[after])


def solve(f: Derivative, y: Tensor, times: Tensor, grid: Tensor, method: str) -> list[Tensor]:
    """Integrates dy/dt = f(t, y) with the steps of a grid, to which the requested times are added.

    Args:
        f: The derivative, on the device of y.
        y: State at the first of the times.
        times: Times at which the state is requested, monotonic, on the CPU, shape (T,).
        grid: Times of steps, on the CPU, shape (S,).
        method: "euler", "midpoint" or "rk4".

    Returns:
        The state at each of the times, T in all.

    Example:
        >>> ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> y = solve(lambda t, y: 4 * t**3 + 0 * y, torch.zeros(1, dtype=torch.float64), ends, ends, "rk4")[-1]
        >>> round(y.item(), 2)  # ∫ 4 t³ dt
        1.0
    """
    stops = refine(grid.to(y.dtype), times.to(y.dtype))
    moments, wanted = stops.to(y.device), set(times.to(y.dtype).tolist())
    states = {stops[0].item(): y}
    for k, (_, time) in enumerate(pairwise(stops.tolist())):
        y = y + STEPS[method](f, moments[k], moments[k + 1], y)
        if time in wanted:
            states[time] = y
    return [states[time] for time in times.to(y.dtype).tolist()]
