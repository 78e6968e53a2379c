"""Input of a network for a distance: its square and, optionally, smooth functions of it that resolve bond lengths."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps the distance of eq. 9 differentiable where two atoms coincide (and on the diagonal).
DISTANCE_EPSILON = 1e-8


def pair_scalars(squared: Tensor, radial: int) -> Tensor:
    """Returns d² and K radial functions, ``b_k(d) = exp(−β (e^{−d} − μ_k)²)`` (Unke and Meuwly 2019, eq. 7).

    The K centres μ_k are spaced evenly from 0 to 1, and β = (2K/3)² makes neighbours overlap; in e^{−d}, centres are
    dense in the range of bond lengths.

    Args:
        squared: Squared distances d² in the units of the flow, shape (...).
        radial: Number K of functions.

    Returns:
        The scalars, shape (..., 1 + K).

    Example:
        >>> pair_scalars(torch.tensor([0.0, 4.0]), radial=2).shape
        torch.Size([2, 3])
    """
    if not radial:
        return squared.unsqueeze(-1)
    _, off, root = _off_centre(squared, radial)
    return torch.cat([squared.unsqueeze(-1), torch.exp(-(root * off).square())], dim=-1)


def pair_scalar_slopes(squared: Tensor, radial: int) -> Tensor:
    """Returns the derivatives of :func:`pair_scalars` with respect to d², shape (..., 1 + K)."""
    one = torch.ones_like(squared).unsqueeze(-1)
    if not radial:
        return one
    distance, off, root = _off_centre(squared, radial)
    by_distance = torch.exp(-distance) / distance  # −2 d(e^{−d}) / d(d²)
    slopes = root**2 * off * torch.exp(-(root * off).square()) * by_distance.unsqueeze(-1)
    return torch.cat([one, slopes], dim=-1)


def _off_centre(squared: Tensor, radial: int) -> tuple[Tensor, Tensor, float]:
    """Returns d, e^{−d} − μ_k and √β."""
    distance = torch.sqrt(squared + DISTANCE_EPSILON)
    centres = torch.linspace(0.0, 1.0, radial, dtype=squared.dtype, device=squared.device)
    return distance, torch.exp(-distance).unsqueeze(-1) - centres, 2.0 * radial / 3.0
