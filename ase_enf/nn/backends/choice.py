"""The choice of the backend that computes the pairs of an EGNN."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ase_enf.nn.backends import fused
from ase_enf.values import BACKENDS, check_choice

Obstacle = Callable[[int, torch.dtype, torch.device], str | None]
"""Returns why a backend cannot compute a network of some width in a dtype on a device, or None if it can."""


def _no_triton(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    try:
        from ase_enf.nn.backends import triton_pairs  # triton comes with torch for CUDA
    except ImportError:
        return "the package triton is not installed"
    if dtype != torch.float32:
        return f"it computes in float32, not in {dtype}"
    return triton_pairs.unfit(width)


# Backends in the order in which "auto" tries them.
OBSTACLES: dict[str, Obstacle] = {
    "compiled": fused.unavailable,  # C++, for CPUs
    "triton": _no_triton,  # for GPUs
    "torch": lambda width, dtype, device: None,
}


def choose_backend(backend: str, width: int, dtype: torch.dtype, device: torch.device, unfit: str | None = None) -> str:
    """Returns the name of the backend to use: the requested one or, for "auto", the first that can be used.

    Args:
        backend: One of ``BACKENDS``.
        width: Width F of the network.
        dtype: Floating type of its weights.
        device: Device of its weights.
        unfit: Why only torch can compute this network, whatever its width, dtype and device; None if others can.

    Raises:
        ValueError: If the name is unknown, or the backend cannot be used; the message gives the reason.

    Example:
        >>> choose_backend("auto", 7, torch.float32, torch.device("cpu"))
        'torch'
    """
    check_choice("backend", backend, BACKENDS)
    for name, obstacle in OBSTACLES.items():
        if backend not in ("auto", name):
            continue
        reason = None if name == "torch" else unfit or obstacle(width, dtype, device)
        if reason is None:
            return name
        if backend == name:
            raise ValueError(f"backend {backend!r} cannot be used: {reason}")
    raise AssertionError("torch computes everything")
