"""Lifting of discrete features to continuous ones: argmax flow for types, intervals for charges (eq. 12)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_enf.geometry import pair_mask
from ase_enf.nn.egnn import EGNN
from ase_enf.values import DEQUANTIZERS

LOG_2PI = math.log(2.0 * math.pi)


class Lifted(NamedTuple):
    """Continuous features h̃ and their log-density under q."""

    features: Tensor  # (B, M, K + 1): K type scores, then the charge
    log_q: Tensor  # (B,), nats


def lift_types(u: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds scores so that their argmax is the given type (Hoogeboom et al. 2021, argmax flows).

    h̃_c = u_c = T for the true class c, and h̃_k = T − softplus(T − u_k) < T for the others.

    Args:
        u: Unconstrained scores, shape (B, M, K).
        types: One-hot types, shape (B, M, K).

    Returns:
        h̃, shape (B, M, K), and log|∂h̃/∂u| of each entry, shape (B, M, K).

    Example:
        >>> h, _ = lift_types(torch.tensor([[[0.0, 5.0]]]), torch.tensor([[[1.0, 0.0]]]))
        >>> h.argmax(-1).item()
        0
    """
    threshold = (u * types).sum(dim=-1, keepdim=True)
    others = 1.0 - types
    gap = threshold - u
    below = torch.minimum(
        threshold - F.softplus(gap), torch.nextafter(threshold.detach(), threshold.detach() - 1.0)
    )  # no tie by rounding
    lifted = u * types + below * others
    return lifted, F.logsigmoid(gap) * others


def lift_charges(u: Tensor, charges: Tensor) -> tuple[Tensor, Tensor]:
    """Adds noise in (0, 1) to integers: ``h̃ = Z + sigmoid(u)`` (variational dequantisation, Ho et al. 2019).

    Args:
        u: Unconstrained noise, shape (B, M, 1).
        charges: Integers, shape (B, M, 1).

    Returns:
        h̃, shape (B, M, 1), and log|∂h̃/∂u|, shape (B, M, 1).
    """
    # Rounding must not carry the sum to the next integer.
    lifted = torch.minimum(charges + torch.sigmoid(u), torch.nextafter(charges + 1.0, charges))
    return lifted, F.logsigmoid(u) + F.logsigmoid(-u)


def quantize(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns discrete features: argmax of the type scores, floor of the charge; inverts both lifts for any noise.

    Args:
        features: h̃, shape (B, M, K + 1).

    Returns:
        One-hot types, shape (B, M, K), and charges, shape (B, M, 1).
    """
    scores, charge = features[..., :-1], features[..., -1:]
    return F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(features.dtype), torch.floor(charge)


class FixedQ(nn.Module):
    """q(h̃|h) without parameters: Gaussian scores around the one-hot type, and narrow noise at mid-interval for charges.

    Flow matching needs it: its noise does not shrink during training, whereas a learned q would collapse under the
    regression loss.

    Args:
        type_noise: Standard deviation of the scores.
        charge_noise: Standard deviation before the sigmoid.
    """

    def __init__(self, type_noise: float = 0.1, charge_noise: float = 0.25) -> None:
        super().__init__()
        self.type_noise = type_noise
        self.charge_noise = charge_noise

    def forward(self, x: Tensor, types: Tensor, charges: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation of u, shape (B, M, K + 1) each."""
        mean = torch.cat([types, torch.zeros_like(charges)], dim=-1)
        log_std = torch.full_like(mean, math.log(self.type_noise))
        log_std[..., -1] = math.log(self.charge_noise)
        return mean, log_std


class LearnedQ(nn.Module):
    """q(h̃|h, x) with mean and standard deviation from an EGNN of the discrete features and the positions (§4).

    Args:
        n_types: Number K of types.
        hidden: Width of the network.
        layers: Number of layers.
    """

    def __init__(self, n_types: int, hidden: int = 64, layers: int = 4) -> None:
        super().__init__()
        width = n_types + 1
        self.network = EGNN(
            width, 2 * width, hidden, layers, gate=False, reach=None, input_distance=False, positions_out=False
        )

    def forward(self, x: Tensor, types: Tensor, charges: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log standard deviation of u, shape (B, M, K + 1) each."""
        out, _ = self.network(torch.cat([types, charges], dim=-1), x, pair_mask(mask).to(x.dtype))
        mean, log_std = out.chunk(2, dim=-1)
        return mean, log_std


def build_q(kind: str, n_types: int) -> nn.Module:
    """Builds q by its name.

    Args:
        kind: "fixed" or "learned".
        n_types: Number K of types.

    Returns:
        A :class:`FixedQ` or a :class:`LearnedQ`.

    Raises:
        ValueError: If ``kind`` is unknown.
    """
    if kind == "fixed":
        return FixedQ()
    if kind == "learned":
        return LearnedQ(n_types)
    raise ValueError(f"dequantizer {kind!r} is unknown; choose one of {', '.join(DEQUANTIZERS)}")


def lift(q: nn.Module, x: Tensor, types: Tensor, charges: Tensor, mask: Tensor, noise: Tensor) -> Lifted:
    """Draws h̃ ~ q(·|h) by reparametrisation, ``u = μ + σ ε``, and evaluates log q(h̃|h) (eq. 12).

    log q(h̃|h) = Σ_i Σ_k [log N(u_ik; μ_ik, σ_ik²) − log|∂h̃/∂u|_ik]

    Args:
        q: :class:`FixedQ` or :class:`LearnedQ`.
        x: Centred positions, shape (B, M, n), Å.
        types: One-hot, shape (B, M, K).
        charges: Nuclear charges, shape (B, M, 1).
        mask: True for real atoms, shape (B, M).
        noise: ε ~ N(0, I), shape (B, M, K + 1); zeros give the mean of q.

    Returns:
        Features, zero at padding, and log q in nats.
    """
    mean, log_std = q(x, types, charges, mask)
    u = mean + log_std.exp() * noise
    lifted_types, ladj_types = lift_types(u[..., :-1], types)
    lifted_charges, ladj_charges = lift_charges(u[..., -1:], charges)
    gaussian = -0.5 * (noise.square() + LOG_2PI) - log_std
    density = gaussian - torch.cat([ladj_types, ladj_charges], dim=-1)
    real = mask.unsqueeze(-1).to(x.dtype)
    return Lifted(torch.cat([lifted_types, lifted_charges], dim=-1) * real, (density * real).sum(dim=(1, 2)))
