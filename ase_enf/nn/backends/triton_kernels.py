"""Triton kernels for the pairs of one EGCL, as functions of tensors; ``triton_pairs`` multiplies between them.

Seven kernels compute distances, radial functions, gates, sums over neighbours and displacements (eq. 4, 5 and 9), and
read and write each large tensor once. The function that launches a kernel follows it and has its name.

The package ``triton``, which comes with torch for CUDA, is required; this module is not imported on other devices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ase_enf.nn.radial import DISTANCE_EPSILON

# Numbers of pairs and features in one program of the first kernel.
ROWS, CHUNK = 64, 64
_EPSILON = tl.constexpr(DISTANCE_EPSILON)


class Sizes(NamedTuple):
    """Sizes of a batch of B molecules, and of the layer that it goes through."""

    molecules: int  # B
    atoms: int  # M
    width: int  # F
    dimension: int  # n
    radial: int  # K
    bound: float | None  # largest |φ_x|

    @property
    def pairs(self) -> int:
        """Number of pairs, B M²."""
        return self.molecules * self.atoms * self.atoms

    @property
    def grid(self) -> tuple[int]:
        """A program an atom."""
        return (self.molecules * self.atoms,)

    @property
    def by_atom(self) -> dict[str, int]:
        """Constants of the kernels whose programs take an atom each. Each thread holds 16 numbers of its pairs."""
        sources, width = _power_of_two(self.atoms), _power_of_two(self.width)
        warps = min(max(sources * width // 512, 1), 8)
        return {"M": self.atoms, "F": self.width, "WIDTH": width, "SOURCES": sources, "num_warps": warps}


def pad_scalars(by_scalar: Tensor) -> Tensor:
    """Returns the weights of the scalars of a pair with rows of zeros up to a power of two."""
    padded = by_scalar.new_zeros(_power_of_two(len(by_scalar)), by_scalar.shape[1])
    padded[: len(by_scalar)] = by_scalar
    return padded


def _power_of_two(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


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


def first(
    sizes: Sizes,
    target: Tensor,
    source: Tensor,
    x: Tensor,
    extra: Tensor | None,
    context: Tensor | None,
    by_scalar: Tensor,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the first activation u of every pair; with ``save``, also its derivative and the scalars a_ij.

    Args:
        sizes: Those of the other arguments.
        target: A h_i + b, shape (B, M, F).
        source: B h_j, shape (B, M, F).
        x: Positions, shape (B, M, n).
        extra: A second squared distance of each pair, shape (B, M, M), or None.
        context: Constant features of each pair, shape (B, M, M, A), or None.
        by_scalar: C, padded by :func:`pad_scalars`.
        dtype: Of the results.
        save: Whether the backward pass will follow.

    Returns:
        Shapes (B M², F), (B M², F) and (B M², rows of ``by_scalar``).
    """
    u = target.new_empty(sizes.pairs, sizes.width, dtype=dtype)
    slope = torch.empty_like(u) if save else None
    edges = target.new_empty(sizes.pairs, len(by_scalar), dtype=dtype) if save else None
    chunk = min(_power_of_two(sizes.width), CHUNK)
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
    _first[(triton.cdiv(sizes.pairs, ROWS), triton.cdiv(sizes.width, chunk))](
        target, source, x, extra, context, by_scalar, u, slope, edges, sizes.pairs,
        M=sizes.atoms, F=sizes.width, CHUNK=chunk, DIM=sizes.dimension, K=sizes.radial, EXTRA=extra is not None,
        GIVEN=0 if context is None else context.shape[-1],
        COLUMNS=len(by_scalar), ROWS=ROWS, SAVE=save, PRECISION=precision, num_warps=8,
    )  # fmt: skip
    return u, slope, edges


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


def gate(
    sizes: Sizes, out: Tensor, b2: Tensor, gate: Tensor | None, gate_bias: Tensor | None, mask: Tensor, moves: bool
) -> tuple[Tensor | None, Tensor]:
    """Returns the gated messages if they move atoms, shape (B M², F), and their sums, shape (B, M, F)."""
    gated = torch.empty_like(out) if moves else None
    sums = b2.new_empty(sizes.molecules, sizes.atoms, sizes.width)
    _gate[sizes.grid](
        out, b2, gate, gate_bias, mask, gated, sums, **sizes.by_atom, GATE=gate is not None, MOVES=moves
    )  # fmt: skip
    return gated, sums


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


def move(sizes: Sizes, inner: Tensor, b3: Tensor, w4: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Returns the displacement of each atom, shape (B, M, n), from the third pre-activation, shape (B M², F)."""
    shift = torch.empty_like(x)
    _move[sizes.grid](
        inner, b3, w4, x, mask, shift, float(sizes.bound or 0.0),
        **sizes.by_atom, DIM=sizes.dimension, BOUNDED=sizes.bound is not None,
    )  # fmt: skip
    return shift


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


def move_backward(
    sizes: Sizes, inner: Tensor, b3: Tensor, w4: Tensor, x: Tensor, mask: Tensor, g_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward pass of :func:`move`.

    Returns:
        Gradient of the third pre-activation, shape (B M², F); φ_x / (d + 1) of every pair and the gradient of its d²
        through the denominator, shape (B M², 2); gradients of b3 and w4, shape (F,).
    """
    g_inner = torch.empty_like(inner)
    g_pairs = x.new_empty(sizes.pairs, 2)
    sums = x.new_empty(*sizes.grid, 2, sizes.width)
    _move_backward[sizes.grid](
        inner, b3, w4, x, mask, g_shift, g_inner, g_pairs, sums, float(sizes.bound or 0.0),
        **sizes.by_atom, DIM=sizes.dimension, BOUNDED=sizes.bound is not None,
    )  # fmt: skip
    g_b3, g_w4 = sums.sum(dim=0)
    return g_inner, g_pairs, g_b3, g_w4


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


def gate_backward(
    sizes: Sizes,
    out: Tensor,
    b2: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor,
    g_gated: Tensor | None,
    g_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Backward pass of :func:`gate`.

    Returns:
        Gradients of the second pre-activation, shape (B M², F), of b2 and the gate, shape (F,), and of the bias of the
        gate, shape (1,); None for those of no gate.
    """
    g_out = torch.empty_like(out)
    sums, gate_sums = g_sum.new_empty(*sizes.grid, 2, sizes.width), g_sum.new_empty(sizes.grid)
    _gate_backward[sizes.grid](
        out, b2, gate, gate_bias, mask, g_gated, g_sum, g_out, sums, gate_sums,
        **sizes.by_atom, GATE=gate is not None, MOVES=g_gated is not None,
    )  # fmt: skip
    g_b2, g_gate = sums.sum(dim=0)
    return (g_out, g_b2, None, None) if gate is None else (g_out, g_b2, g_gate, gate_sums.sum(dim=0, keepdim=True))


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


def first_backward(sizes: Sizes, g_u: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the first pre-activation, in place of that of u, and of ``target``."""
    g_target = g_u.new_empty(sizes.molecules, sizes.atoms, sizes.width, dtype=torch.float32)
    _first_backward[sizes.grid](g_u, slope, g_target, **sizes.by_atom)
    return g_u, g_target


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


def positions_backward(sizes: Sizes, g_edges: Tensor, g_pairs: Tensor | None, g_shift: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of x_i − x_j of every pair, shape (B, M, M, n).

    Args:
        sizes: Those of the other arguments.
        g_edges: Gradient of the scalars of every pair, shape (B M², columns).
        g_pairs: As from :func:`move_backward`, None if the layer moves no atoms.
        g_shift: Gradient of the displacements, shape (B, M, n).
        x: Positions, shape (B, M, n).
    """
    g_difference = x.new_empty(sizes.molecules, sizes.atoms, sizes.atoms, sizes.dimension)
    _positions_backward[sizes.grid](
        g_edges, g_pairs, g_shift, x, g_difference, M=sizes.atoms, DIM=sizes.dimension, K=sizes.radial,
        COLUMNS=g_edges.shape[1], SOURCES=sizes.by_atom["SOURCES"], MOVES=g_pairs is not None, num_warps=1,
    )  # fmt: skip
    return g_difference
