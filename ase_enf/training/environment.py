"""Settings of the process while it trains; they are restored afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def training_environment(precision: str) -> Iterator[None]:
    """Makes new tensors float32, allows TF32 where ``precision`` asks for it, and keeps freed memory.

    Raises:
        RuntimeError: If gradients are turned off.
    """
    if not torch.is_grad_enabled():  # inference_mode turns them off, too
        raise RuntimeError("training needs gradients, which torch.no_grad or inference_mode turns off; call it outside")
    matmul, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    keep_memory()
    torch.set_default_dtype(torch.float32)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(matmul)


def keep_memory() -> None:
    """Tells glibc to keep freed blocks of up to 32 MiB; returning them at every step halves the speed on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 * 2**20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
