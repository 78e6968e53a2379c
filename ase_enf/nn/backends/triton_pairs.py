"""The pairs of one EGCL on GPUs: torch for the matrix products, and Triton kernels for everything between them.

The kernels have first derivatives only, and none with respect to the second distance; the plain layer, which is the
definition, has all of them.

The package ``triton``, which comes with torch for CUDA, is required; this module is not imported on other devices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ase_enf.nn.backends import triton_kernels as kernels

LARGEST_WIDTH = 256
LARGEST_MOLECULE = 128
LARGEST_SCALARS = 64
LARGEST_TENSOR = 2**31  # indices are 32-bit integers
_WEIGHTS = ("by_scalar", "w2", "b2", "gate", "gate_bias", "w3", "b3", "w4")


def unfit(width: int, atoms: int = 0, scalars: int = 0, dimension: int = 0) -> str | None:
    """Returns why the kernels cannot compute a network, or None if they can; 0 stands for an unknown number."""
    limits = {
        "width": (width, LARGEST_WIDTH),
        "number of atoms": (atoms, LARGEST_MOLECULE),
        "number of scalars of a pair": (scalars, LARGEST_SCALARS),
        "dimension": (dimension, 3),
    }
    for name, (value, most) in limits.items():
        if value > most:
            return f"the {name} {value} is above {most}"
    return None


def pair_layer(
    target: Tensor,
    source: Tensor,
    x: Tensor,
    extra: Tensor | None,
    pair_mask: Tensor,
    radial: int,
    bound: float | None,
    weights: dict[str, Tensor | None],
    context: Tensor | None = None,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the gated messages of each atom, and its displacement by them (eq. 4, 5 and 9); see ``fused.pair_layer``.

    Args:
        target: ``A h_i + b``, shape (B, M, F), float32 like all inputs.
        source: ``B h_j``, shape (B, M, F).
        x: Positions, shape (B, M, n).
        extra: A second squared distance of each pair, shape (B, M, M), or None; it has no gradient.
        pair_mask: 1 where i ≠ j are both real, shape (B, M, M).
        radial: Number K of radial functions of each distance.
        bound: Largest |φ_x|; None for no bound.
        weights: As for the compiled kernel.
        context: Constant features of each pair, shape (B, M, M, A), or None; they have no gradient.
        products: ``torch.bfloat16`` for products of rounded numbers; None for float32 or TF32, as torch is configured.

    Returns:
        Σ_j e_ij m_ij, shape (B, M, F), and Σ_j φ_x(m_ij) (x_i − x_j) / (d_ij + 1), shape (B, M, n).

    Raises:
        ValueError: If the sizes exceed the limits of the kernels; see :func:`unfit`.
    """
    scalars = (1 + radial) * (1 if extra is None else 2) + (0 if context is None else context.shape[-1])
    if reason := unfit(target.shape[-1], target.shape[1], scalars, x.shape[-1]):
        raise ValueError(f"the Triton kernels cannot be used: {reason}")
    if target.numel() * target.shape[1] >= LARGEST_TENSOR:
        raise ValueError(
            f"{len(target)} molecules of up to {target.shape[1]} atoms are too many at once; use smaller batches"
        )
    settings = (radial, bound, products, torch.is_grad_enabled())
    return _PairLayer.apply(settings, pair_mask, context, extra, target, source, x, *(weights[n] for n in _WEIGHTS))


class _Kept(NamedTuple):
    """What the backward pass needs; None where the layer has no gate or moves no atoms."""

    u: Tensor  # (B M², F), as are slope, out, gated and inner
    slope: Tensor  # derivative of u by its pre-activation
    edges: Tensor  # scalars of every pair, padded
    out: Tensor  # second pre-activation, without bias
    gated: Tensor | None
    inner: Tensor | None  # third pre-activation, without bias
    x: Tensor
    pair_mask: Tensor
    by_scalar: Tensor  # padded
    w2: Tensor
    w3: Tensor | None
    b2: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None
    b3: Tensor | None
    w4: Tensor | None


class _PairLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, pair_mask, context, extra, target, source, x, *weights):
        radial, bound, products, with_grad = settings
        pair_mask, target, source, x = (t.contiguous() for t in (pair_mask, target, source, x))
        context = None if context is None else context.to(target.dtype).contiguous()
        extra = None if extra is None else extra.contiguous()
        by_scalar, w2, b2, gate, gate_bias, w3, b3, w4 = (None if w is None else w.contiguous() for w in weights)
        dtype, save, moves = products or target.dtype, with_grad and any(ctx.needs_input_grad), w3 is not None
        w2, w3 = (None if w is None else w.to(dtype) for w in (w2, w3))
        sizes, padded = kernels.Sizes(*target.shape, x.shape[-1], radial, bound), kernels.pad_scalars(by_scalar)

        u, slope, edges = kernels.first(sizes, target, source, x, extra, context, padded, dtype, save)
        out = u @ w2.T
        gated, messages = kernels.gate(sizes, out, b2, gate, gate_bias, pair_mask, moves)
        inner = gated @ w3.T if moves else None
        shift = kernels.move(sizes, inner, b3, w4, x, pair_mask) if moves else torch.zeros_like(x)
        if save:
            ctx.save_for_backward(
                *_Kept(u, slope, edges, out, gated, inner, x, pair_mask, padded, w2, w3, b2, gate, gate_bias, b3, w4)
            )
            ctx.sizes, ctx.scalars = sizes, len(by_scalar)
        return messages, shift

    @staticmethod
    @once_differentiable
    def backward(ctx, g_messages, g_shift):
        if ctx.needs_input_grad[3]:
            raise RuntimeError("the Triton kernels give no gradient with respect to the second distance")
        kept, sizes, single = _Kept(*ctx.saved_tensors), ctx.sizes, g_messages.dtype
        g_messages, g_shift = g_messages.contiguous(), g_shift.contiguous()
        g_gated = g_pairs = g_w3 = g_b3 = g_w4 = g_x = None
        if kept.w3 is not None:
            g_inner, g_pairs, g_b3, g_w4 = kernels.move_backward(
                sizes, kept.inner, kept.b3, kept.w4, kept.x, kept.pair_mask, g_shift
            )
            g_gated = g_inner @ kept.w3
            g_w3 = (g_inner.T @ kept.gated).to(single)
        g_out, g_b2, g_gate, g_gate_bias = kernels.gate_backward(
            sizes, kept.out, kept.b2, kept.gate, kept.gate_bias, kept.pair_mask, g_gated, g_messages
        )
        g_w2 = (g_out.T @ kept.u).to(single)
        g, g_target = kernels.first_backward(sizes, g_out @ kept.w2, kept.slope)
        g_source = g.view(sizes.molecules, sizes.atoms, sizes.atoms, sizes.width).sum(dim=1, dtype=single)
        g_by_scalar = (kept.edges.T @ g)[: ctx.scalars].to(single)
        if ctx.needs_input_grad[6]:
            g_edges = g @ kept.by_scalar.to(g.dtype).T
            g_difference = kernels.positions_backward(sizes, g_edges, g_pairs, g_shift, kept.x)
            g_x = g_difference.sum(dim=2) - g_difference.sum(dim=1)
        # None for the four inputs that are not learned; then those of ``_WEIGHTS``, in their order.
        learned = (g_by_scalar, g_w2, g_b2, g_gate, g_gate_bias, g_w3, g_b3, g_w4)
        return None, None, None, None, g_target, g_source, g_x, *learned
