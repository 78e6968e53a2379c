"""Stochastic estimates of a trace from m products with the matrix.

Each function takes ``A`` (..., D, D), a number of products m and a generator, and returns estimates of shape (...).
They are compared on full Jacobians (``benchmarks.accuracy.likelihood``), where a product costs nothing; in the flow
each product is one reverse pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[[Tensor, int, torch.Generator], Tensor]


def rademacher(a: Tensor, products: int, generator: torch.Generator) -> Tensor:
    """Hutchinson's estimate with probes of ±1, the same for all matrices: ``1/m Σ_p v_pᵀ A v_p``.

    Example:
        >>> rademacher(torch.diag(torch.arange(3.0)), 1, torch.Generator())  # exact for a diagonal
        tensor(3.)
    """
    return _quadratic(a, _signs(a, products, generator)).mean(dim=-1)


def gaussian(a: Tensor, products: int, generator: torch.Generator) -> Tensor:
    """Hutchinson's estimate with Gaussian probes, the same for all matrices."""
    return _quadratic(a, torch.randn(a.shape[-1], products, generator=generator)).mean(dim=-1)


def fresh(a: Tensor, products: int, generator: torch.Generator) -> Tensor:
    """Hutchinson's estimate with new probes of ±1 for each index of the first axis, which averages over a path."""
    return _quadratic(a, _signs(a, products, generator, (len(a), *[1] * (a.dim() - 3)))).mean(dim=-1)


def orthogonal(a: Tensor, products: int, generator: torch.Generator) -> Tensor:
    """Hutchinson's estimate with orthogonal probes of length √D, the same for all matrices; exact for m = D."""
    q, _ = torch.linalg.qr(torch.randn(a.shape[-1], products, generator=generator))
    return _quadratic(a, q * a.shape[-1] ** 0.5).mean(dim=-1)


def hutchpp(a: Tensor, products: int, generator: torch.Generator) -> Tensor:
    """Hutch++ (Meyer, Musco, Musco and Woodruff 2021): exact on the range of a sketch, Hutchinson on the rest.

    tr(QᵀAQ) + 3/m tr(Gᵀ (I − QQᵀ) A (I − QQᵀ) G) with Q = orth(A S), a third of the products each.
    """
    third = products // 3
    probes = _signs(a, 2 * third, generator)
    q, _ = torch.linalg.qr(a @ probes[:, :third])
    g = probes[:, third:] - q @ (q.mT @ probes[:, third:])
    inside = (q * (a @ q)).sum(dim=(-2, -1))
    return inside + (g * (a @ g)).sum(dim=(-2, -1)) / third


def xtrace(a: Tensor, products: int, generator: torch.Generator) -> Tensor:
    """XTrace (Epperly, Tropp and Webber 2024): Hutch++ averaged over leaving out each probe in turn.

    With Y = AΩ = QR and s_i the normalised columns of R⁻ᵀ, leaving probe i out of the sketch gives the projection
    Q (I − s_i s_iᵀ) Qᵀ; the estimates for all i are averaged.
    """
    half = products // 2
    omega = _signs(a, half, generator).expand(*a.shape[:-2], -1, -1)
    y = a @ omega
    q, r = torch.linalg.qr(y)
    z = a @ q
    h = q.mT @ z
    identity = torch.eye(half)
    s = torch.linalg.solve_triangular(r.mT, identity.expand_as(r), upper=False)
    s = s / torch.linalg.vector_norm(s, dim=-2, keepdim=True)
    w = q.mT @ omega
    kept = w - s * (s * w).sum(dim=-2, keepdim=True)  # (I − s_i s_iᵀ) Qᵀ ω_i
    inside = h.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - (s * (h @ s)).sum(dim=-2)
    left = omega - q @ kept
    outside = (left * (y - z @ kept)).sum(dim=-2)
    return (inside + outside).mean(dim=-1)


ESTIMATORS: dict[str, Estimator] = {
    "Rademacher": rademacher,
    "Gaussian": gaussian,
    "Rademacher, fresh at each node": fresh,
    "orthogonal": orthogonal,
    "Hutch++": hutchpp,
    "XTrace": xtrace,
}


def _quadratic(a: Tensor, v: Tensor) -> Tensor:
    """Returns vᵀ A v for each column of v, shape (..., m)."""
    return (v * (a @ v)).sum(dim=-2)


def _signs(a: Tensor, count: int, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Tensor:
    """Draws ±1, shape (*shape, D, count)."""
    return torch.randint(0, 2, (*shape, a.shape[-1], count), generator=generator) * 2.0 - 1.0
