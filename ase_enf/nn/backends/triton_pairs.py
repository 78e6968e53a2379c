"""The pairs of one EGCL in a Triton kernel for GPUs: nothing of a pair but what a gradient needs goes to memory.

One program computes the pairs of one molecule, some targets i at a time: their distances and radial functions, the
messages, the gates and the moves of eq. 4, 5 and 9 stay on the chip. The backward kernel computes them again and writes
what the gradients of the two largest matrices need, which are ordinary products. The kernel knows first derivatives
only, and none with respect to the second distance; whoever needs more uses the plain layer, which is the definition.

Needs the package ``triton``, which comes with torch for CUDA; nothing else imports this module.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ase_enf.nn.radial import DISTANCE_EPSILON

WIDTHS = (16, 32, 64, 128, 256)
# Rows of pairs that a program holds at a time, and how many warps share them: (rows, forward warps, backward warps).
SHAPES = {16: (64, 4, 4), 32: (64, 4, 4), 64: (64, 4, 4), 128: (64, 4, 8), 256: (64, 8, 8)}
TYPES = {None: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_EPSILON = tl.constexpr(DISTANCE_EPSILON)
_WEIGHTS = ("by_scalar", "w2", "b2", "gate", "gate_bias", "w3", "b3", "w4")


def fits(width: int, atoms: int, scalars: int) -> bool:
    """Whether the kernel knows networks of this width, molecules of so many atoms and so many scalars of a pair."""
    return width in WIDTHS and atoms <= 64 and scalars <= 64


@triton.jit
def _dot(a, b, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(PRODUCTS), b.to(PRODUCTS), input_precision=PRECISION)


@triton.jit
def _select(r, M: tl.constexpr, SLOTS: tl.constexpr, BY_SOURCE: tl.constexpr):
    """One where row r belongs to the slot, shape (slots, rows): a sum over rows is a product with this matrix."""
    slot = tl.arange(0, SLOTS)[:, None]
    return slot == ((r % M) if BY_SOURCE else (r // M))[None, :]


@triton.jit
def _geometry(x, mask, b, i, j, inside, M: tl.constexpr, DIM: tl.constexpr):
    """Differences of the positions, and whether both atoms of a pair are there and different."""
    at_i, at_j = (b * M + i) * DIM, (b * M + j) * DIM
    d0 = tl.load(x + at_i, inside, 0.0) - tl.load(x + at_j, inside, 0.0)
    d1 = d0 * 0.0
    d2 = d0 * 0.0
    if DIM > 1:
        d1 = tl.load(x + at_i + 1, inside, 0.0) - tl.load(x + at_j + 1, inside, 0.0)
    if DIM > 2:
        d2 = tl.load(x + at_i + 2, inside, 0.0) - tl.load(x + at_j + 2, inside, 0.0)
    real = tl.load(mask + (b * M + i) * M + j, inside, 0.0)
    return d0, d1, d2, real


@triton.jit
def _radial(squared, column, K: tl.constexpr):
    """d² in column 0 and the radial functions in columns 1 to K, shape (rows, columns); zero in the others."""
    distance = tl.sqrt(squared + _EPSILON)[:, None]
    centre = (column - 1).to(tl.float32) * (1.0 / max(K - 1, 1))
    off = (tl.exp(-distance) - centre) * (2.0 * K / 3.0)
    bell = tl.where((column >= 1) & (column <= K), tl.exp(-off * off), 0.0)
    return tl.where(column == 0, squared[:, None], bell)


@triton.jit
def _radial_slopes(squared, column, K: tl.constexpr):
    """Derivatives of the columns of :func:`_radial` with respect to d²."""
    distance = tl.sqrt(squared + _EPSILON)[:, None]
    root: tl.constexpr = 2.0 * K / 3.0
    off = (tl.exp(-distance) - (column - 1).to(tl.float32) * (1.0 / max(K - 1, 1))) * root
    slope = root * off * tl.exp(-off * off) * tl.exp(-distance) / distance
    return tl.where(column == 0, 1.0, tl.where((column >= 1) & (column <= K), slope, 0.0))


@triton.jit
def _scalars(
    squared, extra, context, b, i, j, inside,
    M: tl.constexpr, K: tl.constexpr, GIVEN: tl.constexpr, EXTRA: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the messages see of a pair, shape (rows, columns): distances, then what is given."""
    column = tl.arange(0, COLUMNS)[None, :]
    pair = (b * M + i) * M + j
    out = _radial(squared, column, K)
    first = 1 + K
    if EXTRA:
        out += _radial(tl.load(extra + pair, inside, 0.0), column - first, K)
        first = 2 + 2 * K
    if GIVEN > 0:
        known = (column >= first) & (column < first + GIVEN)
        out += tl.load(context + pair[:, None] * GIVEN + (column - first), known & inside[:, None], 0.0)
    return out


@triton.jit
def _forward(
    target, source, x, mask, extra, context, by_scalar, w2, b2, gate, gate_bias, w3, b3, w4, messages, shift, bound,
    M: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr, GIVEN: tl.constexpr, EXTRA: tl.constexpr,
    COLUMNS: tl.constexpr, TARGETS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    MOVES: tl.constexpr, BOUNDED: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, tile = tl.program_id(0), tl.program_id(1)
    r, f = tl.arange(0, ROWS), tl.arange(0, F)
    column = tl.arange(0, COLUMNS)
    i, j = tile * TARGETS + r // M, r % M
    inside = (r < TARGETS * M) & (i < M)
    d0, d1, d2, real = _geometry(x, mask, b, i, j, inside, M, DIM)
    squared = d0 * d0 + d1 * d1 + d2 * d2
    slot = tl.arange(0, SLOTS)
    owner = tile * TARGETS + slot
    written = (slot < TARGETS) & (owner < M)
    here = messages + (b * M + owner)[:, None] * F + f[None, :]
    if tl.max(real, axis=0) == 0.0:  # a molecule with fewer atoms
        tl.store(here, tl.zeros((SLOTS, F), tl.float32), written[:, None])
        if MOVES:
            for n in tl.static_range(DIM):
                tl.store(shift + (b * M + owner) * DIM + n, tl.zeros((SLOTS,), tl.float32), written)
        return
    edges = _scalars(squared, extra, context, b, i, j, inside, M, K, GIVEN, EXTRA, COLUMNS)
    w_e = tl.load(by_scalar + column[:, None] * F + f[None, :])
    hidden = tl.dot(edges, w_e, input_precision=PRECISION)
    hidden += tl.load(target + (b * M + i)[:, None] * F + f[None, :], inside[:, None], 0.0)
    hidden += tl.load(source + (b * M + j)[:, None] * F + f[None, :], inside[:, None], 0.0)
    u = hidden * tl.sigmoid(hidden)
    # Weights are stored as (out, in): the transposed matrix is read.
    out = _dot(u, tl.load(w2 + f[None, :] * F + f[:, None]), PRODUCTS, PRECISION) + tl.load(b2 + f)[None, :]
    m = out * tl.sigmoid(out)
    weight = real
    if GATE:
        weight *= tl.sigmoid(tl.sum(m * tl.load(gate + f)[None, :], axis=1) + tl.load(gate_bias))
    m *= weight[:, None]
    by_target = _select(r, M, SLOTS, False)
    tl.store(here, _dot(by_target.to(tl.float32), m, PRODUCTS, PRECISION), written[:, None])
    if MOVES:
        inner = _dot(m, tl.load(w3 + f[None, :] * F + f[:, None]), PRODUCTS, PRECISION) + tl.load(b3 + f)[None, :]
        phi = tl.sum(inner * tl.sigmoid(inner) * tl.load(w4 + f)[None, :], axis=1)
        if BOUNDED:
            phi = (2.0 * tl.sigmoid(2.0 * phi) - 1.0) * bound
        w = phi * real / (tl.sqrt(squared + _EPSILON) + 1.0)
        for n in tl.static_range(DIM):
            move = w * (d0 if n == 0 else (d1 if n == 1 else d2))
            moved = tl.sum(tl.where(by_target, move[None, :], 0.0), axis=1)
            tl.store(shift + (b * M + owner) * DIM + n, moved, written)


@triton.jit
def _slope(v, s):
    """Derivative of silu at v, whose sigmoid is s."""
    return s * (1.0 + v * (1.0 - s))


@triton.jit
def _sum_rows(weight, values, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr):
    """Weighted sum of rows by a product with a matrix of which the first row counts."""
    first = tl.arange(0, 16)[:, None] == 0
    return tl.sum(_dot(tl.where(first, weight[None, :], 0.0), values, PRODUCTS, PRECISION), axis=0)


@triton.jit
def _backward_messages(
    target, source, x, mask, extra, context, by_scalar, w2, b2, gate, gate_bias, w3, b3, w4, bound, g_messages, g_shift,
    sums, gate_sums, g2_rows, m_rows, g3_rows, scalars,
    M: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr, GIVEN: tl.constexpr, EXTRA: tl.constexpr,
    COLUMNS: tl.constexpr, TARGETS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    MOVES: tl.constexpr, BOUNDED: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of what follows the second matrix; per row also φ_x / (d + 1) and what d² gets from 1 / (d + 1)."""
    b, tile = tl.program_id(0), tl.program_id(1)
    program = b * tl.num_programs(1) + tile
    r, f = tl.arange(0, ROWS), tl.arange(0, F)
    column = tl.arange(0, COLUMNS)
    i, j = tile * TARGETS + r // M, r % M
    inside = (r < TARGETS * M) & (i < M)
    d0, d1, d2, real = _geometry(x, mask, b, i, j, inside, M, DIM)
    squared = d0 * d0 + d1 * d1 + d2 * d2
    edges = _scalars(squared, extra, context, b, i, j, inside, M, K, GIVEN, EXTRA, COLUMNS)
    hidden = tl.dot(edges, tl.load(by_scalar + column[:, None] * F + f[None, :]), input_precision=PRECISION)
    hidden += tl.load(target + (b * M + i)[:, None] * F + f[None, :], inside[:, None], 0.0)
    hidden += tl.load(source + (b * M + j)[:, None] * F + f[None, :], inside[:, None], 0.0)
    u = (hidden * tl.sigmoid(hidden)).to(PRODUCTS)
    out = _dot(u, tl.load(w2 + f[None, :] * F + f[:, None]), PRODUCTS, PRECISION) + tl.load(b2 + f)[None, :]
    sigmoid = tl.sigmoid(out)
    m = (out * sigmoid).to(PRODUCTS)
    slope = _slope(out, sigmoid).to(PRODUCTS)
    weight = real
    e = real
    if GATE:
        gate_row = tl.load(gate + f)[None, :]
        e = tl.sigmoid(tl.sum(m.to(tl.float32) * gate_row, axis=1) + tl.load(gate_bias))
        weight = real * e
    row = (program * ROWS + r)[:, None] * F + f[None, :]
    g_m = tl.zeros((ROWS, F), tl.float32)
    if MOVES:
        gated = (m.to(tl.float32) * weight[:, None]).to(PRODUCTS)
        tl.store(m_rows + row, gated)
        inner = _dot(gated, tl.load(w3 + f[None, :] * F + f[:, None]), PRODUCTS, PRECISION)
        inner += tl.load(b3 + f)[None, :]
        last = tl.load(w4 + f)[None, :]
        phi = tl.sum(inner * tl.sigmoid(inner) * last, axis=1)
        rate = real / (tl.sqrt(squared + _EPSILON) + 1.0)
        g_w = tl.load(g_shift + (b * M + i) * DIM, inside, 0.0) * d0
        if DIM > 1:
            g_w += tl.load(g_shift + (b * M + i) * DIM + 1, inside, 0.0) * d1
        if DIM > 2:
            g_w += tl.load(g_shift + (b * M + i) * DIM + 2, inside, 0.0) * d2
        g_phi = g_w * rate
        if BOUNDED:
            tanh = 2.0 * tl.sigmoid(2.0 * phi) - 1.0
            g_phi *= bound * (1.0 - tanh * tanh)
            phi = tanh * bound
        w = phi * rate
        tl.store(scalars + (program * 2) * ROWS + r, w)
        tl.store(scalars + (program * 2 + 1) * ROWS + r, -g_w * w * rate / (2.0 * tl.sqrt(squared + _EPSILON)))
        tl.store(sums + (program * 4 + 3) * F + f, _sum_rows(g_phi, inner * tl.sigmoid(inner), PRODUCTS, PRECISION))
        rounded = (g_phi[:, None] * tl.load(w4 + f)[None, :] * _slope(inner, tl.sigmoid(inner))).to(PRODUCTS)
        tl.store(sums + (program * 4 + 1) * F + f, _sum_rows(real, rounded, PRODUCTS, PRECISION))
        tl.store(g3_rows + row, rounded)
        g_m += _dot(rounded, tl.load(w3 + f[:, None] * F + f[None, :]), PRODUCTS, PRECISION)
    g_m += tl.load(g_messages + (b * M + i)[:, None] * F + f[None, :], inside[:, None], 0.0)
    g2 = g_m * weight[:, None]
    if GATE:
        g_score = tl.sum(g_m * m.to(tl.float32), axis=1) * weight * (1.0 - e)
        g2 += g_score[:, None] * tl.load(gate + f)[None, :]
        tl.store(sums + (program * 4 + 2) * F + f, _sum_rows(g_score, m, PRODUCTS, PRECISION))
        tl.store(gate_sums + program, tl.sum(g_score, axis=0))
    g2 *= slope.to(tl.float32)
    rounded = g2.to(PRODUCTS)
    tl.store(g2_rows + row, rounded)
    tl.store(sums + program * 4 * F + f, _sum_rows(real, rounded, PRODUCTS, PRECISION))


@triton.jit
def _backward_pairs(
    target, source, x, mask, extra, context, by_scalar, w2, g_shift, g2_rows, scalars,
    u_rows, g_target, g_source, g_x, g_scalar,
    M: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, K: tl.constexpr, GIVEN: tl.constexpr, EXTRA: tl.constexpr,
    COLUMNS: tl.constexpr, TARGETS: tl.constexpr, SLOTS: tl.constexpr, SOURCES: tl.constexpr, ROWS: tl.constexpr,
    MOVES: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, FOR_X: tl.constexpr,
):  # fmt: skip
    """Gradients of nodes, scalars and positions, from those behind the second matrix; what sources get by the tile."""
    b, tile = tl.program_id(0), tl.program_id(1)
    program = b * tl.num_programs(1) + tile
    r, f = tl.arange(0, ROWS), tl.arange(0, F)
    column, slot, place = tl.arange(0, COLUMNS), tl.arange(0, SLOTS), tl.arange(0, SOURCES)
    i, j = tile * TARGETS + r // M, r % M
    inside = (r < TARGETS * M) & (i < M)
    d0, d1, d2, real = _geometry(x, mask, b, i, j, inside, M, DIM)
    squared = d0 * d0 + d1 * d1 + d2 * d2
    edges = _scalars(squared, extra, context, b, i, j, inside, M, K, GIVEN, EXTRA, COLUMNS)
    hidden = tl.dot(edges, tl.load(by_scalar + column[:, None] * F + f[None, :]), input_precision=PRECISION)
    hidden += tl.load(target + (b * M + i)[:, None] * F + f[None, :], inside[:, None], 0.0)
    hidden += tl.load(source + (b * M + j)[:, None] * F + f[None, :], inside[:, None], 0.0)
    sigmoid = tl.sigmoid(hidden)
    row = (program * ROWS + r)[:, None] * F + f[None, :]
    tl.store(u_rows + row, (hidden * sigmoid).to(PRODUCTS))
    slope = _slope(hidden, sigmoid).to(PRODUCTS)
    g = _dot(tl.load(g2_rows + row), tl.load(w2 + f[:, None] * F + f[None, :]), PRODUCTS, PRECISION)
    g *= slope.to(tl.float32)
    rounded = g.to(PRODUCTS)
    owner = tile * TARGETS + slot
    written = (slot < TARGETS) & (owner < M)
    by_target, by_source = _select(r, M, SLOTS, False), _select(r, M, SOURCES, True)
    own = _dot(by_target.to(PRODUCTS), rounded, PRODUCTS, PRECISION)
    tl.store(g_target + (b * M + owner)[:, None] * F + f[None, :], own, written[:, None])
    others = _dot(by_source.to(PRODUCTS), rounded, PRODUCTS, PRECISION)
    tl.store(g_source + (program * M + place)[:, None] * F + f[None, :], others, (place < M)[:, None])
    of_scalars = tl.dot(tl.trans(edges), g, input_precision=PRECISION)
    tl.store(g_scalar + (program * COLUMNS + column)[:, None] * F + f[None, :], of_scalars)
    if FOR_X:
        # Columns beyond d² and its functions have no slope.
        back = tl.dot(g, tl.load(by_scalar + column[None, :] * F + f[:, None]), input_precision=PRECISION)
        g_squared = tl.sum(back * _radial_slopes(squared, column[None, :], K), axis=1)
        w = squared * 0.0
        if MOVES:
            w = tl.load(scalars + (program * 2) * ROWS + r)
            g_squared += tl.load(scalars + (program * 2 + 1) * ROWS + r)
        for n in tl.static_range(DIM):
            d = d0 if n == 0 else (d1 if n == 1 else d2)
            g_d = 2.0 * g_squared * d
            if MOVES:
                g_d += tl.load(g_shift + (b * M + i) * DIM + n, inside, 0.0) * w
            of_target = tl.sum(tl.where(by_target, g_d[None, :], 0.0), axis=1)
            of_source = tl.sum(tl.where(by_source, g_d[None, :], 0.0), axis=1)
            # Each program has its own row of positions: what targets get, then what sources lose.
            at = g_x + (program * 2 * M) * DIM + n
            tl.store(at + (slot * DIM), of_target, slot < TARGETS)
            tl.store(at + (M + place) * DIM, of_source, place < M)


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
    """Sum of the gated messages of each atom, and how far they move it (eq. 4, 5 and 9); see ``fused.pair_layer``.

    Args:
        target: ``A h_i + b``, shape (B, M, F), float32 like everything else.
        source: ``B h_j``, shape (B, M, F).
        x: Positions, shape (B, M, n).
        extra: A second squared distance of each pair, shape (B, M, M), or None; no gradient flows to it.
        pair_mask: 1 where i ≠ j are both real, shape (B, M, M).
        radial: Number K of radial functions of each distance.
        bound: The largest |φ_x|; None for no bound.
        weights: As for the compiled kernel.
        context: Constant features of each pair, shape (B, M, M, A), or None; no gradient flows to them.
        products: ``torch.bfloat16`` for products of rounded numbers, None for float32 or TF32, as torch is set.

    Returns:
        Σ_j e_ij m_ij, shape (B, M, F), and Σ_j φ_x(m_ij) (x_i − x_j) / (d_ij + 1), shape (B, M, n).

    Raises:
        ValueError: For what :func:`fits` refuses.
    """
    columns = (1 + radial) * (1 if extra is None else 2) + (0 if context is None else context.shape[-1])
    if not fits(target.shape[-1], target.shape[1], columns) or x.shape[-1] > 3:
        raise ValueError(
            f"the Triton kernel knows widths {WIDTHS}, up to 64 atoms, 64 scalars of a pair and 3 dimensions; "
            f"got {target.shape[-1]}, {target.shape[1]}, {columns} and {x.shape[-1]}"
        )
    settings = (radial, bound, products)
    return _PairLayer.apply(settings, pair_mask, context, extra, target, source, x, *(weights[n] for n in _WEIGHTS))


def _power_of_two(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def _plan(target: Tensor, x: Tensor, weights: dict[str, Tensor | None], extra, context, settings) -> dict:  # noqa: ANN001
    """Returns the constants that a kernel is compiled for."""
    radial, bound, products = settings
    _, atoms, width = target.shape
    rows = max(SHAPES[width][0], triton.next_power_of_2(atoms))
    most = rows // atoms
    tiles = -(-atoms // most)
    targets = -(-atoms // tiles)
    given = 0 if context is None else context.shape[-1]
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"
    return {
        "M": atoms,
        "F": width,
        "DIM": x.shape[-1],
        "K": radial,
        "GIVEN": given,
        "EXTRA": extra is not None,
        "COLUMNS": _power_of_two(len(weights["by_scalar"])),
        "TARGETS": targets,
        "SLOTS": _power_of_two(targets),
        "ROWS": rows,
        "GATE": weights["gate"] is not None,
        "MOVES": weights["w3"] is not None,
        "BOUNDED": bound is not None,
        "PRODUCTS": TYPES[products],
        "PRECISION": precision,
    }


def _prepare(weights: dict[str, Tensor | None], columns: int, products: torch.dtype | None) -> list[Tensor | None]:
    """Returns the weights as the kernels read them: rounded products by rounded matrices, scalars padded by zeros."""
    out = []
    for name in _WEIGHTS:
        weight = weights[name]
        if name in ("w2", "w3") and weight is not None and products is not None:
            weight = weight.to(products)
        if name == "by_scalar":
            padded = weight.new_zeros(columns, weight.shape[1])
            padded[: len(weight)] = weight
            weight = padded
        out.append(None if weight is None else weight.contiguous())
    return out


class _PairLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, pair_mask, context, extra, target, source, x, *weights):  # noqa: ANN001, ANN002, ANN205
        named = dict(zip(_WEIGHTS, weights, strict=True))
        plan = _plan(target, x, named, extra, context, settings)
        kept = _prepare(named, plan["COLUMNS"], settings[2])
        pair_mask, target, source, x = (t.contiguous() for t in (pair_mask, target, source, x))
        context = None if context is None else context.to(target.dtype).contiguous()
        extra = None if extra is None else extra.contiguous()
        messages, shift = torch.empty_like(target), torch.zeros_like(x) if not plan["MOVES"] else torch.empty_like(x)
        tiles = -(-plan["M"] // plan["TARGETS"])
        bound = 0.0 if settings[1] is None else float(settings[1])
        inputs = (target, source, x, pair_mask, extra, context, *kept)
        _forward[(len(target), tiles)](
            *inputs, messages, shift, bound, **plan, num_warps=SHAPES[plan["F"]][1], num_stages=1
        )
        ctx.save_for_backward(*inputs)
        ctx.plan, ctx.bound, ctx.tiles, ctx.scalars = plan, bound, tiles, len(named["by_scalar"])
        ctx.products = settings[2]
        return messages, shift

    @staticmethod
    @once_differentiable
    def backward(ctx, g_messages, g_shift):  # noqa: ANN001, ANN205
        if ctx.needs_input_grad[3]:
            raise RuntimeError("the Triton kernel gives no gradient with respect to the second distance")
        inputs, plan, tiles = ctx.saved_tensors, ctx.plan, ctx.tiles
        target, source, x, mask, extra, context, by_scalar, w2 = inputs[:8]
        size, atoms, width = target.shape
        programs, rows, n = size * tiles, plan["ROWS"], x.shape[-1]
        dtype, moves = ctx.products or target.dtype, plan["MOVES"]
        g_messages, g_shift = g_messages.contiguous(), g_shift.contiguous()
        u, g2 = (target.new_empty(programs * rows, width, dtype=dtype) for _ in range(2))
        m, g3 = (torch.empty_like(u) for _ in range(2)) if moves else (u, g2)
        sums, gate_sums = target.new_empty(programs, 4, width), target.new_empty(programs)
        scalars = target.new_empty(programs, 2, rows)
        common = {key: value for key, value in plan.items() if key not in ("GATE", "BOUNDED")}
        options = {"num_warps": SHAPES[width][2], "num_stages": 1}
        _backward_messages[(size, tiles)](
            *inputs, ctx.bound, g_messages, g_shift, sums, gate_sums, g2, m, g3, scalars, **plan, **options
        )
        for_x = ctx.needs_input_grad[6]
        g_target = torch.empty_like(target)
        g_source = target.new_empty(size, tiles, atoms, width)
        g_x = target.new_empty(size, tiles, 2, atoms, n)
        g_scalar = target.new_empty(programs, plan["COLUMNS"], width)
        _backward_pairs[(size, tiles)](
            target, source, x, mask, extra, context, by_scalar, w2, g_shift, g2, scalars,
            u, g_target, g_source, g_x, g_scalar,
            **common, SOURCES=_power_of_two(atoms), FOR_X=for_x, **options,
        )  # fmt: skip
        own = g_x[:, :, 0, : plan["TARGETS"]].flatten(1, 2)[:, :atoms]
        rest, gate = sums.sum(dim=0), plan["GATE"]
        return (
            None, None, None, None, g_target, g_source.sum(dim=1), own - g_x[:, :, 1].sum(dim=1) if for_x else None,
            g_scalar.sum(dim=0)[: ctx.scalars],
            (g2.mT @ u).to(target.dtype),
            rest[0],
            rest[2] if gate else None,
            gate_sums.sum(dim=0, keepdim=True) if gate else None,
            (g3.mT @ m).to(target.dtype) if moves else None,
            rest[1] if moves else None,
            rest[3] if moves else None,
        )  # fmt: skip
