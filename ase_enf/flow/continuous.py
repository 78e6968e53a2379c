"""The continuous flow: integrates any velocity field ``(t, x, h) → (dx, dh)`` and its log-determinant (eq. 2, 7).

Time runs from data (t = 0) to latent (t = 1). ``ladj`` is always ``∫_{t0}^{t1} Tr J dt`` in the direction of travel.
This module is the only caller of torchdiffeq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from ase_enf.flow import fixed_steps
from ase_enf.flow.divergence import Divergence, Field, Moment, Velocity
from ase_enf.flow.quadrature import check_intervals, clenshaw_curtis, integrate, rule
from ase_enf.geometry import subspace_dim
from ase_enf.threads import map_threads
from ase_enf.values import SOLVERS, check_choice, check_whole

# (field at one moment, x, h) → velocity and divergence.
TraceMethod = Callable[[Field, Tensor, Tensor], Divergence]

# Not dopri8 and bosh3: torchdiffeq interpolates their last step, which is accurate to about five digits only.
ADAPTIVE = ("dopri5",)
EVALUATIONS_PER_STEP = {"rk4": 4, "midpoint": 2, "euler": 1}
# Factor by which the error of the path is assumed to grow with half the fixed steps, or with tolerances LOOSENED times
# as large. For fixed steps it corresponds to one order less than the method's own (there is none below Euler's),
# because the steps may be too long for the full order; an adaptive method follows its tolerance so loosely that a
# coarser solve may err little more.
PATH_REDUCTION = {"rk4": 8.0, "midpoint": 2.0, "euler": 2.0, "dopri5": 2.0}
LOOSENED = 10.0

# An adaptive solve takes some hundred evaluations; one that needs more than this is taken not to end.
MAX_EVALUATIONS = 10_000

# Default number of intervals of the quadrature of the trace.
INTERVALS = 48


class SolverError(RuntimeError):
    """The adaptive solver failed: its step size underflowed, or the state is no longer finite.

    Fixed steps never raise it; they carry a non-finite state to the end, and the caller checks the result.
    """


@dataclass(frozen=True)
class Solver:
    """How an ODE is integrated.

    Args:
        method: "dopri5" (adaptive) or "rk4", "midpoint", "euler" (fixed steps).
        steps: Number of fixed steps; ignored by adaptive methods.
        rtol: Relative tolerance of adaptive methods.
        atol: Absolute tolerance of adaptive methods.
        warp: Fixed steps lie at ``t = (k / steps)^warp``; above 1 they are denser near the data, where a flow is stiff.
            With every method, the quadrature of the trace is in u, with t = u^max(warp, 1). A whole number keeps a
            smooth integrand smooth.

    Raises:
        ValueError: If the method is unknown, steps is below 1, or a tolerance or warp is not positive.

    Example:
        >>> Solver("midpoint", steps=4, warp=2.0).grid().tolist()
        [0.0, 0.0625, 0.25, 0.5625, 1.0]
    """

    method: str = "dopri5"
    steps: int = 32
    rtol: float = 1e-5
    atol: float = 1e-5
    warp: float = 1.0

    def __post_init__(self) -> None:
        check_choice("solver", self.method, SOLVERS)
        check_whole("solver steps", self.steps, 1)
        if min(self.rtol, self.atol, self.warp) <= 0:
            raise ValueError(f"solver rtol={self.rtol}, atol={self.atol}, warp={self.warp}: all must be positive")

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its own steps."""
        return self.method in ADAPTIVE

    def __str__(self) -> str:
        if self.adaptive:
            return f"{self.method}, rtol {self.rtol:g}, atol {self.atol:g}"
        return f"{self.method}, {self.steps} steps, warp {self.warp:g}"

    def coarser(self) -> Solver:
        """Returns a cheaper solver of about ``PATH_REDUCTION`` times the error: half the steps or looser tolerances.

        Example:
            >>> str(Solver("rk4", steps=8).coarser()), str(Solver().coarser())
            ('rk4, 4 steps, warp 1', 'dopri5, rtol 0.0001, atol 0.0001')
        """
        if self.adaptive:
            return replace(self, rtol=self.rtol * LOOSENED, atol=self.atol * LOOSENED)
        return replace(self, steps=max(self.steps // 2, 1))

    def finer(self, dtype: torch.dtype = torch.float64) -> Solver:
        """Returns a more accurate solver: twice the steps, or tighter tolerances as far as ``dtype`` resolves them.

        Example:
            >>> str(Solver().finer()), str(Solver().finer(torch.float32).finer(torch.float32).finer(torch.float32))
            ('dopri5, rtol 1e-06, atol 1e-06', 'dopri5, rtol 9.53674e-07, atol 9.53674e-07')
        """
        if not self.adaptive:
            return replace(self, steps=2 * self.steps)
        least = 8 * torch.finfo(dtype).eps
        rtol, atol = (min(value, max(value / LOOSENED, least)) for value in (self.rtol, self.atol))
        return replace(self, rtol=rtol, atol=atol)

    def grid(self) -> Tensor:
        """Returns the fixed times, shape (steps + 1,), float64."""
        return torch.linspace(0.0, 1.0, self.steps + 1, dtype=torch.float64) ** self.warp


def resolve_solver(solver: str | Solver | None, steps: int | None, default: Solver) -> Solver:
    """Returns a ``Solver`` from what a caller gave: a solver, the name of a method, a number of steps, or nothing.

    Args:
        solver: A solver, which is returned as it is; or the name of a method; or None for that of the default.
        steps: Number of fixed steps; None for that of the default.
        default: Supplies whatever is not given.

    Returns:
        The solver.

    Raises:
        TypeError: If ``solver`` is anything else, such as a ``StochasticSampler``, which has no likelihood.
        ValueError: If the method is unknown, or steps are given for an adaptive method or beside a ``Solver``.

    Example:
        >>> resolve_solver(None, 10, Solver("midpoint")).steps
        10
    """
    if isinstance(solver, Solver):
        if steps is not None:
            raise ValueError(f"steps={steps}: the given Solver already says {solver.steps}; leave one of them out")
        return solver
    if not (solver is None or isinstance(solver, str)):
        raise TypeError(f"solver {solver}: has no likelihood; give a Solver or the name of a method")
    chosen = Solver(
        method=solver or default.method,
        steps=default.steps if steps is None else steps,
        rtol=default.rtol,
        atol=default.atol,
        warp=default.warp,
    )
    if steps is not None and chosen.adaptive:
        raise ValueError(f"steps={steps}: {chosen.method} chooses its own steps; use rk4, midpoint or euler")
    return chosen


class Transformed(NamedTuple):
    """Result of transporting a batch along the flow."""

    x: Tensor  # (B, M, n)
    h: Tensor  # (B, M, F)
    ladj: Tensor  # (B,), ∫ Tr J dt in the direction of travel, nats; zeros when no trace was asked for
    error: Tensor  # (B,), estimated error of the quadrature of ladj, nats
    samples: Tensor  # (P, B), ladj by each probe alone; (1, B) for an exact trace
    traces: Tensor  # (Q, P, B), Tr J at the Q nodes of the quadrature, in the order of t
    nfe: int  # number of evaluations of the velocity, including those for the traces


class Again(NamedTuple):
    """Result of transporting a batch with another solver; see ``ContinuousFlow.again``."""

    x: Tensor  # (B, M, n)
    h: Tensor  # (B, M, F)
    traces: Tensor  # (Q, P, B), at every fourth node
    nfe: int


class Regularised(NamedTuple):
    """Result of transporting a batch in training, with the regularisers of Finlay et al. (2020)."""

    x: Tensor  # (B, M, n)
    h: Tensor  # (B, M, F)
    ladj: Tensor  # (B,)
    kinetic: Tensor  # (B,), ∫ ‖f‖² dt
    jacobian: Tensor  # (B,), ∫ ‖vᵀ J‖² dt with the same probe v as the trace
    nfe: int


class ContinuousFlow:
    """The flow of a velocity field between t = 0 (data) and t = 1 (latent) (eq. 7).

    Likelihoods solve for the state alone and integrate the trace by quadrature along the solved path. The trace does
    not feed back into the state, so it is needed at a few nodes only, and nested rules estimate the error.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``; x (B, M, n), h (B, M, F).
        mask: True for real atoms, shape (B, M).
        solver: How to integrate the state.

    Example:
        The flow of a linear field is known: dx/dt = a x gives x(1) = eᵃ x(0) and ladj = a (M − 1) n on the subspace.

        >>> from ase_enf.flow import divergence
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
        >>> velocity = lambda t, x, h: (0.5 * (x - x.mean(1, keepdim=True)), h)
        >>> flow = ContinuousFlow(velocity, mask)
        >>> z = flow.forward(x, torch.zeros(1, 3, 0, dtype=torch.float64), trace=divergence.exact)
        >>> round(z.x[0, 0, 0].item(), 4), round(z.ladj.item(), 6)
        (1.6487, 2.0)
    """

    def __init__(self, velocity: Velocity, mask: Tensor, solver: Solver | None = None) -> None:
        self.velocity = velocity
        self.mask = mask
        self.solver = solver or Solver()
        self.nfe = 0

    def forward(self, x: Tensor, h: Tensor, trace: TraceMethod | None = None, **quadrature: Any) -> Transformed:
        """Takes data to latent space (f of the paper); see :meth:`transport`."""
        return self.transport(x, h, 0.0, 1.0, trace, **quadrature)

    def inverse(self, x: Tensor, h: Tensor, trace: TraceMethod | None = None, **quadrature: Any) -> Transformed:
        """Takes latent to data space (g of the paper); see :meth:`transport`."""
        return self.transport(x, h, 1.0, 0.0, trace, **quadrature)

    def transport(
        self,
        x: Tensor,
        h: Tensor,
        start: float,
        end: float,
        trace: TraceMethod | None = None,
        intervals: int = INTERVALS,
        known: Tensor | None = None,
    ) -> Transformed:
        """Integrates the state from ``start`` to ``end`` and, given a trace method, ``ladj = ∫ Tr J dt`` (eq. 2, 7).

        The quadrature is Clenshaw-Curtis in u with t = u^w, ``∫ Tr J(u^w) w u^{w−1} du``. Its nodes are added to the
        grid of a fixed-step solver, and its error is estimated from the nested rules.

        Args:
            x: Positions, shape (B, M, n).
            h: Features, shape (B, M, F).
            start: 0 or 1.
            end: 1 or 0.
            trace: ``divergence.exact`` or a closure over probes; None leaves ladj at zero.
            intervals: Number Q − 1 of intervals of the quadrature, a multiple of 8.
            known: Tr J at every other node, shape ((Q + 1) / 2, P, B), from a path with half the intervals. The caller
                accounts for the error of that path; see ``likelihood.path_error``.

        Returns:
            State, ladj and its error.

        Raises:
            SolverError: If the solver fails.
            ValueError: If ``intervals`` is not a multiple of 8.
        """
        self.nfe = 0
        if trace is None:
            path = self._solve(x, h, torch.tensor([start, end], dtype=torch.float64))
            zero = x.new_zeros(1, 1, len(x))
            return Transformed(*path[-1], zero[0, 0], zero[0, 0], zero[0], zero[:0], self.nfe)
        check_intervals(intervals)
        times, stretch = self.nodes(intervals)
        # The path stops at every node, so more nodes also make it more accurate.
        path = self._solve(x, h, times if start < end else times.flip(0))
        states = path if start < end else path[::-1]
        if known is None:
            traces = self._traces(trace, times, states)
        else:
            between = self._traces(trace, times[1::2], states[1::2])
            traces = torch.cat([torch.stack([known[:-1], between], dim=1).flatten(0, 1), known[-1:]])
        weighted = traces * stretch.to(traces)[:, None, None]
        samples = integrate(weighted).value * (1.0 if start < end else -1.0)
        error = integrate(weighted.mean(dim=1)).error  # of the mean over probes
        return Transformed(*path[-1], *(t.to(x) for t in (samples.mean(dim=0), error, samples, traces)), self.nfe)

    def _traces(self, trace: TraceMethod, times: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Returns Tr J at the given times and states, shape (Q, P, B), float64."""
        x = states[0][0]
        moments = times.to(x)

        def at_node(k: int) -> Tensor:
            return trace(Moment(self.velocity, moments[k]), *states[k]).samples.double()

        # The nodes of a solved path are independent: threads share them, unless autograd records or one fills a GPU.
        alone = torch.is_grad_enabled() or x.device.type != "cpu"
        nodes = range(len(times))
        self.nfe += len(nodes)
        return torch.stack([at_node(k) for k in nodes] if alone else map_threads(at_node, nodes))

    def nodes(self, intervals: int) -> tuple[Tensor, Tensor]:
        """Returns the times t = u^warp of the quadrature and dt/du there, shape (intervals + 1,), float64."""
        u, warp = clenshaw_curtis(intervals)[0], max(self.solver.warp, 1.0)
        return u**warp, warp * u ** (warp - 1.0)

    def trajectory(self, x: Tensor, h: Tensor, times: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the states (x, h) at monotonic ``times``, the first of which is that of the given x and h."""
        self.nfe = 0
        return self._solve(x, h, times.double())

    def again(self, x: Tensor, h: Tensor, trace: TraceMethod, intervals: int, solver: Solver) -> Again:
        """Transports data to latent space with another solver, to estimate the error of the path.

        Args:
            x: Positions at t = 0, shape (B, M, n).
            h: Features at t = 0, shape (B, M, F).
            trace: As in :meth:`transport`.
            intervals: Number of intervals of the original quadrature; the trace is computed at every fourth node.
            solver: The other solver.

        Returns:
            Latent state, and the traces.
        """
        other = ContinuousFlow(self.velocity, self.mask, solver)
        times = self.nodes(intervals)[0]
        path = other.trajectory(x, h, times[::2])
        return Again(*path[-1], other._traces(trace, times[::4], path[::2]), other.nfe)

    def every_fourth(self, traces: Tensor) -> Tensor:
        """Returns ∫_0^1 Tr J dt, shape (B,), from traces at every fourth node of a quadrature."""
        stretch = self.nodes(4 * (len(traces) - 1))[1][::4]
        return rule(traces.mean(dim=1) * stretch.to(traces)[:, None])

    def unresolved(self, x: Tensor, h: Tensor, traces: Tensor) -> Tensor:
        """Returns ∫ |Tr J| dt over those parts of the path where fixed steps are too long to be stable.

        The mean eigenvalue of J is Tr J / D, where D is the dimension of the state, and the largest is assumed to be
        twice the mean. Where a step is not stable for that eigenvalue, neither is one of twice the length, and their
        difference does not measure the error.

        Args:
            x: Positions, shape (B, M, n).
            h: Features, shape (B, M, F).
            traces: Tr J at the nodes of the quadrature, shape (Q, P, B).

        Returns:
            Nats, shape (B,); zero for an adaptive solver.
        """
        if self.solver.adaptive:
            return torch.zeros_like(x[:, 0, 0])
        times, stretch = self.nodes(len(traces) - 1)
        limit = 0.5 * fixed_steps.STABLE[self.solver.method] / fixed_steps.longest_steps(self.solver.grid(), times)
        dimensions = subspace_dim(self.mask, x.shape[-1]) + h.shape[-1] * self.mask.sum(dim=-1)
        size = traces.mean(dim=1).abs()  # (Q, B)
        too_long = size > limit.to(traces)[:, None] * dimensions
        return rule(size * too_long * stretch.to(traces)[:, None]).to(x)

    def forward_regularised(
        self, x: Tensor, h: Tensor, probes: tuple[Tensor, Tensor], parameters: Sequence[Tensor], adjoint: bool = False
    ) -> Regularised:
        """Takes data to latent space, integrating trace and regularisers with the state; differentiable for training.

        kinetic = ∫ ‖f‖² dt and jacobian = ∫ ‖vᵀ J‖² dt (Finlay et al. 2020), with one probe v for the whole solve. The
        tolerance is met on average over the batch, which is faster; reported likelihoods use :meth:`forward`.

        Args:
            x: Positions, shape (B, M, n).
            h: Features, shape (B, M, F).
            probes: v for x (B, M, n) and for h (B, M, F).
            parameters: Tensors besides the state that the adjoint computes gradients for.
            adjoint: Whether to use the constant-memory adjoint instead of back-propagation through the solver.

        Returns:
            Latent state, ladj and regularisers.

        Raises:
            SolverError: If the solver fails.
        """
        self.nfe = 0
        n = x.shape[-1]

        def augmented(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self._count(t)
            # The adjoint's forward pass records no graph: the trace then needs a leaf of its own.
            attached = torch.is_grad_enabled() and state[0].requires_grad
            y = state[0] if attached else state[0].detach().requires_grad_(True)
            with torch.enable_grad():
                dx, dh = self.velocity(t, y[..., :n], y[..., n:])
                dy = torch.cat([dx, dh], dim=-1)
                (vj,) = torch.autograd.grad(dy, y, v, create_graph=True)
                kinetic = dy.square().sum(dim=(1, 2))
                return dy, (vj * v).sum(dim=(1, 2)), kinetic, vj.square().sum(dim=(1, 2))

        v = torch.cat(probes, dim=-1)
        zero = torch.zeros_like(x[:, 0, 0])
        state = (torch.cat([x, h], dim=-1), zero, zero, zero)
        times = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        integrate = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        extra = {"adjoint_params": tuple(parameters)} if adjoint else {}
        out = self._guard(
            lambda: integrate(augmented, state, times, method=self.solver.method, **self._settings(times), **extra)
        )
        y, ladj, kinetic, jacobian = (part[-1] for part in out)
        return Regularised(y[..., :n], y[..., n:], ladj, kinetic, jacobian, self.nfe)

    def _solve(self, x: Tensor, h: Tensor, times: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the states at ``times`` as (x, h) pairs."""
        n = x.shape[-1]

        def derivative(t: Tensor, y: Tensor) -> Tensor:
            self._count(t)
            return torch.cat(self.velocity(t, y[..., :n], y[..., n:]), dim=-1)

        start = torch.cat([x, h], dim=-1)
        if self.solver.adaptive:
            settings = {"rtol": self.solver.rtol, "atol": self.solver.atol, "options": {"norm": self._norm(x, h)}}
            method = self.solver.method
            y = self._guard(lambda: torchdiffeq.odeint(derivative, start, times.to(x), method=method, **settings))
        else:
            y = fixed_steps.solve(derivative, start, times, self.solver.grid(), self.solver.method)
        return [(state[..., :n], state[..., n:]) for state in y]

    def _norm(self, x: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns a norm by which each molecule meets the tolerance: the largest of their root mean squares."""
        entries = (self.mask.sum(dim=-1) * (x.shape[-1] + h.shape[-1])).to(x.dtype)
        return lambda y: (y.square().sum(dim=(1, 2)) / entries).max().sqrt()

    def _settings(self, times: Tensor) -> dict[str, object]:
        """Returns torchdiffeq's settings for one solve between two times."""
        if self.solver.adaptive:
            return {"rtol": self.solver.rtol, "atol": self.solver.atol}
        grid = fixed_steps.refine(self.solver.grid().to(times), times)
        # The adjoint runs backwards over the same grid.
        return {"options": {"grid_constructor": lambda func, y0, t: grid if t[0] < t[-1] else grid.flip(0)}}

    def _guard(self, integrate: Callable[[], Tensor]) -> Tensor:
        try:
            return integrate()
        except AssertionError as error:  # torchdiffeq asserts on underflow of dt and on non-finite values
            raise self._failure(str(error).split(":")[0]) from None  # torchdiffeq prints a whole tensor after the colon

    def _count(self, t: Tensor) -> None:
        """Counts an evaluation, and stops a solve that would run forever under ``python -O``, without assertions."""
        self.nfe += 1
        if self.solver.adaptive and (self.nfe > MAX_EVALUATIONS or not math.isfinite(t.detach())):
            raise self._failure("the step size vanishes or is not finite")

    def _failure(self, reason: str) -> SolverError:
        return SolverError(
            f"{self.solver.method} failed ({reason}); loosen rtol and atol (now {self.solver.rtol:g} and "
            f"{self.solver.atol:g}) or use a fixed-step method such as rk4"
        )
