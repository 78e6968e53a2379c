"""The exact trace of the Jacobian of an EGNN in closed form, at a fraction of the cost of automatic differentiation.

In a layer, two atoms interact through one message only, which depends on them through the F numbers
``a_ij = A h_i + B h_j + C [d²_ij, d⁰²_ij]``. The Jacobian of a layer is therefore a matrix of M × M blocks
``G_ij = ∂m_ij/∂a_ij`` (F × F), which follow from the forward pass by a few broadcast products. Pushing all
D = M (n + F_out) directions through the layer is one product of dense matrices; the D · M² · F tangents of the pairs
are never formed. The first and the last layer need even less:

* First layer: a perturbation of one atom reaches the other atoms through its own pairs only, one block each.
* Last layer: the trace needs only the dependence of an atom's outputs on its own inputs, so the few cotangents of each
  atom are pulled back through its own pairs and multiplied by the tangents there.

The cost is that of (L − 2) products of (D × M F) with (M F × M F); ``benchmarks/accuracy/likelihood.py`` measures it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ase_enf.geometry import pair_differences
from ase_enf.nn.backends import fused
from ase_enf.nn.egnn import EGCL, EGNN
from ase_enf.nn.gnn import Messages
from ase_enf.nn.radial import DISTANCE_EPSILON, pair_scalar_slopes, pair_scalars

# Most elements of tangents (B, M, D, F) and blocks (B, M F, M F) at a time: they fit a CPU's caches, and fill a GPU.
TANGENT_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}


class _Tangent(NamedTuple):
    """Derivatives of the nodes along D directions; the direction (k, s) perturbs component s of atom k."""

    h: Tensor  # (B, M, D, F)
    x: Tensor  # (B, M, D, n)


class Traced(NamedTuple):
    """Output of an EGNN and the traces of its Jacobian over real atoms."""

    h: Tensor  # h^L, (B, M, out_features)
    x: Tensor  # x^L, (B, M, n)
    by_x: Tensor  # (B,), Σ_ic ∂x^L_ic/∂x^0_ic
    by_h: Tensor  # (B,), Σ_is ∂h^L_is/∂h^0_is over the features that flow


def egnn_trace(
    network: EGNN, h: Tensor, x: Tensor, pair_mask: Tensor, mask: Tensor, pairs: Tensor | None = None
) -> Traced:
    """Output of an EGNN with ``Σ_ic ∂x^L_ic/∂x^0_ic`` and ``Σ_is ∂h^L_is/∂h^0_is``, exact and differentiable.

    Args:
        network: An EGNN of L ≥ 1 layers; the first ``out_features`` of its input features are those that flow.
        h: Input features, shape (B, M, in_features).
        x: Positions, shape (B, M, n).
        pair_mask: 1 where i ≠ j are both real, shape (B, M, M), in the dtype of h.
        mask: True for real atoms, shape (B, M).
        pairs: Constant features of the pairs, shape (B, M, M, A), if the network takes any.

    Returns:
        h^L, x^L and the two traces.

    Example:
        >>> network = EGNN(in_features=2, out_features=1, hidden=8, layers=3)
        >>> mask = torch.ones(1, 4, dtype=torch.bool)
        >>> pairs = torch.ones(1, 4, 4) - torch.eye(4)
        >>> egnn_trace(network, torch.randn(1, 4, 2), torch.randn(1, 4, 3), pairs, mask).by_x.shape
        torch.Size([1])
    """
    (atoms, n), device = x.shape[1:], "cpu" if x.device.type == "cpu" else "cuda"
    features, hidden = (network.out.out_features if network.out is not None else 0), network.embed.out_features
    together = max(1, TANGENT_ELEMENTS[device] // (atoms * (n + features) * atoms * hidden))
    block = (atoms * hidden) ** 2
    blocks = max(1, BLOCK_ELEMENTS[device] // block)
    # Allocating memory of this size takes longer than the arithmetic on it, so it is reused unless a graph needs it.
    middle = len(network.layers) > 2
    needed = min(together, blocks, len(x)) * block
    if network.layers[0].uses_kernel(x):  # the kernel holds no blocks
        needed = min(together, len(x)) * fused.push_memory(atoms, atoms * (n + features), hidden, n, x.dtype)
    work = None if torch.is_grad_enabled() else x.new_empty(needed * middle)
    inputs = (h, x, pair_mask, mask) if pairs is None else (h, x, pair_mask, mask, pairs)
    pieces = [
        _trace(network, blocks, work, *arguments)
        for arguments in zip(*(t.split(together) for t in inputs), strict=True)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return Traced(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _trace(
    network: EGNN,
    blocks: int,
    work: Tensor | None,
    h: Tensor,
    x: Tensor,
    pair_mask: Tensor,
    mask: Tensor,
    pairs: Tensor | None = None,
) -> Traced:
    width = network.out.out_features if network.out is not None else 0
    start = pair_differences(x)
    h_in = network.embed(h)
    lift = network.embed.weight[:, :width].T  # (S, F), derivative of the embedding by the flowing features
    tangent = _unit_tangent(lift, h_in, x)
    last = len(network.layers) - 1
    for depth, module in enumerate(network.layers):
        layer = _Layer(module, h_in, x, start if network.input_distance else None, pair_mask, pairs)
        if depth == last:
            by_x, by_h = layer.trace(tangent, network.out.weight if network.out is not None else None, mask)
        elif depth == 0:
            tangent = layer.push_first(lift)
        else:
            tangent = layer.push(tangent, blocks, work)
        h_in, x = layer.h_out, layer.x_out
    return Traced(h_in[..., :0] if network.out is None else network.out(h_in), x, by_x, by_h)


def _unit_tangent(lift: Tensor, h: Tensor, x: Tensor) -> _Tangent:
    """Returns the tangent of the embedding: each direction moves one atom."""
    size, atoms, n = x.shape
    width, hidden = lift.shape
    one = torch.eye(atoms, dtype=x.dtype, device=x.device)  # (k, j)
    by_h = torch.cat([lift.new_zeros(n, hidden), lift])  # (S, F)
    by_x = torch.cat([torch.eye(n, dtype=x.dtype, device=x.device), x.new_zeros(width, n)])
    return _Tangent(*(torch.einsum("kj,sf->jksf", one, t).flatten(1, 2).expand(size, -1, -1, -1) for t in (by_h, by_x)))


class _MessageJacobian:
    """``G_ij = ∂m_ij/∂a_ij = diag(α_ij) W diag(σ'_ij) + u_ij β_ijᵀ`` with W the second weight of φ_e.

    m = e u with u = silu(v), v = W silu(a) + b and the soft edge e = sigmoid(w·u + b_e):
    α = e silu'(v), σ' = silu'(a), β = e (1 − e) diag(σ') Wᵀ diag(silu'(v)) w. Without soft edges e = 1 and β = 0.

    Args:
        messages: The message block of a layer.
        a: Input of the first SiLU, shape (B, M, M, F).
        pair_mask: 1 where i ≠ j are both real, shape (B, M, M).
    """

    def __init__(self, messages: Messages, a: Tensor, pair_mask: Tensor) -> None:
        pairs = pair_mask.unsqueeze(-1)
        self.weight = messages.edge_out.weight
        hidden, self.slope = _silu_with_slope(a)
        self.u, slope_v = _silu_with_slope(messages.edge_out(hidden))
        self.beta: Tensor | None = None
        if messages.gate is None:
            self.alpha, self.m = slope_v * pairs, self.u * pairs
        else:
            edge = torch.sigmoid(messages.gate(self.u))
            open_ = edge * pairs
            self.alpha, self.m = slope_v * open_, self.u * open_
            w = messages.gate.weight.squeeze(0)
            self.beta = ((slope_v * (w * (open_ * (1.0 - edge)))) @ self.weight) * self.slope

    def apply(self, v: Tensor) -> Tensor:
        """Returns G_ij v, shape (B, M, M, k, F), for vectors v, shape (k, F) or (B, M, M, k, F)."""
        out = F.linear(self.slope.unsqueeze(-2) * v, self.weight) * self.alpha.unsqueeze(-2)
        if self.beta is not None:
            out = out + (v @ self.beta.unsqueeze(-1)) * self.u.unsqueeze(-2)
        return out

    def pull(self, w: Tensor) -> Tensor:
        """Returns G_ijᵀ w for cotangents w (B, M, M or 1, k, F), shape (B, M, M, k, F)."""
        out = ((w * self.alpha.unsqueeze(-2)) @ self.weight) * self.slope.unsqueeze(-2)
        if self.beta is not None:
            out = out + (w @ self.u.unsqueeze(-1)) * self.beta.unsqueeze(-2)
        return out

    def blocks(self, some: slice, work: Tensor | None) -> Tensor:
        """Returns all G_ij of some molecules as a matrix, entry [(j, f), (i, f')] = G_ij[f', f], shape (B', M F, M F).

        Args:
            some: The molecules.
            work: Memory for the matrix, overwritten; None if a graph is recorded.
        """
        slope = self.slope[some].permute(0, 2, 3, 1).contiguous().unsqueeze(-1)  # (B', j, F, i, 1)
        alpha, u = (t[some].transpose(1, 2).unsqueeze(2) for t in (self.alpha, self.u))  # (B', j, 1, i, F')
        size, atoms, width = slope.shape[:3]
        weight = self.weight.T.contiguous().unsqueeze(1)  # (F, 1, F')
        if work is None:
            matrix = slope * weight * alpha
        else:
            matrix = work[: size * (atoms * width) ** 2].view(size, atoms, width, atoms, width)
            torch.mul(slope, weight, out=matrix)
            matrix.mul_(alpha)
        if self.beta is not None:  # in place, as no gradient needs the value of the product
            matrix.addcmul_(self.beta[some].permute(0, 2, 3, 1).contiguous().unsqueeze(-1), u)
        return matrix.flatten(3, 4).flatten(1, 2)

    def row_sum(self) -> Tensor:
        """Returns Σ_j G_ij transposed, entry [i, f, f'], shape (B, M, F, F)."""
        total = (self.slope.transpose(2, 3) @ self.alpha) * self.weight.T
        return total if self.beta is None else total + self.beta.transpose(2, 3) @ self.u


class _Layer:
    """One EGCL at a point: its output, and its Jacobian in the forms that first, middle and last layers need.

    Along a direction, with r_ij = x_i − x_j, δ_ij = 2 r_ij·(dx_i − dx_j) and δ⁰ likewise from the input positions:

        da_ij = A dh_i + B dh_j + c_ij δ_ij + c⁰_ij δ⁰_ij,   dm_i = Σ_j G_ij da_ij
        dx_i' = dx_i + Σ_j r_ij (ψ_ij·da_ij + ζ_ij δ_ij) + w_ij (dx_i − dx_j)

    where x_i' = x_i + Σ_j w_ij r_ij, w = φ_x(m) / (d + 1), ψ = ∂w/∂a, ζ = ∂w/∂d² at fixed a (eq. 5, 9), and c = ∂a/∂d²,
    which without radial functions is the same for all pairs.

    Args:
        module: The layer.
        h: Node features, shape (B, M, F).
        x: Positions, shape (B, M, n).
        start: Differences and squared distances of the network's input; None if the layers do not use them.
        pair_mask: 1 where i ≠ j are both real, shape (B, M, M).
        pairs: Constant features of the pairs, which only shift a_ij, shape (B, M, M, A); or None.
    """

    def __init__(
        self,
        module: EGCL,
        h: Tensor,
        x: Tensor,
        start: tuple[Tensor, Tensor] | None,
        pair_mask: Tensor,
        pairs: Tensor | None = None,
    ) -> None:
        self.h, self.x, self.module = h, x, module
        self.r, squared = pair_differences(x)
        self.r0 = None if start is None else start[0]
        width = h.shape[-1]
        first = module.messages.edge_in
        self.a_i, self.a_j = first.weight[:, :width], first.weight[:, width : 2 * width]  # A, B
        distances = [squared] if start is None else [squared, start[1]]
        by_edge = first.weight[:, 2 * width :].T.contiguous()
        by_scalar = by_edge[: len(distances) * (1 + module.radial)].split(1 + module.radial)
        a = sum(pair_scalars(d, module.radial) @ w for d, w in zip(distances, by_scalar, strict=True))
        # c, c⁰: (1 or 2, F), or with radial functions (B, M, M, 1 or 2, F)
        self.by_distance = torch.cat(by_scalar)
        if module.radial:
            slopes = [pair_scalar_slopes(d, module.radial) @ w for d, w in zip(distances, by_scalar, strict=True)]
            self.by_distance = torch.stack(slopes, dim=-2)
        a = a + F.linear(h, self.a_i, first.bias).unsqueeze(2) + F.linear(h, self.a_j).unsqueeze(1)
        if pairs is not None:
            a = a + pairs @ by_edge[len(distances) * (1 + module.radial) :]
        self.message = _MessageJacobian(module.messages, a, pair_mask)
        self.g = self.message.apply(self.by_distance)  # (B, M, M, 1 or 2, F): G c, G c⁰
        self._positions(squared, pair_mask)
        self._nodes()

    def _positions(self, squared: Tensor, pair_mask: Tensor) -> None:
        """Sets x', w_ij, ψ_ij, η_ij = ∂w/∂δ and η⁰_ij = ∂w/∂δ⁰."""
        module, message = self.module, self.message
        self.x_out = self.x
        if module.position_in is None:
            return
        y, slope_y = _silu_with_slope(module.position_in(message.m))
        phi = module.position_out(y).squeeze(-1)
        slope_phi = torch.ones_like(phi)
        if module.bound is not None:
            tanh = torch.tanh(phi)
            phi, slope_phi = tanh * module.bound, (1.0 - tanh.square()) * module.bound
        distance = torch.sqrt(squared + DISTANCE_EPSILON)
        inverse = pair_mask / (distance + 1.0)
        self.w = phi * inverse
        back = (slope_y * module.position_out.weight.squeeze(0)) @ module.position_in.weight
        back = back * (slope_phi * inverse).unsqueeze(-1)
        self.psi = message.pull(back.unsqueeze(-2)).squeeze(-2)  # (B, M, M, F)
        zeta = -self.w / (distance + 1.0) / (2.0 * distance)
        eta = (self.by_distance @ self.psi.unsqueeze(-1)).squeeze(-1)
        self.eta, self.eta0 = eta[..., 0] + zeta, eta[..., -1]
        self.x_out = self.x + torch.einsum("bij,bijn->bin", self.w, self.r)

    def _nodes(self) -> None:
        """Sets h' and the derivative of the SiLU in the node update."""
        self.h_out, node = self.h, self.module.node
        if node is not None:
            inner = node.node_in(torch.cat([self.h, self.message.m.sum(dim=2)], dim=-1))
            inner, self.node_slope = _silu_with_slope(inner)
            self.h_out = self.h + node.node_out(inner)

    def _message_blocks(self) -> tuple[Tensor, Tensor | None]:
        """Returns ∂m_i/∂x_j at fixed h, and the same for the input positions.

        Entries are [j, c, i, f']; the diagonal j = i holds the effect of an atom on itself.
        """
        pairs = zip((self.r, self.r0), self.g.unbind(dim=3), strict=False)
        blocks = [
            _fill_own(-2.0 * r.permute(0, 2, 3, 1).unsqueeze(-1) * g.transpose(1, 2).unsqueeze(2)) for r, g in pairs
        ]
        return blocks[0], blocks[1] if self.r0 is not None else None

    def _position_blocks(self) -> tuple[Tensor, Tensor | None]:
        """Returns ∂(x_i' − x_i)/∂x_j at fixed h, entries [j, c, i, c'], and the same for the input positions."""
        identity = torch.eye(self.x.shape[-1], dtype=self.x.dtype, device=self.x.device)
        by_w = self.w.transpose(1, 2)[:, :, None, :, None] * identity[:, None, :]
        r = -2.0 * self.r.permute(0, 2, 3, 1).unsqueeze(-1)  # (B, j, n, i, 1)
        to_x = _fill_own(r * self._along(self.eta) - by_w)
        if self.r0 is None:
            return to_x, None
        return to_x, _fill_own(-2.0 * self.r0.permute(0, 2, 3, 1).unsqueeze(-1) * self._along(self.eta0))

    def _along(self, weight: Tensor) -> Tensor:
        """Returns weight_ij r_ij, shape (B, j, 1, i, n)."""
        return (weight.unsqueeze(-1) * self.r).transpose(1, 2).unsqueeze(2)

    def push_first(self, lift: Tensor) -> _Tangent:
        """Pushes the directions of the network's inputs, each of which perturbs one atom, through the layer."""
        size, atoms, n = self.x.shape
        (to_m, to_m0), (to_x, to_x0) = self._message_blocks(), self._position_blocks()
        if to_m0 is not None:
            to_m, to_x = to_m + to_m0, to_x + to_x0
        by_own, by_other = lift @ self.a_i.T, lift @ self.a_j.T  # (S, F)
        dm = self.message.apply(by_other)  # (B, i, k, S, F)
        dx = torch.einsum("biks,bikc->biksc", self.psi @ by_other.T, self.r)
        own_m = torch.einsum("bifg,sf->bisg", self.message.row_sum(), by_own)
        own_x = torch.einsum("bijs,bijc->bisc", self.psi @ by_own.T, self.r)
        one = torch.eye(atoms, dtype=self.x.dtype, device=self.x.device)[:, :, None, None]  # (i, k, 1, 1)
        dm = torch.cat([to_m.permute(0, 3, 1, 2, 4), dm + own_m.unsqueeze(2) * one], dim=3).flatten(2, 3)
        move = to_x.permute(0, 3, 1, 2, 4) + one * torch.eye(n, dtype=self.x.dtype, device=self.x.device)
        dx = torch.cat([move, dx + own_x.unsqueeze(2) * one], dim=3).flatten(2, 3)
        dh = (torch.cat([lift.new_zeros(n, lift.shape[1]), lift]) * one).flatten(1, 2)  # (i, D, F)
        node = self.module.node
        inner = F.linear(torch.cat([dh.expand(size, -1, -1, -1), dm], dim=-1), node.node_in.weight)
        moved = dh + F.linear(inner * self.node_slope.unsqueeze(2), node.node_out.weight)
        return _Tangent(moved.contiguous(), dx.contiguous())  # push writes into views of them

    def push(self, tangent: _Tangent, together: int, work: Tensor | None) -> _Tangent:
        """Pushes arbitrary directions through the layer.

        Args:
            tangent: Tangents of the layer's inputs; overwritten unless a graph is recorded.
            together: Number of molecules whose blocks are held at a time.
            work: Memory for the blocks; None if a graph is recorded.
        """
        if work is not None and self.module.uses_kernel(self.x):
            return self._push_fused(tangent, work)
        size, atoms, directions, n = tangent.x.shape
        width, node = self.h.shape[-1], self.module.node
        by_h, by_m = node.node_in.weight.split(width, dim=1)
        (to_m, to_m0), (to_x, to_x0) = self._message_blocks(), self._position_blocks()
        to_x_by_h = torch.einsum("bijf,bijc->bjfic", self.psi, self.r)  # (B, j, F, i, n)
        others, moved = F.linear(tangent.h, self.a_j), tangent.x.transpose(1, 2).flatten(2)
        # Effect of an atom on itself, as matrices (F, F) on the node update and (F, n) on the position.
        own = self.a_i.T @ self.message.row_sum() @ by_m.T + by_h.T  # (B, i, F, F)
        own_x = self.a_i.T @ to_x_by_h.sum(dim=1).transpose(1, 2)  # (B, i, F, n)
        out = self.node_slope.unsqueeze(-1) * node.node_out.weight.T  # (B, i, F, F)
        h_pieces, x_pieces = [], []
        for first in range(0, size, together):  # few molecules at a time stay in the cache
            some = slice(first, first + together)
            v, h = others[some].transpose(1, 2).flatten(2), tangent.h[some].view(-1, directions, width)
            dm = torch.bmm(moved[some], to_m[some].flatten(3).flatten(1, 2))
            dx = torch.bmm(moved[some], to_x[some].flatten(3).flatten(1, 2))
            dm.baddbmm_(v, self.message.blocks(some, work))
            dx.baddbmm_(v, to_x_by_h[some].flatten(3).flatten(1, 2))
            if to_m0 is not None:  # every layer depends on the input positions directly, too
                dm.view(len(dm), atoms, -1, atoms, width)[:, :, :n] += to_m0[some]
                dx.view(len(dx), atoms, -1, atoms, n)[:, :, :n] += to_x0[some]
            dm, dx = (t.unflatten(2, (atoms, -1)).transpose(1, 2).flatten(0, 1) for t in (dm, dx))  # (B' M, D, ·)
            x_pieces.append(torch.baddbmm(dx, h, own_x[some].flatten(0, 1)))
            inner = torch.bmm(dm, by_m.T.expand(len(dm), -1, -1)).baddbmm_(h, own[some].flatten(0, 1))
            # In place unless a graph is recorded: the old tangent is not needed any more.
            target = None if work is None else h
            h_pieces.append(torch.baddbmm(h, inner, out[some].flatten(0, 1), out=target))
        dh = torch.cat(h_pieces).view_as(tangent.h) if work is None else tangent.h
        return _Tangent(dh, tangent.x + torch.cat(x_pieces).view_as(tangent.x))

    def _push_fused(self, tangent: _Tangent, work: Tensor) -> _Tangent:
        """As ``push``, by the compiled kernel, which keeps the data of an atom in the caches; changes ``tangent.h``."""
        size, atoms, _, n = tangent.x.shape
        width, node, message = self.h.shape[-1], self.module.node, self.message
        by_h, by_m = node.node_in.weight.split(width, dim=1)
        (to_m, to_m0), (to_x, to_x0) = self._message_blocks(), self._position_blocks()
        by_v = torch.einsum("bijf,bijc->bijfc", self.psi, self.r)
        columns = fused.push_columns(atoms, n, self.x.dtype)
        by_source = self.x.new_zeros(size, atoms, width + n, columns)
        by_source[:, :, :width, : atoms * n].unflatten(3, (atoms, n)).copy_(by_v.permute(0, 2, 3, 1, 4))
        by_source[:, :, width:, : atoms * n].unflatten(3, (atoms, n)).copy_(to_x)
        terms = {
            "mask": (message.alpha != 0).any(dim=-1),
            **{name: getattr(message, name) for name in ("slope", "alpha", "beta", "u", "weight")},
            "to_m": to_m.permute(0, 3, 1, 2, 4),
            "to_m0": None if to_m0 is None else to_m0.permute(0, 3, 1, 2, 4),
            "a_i": self.a_i,
            "a_j": self.a_j,
            "by_h": by_h,
            "by_m": by_m,
            "node_slope": self.node_slope,
            "node_out": node.node_out.weight,
            "to_x": by_source,
            "own_x": torch.einsum("fg,bifc->bigc", self.a_i, by_v.sum(dim=2)),
        }
        dx = tangent.x + fused.push_tangents(tangent.h, tangent.x, terms, work)
        if to_x0 is not None:  # every layer depends on the input positions directly, too
            dx.unflatten(2, (atoms, -1))[:, :, :, :n] += to_x0.permute(0, 3, 1, 2, 4)
        return _Tangent(tangent.h, dx)

    def trace(self, tangent: _Tangent, out: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the traces of positions and of features, shape (B,) each, contracting tangents and cotangents.

        Args:
            tangent: Tangents of the layer's inputs.
            out: Weight of the linear output layer of the features, shape (S, F), if there is one.
            mask: True for real atoms, shape (B, M).
        """
        atoms, n = self.x.shape[1:]
        dh, dx = (t.unflatten(2, (atoms, -1)) for t in tangent)  # (B, j, i, s, ·): atom j along direction (i, s)
        total = torch.einsum("biicc->bi", dx[..., :n, :])
        if self.module.position_in is not None:
            to_x, to_x0 = self._position_blocks()
            to_h = torch.einsum("bijf,bijc->bijcf", self.psi, self.r)
            own = torch.einsum("biicf->bicf", dh[..., :n, :]) @ self.a_i.T
            total = total + torch.einsum("bijcf,bjicf->bi", to_h, F.linear(dh[..., :n, :], self.a_j))
            total = total + torch.einsum("bicf,bicf->bi", to_h.sum(dim=2), own)
            total = total + torch.einsum("bjdic,bjicd->bi", to_x, dx[..., :n, :])
            if to_x0 is not None:
                total = total + torch.einsum("bicic->bi", to_x0)
        features = torch.zeros_like(total) if out is None else self._feature_trace(dh[..., n:, :], dx[..., n:, :], out)
        return (total * mask).sum(dim=1), (features * mask).sum(dim=1)

    def _feature_trace(self, dh: Tensor, dx: Tensor, out: Tensor) -> Tensor:
        node = self.module.node
        weight, width = node.node_in.weight, dh.shape[-1]
        inner = (out @ node.node_out.weight) * self.node_slope.unsqueeze(2)  # (B, i, S, F)
        to_own, to_m = out + inner @ weight[:, :width], inner @ weight[:, width:]
        back = self.message.pull(to_m.unsqueeze(2))  # (B, i, j, S, F)
        by_distance = torch.einsum("bisf,bijf->bijs", to_m, self.g[..., 0, :])
        own_h, own_x = (torch.einsum("biisf->bisf", t) for t in (dh, dx))
        total = torch.einsum("bijsf,bjisf->bi", back, F.linear(dh, self.a_j))
        total = total + torch.einsum("bisf,bisf->bi", to_own + back.sum(dim=2) @ self.a_i, own_h)
        stretch = torch.einsum("bijc,bijsc->bijs", self.r, own_x.unsqueeze(2) - dx.transpose(1, 2))
        return total + 2.0 * torch.einsum("bijs,bijs->bi", by_distance, stretch)


def _silu_with_slope(v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns silu(v) and its derivative."""
    gate = torch.sigmoid(v)
    value = v * gate
    return value, gate * (1.0 - value) + value


def _fill_own(blocks: Tensor) -> Tensor:
    """Sets the diagonal of blocks [j, ·, i, ·] to minus the sum over j: moving all atoms together changes nothing."""
    own = blocks.sum(dim=1).transpose(1, 2)  # (B, i, n, ·); the diagonal itself is zero so far
    blocks.diagonal(dim1=1, dim2=3).sub_(own.permute(0, 2, 3, 1))
    return blocks
