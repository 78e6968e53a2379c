"""Parallel work on a CPU: one thread for each independent piece is faster than many threads in each operation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Returns ``[work(item) for item in items]``, computed by as many threads as torch uses, without gradients.

    Operations inside each thread use one thread only; torch's number of threads is restored afterwards.

    Args:
        work: A function of one item.
        items: Independent items.

    Example:
        >>> map_threads(lambda k: k * k, range(4))
        [0, 1, 4, 9]
    """
    threads = torch.get_num_threads()
    count = min(threads, len(items))
    if count < 2:
        with torch.no_grad():
            return [work(item) for item in items]
    torch.set_num_threads(1)
    try:
        return list(_pool(threads).map(torch.no_grad()(work), items))
    finally:
        torch.set_num_threads(threads)


def share_out(size: int, work: Callable[[int, int, int], None]) -> None:
    """Calls ``work(k, first, last)`` for equal shares of ``size`` items in parallel; for work that releases the GIL.

    Args:
        size: Number of items.
        work: Function of the number k of the share, its first item, and the item after its last one.
    """
    count = shares(size)
    bounds = [size * k // count for k in range(count + 1)]
    pool = _plain_pool(torch.get_num_threads() - 1) if count > 1 else None
    others = [pool.submit(work, k, bounds[k], bounds[k + 1]) for k in range(1, count)]
    work(0, 0, bounds[1])
    for other in others:
        other.result()


def shares(size: int) -> int:
    """Returns the number of shares into which :func:`share_out` divides ``size`` items."""
    return max(1, min(torch.get_num_threads(), size))


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "ase_enf", initializer=torch.set_num_threads, initargs=(1,))


@functools.cache
def _plain_pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "ase_enf_kernel")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    for _cached in (_pool, _plain_pool):
        os.register_at_fork(after_in_child=_cached.cache_clear)
