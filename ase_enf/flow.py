"""The continuous flow: integrates any velocity field ``(t, x, h) → (dx, dh)`` and its log-determinant (eq. 2, 7).

Time runs from data (t = 0) to latent (t = 1). ``ladj`` always is ``∫_{t0}^{t1} Tr J dt`` in the direction of travel.
This module is the only caller of torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchdiffeq
from torch import Tensor

from ase_enf.divergence import Divergence, Field, Moment, Velocity

# (field at one moment, x, h) → velocity and divergence.
TraceMethod = Callable[[Field, Tensor, Tensor], Divergence]

# An interval of the quadrature.
Panel = tuple[float, float]

# Not dopri8 and bosh3: torchdiffeq interpolates their last step, which costs them all digits beyond the fifth.
ADAPTIVE = ("dopri5",)
EVALUATIONS_PER_STEP = {"rk4": 4, "midpoint": 2, "euler": 1}

# Gauss-Kronrod 7-15 on [−1, 1] (QUADPACK's qk15): nodes ≥ 0 in falling order, Kronrod weights, Gauss weights of the
# odd-numbered nodes.
_KRONROD_NODES = (
    0.991455371120812639206854697526329, 0.949107912342758524526189684047851, 0.864864423359769072789712788640926,
    0.741531185599394439863864773280788, 0.586087235467691130294144838258730, 0.405845151377397166906606412076961,
    0.207784955007898467600689403773245, 0.0,
)  # fmt: skip
_KRONROD_WEIGHTS = (
    0.022935322010529224963732008058970, 0.063092092629978553290700663189204, 0.104790010322250183839876322541518,
    0.140653259715525918745189590510238, 0.169004726639267902826583426598550, 0.190350578064785409913256402421014,
    0.204432940075298892414161999234649, 0.209482141084727828012999174891714,
)  # fmt: skip
_GAUSS_WEIGHTS = (
    0.129484966168869693270611432679082, 0.279705391489276667901467771423780, 0.381830050505118944950369775488975,
    0.417959183673469387755102040816327,
)  # fmt: skip


class SolverError(RuntimeError):
    """The adaptive solver could not integrate: its step underflowed or the state left the finite numbers.

    Fixed steps carry a non-finite state to the end; whoever asked for them looks at the result.
    """


@dataclass(frozen=True)
class Solver:
    """How an ODE is integrated.

    Args:
        method: "dopri5" (adaptive) or "rk4", "midpoint", "euler" (fixed steps).
        steps: Number of fixed steps; ignored by adaptive methods.
        rtol: Relative tolerance of adaptive methods.
        atol: Absolute tolerance of adaptive methods.
        warp: Fixed steps lie at ``t = (k / steps)^warp``: above 1 they are denser near the data, where a flow is stiff.

    Raises:
        ValueError: For an unknown method, steps < 1, or tolerances that are not positive.

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
        known = (*ADAPTIVE, *EVALUATIONS_PER_STEP)
        if self.method not in known:
            raise ValueError(f"solver {self.method!r} is unknown; choose one of {', '.join(known)}")
        if self.steps < 1:
            raise ValueError(f"solver steps={self.steps}: need at least 1")
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

    def grid(self) -> Tensor:
        """Returns the fixed times, shape (steps + 1,), float64."""
        return torch.linspace(0.0, 1.0, self.steps + 1, dtype=torch.float64) ** self.warp


def resolve_solver(solver: str | Solver | None, steps: int | None, default: Solver) -> Solver:
    """Turns a name, a number of steps or nothing into a ``Solver``.

    Raises:
        ValueError: For an unknown method, or steps for an adaptive one.

    Example:
        >>> resolve_solver(None, 10, Solver("midpoint")).steps
        10
    """
    if isinstance(solver, Solver):
        if steps is not None:
            raise ValueError(f"steps={steps}: the given Solver already says {solver.steps}; leave one of them out")
        return solver
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
    """Where the flow took a batch."""

    x: Tensor  # (B, M, n)
    h: Tensor  # (B, M, F)
    ladj: Tensor  # (B,), ∫ Tr J dt in the direction of travel, nats; zeros when no trace was asked for
    error: Tensor  # (B,), estimated error of the quadrature of ladj (not of the path), nats
    samples: Tensor  # (P, B), ladj by each probe alone; (1, B) for an exact trace
    by_panel: Tensor  # (N, P, B), what each panel of the quadrature adds to samples
    panel_error: Tensor  # (N, B), what each panel adds to error
    nfe: int  # evaluations of the velocity, those inside traces included


class Regularised(NamedTuple):
    """Where the flow took a batch in training, with the terms of Finlay et al. (2020)."""

    x: Tensor  # (B, M, n)
    h: Tensor  # (B, M, F)
    ladj: Tensor  # (B,)
    kinetic: Tensor  # (B,), ∫ ‖f‖² dt
    jacobian: Tensor  # (B,), ∫ ‖vᵀ J‖² dt with the trace's own probe v
    nfe: int


def equal_panels(count: int) -> list[Panel]:
    """Returns [0, 1] cut into equal panels.

    Example:
        >>> equal_panels(2)
        [(0.0, 0.5), (0.5, 1.0)]
    """
    return [(k / count, (k + 1) / count) for k in range(count)]


def gauss_kronrod(panels: Sequence[Panel]) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights of the composite Gauss-Kronrod 7-15 rule.

    Args:
        panels: Intervals in rising order.

    Returns:
        Nodes in rising order, Kronrod weights, Gauss weights (zero off the Gauss nodes), each shape (15 · panels,),
        float64.

    Example:
        >>> nodes, kronrod, gauss = gauss_kronrod([(0.0, 1.0)])
        >>> f"{(kronrod * nodes**20).sum():.15f} {(gauss * nodes**12).sum():.15f}"  # 1/21 and 1/13
        '0.047619047619048 0.076923076923077'
    """
    half = torch.tensor(_KRONROD_NODES, dtype=torch.float64)
    unit = torch.cat([-half, half[:-1].flip(0)])
    wk = torch.tensor(_KRONROD_WEIGHTS, dtype=torch.float64)
    wk = torch.cat([wk, wk[:-1].flip(0)])
    wg = torch.zeros(15, dtype=torch.float64)
    gauss = torch.tensor(_GAUSS_WEIGHTS, dtype=torch.float64)
    wg[1::2] = torch.cat([gauss, gauss[:-1].flip(0)])
    scaled = [((a + b) / 2 + (b - a) / 2 * unit, (b - a) / 2 * wk, (b - a) / 2 * wg) for a, b in panels]
    nodes, kronrod, gaussian = (torch.cat(parts) for parts in zip(*scaled, strict=True))
    return nodes, kronrod, gaussian


class ContinuousFlow:
    """The flow of a velocity field between t = 0 (data) and t = 1 (latent) (eq. 7).

    Likelihoods solve for the state alone and integrate the trace by quadrature along the solved path: the trace does
    not feed back into the state, so it is needed at a few nodes only, and two orders of the rule estimate the error.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``; x (B, M, n), h (B, M, F).
        mask: True for real atoms, shape (B, M).
        solver: How to integrate the state.

    Example:
        A linear field has a known flow: dx/dt = a x gives x(1) = eᵃ x(0) and ladj = a (M − 1) n on the subspace.

        >>> from ase_enf import divergence
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

    def forward(self, x: Tensor, h: Tensor, trace: TraceMethod | None = None, **quadrature: float) -> Transformed:
        """Takes data to latent space (f of the paper); see :meth:`transport`."""
        return self.transport(x, h, 0.0, 1.0, trace, **quadrature)

    def inverse(self, x: Tensor, h: Tensor, trace: TraceMethod | None = None, **quadrature: float) -> Transformed:
        """Takes latent to data space (g of the paper); see :meth:`transport`."""
        return self.transport(x, h, 1.0, 0.0, trace, **quadrature)

    def transport(
        self,
        x: Tensor,
        h: Tensor,
        start: float,
        end: float,
        trace: TraceMethod | None = None,
        panels: int | Sequence[Panel] = 2,
        clustering: float = 3.0,
    ) -> Transformed:
        """Integrates from ``start`` to ``end`` and, when a trace method is given, ``ladj = ∫ Tr J dt``.

        The quadrature runs in u with t = u^clustering, Gauss-Kronrod 7-15 on each panel; its error is estimated by the
        difference of the two orders, panel by panel.

        Args:
            x: Positions, shape (B, M, n).
            h: Features, shape (B, M, F).
            start: 0 or 1.
            end: 1 or 0.
            trace: ``divergence.exact`` or a closure over probes; None leaves ladj at zero.
            panels: Number of equal panels of u in [0, 1], or the panels themselves (a part of them gives that part of
                the integral).
            clustering: How much denser the nodes lie near the data.

        Raises:
            SolverError: If the solver fails.
        """
        self.nfe = 0
        if trace is None:
            path = self._solve(x, h, torch.tensor([start, end], dtype=torch.float64))
            zero = x.new_zeros(1, 1, len(x))
            return Transformed(*path[-1], zero[0, 0], zero[0, 0], zero[0], zero, zero[0], self.nfe)
        panels = equal_panels(panels) if isinstance(panels, int) else panels
        if any(first[1] > second[0] for first, second in zip(panels, panels[1:], strict=False)):
            raise ValueError(f"panels {panels} must lie in rising order and must not overlap")
        u, kronrod, gauss = gauss_kronrod(panels)
        times = u**clustering
        speed = clustering * u ** (clustering - 1.0)  # dt/du
        order = torch.arange(len(u)) if start < end else torch.arange(len(u)).flip(0)
        ends = torch.tensor([start, end], dtype=torch.float64)
        path = self._solve(x, h, torch.cat([ends[:1], times[order], ends[1:]]))
        samples: list[Tensor] = [x] * len(u)
        for node, (x_t, h_t) in zip(order.tolist(), path[1:-1], strict=True):
            samples[node] = trace(Moment(self.velocity, times[node].to(x)), x_t, h_t).samples
            self.nfe += 1
        values = torch.stack(samples).double()  # (Q, P, B)
        direction = 1.0 if start < end else -1.0
        by_panel, gauss_by_panel = (
            (values * (direction * weight * speed).to(x.device)[:, None, None])
            .unflatten(0, (len(panels), -1))
            .sum(dim=1)
            for weight in (kronrod, gauss)
        )
        panel_error = (by_panel - gauss_by_panel).mean(dim=1).abs()  # of the mean over probes
        total = by_panel.sum(dim=0)
        ladj, error = total.mean(dim=0), panel_error.sum(dim=0)
        return Transformed(*path[-1], *(t.to(x) for t in (ladj, error, total, by_panel, panel_error)), self.nfe)

    def trajectory(self, x: Tensor, h: Tensor, times: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the states at ``times`` (monotonic, the first being that of x and h)."""
        self.nfe = 0
        return self._solve(x, h, times.double())

    def forward_regularised(
        self, x: Tensor, h: Tensor, probes: tuple[Tensor, Tensor], parameters: Sequence[Tensor], adjoint: bool = False
    ) -> Regularised:
        """Takes data to latent space with trace and regularisers inside the solver, differentiable for training.

        kinetic = ∫ ‖f‖² dt and jacobian = ∫ ‖vᵀ J‖² dt (Finlay et al. 2020), with one probe v for the whole solve. The
        tolerance is met on average over the batch, which is faster; likelihoods that are reported use :meth:`forward`.

        Args:
            x: Positions, shape (B, M, n).
            h: Features, shape (B, M, F).
            probes: v for x (B, M, n) and for h (B, M, F).
            parameters: What the adjoint differentiates for, besides the state.
            adjoint: Constant-memory adjoint instead of back-propagation through the solver.

        Raises:
            SolverError: If the solver fails.
        """
        self.nfe = 0
        n = x.shape[-1]

        def augmented(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.nfe += 1
            # The adjoint's forward runs without a graph; only inside one may y be part of it.
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
            lambda: integrate(augmented, state, times, method=self.solver.method, **self._tolerances(times, x), **extra)
        )
        y, ladj, kinetic, jacobian = (part[-1] for part in out)
        return Regularised(y[..., :n], y[..., n:], ladj, kinetic, jacobian, self.nfe)

    def _solve(self, x: Tensor, h: Tensor, times: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the states at ``times`` as (x, h) pairs."""
        n = x.shape[-1]

        def derivative(t: Tensor, y: Tensor) -> Tensor:
            self.nfe += 1
            return torch.cat(self.velocity(t, y[..., :n], y[..., n:]), dim=-1)

        times = times.to(x)
        y = self._guard(
            lambda: torchdiffeq.odeint(
                derivative, torch.cat([x, h], dim=-1), times, method=self.solver.method, **self._tolerances(times, x, h)
            )
        )
        return [(state[..., :n], state[..., n:]) for state in y]

    def _tolerances(self, times: Tensor, x: Tensor, h: Tensor | None = None) -> dict[str, object]:
        if not self.solver.adaptive:
            # The fixed grid is refined by the requested times, so that no state is interpolated.
            low, high = times.min(), times.max()
            inner = self.solver.grid().to(times)
            grid = torch.cat([inner[(inner > low) & (inner < high)], times]).unique()
            # The adjoint comes back over the same grid in the other direction.
            return {"options": {"grid_constructor": lambda func, y0, t: grid if t[0] < t[-1] else grid.flip(0)}}
        settings: dict[str, object] = {"rtol": self.solver.rtol, "atol": self.solver.atol}
        if h is not None:
            # Each molecule must meet the tolerance by itself: root mean square over its real entries, then the worst.
            entries = (self.mask.sum(dim=-1) * (x.shape[-1] + h.shape[-1])).to(x.dtype)
            settings["options"] = {"norm": lambda y: (y.square().sum(dim=(1, 2)) / entries).max().sqrt()}
        return settings

    def _guard(self, integrate: Callable[[], Tensor]) -> Tensor:
        try:
            return integrate()
        except AssertionError as error:  # torchdiffeq asserts on underflow of dt and on non-finite values
            reason = str(error).split(":")[0]  # what follows is a whole tensor
            raise SolverError(
                f"{self.solver.method} failed ({reason}); loosen rtol and atol (now {self.solver.rtol:g} and "
                f"{self.solver.atol:g}) "
                "or use a fixed-step method such as rk4"
            ) from None
