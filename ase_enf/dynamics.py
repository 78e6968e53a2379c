"""The dynamics of the flow: time and context enter, a network answers with the velocity (eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ase_enf.geometry import center, pair_mask
from ase_enf.nn.egnn import EGNN
from ase_enf.nn.gnn import GNN


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
        time = t.to(x.dtype).expand(x.shape[0])[:, None, None].expand(-1, x.shape[1], 1)
        nodes = [h, time] if context is None else [h, context, time]
        h_out, x_out = self.network(torch.cat(nodes, dim=-1), x, pair_mask(mask).to(x.dtype))
        return center(x_out - x, mask), h_out * mask.unsqueeze(-1)


def build_network(
    kind: str, in_features: int, out_features: int, dimension: int, hidden: int, layers: int, attention: bool
) -> nn.Module:
    """Builds a network by name; ``in_features`` counts the time.

    Raises:
        ValueError: If ``kind`` is unknown.
    """
    if kind == "egnn":
        return EGNN(in_features, out_features, hidden, layers, gate=attention)
    if kind == "gnn":
        return GNN(in_features, out_features, dimension, hidden, layers, gate=attention)
    raise ValueError(f"network {kind!r} is unknown; choose 'egnn' or 'gnn'")
