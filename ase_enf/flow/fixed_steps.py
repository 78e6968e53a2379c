"""Fixed steps for an ODE, which never wait for the host: a GPU has the next step to do before it is done with this."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# (t, y) → dy/dt
Derivative = Callable[[Tensor, Tensor], Tensor]


def euler(f: Derivative, start: Tensor, end: Tensor, y: Tensor) -> Tensor:
    """Returns Δy of one step by Euler's method, of first order."""
    return (end - start) * f(start, y)


def midpoint(f: Derivative, start: Tensor, end: Tensor, y: Tensor) -> Tensor:
    """Returns Δy of one step by the midpoint method, of second order."""
    step = end - start
    half = 0.5 * step
    return step * f(start + half, y + half * f(start, y))


def rk4(f: Derivative, start: Tensor, end: Tensor, y: Tensor) -> Tensor:
    """Returns Δy of one step by the 3/8 rule, of fourth order (Kutta 1901)."""
    step = end - start
    k1 = f(start, y)
    k2 = f(start + step * (1 / 3), y + step * k1 * (1 / 3))
    k3 = f(start + step * (2 / 3), y + step * (k2 - k1 * (1 / 3)))
    k4 = f(end, y + step * (k1 - k2 + k3))
    return (k1 + 3 * (k2 + k3) + k4) * step * 0.125


STEPS = {"euler": euler, "midpoint": midpoint, "rk4": rk4}


def refine(grid: Tensor, times: Tensor) -> Tensor:
    """Returns a grid between the first and the last of some times that stops at all of them, in their direction.

    Args:
        grid: Times of steps, shape (S,).
        times: Monotonic, shape (T,).

    Example:
        >>> refine(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.8, 0.2])).tolist()
        [0.800000011920929, 0.5, 0.20000000298023224]
    """
    low, high = times.min(), times.max()
    together = torch.cat([grid[(grid > low) & (grid < high)], times]).unique()
    return together if times[0] < times[-1] else together.flip(0)


def solve(f: Derivative, y: Tensor, times: Tensor, grid: Tensor, method: str) -> list[Tensor]:
    """Integrates dy/dt = f(t, y) by the steps of a grid, which is refined by the times that are asked for.

    Args:
        f: On the device of y.
        y: The state at the first time.
        times: When the state is wanted; monotonic, on the CPU, shape (T,).
        grid: Times of steps, on the CPU.
        method: "euler", "midpoint" or "rk4".

    Returns:
        The state at each of the times.

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
