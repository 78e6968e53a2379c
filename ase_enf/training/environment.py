"""Settings of the process while it trains; afterwards they are what they were."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def training_environment(precision: str) -> Iterator[None]:
    """Allows TF32 where ``precision`` asks for it, and keeps freed memory."""
    before = torch.get_float32_matmul_precision()
    keep_memory()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_memory() -> None:
    """Tells glibc to keep freed blocks of up to 32 MiB; returning pages at every step costs half the speed on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 * 2**20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
