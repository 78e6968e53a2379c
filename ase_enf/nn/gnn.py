"""The non-equivariant graph network of the baselines GNF and GNF-att, and the message block both networks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Messages(nn.Module):
    """Messages weighted by soft edges on all ordered pairs, e_ij m_ij (eq. 4).

    m_ij = φ_e(h_i, h_j, a_ij),  e_ij = sigmoid(w·m_ij + b)

    The first layer of φ_e is linear in [h_i, h_j, a_ij]. It is therefore applied to the nodes, and the results are
    added on the pairs, which halves the products and needs no tensor of shape (B, M, M, 2F + k).

    Args:
        features: Width F of nodes and messages.
        edge_features: Number k of pair scalars a_ij.
        gate: Whether to weight messages by the soft edges e_ij; otherwise e_ij = 1.
    """

    def __init__(self, features: int, edge_features: int, gate: bool) -> None:
        super().__init__()
        self.features = features
        self.products: torch.dtype | None = None  # dtype of the largest products; None for that of the weights
        self.edge_in = nn.Linear(2 * features + edge_features, features)
        self.edge_out = nn.Linear(features, features)
        self.gate = nn.Linear(features, 1) if gate else None

    def forward(
        self,
        h: Tensor,  # (B, M, F)
        a: Tensor | None,  # (B, M, M, k)
        pair_mask: Tensor,  # (B, M, M), 1 where i ≠ j are both real, same dtype as h
    ) -> Tensor:  # (B, M, M, F)
        """Returns e_ij m_ij, zero where ``pair_mask`` is zero."""
        width = self.features
        weight = self.edge_in.weight
        target = F.linear(h, weight[:, :width], self.edge_in.bias)  # h_i
        source = F.linear(h, weight[:, width : 2 * width])  # h_j
        if a is None:
            hidden = target.unsqueeze(2) + source.unsqueeze(1)
        else:  # added in place, as this is the largest tensor
            hidden = F.linear(a, weight[:, 2 * width :]).add_(target.unsqueeze(2)).add_(source.unsqueeze(1))
        m = F.silu(linear(self.edge_out, F.silu(hidden), self.products))
        if self.gate is None:
            return m * pair_mask.unsqueeze(-1).to(m.dtype)
        score = self.gate(m) if self.products is None else dot(m, self.gate.weight) + self.gate.bias
        return m * (torch.sigmoid(score) * pair_mask.unsqueeze(-1)).to(m.dtype)


def linear(layer: nn.Linear, values: Tensor, products: torch.dtype | None) -> Tensor:
    """Applies a linear layer in the dtype ``products``, which is that of the result, or as it is if None is given."""
    if products is None:
        return layer(values)
    bias = None if layer.bias is None else layer.bias.to(products)
    return F.linear(values.to(products), layer.weight.to(products), bias)


def dot(values: Tensor, weight: Tensor) -> Tensor:
    """Returns the product with one row of weights, shape (1, F), summed in the dtype of the weights."""
    return (values.to(weight.dtype) * weight[0]).sum(dim=-1, keepdim=True)


class NodeUpdate(nn.Module):
    """Residual update of the node features, ``h_i ← h_i + φ_h(h_i, m_i)`` (eq. 5).

    Args:
        features: Width F.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.node_in = nn.Linear(2 * features, features)
        self.node_out = nn.Linear(features, features)

    def forward(self, h: Tensor, m: Tensor) -> Tensor:
        """Returns h (B, M, F) updated by the summed messages m (B, M, F)."""
        return h + self.node_out(F.silu(self.node_in(torch.cat([h, m], dim=-1))))


class GNN(nn.Module):
    """A graph network that takes positions as plain node features, and so is *not* rotation equivariant.

    h_i ← h_i + φ_h(h_i, Σ_j e_ij φ_e(h_i, h_j)) for L layers; a final linear layer gives [x^L − x, h^L]. It is the
    dynamics of GNF (without soft edges) and GNF-att (with them) in Tables 1 and 2 of the paper.

    Args:
        in_features: Number of input features of a node, including time and context.
        out_features: Number of output features of a node, 0 for none.
        dimension: Dimension n of space.
        hidden: Width F.
        layers: Number L of layers.
        gate: Whether there are soft edges e_ij (GNF-att).

    Example:
        >>> network = GNN(in_features=2, out_features=3, dimension=3, hidden=8, layers=2)
        >>> mask = torch.ones(1, 4, 4) - torch.eye(4)
        >>> h, x = network(torch.randn(1, 4, 2), torch.randn(1, 4, 3), mask)
        >>> h.shape, x.shape
        (torch.Size([1, 4, 3]), torch.Size([1, 4, 3]))
    """

    def __init__(
        self, in_features: int, out_features: int, dimension: int, hidden: int = 64, layers: int = 6, gate: bool = True
    ) -> None:
        super().__init__()
        self.dimension = dimension
        self.embed = nn.Linear(dimension + in_features, hidden)
        self.messages = nn.ModuleList(Messages(hidden, 0, gate) for _ in range(layers))
        self.nodes = nn.ModuleList(NodeUpdate(hidden) for _ in range(layers))
        self.out = nn.Linear(hidden, dimension + out_features)

    def forward(
        self,
        h: Tensor,  # (B, M, in_features)
        x: Tensor,  # (B, M, n)
        pair_mask: Tensor,  # (B, M, M)
    ) -> tuple[Tensor, Tensor]:
        """Returns h^L (B, M, out_features) and x^L (B, M, n)."""
        hidden = self.embed(torch.cat([x, h], dim=-1))
        for messages, node in zip(self.messages, self.nodes, strict=True):
            hidden = node(hidden, messages(hidden, None, pair_mask).sum(dim=2))
        out = self.out(hidden)
        return out[..., self.dimension :], x + out[..., : self.dimension]
