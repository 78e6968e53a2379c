"""The likelihood of molecules whose noise is given: the only place where its terms are summed (eq. 6, 11, 12)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ase_enf.flow import base
from ase_enf.flow.context import Context
from ase_enf.flow.continuous import PATH_REDUCTION, ContinuousFlow, SolverError, TraceMethod
from ase_enf.flow.divergence import Velocity
from ase_enf.geometry import subspace_dim


class Encoded(NamedTuple):
    """A batch in the coordinates of the flow, and what its likelihood holds besides that of the flow."""

    x: Tensor  # (B, M, n), scaled and centred
    h: Tensor  # (B, M, F), lifted, shifted and scaled
    mask: Tensor  # (B, M)
    context: Tensor | Context | None  # (B, M, K) for "given" and of conditions; of a graph those of the pairs, too
    log_volume: Tensor  # (B,), log|det| of the scaling, on the subspace
    log_q: Tensor  # (B,), log q(h̃|h), zero unless "joint"
    log_size: Tensor  # (B,), log p_M(M), zero unless "joint"


class Terms(NamedTuple):
    """The terms of a log-likelihood, nats, shape (B,) each."""

    log_base: Tensor  # log p_Z(z)
    ladj: Tensor  # log-determinant of flow and scaling
    log_q: Tensor  # log q(h̃|h), zero unless "joint"
    log_size: Tensor  # log p_M(M), zero unless "joint"

    @property
    def log_density(self) -> Tensor:
        """``log p_Z(z) + ladj − log q(h̃|h)``: of molecules whose size is given."""
        return self.log_base + self.ladj - self.log_q

    @property
    def log_prob(self) -> Tensor:
        """``log p_Z(z) + ladj − log q(h̃|h) + log p_M(M)``."""
        return self.log_density + self.log_size


class LogProb(NamedTuple):
    """A log-likelihood by quadrature, its terms and its error; nats, each of shape (B,) unless said otherwise."""

    log_prob: Tensor
    log_density: Tensor  # without log p_M(M)
    log_base: Tensor
    ladj: Tensor
    log_q: Tensor
    log_size: Tensor
    error: Tensor  # estimated integration error, of the quadrature and of the path
    samples: Tensor  # (P, B), ladj by each probe alone
    nfe: int


def log_likelihood(data: Encoded, z_x: Tensor, z_h: Tensor, ladj: Tensor) -> Terms:
    """Log-likelihood of molecules from where the flow takes them; differentiable in all that it is given (eq. 6, 11).

    log p(x, h, M) ≥ log p_Z(z) + ladj − log q(h̃|h) + log p_M(M),   z = f(x, h̃)

    How the flow gets there is the caller's choice: by quadrature for a likelihood, with regularisers inside the solver
    for training, or backwards for a sample.

    Args:
        data: The molecules with one draw of q.
        z_x: Their latent positions, centred, shape (B, M, n).
        z_h: Their latent features, shape (B, M, F).
        ladj: ∫ Tr J dt from the data to there, nats, shape (B,).

    Example:
        The flow of a field that is zero everywhere:

        >>> mask, zero = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1)
        >>> x, h = torch.tensor([[[1.0], [-1.0]]]), torch.zeros(1, 2, 0)
        >>> log_likelihood(Encoded(x, h, mask, None, zero, zero, zero), x, h, zero).log_prob
        tensor([-1.9189])
    """
    return Terms(log_base(z_x, z_h, data.mask), ladj + data.log_volume, data.log_q, data.log_size)


def log_base(z_x: Tensor, z_h: Tensor, mask: Tensor) -> Tensor:
    """Returns log p_Z(z) of latent positions (B, M, n) and features (B, M, F), nats, shape (B,) (eq. 11)."""
    return base.position_log_prob(z_x, mask) + base.feature_log_prob(z_h, mask)


def path_error(
    flow: ContinuousFlow, x: Tensor, h: Tensor, latent: Tensor, traces: Tensor, trace: TraceMethod
) -> tuple[Tensor, int]:
    """Estimates the error of log p_Z + ladj that the solver causes, from a coarser solve; see ``Solver.coarser``.

    An adaptive solver is compared with a finer one as well, and the larger estimate counts: its error depends on the
    tolerance erratically, and two loose solves may have much of theirs in common.

    Args:
        flow: Of one batch.
        x: Positions at the data end of the path, shape (B, M, n).
        h: Features there, shape (B, M, F).
        latent: log p_Z at its latent end, shape (B,).
        traces: Along the path, from the quadrature, shape (Q, P, B).
        trace: By which.

    Returns:
        The error, nats, shape (B,), infinite where another solver fails; the number of evaluations it took.
    """
    solver, error, nfe = flow.solver, torch.zeros_like(latent), 0
    reduction = PATH_REDUCTION[solver.method]
    # Other solvers, and which share of the difference to them is the error of this one.
    others = [(solver.coarser(), 1.0 / (reduction - 1.0))]
    if solver.adaptive:
        others.append((solver.finer(x.dtype), reduction / (reduction - 1.0)))
    for other, share in others:
        try:
            again = flow.again(x, h, trace, len(traces) - 1, other)
        except SolverError:
            return torch.full_like(latent, math.inf), nfe
        by_base = latent.double() - log_base(again.x, again.h, flow.mask).double()
        by_trace = flow.every_fourth(traces[::4]) - again.ladj
        error = torch.maximum(error, share * (by_base + by_trace).abs().to(latent))
        nfe += again.nfe
    return error, nfe


def smeared(data: Encoded, time: float) -> Encoded:
    """Returns data as they are at time t of the path of flow matching, whose density is that of smeared data.

    x_t = (1 − t) x + t z is x + σ z but for its scale, with σ = t / (1 − t) in units of the flow:

    log p_σ(x) = log p_t((1 − t) x) + D log(1 − t),  D = (M − 1) n + M F

    where p_t is what the flow makes from t on; see :class:`Later`.

    Args:
        data: Of a flow that flow matching has trained.
        time: t, from 0 to below 1; 0 leaves the data as they are.
    """
    count = subspace_dim(data.mask, data.x.shape[-1]) + data.h.shape[-1] * data.mask.sum(dim=-1)
    shrunk = count.to(data.log_volume) * math.log1p(-time)
    return data._replace(x=(1.0 - time) * data.x, h=(1.0 - time) * data.h, log_volume=data.log_volume + shrunk)


class Later:
    """A velocity from a later time on, as a velocity between 0 and 1: ``(1 − t₀) φ(t₀ + (1 − t₀) s)``.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``.
        start: t₀.
    """

    def __init__(self, velocity: Velocity, start: float) -> None:
        self.velocity, self.start, self.length = velocity, start, 1.0 - start

    def __call__(self, s: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx/ds and dh/ds."""
        dx, dh = self.velocity(self.start + self.length * s, x, h)
        return self.length * dx, self.length * dh

    def trace(self, s: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx/ds, dh/ds and the exact trace (B,), None where the velocity has no closed form."""
        trace = getattr(self.velocity, "trace", None)
        parts = None if trace is None else trace(self.start + self.length * s, x, h)
        return None if parts is None else tuple(self.length * part for part in parts)
