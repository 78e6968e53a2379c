"""The dynamics of the flow: a network gives the velocity at a state, time and context (eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ase_enf.flow.context import Context, split_context
from ase_enf.flow.parameterisation import Coefficients, Parameterisation
from ase_enf.geometry import center, pair_mask
from ase_enf.nn.backends.choice import choose_backend
from ase_enf.nn.egnn import EGNN
from ase_enf.nn.gnn import GNN
from ase_enf.nn.jacobian import egnn_trace
from ase_enf.nn.koehler import KernelDynamics, SimpleDynamics
from ase_enf.values import NETWORKS

# The last two move positions only.
POSITION_NETWORKS = {"simple": SimpleDynamics, "kernel": KernelDynamics}


class Dynamics(nn.Module):
    """Velocity of positions and features at time t (eq. 8).

    In the paper, dx/dt = x^L − x with its mean removed and dh/dt = h^L, where h^L, x^L = network[(h, context, t), x].
    A :class:`Parameterisation` other than "velocity" scales the input and interprets the output differently.

    Args:
        network: Maps (h, x, pair mask) to (h^L, x^L).
        parameterisation: How the output of the network becomes a velocity.
    """

    def __init__(self, network: nn.Module, parameterisation: Parameterisation | None = None) -> None:
        super().__init__()
        self.network = network
        self.parameterisation = parameterisation or Parameterisation()

    def forward(
        self,
        t: Tensor,  # () or (B,)
        x: Tensor,  # (B, M, n)
        h: Tensor,  # (B, M, F), F may be 0
        mask: Tensor,  # (B, M), bool
        context: Tensor | Context | None = None,  # features that do not flow, of nodes (B, M, K) and of pairs
    ) -> tuple[Tensor, Tensor]:
        """Returns dx/dt (B, M, n) on the zero-mean subspace and dh/dt (B, M, F), zero at padding."""
        c = self.parameterisation(self._times(t, x))
        y = c.x_in * x
        known = split_context(context)
        pairs = () if known.pairs is None else (known.pairs,)  # only an EGNN accepts them
        h_out, x_out = self.network(self._nodes(t, c.h_in * h, known.nodes), y, pair_mask(mask).to(x.dtype), *pairs)
        return self._velocity(c, x, h, y, h_out, x_out, mask)

    def trace(
        self,
        t: Tensor,  # () or (B,)
        x: Tensor,  # (B, M, n)
        h: Tensor,  # (B, M, F)
        mask: Tensor,  # (B, M), bool
        context: Tensor | Context | None = None,  # as in forward
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx/dt, dh/dt and the exact trace (B,) in closed form, or None if the network has none.

        Tr J = x_skip (M − 1) n + x_out x_in Tr ∂(x^L − y)/∂y + h_skip M F + h_out h_in Tr ∂h^L/∂g

        Removing the mean subtracts ``1/M Σ_ik ∂(x^L − y)_i/∂y_k`` from the trace. This is zero, because x^L − y of an
        EGNN or a radial field does not change when all atoms move together.
        """
        if not self.has_closed_form:
            return None
        c = self.parameterisation(self._times(t, x))
        y, pairs = c.x_in * x, pair_mask(mask).to(x.dtype)
        known = split_context(context)
        nodes = self._nodes(t, c.h_in * h, known.nodes)
        atoms = mask.sum(dim=-1)
        x_gain, h_gain = ((out * scale).flatten() for out, scale in ((c.x_out, c.x_in), (c.h_out, c.h_in)))
        if isinstance(self.network, EGNN):
            h_out, x_out, by_x, by_h = egnn_trace(self.network, nodes, y, pairs, mask, known.pairs)
            trace = x_gain * (by_x - x.shape[-1] * atoms) + h_gain * by_h  # of x^L − y
        else:
            h_out, x_out, by_x = self.network.with_trace(nodes, y, pairs)
            trace = x_gain * by_x
        trace = trace + c.x_skip.flatten() * (x.shape[-1] * (atoms - 1)) + c.h_skip.flatten() * (h.shape[-1] * atoms)
        return *self._velocity(c, x, h, y, h_out, x_out, mask), trace

    @staticmethod
    def _velocity(
        c: Coefficients, x: Tensor, h: Tensor, y: Tensor, h_out: Tensor, x_out: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        dx = center(c.x_skip * x + c.x_out * (x_out - y), mask)
        return dx, (c.h_skip * h + c.h_out * h_out) * mask.unsqueeze(-1)

    @property
    def has_closed_form(self) -> bool:
        """Whether the network has a closed form of its trace."""
        return type(self.network) in (EGNN, *POSITION_NETWORKS.values())  # a subclass may compute something else

    def use_backend(self, backend: str) -> str:
        """Chooses the backend for the pairs of an EGNN and returns its name; see ``ENF.use_backend``.

        Raises:
            ValueError: If the name is unknown, or the backend cannot be used.
        """
        weight, kind = next(self.network.parameters()), type(self.network)
        unfit = None if kind is EGNN else f"it computes the pairs of an EGNN only, not of {kind.__name__}"
        width = self.network.embed.out_features if kind is EGNN else 0
        chosen = choose_backend(backend, width, weight.dtype, weight.device, unfit)
        if isinstance(self.network, EGNN):
            self.network.fuse(chosen == "compiled")
            self.network.use_triton(chosen == "triton")
        return chosen

    @staticmethod
    def _times(t: Tensor, x: Tensor) -> Tensor:
        """Returns t in the dtype of x, shape () or (B, 1, 1)."""
        t = t.to(x.dtype)
        return t[:, None, None] if t.ndim else t

    @staticmethod
    def _nodes(t: Tensor, h: Tensor, context: Tensor | None) -> Tensor:
        time = t.to(h.dtype).expand(h.shape[0])[:, None, None].expand(-1, h.shape[1], 1)
        return torch.cat([h, time] if context is None else [h, context, time], dim=-1)


@dataclass(frozen=True, eq=False)
class BoundDynamics:
    """Dynamics of one batch: ``(t, x, h) → (dx, dh)`` with mask and context bound.

    Args:
        dynamics: The dynamics.
        mask: True for real atoms, shape (B, M).
        context: Features that do not flow: of nodes, shape (B, M, K), or a ``Context`` with those of pairs; or None.
    """

    dynamics: Dynamics
    mask: Tensor
    context: Tensor | Context | None = None

    def __call__(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx/dt and dh/dt."""
        return self.dynamics(t, x, h, self.mask, self.context)

    def trace(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx/dt, dh/dt and the exact trace (B,); see :meth:`Dynamics.trace`."""
        return self.dynamics.trace(t, x, h, self.mask, self.context)


def build_network(
    kind: str,
    in_features: int,
    out_features: int,
    dimension: int,
    hidden: int,
    layers: int,
    attention: bool,
    radial: int = 0,
    pair_features: int = 0,
) -> nn.Module:
    """Builds a network by its name.

    Args:
        kind: One of :data:`NETWORKS`.
        in_features: Number of features of an atom, including the time.
        out_features: Number of features that flow.
        dimension: Dimension n of space, for "gnn".
        hidden: Width of the network.
        layers: Number of layers.
        attention: Soft edges (eq. 4), for "egnn" and "gnn".
        radial: Number of radial functions of each distance, for "egnn".
        pair_features: Number of features of each pair, for "egnn".

    Returns:
        The network.

    Raises:
        ValueError: If ``kind`` is unknown, or moves positions only although there are features.
    """
    if kind == "egnn":
        return EGNN(
            in_features, out_features, hidden, layers, gate=attention, radial=radial, pair_features=pair_features
        )
    if kind == "gnn":
        return GNN(in_features, out_features, dimension, hidden, layers, gate=attention)
    if kind not in POSITION_NETWORKS:
        raise ValueError(f"network {kind!r} is unknown; choose one of {', '.join(NETWORKS)}")
    if (in_features, out_features) != (1, 0):
        raise ValueError(f"network {kind!r} moves positions only and knows no features; use features='none'")
    return POSITION_NETWORKS[kind](hidden, layers)
