"""The pairs of one EGCL on GPUs: torch for the matrix products, and Triton kernels for everything between them.

Seven kernels compute distances, radial functions, gates, sums over neighbours and displacements (eq. 4, 5 and 9), and
read and write each large tensor once; torch multiplies by the matrices of the layer. The kernels have first derivatives
only, and none with respect to the second distance; the plain layer, which is the definition, has all of them.

The package ``triton``, which comes with torch for CUDA, is required; this module is not imported on other devices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ase_enf.nn.radial import DISTANCE_EPSILON

LARGEST_WIDTH = 256
LARGEST_MOLECULE = 128
LARGEST_SCALARS = 64
LARGEST_TENSOR = 2**31  # indices are 32-bit integers
# Numbers of pairs and features in one program of the first kernel.
ROWS, CHUNK = 64, 64
_EPSILON = tl.constexpr(DISTANCE_EPSILON)
_WEIGHTS = ("by_scalar", "w2", "b2", "gate", "gate_bias", "w3", "b3", "w4")


@triton.jit
def _slope(v, s):
    """Derivative of silu at v, where s = sigmoid(v)."""
    return s * (1.0 + v * (1.0 - s))


@triton.jit
def _difference(x, at_i, at_j, n: tl.constexpr, DIM: tl.constexpr, inside):
    """Component n of x_i − x_j; zero if there is none."""
    if n < DIM:
        return tl.load(x + at_i * DIM + n, inside, 0.0) - tl.load(x + at_j * DIM + n, inside, 0.0)
    return at_j.to(tl.float32) * 0.0


@triton.jit
def _geometry(x, at_i, at_j, DIM: tl.constexpr, inside):
    """Three components of x_i − x_j, and its squared length."""
    d0 = _difference(x, at_i, at_j, 0, DIM, inside)
    d1 = _difference(x, at_i, at_j, 1, DIM, inside)
    d2 = _difference(x, at_i, at_j, 2, DIM, inside)
    return d0, d1, d2, d0 * d0 + d1 * d1 + d2 * d2


@triton.jit
def _off_centre(squared, column, K: tl.constexpr):
    """√β (e^{−d} − μ_k) of every column k + 1, and d, shapes (rows, columns) and (rows, 1); see ``nn.radial``."""
    distance = tl.sqrt(squared + _EPSILON)[:, None]
    centre = (column - 1).to(tl.float32) * (1.0 / max(K - 1, 1))
    return (tl.exp(-distance) - centre) * (2.0 * K / 3.0), distance


@triton.jit
def _radial(squared, column, K: tl.constexpr):
    """d² in column 0 and the radial functions in columns 1 to K; zero in the others."""
    off, _ = _off_centre(squared, column, K)
    bell = tl.where((column >= 1) & (column <= K), tl.exp(-off * off), 0.0)
    return tl.where(column == 0, squared[:, None], bell)


@triton.jit
def _radial_slopes(squared, column, K: tl.constexpr):
    """Derivatives of the columns of :func:`_radial` with respect to d²."""
    off, distance = _off_centre(squared, column, K)
    slope = (2.0 * K / 3.0) * off * tl.exp(-off * off) * tl.exp(-distance) / distance
    return tl.where(column == 0, 1.0, tl.where((column >= 1) & (column <= K), slope, 0.0))


@triton.jit
def _first(
    target, source, x, extra, context, by_scalar, u_out, slope_out, edges_out, total,
    M: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr, GIVEN: tl.constexpr,
    EXTRA: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = silu(A h_i + B h_j + C a_ij + b) of every pair; and, for the backward pass, its derivative and a_ij."""
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)[None, :]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = p < total
    at_i = p // M
    at_j = p // (M * M) * M + p % M
    _, _, _, squared = _geometry(x, at_i, at_j, DIM, inside)
    edges = _radial(squared, column, K)
    first: tl.constexpr = (2 + 2 * K) if EXTRA else (1 + K)
    if EXTRA:
        edges += _radial(tl.load(extra + p, inside, 0.0), column - (1 + K), K)
    if GIVEN > 0:
        known = (column >= first) & (column < first + GIVEN)
        edges += tl.load(context + p[:, None] * GIVEN + (column - first), known & inside[:, None], 0.0)
    here = inside[:, None] & (f < F)
    row = p[:, None] * F + f
    c = tl.load(by_scalar + tl.arange(0, COLUMNS)[:, None] * F + f, f < F, 0.0)
    hidden = tl.dot(edges, c, input_precision=PRECISION)
    hidden += tl.load(target + at_i[:, None] * F + f, here, 0.0)
    hidden += tl.load(source + at_j[:, None] * F + f, here, 0.0)
    s = tl.sigmoid(hidden)
    tl.store(u_out + row, (hidden * s).to(u_out.dtype.element_ty), here)
    if SAVE:
        tl.store(slope_out + row, _slope(hidden, s).to(slope_out.dtype.element_ty), here)
        if tl.program_id(1) == 0:
            place = edges_out + p[:, None] * COLUMNS + column
            tl.store(place, edges.to(edges_out.dtype.element_ty), inside[:, None])


@triton.jit
def _messages(out, b2, gate, gate_bias, real, j, rows, f, M: tl.constexpr, F: tl.constexpr, GATE: tl.constexpr):
    """Second pre-activation with bias, its sigmoid, message and soft edge of the pairs of one atom."""
    here = (j < M)[:, None] & (f < F)
    v = tl.load(out + rows, here, 0.0).to(tl.float32) + tl.load(b2 + f, f < F, 0.0)
    s = tl.sigmoid(v)
    m = v * s
    e = real
    if GATE:
        e = real * tl.sigmoid(tl.sum(m * tl.load(gate + f, f < F, 0.0), axis=1) + tl.load(gate_bias))
    return v, s, m, e


@triton.jit
def _gate(
    out, b2, gate, gate_bias, mask, gated_out, sum_out,
    M: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr, GATE: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    """Gated messages to one atom, and their sum."""
    at_i = tl.program_id(0)
    j, f = tl.arange(0, SOURCES), tl.arange(0, WIDTH)[None, :]
    real = tl.load(mask + at_i * M + j, j < M, 0.0)
    rows = (at_i * M + j)[:, None] * F + f
    _, _, m, e = _messages(out, b2, gate, gate_bias, real, j, rows, f, M, F, GATE)
    m *= e[:, None]
    if MOVES:
        tl.store(gated_out + rows, m.to(gated_out.dtype.element_ty), (j < M)[:, None] & (f < F))
    tl.store(sum_out + at_i * F + tl.arange(0, WIDTH), tl.sum(m, axis=0), tl.arange(0, WIDTH) < F)


@triton.jit
def _phi(inner, b3, w4, real, rows, j, f, squared, bound, M: tl.constexpr, F: tl.constexpr, BOUNDED: tl.constexpr):
    """Third pre-activation, its sigmoid, φ_x, the derivative of φ_x by its unbounded value, and 1 / (d + 1)."""
    v = tl.load(inner + rows, (j < M)[:, None] & (f < F), 0.0).to(tl.float32) + tl.load(b3 + f, f < F, 0.0)
    s = tl.sigmoid(v)
    phi = tl.sum(v * s * tl.load(w4 + f, f < F, 0.0), axis=1)
    slope = real
    if BOUNDED:
        tanh = 2.0 * tl.sigmoid(2.0 * phi) - 1.0
        slope = real * bound * (1.0 - tanh * tanh)
        phi = tanh * bound
    return v, s, phi, slope, real / (tl.sqrt(squared + _EPSILON) + 1.0)


@triton.jit
def _move(
    inner, b3, w4, x, mask, shift, bound,
    M: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr, DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Displacement of one atom by its pairs."""
    at_i = tl.program_id(0)
    j, f = tl.arange(0, SOURCES), tl.arange(0, WIDTH)[None, :]
    real = tl.load(mask + at_i * M + j, j < M, 0.0)
    at_j = at_i // M * M + j
    d0, d1, d2, squared = _geometry(x, at_i + 0 * j, at_j, DIM, j < M)
    rows = (at_i * M + j)[:, None] * F + f
    _, _, phi, _, rate = _phi(inner, b3, w4, real, rows, j, f, squared, bound, M, F, BOUNDED)
    w = phi * rate
    for n in tl.static_range(DIM):
        tl.store(shift + at_i * DIM + n, tl.sum(w * (d0 if n == 0 else (d1 if n == 1 else d2)), axis=0))


@triton.jit
def _move_backward(
    inner, b3, w4, x, mask, g_shift, g_inner, g_pairs, sums, bound,
    M: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr, DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Backward pass of :func:`_move`: gradients of the third pre-activation, of b3 and w4, and through 1 / (d + 1)."""
    at_i = tl.program_id(0)
    j, k = tl.arange(0, SOURCES), tl.arange(0, WIDTH)
    f = k[None, :]
    real = tl.load(mask + at_i * M + j, j < M, 0.0)
    at_j = at_i // M * M + j
    d0, d1, d2, squared = _geometry(x, at_i + 0 * j, at_j, DIM, j < M)
    rows = (at_i * M + j)[:, None] * F + f
    v, s, phi, slope, rate = _phi(inner, b3, w4, real, rows, j, f, squared, bound, M, F, BOUNDED)
    g_w = tl.load(g_shift + at_i * DIM) * d0
    if DIM > 1:
        g_w += tl.load(g_shift + at_i * DIM + 1) * d1
    if DIM > 2:
        g_w += tl.load(g_shift + at_i * DIM + 2) * d2
    w = phi * rate
    pair = g_pairs + (at_i * M + j) * 2
    tl.store(pair, w, j < M)
    tl.store(pair + 1, -g_w * w * rate / (2.0 * tl.sqrt(squared + _EPSILON)), j < M)
    g_phi = (g_w * slope * rate)[:, None]
    g = g_phi * tl.load(w4 + f, f < F, 0.0) * _slope(v, s)
    tl.store(g_inner + rows, g.to(g_inner.dtype.element_ty), (j < M)[:, None] & (f < F))
    tl.store(sums + at_i * 2 * F + k, tl.sum(g, axis=0), k < F)
    tl.store(sums + (at_i * 2 + 1) * F + k, tl.sum(v * s * g_phi, axis=0), k < F)


@triton.jit
def _gate_backward(
    out, b2, gate, gate_bias, mask, g_gated, g_sum, g_out, sums, gate_sums,
    M: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr, GATE: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    """Backward pass of :func:`_gate`: gradients of the second pre-activation, of b2 and of the gate."""
    at_i = tl.program_id(0)
    j, k = tl.arange(0, SOURCES), tl.arange(0, WIDTH)
    f = k[None, :]
    real = tl.load(mask + at_i * M + j, j < M, 0.0)
    rows = (at_i * M + j)[:, None] * F + f
    here = (j < M)[:, None] & (f < F)
    v, s, m, e = _messages(out, b2, gate, gate_bias, real, j, rows, f, M, F, GATE)
    g_m = tl.load(g_sum + at_i * F + f, f < F, 0.0)
    if MOVES:
        g_m += tl.load(g_gated + rows, here, 0.0).to(tl.float32)
    g = g_m * e[:, None]
    if GATE:
        # d(real sigmoid) = e (1 − e) wherever the pair is real
        score = tl.sum(g_m * m, axis=1) * e * (1.0 - e)
        g += score[:, None] * tl.load(gate + f, f < F, 0.0)
        tl.store(sums + (at_i * 2 + 1) * F + k, tl.sum(m * score[:, None], axis=0), k < F)
        tl.store(gate_sums + at_i, tl.sum(score, axis=0))
    g *= _slope(v, s)
    tl.store(g_out + rows, g.to(g_out.dtype.element_ty), here)
    tl.store(sums + at_i * 2 * F + k, tl.sum(g, axis=0), k < F)


@triton.jit
def _first_backward(g_u, slope, g_target, M: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, SOURCES: tl.constexpr):
    """Gradient of the first pre-activation, overwriting that of u, and its sum over the sources of one atom."""
    at_i = tl.program_id(0)
    j, k = tl.arange(0, SOURCES), tl.arange(0, WIDTH)
    f = k[None, :]
    rows = (at_i * M + j)[:, None] * F + f
    here = (j < M)[:, None] & (f < F)
    g = tl.load(g_u + rows, here, 0.0).to(tl.float32) * tl.load(slope + rows, here, 0.0).to(tl.float32)
    tl.store(g_u + rows, g.to(g_u.dtype.element_ty), here)
    tl.store(g_target + at_i * F + k, tl.sum(g, axis=0), k < F)


@triton.jit
def _positions_backward(
    g_edges, g_pairs, g_shift, x, g_difference,
    M: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, SOURCES: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    """Gradient of x_i − x_j of every pair, through its distance and the displacement."""
    at_i = tl.program_id(0)
    j, column = tl.arange(0, SOURCES), tl.arange(0, COLUMNS)[None, :]
    inside = j < M
    d0, d1, d2, squared = _geometry(x, at_i + 0 * j, at_i // M * M + j, DIM, inside)
    p = at_i * M + j
    g = tl.load(g_edges + p[:, None] * COLUMNS + column, inside[:, None], 0.0).to(tl.float32)
    g_squared = tl.sum(g * _radial_slopes(squared, column, K), axis=1)
    w = squared * 0.0
    if MOVES:
        w = tl.load(g_pairs + p * 2, inside, 0.0)
        g_squared += tl.load(g_pairs + p * 2 + 1, inside, 0.0)
    for n in tl.static_range(DIM):
        g_d = 2.0 * g_squared * (d0 if n == 0 else (d1 if n == 1 else d2))
        if MOVES:
            g_d += tl.load(g_shift + at_i * DIM + n) * w
        tl.store(g_difference + p * DIM + n, g_d, inside)


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


def _power_of_two(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def _warps(sources: int, width: int) -> int:
    """Returns the number of warps that share the pairs of one atom, with 16 numbers in each thread."""
    return min(max(sources * width // 512, 1), 8)


class _PairLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, pair_mask, context, extra, target, source, x, *weights):
        radial, bound, products, with_grad = settings
        by_scalar, w2, b2, gate, gate_bias, w3, b3, w4 = (None if w is None else w.contiguous() for w in weights)
        size, atoms, width = target.shape
        n, moves, pairs = x.shape[-1], w3 is not None, size * atoms * atoms
        dtype = products or target.dtype
        save = with_grad and any(ctx.needs_input_grad)
        pair_mask, target, source, x = (t.contiguous() for t in (pair_mask, target, source, x))
        context = None if context is None else context.to(target.dtype).contiguous()
        extra = None if extra is None else extra.contiguous()
        columns = _power_of_two(len(by_scalar))
        padded = by_scalar.new_zeros(columns, width)
        padded[: len(by_scalar)] = by_scalar
        by_atom = {"M": atoms, "F": width, "WIDTH": _power_of_two(width), "SOURCES": _power_of_two(atoms)}
        warps = _warps(by_atom["SOURCES"], by_atom["WIDTH"])
        u = target.new_empty(pairs, width, dtype=dtype)
        slope = torch.empty_like(u) if save else u
        edges = target.new_empty(pairs, columns, dtype=dtype) if save else u
        chunk = min(_power_of_two(width), CHUNK)
        _first[(triton.cdiv(pairs, ROWS), triton.cdiv(width, chunk))](
            target, source, x, extra, context, padded, u, slope, edges, pairs,
            M=atoms, F=width, CHUNK=chunk, DIM=n, K=radial, EXTRA=extra is not None,
            GIVEN=0 if context is None else context.shape[-1],
            COLUMNS=columns, ROWS=ROWS, SAVE=save, PRECISION=_precision(), num_warps=8,
        )  # fmt: skip
        rounded = [None if w is None else w.to(dtype) for w in (w2, w3)]
        out = u @ rounded[0].T
        gated = torch.empty_like(u) if moves else u
        messages = torch.empty_like(target)
        _gate[(size * atoms,)](
            out, b2, gate, gate_bias, pair_mask, gated, messages,
            **by_atom, GATE=gate is not None, MOVES=moves, num_warps=warps,
        )  # fmt: skip
        inner, shift = None, torch.zeros_like(x)
        if moves:
            inner = gated @ rounded[1].T
            _move[(size * atoms,)](
                inner, b3, w4, x, pair_mask, shift, 0.0 if bound is None else float(bound),
                **by_atom, DIM=n, BOUNDED=bound is not None, num_warps=warps,
            )  # fmt: skip
        if save:
            kept = (u, slope, edges, out, gated, inner, x, pair_mask, padded, *rounded, b2, gate, gate_bias, b3, w4)
            ctx.save_for_backward(*kept)
            ctx.settings, ctx.by_atom, ctx.warps, ctx.scalars = settings, by_atom, warps, len(by_scalar)
        return messages, shift

    @staticmethod
    @once_differentiable
    def backward(ctx, g_messages, g_shift):
        if ctx.needs_input_grad[3]:
            raise RuntimeError("the Triton kernels give no gradient with respect to the second distance")
        u, slope, edges, out, gated, inner, x, pair_mask, padded, w2, w3, b2, gate, gate_bias, b3, w4 = (
            ctx.saved_tensors
        )
        radial, bound, _, _ = ctx.settings
        size, atoms, n = x.shape
        width, moves = u.shape[1], w3 is not None
        single = g_messages.dtype
        g_messages, g_shift = g_messages.contiguous(), g_shift.contiguous()
        grid, by_atom, warps = (size * atoms,), ctx.by_atom, ctx.warps
        g_pairs = g_gated = g_w3 = g_b3 = g_w4 = None
        if moves:
            g_inner = torch.empty_like(inner)
            g_pairs = x.new_empty(size * atoms * atoms, 2)
            sums = x.new_empty(size * atoms, 2, width)
            _move_backward[grid](
                inner, b3, w4, x, pair_mask, g_shift, g_inner, g_pairs, sums, 0.0 if bound is None else float(bound),
                **by_atom, DIM=n, BOUNDED=bound is not None, num_warps=warps,
            )  # fmt: skip
            g_gated = g_inner @ w3
            g_w3 = (g_inner.T @ gated).to(single)
            g_b3, g_w4 = sums.sum(dim=0)
        g_out = torch.empty_like(out)
        sums, gate_sums = x.new_empty(size * atoms, 2, width), x.new_empty(size * atoms)
        _gate_backward[grid](
            out, b2, gate, gate_bias, pair_mask, g_gated, g_messages, g_out, sums, gate_sums,
            **by_atom, GATE=gate is not None, MOVES=moves, num_warps=warps,
        )  # fmt: skip
        g_b2, g_gate = sums.sum(dim=0)
        g = g_out @ w2
        g_w2 = (g_out.T @ u).to(single)
        g_target = torch.empty_like(g_messages)
        _first_backward[grid](g, slope, g_target, **by_atom, num_warps=warps)
        g_source = g.view(size, atoms, atoms, width).sum(dim=1, dtype=single)
        g_scalar = (edges.T @ g)[: ctx.scalars].to(single)
        g_x = None
        if ctx.needs_input_grad[6]:
            g_difference = x.new_empty(size, atoms, atoms, n)
            _positions_backward[grid](
                g @ padded.to(g.dtype).T, g_pairs, g_shift, x, g_difference, M=atoms, DIM=n, K=radial,
                COLUMNS=len(padded), SOURCES=by_atom["SOURCES"], MOVES=moves, num_warps=1,
            )  # fmt: skip
            g_x = g_difference.sum(dim=2) - g_difference.sum(dim=1)
        known = gate is not None
        return (
            None, None, None, None, g_target, g_source, g_x, g_scalar, g_w2, g_b2, g_gate if known else None,
            gate_sums.sum(dim=0, keepdim=True) if known else None, g_w3, g_b3, g_w4,
        )  # fmt: skip


def _precision() -> str:
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
