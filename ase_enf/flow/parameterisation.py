"""How the output of the network becomes a velocity: directly, as an endpoint, or as a denoised molecule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ase_enf.values import PARAMETERISATIONS, check_choice

# Added to t so that 1 / t stays finite at the data.
OFFSET = 0.02


class Coefficients(NamedTuple):
    """Scalars of t that turn the network's output into a velocity, each of shape () or (B, 1, 1).

    y = x_in x,  g = h_in h,  h^L, x^L = network[(g, context, t), y]
    dx/dt = x_skip x + x_out (x^L − y) with its mean removed,  dh/dt = h_skip h + h_out h^L
    """

    x_in: Tensor
    x_skip: Tensor
    x_out: Tensor
    h_in: Tensor
    h_skip: Tensor
    h_out: Tensor


@dataclass(frozen=True)
class Parameterisation:
    """How the output of the network becomes a velocity on the path x_t = (1 − t) x + t z.

    * "velocity" (the paper, eq. 8): dx/dt = x^L − x,  dh/dt = h^L.
    * "endpoint": x^L and h^L are the molecule at t = 0, from which the velocity follows,
      dx/dt = (x − x^L) / (t + δ),  dh/dt = (h − h^L) / (t + δ).
    * "denoising": the input has unit variance, and the part of the velocity that is linear in x is built in (Karras et
      al. 2022, for a velocity). With data of standard deviation s and σ² = (1 − t)² s² + t²: c_in = 1/σ,
      c_skip = (t − (1 − t) s²) / σ², c_out = s/σ, and x^L − c_in x is the displacement towards the data,
      dx/dt = c_skip x − c_out (x^L − c_in x) / (t c_in + δ),  dh/dt = c_skip h + c_out h^L.

    Each layer of an EGNN moves the positions, and the next layer computes distances from the moved ones. With
    "endpoint" and "denoising" they move towards the molecule, so that later layers see a better geometry.

    Args:
        kind: One of the three.
        feature_std: Standard deviation s of the flowing features; that of positions is 1.
        offset: Offset δ of the time.

    Raises:
        ValueError: If the kind is unknown, or a number is not positive and finite.

    Example:
        >>> velocity = Parameterisation("endpoint", offset=0.5)(torch.tensor(0.5))
        >>> velocity.x_out.item(), velocity.h_skip.item()
        (-1.0, 1.0)
    """

    kind: str = "velocity"
    feature_std: float = 1.0
    offset: float = OFFSET

    def __post_init__(self) -> None:
        check_choice("parameterisation", self.kind, PARAMETERISATIONS)
        if not (0 < self.feature_std < float("inf") and 0 < self.offset < float("inf")):
            raise ValueError(f"feature_std={self.feature_std}, offset={self.offset}: both must be positive and finite")

    def __call__(self, t: Tensor) -> Coefficients:
        """Returns the coefficients at times t, shape () or (B, 1, 1)."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        if self.kind == "velocity":
            return Coefficients(one, zero, one, one, zero, one)
        if self.kind == "endpoint":
            rate = 1.0 / (t + self.offset)
            return Coefficients(one, zero, -rate, one, rate, -rate)
        x_in, x_skip, x_out = self._denoising(t, 1.0)
        return Coefficients(x_in, x_skip, -x_out / (t * x_in + self.offset), *self._denoising(t, self.feature_std))

    @staticmethod
    def _denoising(t: Tensor, std: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns c_in, c_skip and c_out for data of standard deviation ``std``."""
        data = (1.0 - t) * std
        scale = torch.rsqrt(data.square() + t.square())
        return scale, (t - data * std) * scale.square(), std * scale
