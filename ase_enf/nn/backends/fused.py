"""A compiled CPU kernel for the pairs of one EGCL: the same numbers as the plain layer, faster.

``pairs.cpp`` is compiled on first use by the system's C++ compiler ($CXX, or c++, g++, clang++) for the processor at
hand, and kept in the user's cache folder (``ase_enf.folders``). The kernel has first derivatives only; the plain layer,
which is the definition, has second ones as well.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ase_enf.folders import cache_folder
from ase_enf.threads import share_out, shares

SOURCE = Path(__file__).with_name("pairs.cpp")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared",
    "-fPIC",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
NAMES = {torch.float32: "float32", torch.float64: "float64"}
# Elements in the longest vectors of a CPU (64 bytes); a width must be a multiple of this number.
LANES = {torch.float32: 16, torch.float64: 8}

# Inputs that have gradients, in the order of the structures in pairs.cpp.
_DIFFERENTIABLE = (
    "target", "source", "x", "extra", "by_scalar", "w2", "b2", "gate", "gate_bias", "w3", "b3", "w4",
)  # fmt: skip
_WEIGHTS = _DIFFERENTIABLE[4:]


class KernelError(RuntimeError):
    """The kernel could not be compiled."""


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("atoms", "dimension", "width", "radial", "scalars", "given")),
        ("bound", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("mask", "context", *_DIFFERENTIABLE)),
    ]


_TERMS = (
    "mask", "slope", "alpha", "beta", "u", "weight", "to_m", "to_m0", "a_i", "a_j", "by_h", "by_m", "node_slope",
    "node_out", "to_x", "own_x",
)  # fmt: skip


class _Tangents(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("atoms", "dimension", "width", "directions", "columns")),
        *((name, ctypes.c_void_p) for name in (*_TERMS, "x", "h", "v", "moved")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _DIFFERENTIABLE]


def unavailable(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why the kernel cannot compute a network, or None if it can; compiles the kernel if necessary.

    Args:
        width: Width F of the network.
        dtype: Floating type of its weights.
        device: Device of its weights.
    """
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    if dtype not in NAMES:
        return f"it computes in float32 and float64, not in {dtype}"
    if not fits(width, dtype):
        return f"the width {width} is not a multiple of {LANES[dtype]}"
    try:
        library()
    except KernelError as error:
        return str(error)
    return None


def fits(width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel supports a dtype, and rows of this width fill whole vectors."""
    return dtype in NAMES and width % LANES[dtype] == 0


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
) -> tuple[Tensor, Tensor]:
    """Sum of the gated messages of each atom, and its displacement by them (eq. 4, 5 and 9).

    Args:
        target: ``A h_i + b``, shape (B, M, F).
        source: ``B h_j``, shape (B, M, F).
        x: Positions, shape (B, M, n).
        extra: A second squared distance of each pair, shape (B, M, M), or None.
        pair_mask: 1 where i ≠ j are both real, shape (B, M, M).
        radial: Number K of radial functions of each distance.
        bound: Largest |φ_x|; None for no bound.
        weights: ``by_scalar`` ((1 or 2) · (1 + K) + A, F) for d² and its K radial functions (``nn.radial``), those of
            the second distance, and the context; ``w2`` (F, F), ``b2`` (F), ``gate`` (F) and ``gate_bias`` (1) or None,
            ``w3`` (F, F), ``b3`` (F), ``w4`` (F) or None.
        context: Constant features of each pair, shape (B, M, M, A), or None; they have no gradient.

    Returns:
        Σ_j e_ij m_ij, shape (B, M, F), and Σ_j φ_x(m_ij) (x_i − x_j) / (d_ij + 1), shape (B, M, n).

    Raises:
        ValueError: If there are more than three dimensions, or ``by_scalar`` has another number of rows.
    """
    given = 0 if context is None else context.shape[-1]
    rows, expected = len(weights["by_scalar"]), (1 + radial) * (1 if extra is None else 2) + given
    if x.shape[-1] > 3 or rows != expected:
        raise ValueError(
            f"the kernel knows up to 3 dimensions and {expected} scalars of a pair here; got {x.shape[-1]} and {rows}"
        )
    mask = pair_mask.ne(0)
    tensors = (target, source, x, extra, *(weights[name] for name in _WEIGHTS))
    settings = (radial, 0.0 if bound is None else float(bound))
    return _PairLayer.apply(mask, context, settings, torch.is_grad_enabled(), *tensors)


def push_tangents(h: Tensor, x: Tensor, terms: dict[str, Tensor | None], work: Tensor) -> Tensor:
    """Pushes tangents through a layer, without recording a graph.

    Args:
        h: Tangents of the features, contiguous, shape (B, M, D, F); updated in place.
        x: Tangents of the positions, shape (B, M, D, n).
        terms: Parts of the layer's Jacobian, those of ``Tangents`` in pairs.cpp.
        work: Memory, overwritten; see :func:`push_memory`.

    Returns:
        Change of the tangents of the positions, shape (B, M, D, n).
    """
    size, atoms, directions, width = h.shape
    n, columns = x.shape[-1], terms["to_x"].shape[-1]
    held = [None if t is None else t.contiguous() for t in (*(terms[name] for name in _TERMS), x)]
    sources, moved = work[: size * push_memory(atoms, directions, width, n, h.dtype)].split(
        [size * atoms * directions * (width + n), size * atoms * directions * columns]
    )
    pointers = (_address(t) for t in (*held, h, sources, moved))
    tangents = _Tangents(atoms, n, width, directions, columns, *pointers)
    for phase in ("sources", "targets"):
        function = _function(f"push_{phase}", h.dtype)
        share_out(size * atoms, lambda k, first, last, call=function: call(tangents, first, last))
    shift = moved.view(size, atoms, directions, columns).sum(dim=1)[..., : atoms * n]
    return shift.unflatten(-1, (atoms, n)).transpose(1, 2)


def push_columns(atoms: int, n: int, dtype: torch.dtype) -> int:
    """Returns M n rounded up to whole vectors."""
    return -(-atoms * n // LANES[dtype]) * LANES[dtype]


def push_memory(atoms: int, directions: int, width: int, n: int, dtype: torch.dtype) -> int:
    """Returns the number of elements of memory that a molecule needs in :func:`push_tangents`."""
    return atoms * directions * (width + n + push_columns(atoms, n, dtype))


class _PairLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask, context, settings, with_grad, *tensors):  # noqa: ANN001, ANN002, ANN205 (autograd's own)
        inputs = {
            name: None if t is None else t.detach().contiguous()
            for name, t in zip(_DIFFERENTIABLE, tensors, strict=True)
        }
        target, x = inputs["target"], inputs["x"]
        size, atoms, width = target.shape
        messages, shift = torch.zeros_like(target), torch.zeros_like(x)
        keep = with_grad and any(ctx.needs_input_grad)
        moves = inputs["w3"] is not None
        v = target.new_empty(size, atoms * atoms, width) if keep else None
        p = target.new_empty(size, atoms * atoms, width) if keep and moves else None
        scalars = target.new_empty(size, atoms * atoms, 2) if keep else None
        mask = mask.contiguous()
        context = None if context is None else context.detach().to(target.dtype).contiguous()
        problem = _problem(mask, context, settings, inputs)
        function = _function("forward", target.dtype)
        outputs = [_address(t) for t in (messages, shift if moves else None, v, p, scalars)]
        share_out(size, lambda k, first, last: function(problem, first, last, *outputs))
        # The original tensors, so that gradients depend on them; see ``_Once``.
        ctx.save_for_backward(mask, context, v, p, scalars, *tensors)
        ctx.settings = settings
        return messages, shift

    @staticmethod
    def backward(ctx, g_messages, g_shift):  # noqa: ANN001, ANN205
        with torch.no_grad():
            gradients = _PairLayer.gradients(ctx, g_messages, g_shift)
        if torch.is_grad_enabled():
            sources = [t for t in (g_messages, g_shift, *ctx.saved_tensors[5:]) if t is not None]
            there = [k for k, gradient in enumerate(gradients) if gradient is not None]
            once = _Once.apply(len(there), *(gradients[k] for k in there), *sources)
            gradients = [once[there.index(k)] if k in there else None for k in range(len(gradients))]
        return None, None, None, None, *gradients

    @staticmethod
    def gradients(ctx, g_messages, g_shift):  # noqa: ANN001, ANN205
        """Returns the gradients of all differentiable inputs, None where one is not needed."""
        mask, context, v, p, scalars, *kept = ctx.saved_tensors
        inputs = {
            name: None if t is None else t.detach().contiguous() for name, t in zip(_DIFFERENTIABLE, kept, strict=True)
        }
        needs = dict(zip(_DIFFERENTIABLE, ctx.needs_input_grad[4:], strict=True))
        target = inputs["target"]
        size = len(target)
        out = {name: torch.zeros_like(inputs[name]) for name in ("target", "source", "x")}
        if needs["extra"]:
            out["extra"] = torch.zeros_like(inputs["extra"])
        threads = shares(size)
        learn = any(needs[name] for name in _WEIGHTS)
        own = {
            name: inputs[name].new_zeros(threads, *inputs[name].shape)
            for name in _WEIGHTS
            if learn and inputs[name] is not None
        }
        problem = _problem(mask, context, ctx.settings, inputs)
        function = _function("backward", target.dtype)
        g_messages, g_shift = g_messages.contiguous(), g_shift.contiguous()
        given = [_address(t) for t in (v, p, scalars, g_messages, g_shift)]

        def work(k: int, first: int, last: int) -> None:
            part = {name: t[k] for name, t in own.items()} | out
            function(problem, first, last, *given, _Gradients(*(_address(part.get(name)) for name in _DIFFERENTIABLE)))

        share_out(size, work)
        out |= {name: t.sum(dim=0) for name, t in own.items()}
        return [out.get(name) if needs[name] else None for name in _DIFFERENTIABLE]


class _Once(torch.autograd.Function):
    """Gradients that stay attached to the tensors they depend on, so that differentiating them again is an error.

    With ``once_differentiable`` of torch they would look constant, and ``torch.autograd.grad(..., x)`` would silently
    omit their contribution.
    """

    @staticmethod
    def forward(ctx, count, *tensors):  # noqa: ANN001, ANN002, ANN205
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError(
            "the compiled kernel is once_differentiable: it has no second derivatives; "
            'flow.use_backend("torch") has them'
        )


def _problem(
    mask: Tensor, context: Tensor | None, settings: tuple[int, float], inputs: dict[str, Tensor | None]
) -> _Problem:
    atoms, width = inputs["target"].shape[1:]
    radial, bound = settings
    given = 0 if context is None else context.shape[-1]
    pointers = (_address(t) for t in (mask, context, *(inputs[name] for name in _DIFFERENTIABLE)))
    return _Problem(atoms, inputs["x"].shape[-1], width, radial, len(inputs["by_scalar"]), given, bound, *pointers)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@functools.cache
def _function(direction: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library(), f"pairs_{direction}_{NAMES[dtype]}")
    integer, pointers = ctypes.c_int, [ctypes.c_void_p] * 5
    function.argtypes = {
        "forward": [ctypes.POINTER(_Problem), integer, integer, *pointers],
        "backward": [ctypes.POINTER(_Problem), integer, integer, *pointers, ctypes.POINTER(_Gradients)],
        "push_sources": [ctypes.POINTER(_Tangents), integer, integer],
        "push_targets": [ctypes.POINTER(_Tangents), integer, integer],
    }[direction]
    function.restype = None
    return function


@functools.cache
def library() -> ctypes.CDLL:
    """Loads the kernel, after compiling it if necessary.

    Raises:
        KernelError: If there is no compiler, it fails, or the kernel cannot be kept or loaded.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in COMPILERS if shutil.which(c)][:1]
    if not compiler:
        raise KernelError(f"no C++ compiler; install one ({', '.join(COMPILERS)}) or name it in $CXX")
    source = SOURCE.read_bytes()
    # Machines with different processors may share the folder.
    identity = "\0".join([*compiler, *FLAGS, platform.system(), platform.machine(), _processor()]).encode()
    digest = hashlib.sha256(source + identity).hexdigest()[:16]
    try:
        path = cache_folder() / f"pairs-{digest}.so"
        if not path.exists():
            _compile([*compiler, *FLAGS, str(SOURCE), "-o"], path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(f"no folder to keep the kernel in ({error}); set ASE_ENF_CACHE to one") from None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded ({error}); delete it") from None


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed when complete: processes may start together
        built = Path(folder) / path.name
        try:
            done = subprocess.run([*command, str(built)], capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(f"{command[0]} failed ({error})") from None
        if done.returncode or not built.exists():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise KernelError(f"{command[0]} failed: {lines[0]}")
        os.replace(built, path)


def _processor() -> str:
    """Returns the name and instruction sets of the processor, as far as the system reports them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "isa")
    return "".join(sorted({line for line in info.read_text().splitlines() if line.startswith(wanted)}))
