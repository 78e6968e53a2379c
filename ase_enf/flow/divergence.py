"""The divergence (trace of the Jacobian) of a velocity field: exact, or estimated by Hutchinson's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# (t, x, h) → (dx, dh), mask and context bound by closure.
Velocity = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (x, h) → (dx, dh): a velocity field at one time, mask and context bound by closure.
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PROBES = ("rademacher", "gaussian")
# Most pairs of atoms in one vectorised reverse pass; beyond that, one direction at a time is as fast.
VECTORISED_PAIRS = 8192


class Moment:
    """A velocity at one time, which is a ``Field``, with the closed form of its trace where the velocity has one.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``. Its method ``trace(t, x, h)``, if any, returns (dx, dh, Tr J), or None if
            there is no closed form.
        t: The time, shape () or (B,).
    """

    def __init__(self, velocity: Velocity, t: Tensor) -> None:
        self.velocity = velocity
        self.t = t

    def __call__(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx and dh."""
        return self.velocity(self.t, x, h)

    def closed_form(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx, dh and the exact trace (B,), or None if the velocity has no closed form of it."""
        trace = getattr(self.velocity, "trace", None)
        return None if trace is None else trace(self.t, x, h)


class Divergence(NamedTuple):
    """Velocity and divergence at one point."""

    dx: Tensor  # (B, M, n)
    dh: Tensor  # (B, M, F)
    trace: Tensor  # (B,)
    samples: Tensor  # (P, B), one estimate for each probe; (1, B) for the exact trace


def _directional(
    y: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], create_graph: bool
) -> Tensor:
    """Returns vᵀ J v for each molecule by one reverse pass, shape (B,)."""
    pairs = [(o, w) for o, w in zip(out, v, strict=True) if o.numel() and o.requires_grad]
    if not pairs:
        return torch.zeros(y[0].shape[0], dtype=y[0].dtype, device=y[0].device)
    inputs = [t for t in y if t.numel()]
    outputs, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(
        outputs, inputs, weights, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    directions = [w for t, w in zip(y, v, strict=True) if t.numel()]
    terms = [(g * w).sum(dim=(1, 2)) for g, w in zip(grads, directions, strict=True) if g is not None]
    return torch.stack(terms).sum(dim=0) if terms else torch.zeros_like(y[0][:, 0, 0])


def _evaluate(field: Field, x: Tensor, h: Tensor, create_graph: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluates the field at x and h: at new leaves, or at the given tensors if their graph must be kept."""
    # A new leaf, so that requires_grad of the caller's tensor does not change.
    x = x if create_graph and x.requires_grad else x.detach().requires_grad_(True)
    h = h if create_graph and h.requires_grad else h.detach().requires_grad_(h.numel() > 0)
    dx, dh = field(x, h)
    return x, h, dx, dh


def exact(field: Field, x: Tensor, h: Tensor, create_graph: bool = False) -> Divergence:
    """Trace of the Jacobian, by the velocity's closed form or by one reverse pass for each of the M (n + F) directions.

    Tr J = Σ_k ∂f_k / ∂y_k with y = (x, h). Positions are coordinates of the ambient space. Because the field has zero
    mean, the ambient trace equals that on the zero-mean subspace (eq. 10): Tr P J P = Tr P J = Tr J.

    One pass serves a direction of all molecules at once, because atoms of different molecules never interact.

    Args:
        field: The velocity field; a :class:`Moment` may have a closed form of the trace, which is far cheaper.
        x: Positions, shape (B, M, n).
        h: Features, shape (B, M, F); F may be 0.
        create_graph: Whether to keep the graph, for training through the trace.

    Returns:
        Velocity and trace.

    Example:
        >>> x, h = torch.randn(2, 3, 2), torch.zeros(2, 3, 0)
        >>> exact(lambda x, h: (2.0 * x, h), x, h).trace
        tensor([12., 12.])
    """
    if isinstance(field, Moment) and (closed := _closed_form(field, x, h, create_graph)) is not None:
        return Divergence(*closed, closed[2].unsqueeze(0))
    with torch.enable_grad():
        x, h, dx, dh = _evaluate(field, x, h, create_graph)
        trace = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
        for out, y in ((dx, x), (dh, h)):
            if out.numel() and out.requires_grad:
                trace = trace + _diagonal_sum(out, y, create_graph)
    if not create_graph:
        dx, dh, trace = dx.detach(), dh.detach(), trace.detach()
    return Divergence(dx, dh, trace, trace.unsqueeze(0))


def _closed_form(field: Moment, x: Tensor, h: Tensor, create_graph: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Evaluates the closed form, if there is one."""
    if not create_graph:
        with torch.no_grad():
            return field.closed_form(x, h)
    with torch.enable_grad():
        # The Jacobians of a whole path would fill the memory; each is recomputed in the backward pass instead.
        return checkpoint(field.closed_form, x, h, use_reentrant=False, preserve_rng_state=False)


def _diagonal_sum(out: Tensor, y: Tensor, create_graph: bool) -> Tensor:
    """Returns Σ_k ∂out_k/∂y_k for each molecule, shape (B,)."""
    size, atoms, components = y.shape
    directions = torch.eye(atoms * components, dtype=y.dtype, device=y.device).view(-1, 1, atoms, components)
    # Small molecules are limited by the number of calls, large ones by memory: take as many directions as fit.
    chunk = max(1, VECTORISED_PAIRS // (size * atoms * atoms))
    total = torch.zeros(size, dtype=y.dtype, device=y.device)
    for v in directions.split(chunk):
        v = v.expand(-1, size, -1, -1)
        (grad,) = torch.autograd.grad(
            out,
            y,
            v if chunk > 1 else v[0],
            is_grads_batched=chunk > 1,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        if grad is None:  # out does not depend on y
            return total
        total = total + (grad * v).sum(dim=(0, 2, 3))
    return total


def hutchinson(
    field: Field, x: Tensor, h: Tensor, probes: tuple[Tensor, Tensor], create_graph: bool = False
) -> Divergence:
    """Hutchinson's estimate, ``Tr J ≈ 1/P Σ_p v_pᵀ J v_p`` with E[v vᵀ] = I (Hutchinson 1990; Grathwohl et al. 2018).

    Args:
        field: The velocity field.
        x: Positions, shape (B, M, n).
        h: Features, shape (B, M, F).
        probes: v for x, shape (P, B, M, n), and for h, shape (P, B, M, F); see :func:`draw_probes`.
        create_graph: Whether to keep the graph, for training through the estimate.

    Returns:
        Velocity, the mean over probes, and the estimate of each probe.
    """
    with torch.enable_grad():
        x, h, dx, dh = _evaluate(field, x, h, create_graph)
        samples = torch.stack([_directional((x, h), (dx, dh), v, create_graph) for v in zip(*probes, strict=True)])
    if not create_graph:
        dx, dh, samples = dx.detach(), dh.detach(), samples.detach()
    return Divergence(dx, dh, samples.mean(dim=0), samples)


def draw_probes(
    x: Tensor, h: Tensor, count: int, generator: torch.Generator | None = None, kind: str = "rademacher"
) -> tuple[Tensor, Tensor]:
    """Draws probe vectors with identity covariance, shaped like x and h with a leading dimension ``count``.

    Args:
        x: Positions, shape (B, M, n).
        h: Features, shape (B, M, F).
        count: Number P of probes.
        generator: Source of randomness, on the CPU.
        kind: "rademacher" (±1, the smaller variance) or "gaussian".

    Returns:
        Probes for x and for h.

    Raises:
        ValueError: If ``kind`` is unknown.
    """
    if kind not in PROBES:
        raise ValueError(f"probe {kind!r} is unknown; choose one of {', '.join(PROBES)}")

    def draw(like: Tensor) -> Tensor:
        noise = torch.randn((count, *like.shape), generator=generator, dtype=torch.float64)
        # A comparison, because sign(0) would be 0.
        noise = torch.where(noise >= 0, 1.0, -1.0) if kind == "rademacher" else noise
        return noise.to(like)

    return draw(x), draw(h)
