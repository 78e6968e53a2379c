"""E(n) equivariant graph networks on dense masked pairs (eq. 4, 5 and 9)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_enf.geometry import pair_differences
from ase_enf.nn.backends import fused
from ase_enf.nn.gnn import Messages, NodeUpdate, dot, linear
from ase_enf.nn.radial import DISTANCE_EPSILON, pair_scalars
from ase_enf.threads import map_threads, shares


class EGCL(nn.Module):
    """One E(n) equivariant graph convolutional layer (eq. 4, 5 with the normalised difference of eq. 9).

    m_ij = e_ij φ_e(h_i, h_j, ‖x_i − x_j‖², a_ij)
    x_i ← x_i + Σ_{j≠i} (x_i − x_j) / (‖x_i − x_j‖ + C) · φ_x(m_ij),  C = 1
    h_i ← h_i + φ_h(h_i, Σ_{j≠i} m_ij)

    In the dynamics, φ_x is bounded by tanh, which keeps them Lipschitz continuous; the paper reports divergence without
    a bound.

    Args:
        features: Width F of the node features.
        edge_features: Number of constant pair scalars a_ij, including context.
        radial: Number K of radial functions of the distance in addition to ‖x_i − x_j‖²; see
            ``nn.radial.pair_scalars``.
        gate: Whether there are soft edges e_ij (eq. 4).
        bound: Largest |φ_x|, in the units of x; None for no bound.
        update_features: Whether h is updated; False in a last layer whose features are not used.
        update_positions: Whether x is updated; False in a last layer whose positions are not used.
    """

    def __init__(
        self,
        features: int,
        edge_features: int = 0,
        radial: int = 0,
        gate: bool = True,
        bound: float | None = 15.0,
        update_features: bool = True,
        update_positions: bool = True,
    ) -> None:
        super().__init__()
        self.bound = bound
        self.radial = radial
        self.fused = False  # see EGNN.fuse
        self.triton = False  # see EGNN.use_triton
        self.messages = Messages(features, 1 + radial + edge_features, gate)
        self.node = NodeUpdate(features) if update_features else None
        self.position_in = nn.Linear(features, features) if update_positions else None
        self.position_out = nn.Linear(features, 1, bias=False) if update_positions else None
        if self.position_out is not None:
            # With small initial weights the flow starts near the identity.
            nn.init.xavier_uniform_(self.position_out.weight, gain=1e-3)

    def forward(
        self,
        h: Tensor,  # (B, M, F)
        x: Tensor,  # (B, M, n)
        a: Tensor | None,  # (B, M, M, k), scalars of the input distances
        pair_mask: Tensor,  # (B, M, M)
        context: Tensor | None = None,  # (B, M, M, A), constant features of each pair
        on_gpu: bool = False,  # whether the Triton kernel computes the pairs
    ) -> tuple[Tensor, Tensor]:
        """Returns the updated h (B, M, F) and x (B, M, n)."""
        if self.uses_kernel(x):
            m_sum, shift = self._fused_pairs(h, x, a, pair_mask, context, fused.pair_layer)
            return (h if self.node is None else self.node(h, m_sum)), x + shift
        if on_gpu:
            from ase_enf.nn.backends.triton_pairs import pair_layer  # triton comes with CUDA only

            kernel = functools.partial(pair_layer, products=self.messages.products)
            m_sum, shift = self._fused_pairs(h, x, a, pair_mask, context, kernel)
            return (h if self.node is None else self.node(h, m_sum)), x + shift
        difference, squared = pair_differences(x)
        edges = pair_scalars(squared, self.radial)
        if more := [t for t in (a, context) if t is not None]:
            edges = torch.cat([edges, *more], dim=-1)
        m = self.messages(h, edges, pair_mask)
        if self.position_in is not None:
            products = self.messages.products
            hidden = F.silu(linear(self.position_in, m, products))
            phi = (self.position_out(hidden) if products is None else dot(hidden, self.position_out.weight)).squeeze(-1)
            if self.bound is not None:
                phi = torch.tanh(phi) * self.bound
            weight = phi * pair_mask / (torch.sqrt(squared + DISTANCE_EPSILON) + 1.0)
            x = x + torch.einsum("bij,bijn->bin", weight, difference)
        if self.node is not None:
            h = self.node(h, m.sum(dim=2, dtype=h.dtype))
        return h, x

    def uses_kernel(self, x: Tensor) -> bool:
        """Whether the compiled kernel computes the pairs of these positions; ``a`` is then ‖x^0_i − x^0_j‖² alone."""
        if not self.fused or x.device.type != "cpu" or self.messages.products or torch.is_autocast_enabled("cpu"):
            return False
        # The dtype may have changed since the kernel was chosen.
        return fused.fits(self.messages.edge_out.out_features, x.dtype)

    def _fused_pairs(
        self,
        h: Tensor,
        x: Tensor,
        a: Tensor | None,
        pair_mask: Tensor,
        context: Tensor | None,
        kernel: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        messages, width = self.messages, h.shape[-1]
        first, moves = messages.edge_in.weight, self.position_in is not None
        gate = messages.gate
        weights = {
            "by_scalar": first[:, 2 * width :].T,
            "w2": messages.edge_out.weight,
            "b2": messages.edge_out.bias,
            "gate": None if gate is None else gate.weight[0],
            "gate_bias": None if gate is None else gate.bias,
            "w3": self.position_in.weight if moves else None,
            "b3": self.position_in.bias if moves else None,
            "w4": self.position_out.weight[0] if moves else None,
        }
        by_target, by_source = first[:, :width], first[:, width : 2 * width]
        if h.device.type == "cuda":  # products with unaligned rows are slow there
            by_target, by_source = by_target.contiguous(), by_source.contiguous()
        target = F.linear(h, by_target, messages.edge_in.bias)
        source = F.linear(h, by_source)
        extra = None if a is None else a[..., 0]
        return kernel(target, source, x, extra, pair_mask, self.radial, self.bound, weights, context)


class EGNN(nn.Module):
    """L layers of EGCL between two linear maps: ``h^L, x^L = EGNN[h^0, x^0]``.

    Args:
        in_features: Number of input features of a node, including time and context.
        out_features: Number of output features of a node, 0 for none.
        hidden: Width F.
        layers: Number L of layers.
        gate: Whether there are soft edges e_ij.
        reach: Bound on the sum over layers of |φ_x|, in the units of x; None for no bound.
        input_distance: Whether ‖x^0_i − x^0_j‖² of the *input* is a feature of every layer.
        radial: Number K of radial functions of each distance in addition to its square.
        positions_out: Whether x^L is used; if not, the last layer has no φ_x.
        pair_features: Number A of constant features of each pair, such as its bond order (a_ij of eq. 4).

    Example:
        >>> network = EGNN(in_features=2, out_features=3, hidden=8, layers=2)
        >>> mask = torch.ones(1, 4, 4) - torch.eye(4)
        >>> h, x = network(torch.randn(1, 4, 2), torch.randn(1, 4, 3), mask)
        >>> h.shape, x.shape
        (torch.Size([1, 4, 3]), torch.Size([1, 4, 3]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 64,
        layers: int = 6,
        gate: bool = True,
        reach: float | None = 15.0,
        input_distance: bool = True,
        radial: int = 0,
        positions_out: bool = True,
        pair_features: int = 0,
    ) -> None:
        super().__init__()
        self.input_distance = input_distance
        self.radial = radial
        self.embed = nn.Linear(in_features, hidden)
        self.layers = nn.ModuleList(
            EGCL(
                hidden,
                edge_features=(1 + radial if input_distance else 0) + pair_features,
                radial=radial,
                gate=gate,
                bound=None if reach is None else reach / layers,
                update_features=out_features > 0 or layer < layers - 1,
                update_positions=positions_out or layer < layers - 1,
            )
            for layer in range(layers)
        )
        self.out = nn.Linear(hidden, out_features) if out_features else None

    def multiply_in(self, products: torch.dtype | None) -> None:
        """Sets the dtype of the (F, F) products of the pairs, such as bfloat16; None for that of the weights.

        Distances, radial functions, sums over neighbours and node features keep the dtype of the weights, because
        rounded distances would blur the geometry.
        """
        for layer in self.layers:
            layer.messages.products = products

    def fuse(self, fused: bool = True) -> None:
        """Chooses whether the compiled kernel computes the pairs; it has no second derivatives."""
        for layer in self.layers:
            layer.fused = fused

    def use_triton(self, triton: bool = True) -> None:
        """Chooses whether the Triton kernel computes the pairs where it can.

        It works in float32 on CUDA devices and has gradients with respect to the weights only; the plain layer computes
        those with respect to the input.
        """
        for layer in self.layers:
            layer.triton = triton

    def forward(
        self,
        h: Tensor,  # (B, M, in_features)
        x: Tensor,  # (B, M, n)
        pair_mask: Tensor,  # (B, M, M), same dtype as h
        pairs: Tensor | None = None,  # (B, M, M, pair_features)
    ) -> tuple[Tensor, Tensor]:
        """Returns h^L (B, M, out_features) and x^L (B, M, n)."""
        count = 1 if torch.is_grad_enabled() or not self.layers[0].uses_kernel(x) else shares(len(x))
        if count == 1:
            return self._evaluate(h, x, pair_mask, pairs)
        # Molecules are independent: threads that each evaluate the whole network do not wait for each other.
        inputs = (h, x, pair_mask) if pairs is None else (h, x, pair_mask, pairs)
        pieces = list(zip(*(t.chunk(count) for t in inputs), strict=True))
        done = map_threads(lambda piece: self._evaluate(*piece), pieces)
        h_out, x_out = (torch.cat(parts) for parts in zip(*done, strict=True))
        return h_out, x_out

    def _evaluate(self, h: Tensor, x: Tensor, pair_mask: Tensor, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a = None
        on_gpu = self._on_gpu(h, x)
        if self.input_distance:
            expanded = 0 if on_gpu or self.layers[0].uses_kernel(x) else self.radial  # kernels expand it themselves
            a = pair_scalars(pair_differences(x)[1], expanded)
        h = self.embed(h)
        for layer in self.layers:
            h, x = layer(h, x, a, pair_mask, pairs, on_gpu)
        if self.out is None:
            return h[..., :0], x
        return self.out(h), x

    def _on_gpu(self, h: Tensor, x: Tensor) -> bool:
        """Whether the Triton kernel computes the pairs of this batch."""
        if not self.layers[0].triton or x.device.type != "cuda" or x.dtype != torch.float32:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or h.requires_grad):
            return False
        from ase_enf.nn.backends.triton_pairs import unfit  # triton comes with CUDA only

        messages = self.layers[0].messages
        scalars = messages.edge_in.in_features - 2 * messages.features
        return unfit(messages.features, x.shape[1], scalars, x.shape[2]) is None
