"""The dynamics of the flow: time and context enter, a network answers with the velocity (eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ase_enf.geometry import center, pair_mask
from ase_enf.nn import fused
from ase_enf.nn.egnn import EGNN
from ase_enf.nn.gnn import GNN
from ase_enf.nn.jacobian import egnn_trace
from ase_enf.nn.koehler import KernelDynamics, SimpleDynamics

KERNELS = ("auto", "fused", "plain")
# The last two move positions only.
NETWORKS = ("egnn", "gnn", "simple", "kernel")
POSITION_NETWORKS = {"simple": SimpleDynamics, "kernel": KernelDynamics}


class Dynamics(nn.Module):
    """Velocity of positions and features at time t (eq. 8).

    dx/dt = x^L − x with its mean removed,  dh/dt = h^L,  where h^L, x^L = network[(h, context, t), x].

    Args:
        network: Maps (h, x, pair mask) to (h^L, x^L).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        t: Tensor,  # () or (B,)
        x: Tensor,  # (B, M, n)
        h: Tensor,  # (B, M, F), F may be 0
        mask: Tensor,  # (B, M), bool
        context: Tensor | None = None,  # (B, M, K), features that do not flow
    ) -> tuple[Tensor, Tensor]:
        """Returns dx/dt (B, M, n) on the zero-mean subspace and dh/dt (B, M, F), zero at padding."""
        h_out, x_out = self.network(self._nodes(t, x, h, context), x, pair_mask(mask).to(x.dtype))
        return center(x_out - x, mask), h_out * mask.unsqueeze(-1)

    def trace(
        self,
        t: Tensor,  # () or (B,)
        x: Tensor,  # (B, M, n)
        h: Tensor,  # (B, M, F)
        mask: Tensor,  # (B, M), bool
        context: Tensor | None = None,  # (B, M, K)
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx/dt, dh/dt and the exact trace (B,) by the structure of the network, None if it offers none.

        Removing the mean takes ``1/M Σ_ik ∂(x^L − x)_i/∂x_k`` off the trace, which is zero: an EGNN or a radial field
        does not notice when all atoms move together.
        """
        if not self.has_closed_form:
            return None
        nodes, pairs = self._nodes(t, x, h, context), pair_mask(mask).to(x.dtype)
        if isinstance(self.network, EGNN):
            h_out, x_out, trace = egnn_trace(self.network, nodes, x, pairs, mask)
            trace = trace - x.shape[-1] * mask.sum(dim=-1)  # of x^L − x
        else:
            h_out, x_out, trace = self.network.with_trace(nodes, x, pairs)
        return center(x_out - x, mask), h_out * mask.unsqueeze(-1), trace

    @property
    def has_closed_form(self) -> bool:
        """Whether the structure of the network gives its trace."""
        return type(self.network) in (EGNN, *POSITION_NETWORKS.values())  # a subclass may compute something else

    def use_kernel(self, kernel: str) -> str:
        """Chooses "fused", "plain" or "auto" and returns which of the first two it is; see ``ENF.use_kernel``.

        Raises:
            ValueError: For an unknown name, or "fused" where that is impossible.
        """
        if kernel not in KERNELS:
            raise ValueError(f"kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
        reason = None if kernel == "plain" else self._no_kernel()
        if reason and kernel == "fused":
            raise ValueError(f"kernel 'fused' cannot be used: {reason}")
        fuse = kernel != "plain" and reason is None
        if isinstance(self.network, EGNN):
            self.network.fuse(fuse)
        return "fused" if fuse else "plain"

    def _no_kernel(self) -> str | None:
        if type(self.network) is not EGNN:
            return f"it computes the pairs of an EGNN only, not of {type(self.network).__name__}"
        weight = self.network.embed.weight
        return fused.unavailable(len(weight), weight.dtype, weight.device)

    @staticmethod
    def _nodes(t: Tensor, x: Tensor, h: Tensor, context: Tensor | None) -> Tensor:
        time = t.to(x.dtype).expand(x.shape[0])[:, None, None].expand(-1, x.shape[1], 1)
        return torch.cat([h, time] if context is None else [h, context, time], dim=-1)


@dataclass(frozen=True, eq=False)
class BoundDynamics:
    """Dynamics of one batch: ``(t, x, h) → (dx, dh)`` with mask and context bound.

    Args:
        dynamics: The dynamics.
        mask: True for real atoms, shape (B, M).
        context: Features that do not flow, shape (B, M, K), or None.
    """

    dynamics: Dynamics
    mask: Tensor
    context: Tensor | None = None

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
) -> nn.Module:
    """Builds a network by name; ``in_features`` counts the time, ``radial`` is for an EGNN only.

    Raises:
        ValueError: If ``kind`` is unknown, or moves positions only and there are features.
    """
    if kind == "egnn":
        return EGNN(in_features, out_features, hidden, layers, gate=attention, radial=radial)
    if kind == "gnn":
        return GNN(in_features, out_features, dimension, hidden, layers, gate=attention)
    if kind not in POSITION_NETWORKS:
        raise ValueError(f"network {kind!r} is unknown; choose one of {', '.join(NETWORKS)}")
    if (in_features, out_features) != (1, 0):
        raise ValueError(f"network {kind!r} moves positions only and knows no features; use features='none'")
    return POSITION_NETWORKS[kind](hidden, layers)
