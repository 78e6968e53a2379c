"""The likelihood of molecules for given noise of q: the only place where its terms are summed (eq. 6, 11, 12)."""

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
    """A batch in the coordinates of the flow, with the terms of its likelihood that do not come from the flow."""

    x: Tensor  # (B, M, n), scaled and centred
    h: Tensor  # (B, M, F), lifted, shifted and scaled
    mask: Tensor  # (B, M)
    context: Tensor | Context | None  # (B, M, K) of given types and conditions; a Context for a graph
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
        """``log p_Z(z) + ladj − log q(h̃|h)``, the log-density for a given number of atoms."""
        return self.log_base + self.ladj - self.log_q

    @property
    def log_prob(self) -> Tensor:
        """``log p_Z(z) + ladj − log q(h̃|h) + log p_M(M)``."""
        return self.log_density + self.log_size


class Known(NamedTuple):
    """What a likelihood with half the intervals contributes to one with all of them."""

    traces: Tensor  # (Q, P, B), Tr J at the nodes that both share
    path_error: Tensor  # (B,), nats, error of the path on which they were computed


class LogProb(NamedTuple):
    """A log-likelihood by quadrature, its terms and its error; nats, each of shape (B,) unless stated otherwise."""

    log_prob: Tensor
    log_density: Tensor  # without log p_M(M)
    log_base: Tensor
    ladj: Tensor
    log_q: Tensor
    log_size: Tensor
    error: Tensor  # estimated integration error, the sum of those of the quadrature and the path
    path_error: Tensor  # the part of the path
    traces: Tensor  # (Q, P, B), Tr J at the nodes of the quadrature, in the order of t
    samples: Tensor  # (P, B), ladj by each probe alone
    nfe: int  # number of evaluations of the velocity

    def known(self, chosen: Tensor) -> Known:
        """Returns what twice the intervals can reuse, for the molecules of the batch at the indices ``chosen``."""
        return Known(self.traces[..., chosen], self.path_error[chosen])


def log_likelihood(data: Encoded, z_x: Tensor, z_h: Tensor, ladj: Tensor) -> Terms:
    """Log-likelihood of molecules from their latent representation; differentiable in all arguments (eq. 6, 11, 12).

    log p(x, h, M) ≥ log p_Z(z) + ladj − log q(h̃|h) + log p_M(M),   z = f(x, h̃)

    The caller chooses how to compute z and ladj: by quadrature for a likelihood, with regularisers inside the solver
    for training, or along the inverse path of a sample.

    Args:
        data: The molecules with one draw of q.
        z_x: Their latent positions, centred, shape (B, M, n).
        z_h: Their latent features, shape (B, M, F).
        ladj: ∫ Tr J dt from data to latent space, nats, shape (B,).

    Returns:
        The terms.

    Example:
        For a velocity that is zero everywhere:

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
    """Estimates the error of log p_Z + ladj due to the solver, by comparison with a coarser one (``Solver.coarser``).

    An adaptive solver is compared with a finer one as well, and the larger estimate is returned: its error depends
    erratically on the tolerance, and two loose solves may share much of theirs. For "euler", changes of log p_Z and of
    the trace along the path add up whatever their signs. Where fixed steps are too long to be stable, the whole
    contribution of the trace counts as error; see ``ContinuousFlow.unresolved``.

    Args:
        flow: The flow of one batch.
        x: Positions at the data end of the path, shape (B, M, n).
        h: Features at the data end, shape (B, M, F).
        latent: log p_Z at the latent end, nats, shape (B,).
        traces: Tr J along the path, at the nodes of the quadrature, shape (Q, P, B).
        trace: Method that computed them.

    Returns:
        The error, nats, shape (B,), infinite if another solver fails; and the number of evaluations of the velocity.
    """
    solver, error, nfe = flow.solver, torch.zeros_like(latent), 0
    reduction = PATH_REDUCTION[solver.method]
    # Other solvers, and the fraction of the difference from each that is the error of this solver.
    others = [(solver.coarser(), 1.0 / (reduction - 1.0))]
    if solver.adaptive:
        others.append((solver.finer(x.dtype), reduction / (reduction - 1.0)))
    for other, share in others:
        try:
            again = flow.again(x, h, trace, len(traces) - 1, other)
        except SolverError:
            return torch.full_like(latent, math.inf), nfe
        by_base = latent.double() - log_base(again.x, again.h, flow.mask).double()
        if solver.method == "euler":
            # The estimate has no margin (``PATH_REDUCTION`` is that of its own order): where its parts cancel by
            # chance, their sum says nothing about the next order, which is not much smaller.
            by_trace = flow.every_fourth((traces[::4] - again.traces).mean(dim=1, keepdim=True).abs())
            difference = by_base.abs() + by_trace
        else:
            difference = (by_base + flow.every_fourth(traces[::4]) - flow.every_fourth(again.traces)).abs()
        error = torch.maximum(error, share * difference.to(latent))
        nfe += again.nfe
    return error + flow.unresolved(x, h, traces), nfe


def smeared(data: Encoded, time: float) -> Encoded:
    """Returns data moved to time t on the path of flow matching, where the flow gives the density of smeared data.

    Up to its scale, x_t = (1 − t) x + t z is x + σ z with σ = t / (1 − t), in units of the flow. Hence

    log p_σ(x) = log p_t((1 − t) x) + D log(1 − t),  D = (M − 1) n + M F

    where p_t is the density of the flow from t on; see :class:`Later`.

    Args:
        data: Data of a flow that was trained by flow matching.
        time: Time t, 0 ≤ t < 1; 0 leaves the data unchanged.

    Returns:
        The data at time t; D log(1 − t) is added to ``log_volume``.
    """
    count = subspace_dim(data.mask, data.x.shape[-1]) + data.h.shape[-1] * data.mask.sum(dim=-1)
    shrunk = count.to(data.log_volume) * math.log1p(-time)
    return data._replace(x=(1.0 - time) * data.x, h=(1.0 - time) * data.h, log_volume=data.log_volume + shrunk)


class Later:
    """A velocity φ between the times t₀ and 1, rescaled to the times s from 0 to 1: ``(1 − t₀) φ(t₀ + (1 − t₀) s)``.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``.
        start: Time t₀.
    """

    def __init__(self, velocity: Velocity, start: float) -> None:
        self.velocity, self.start, self.length = velocity, start, 1.0 - start

    def __call__(self, s: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx/ds and dh/ds."""
        dx, dh = self.velocity(self.start + self.length * s, x, h)
        return self.length * dx, self.length * dh

    def trace(self, s: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx/ds, dh/ds and the exact trace (B,), or None if the velocity has no closed form of it."""
        trace = getattr(self.velocity, "trace", None)
        parts = None if trace is None else trace(self.start + self.length * s, x, h)
        return None if parts is None else tuple(self.length * part for part in parts)
