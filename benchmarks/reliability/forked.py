"""Runs ``ase-enf`` in children of a process that has imported everything, and kills them.

A child is forked before its work begins, has its own session, and is ended by SIGKILL, as suddenly as any process but
without spending seconds on imports, when nothing can be lost. Units of work are counted in memory shared with the
parent, so that work repeated after a kill is noticed.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ase_enf.cli import main as command_line

COUNTED = 4
"""Kinds of work that are counted at most."""


class Ran(NamedTuple):
    """Result of a child."""

    seconds: float
    killed: bool
    counts: tuple[int, ...]


class Counters:
    """Counts the work of functions in a child, each in its own cell of shared memory.

    Args:
        functions: For each function its module or class, its name, and the work of a call as a function of its
            arguments.
    """

    def __init__(self, functions: Sequence[tuple[Any, str, Callable[..., int]]]) -> None:
        self._functions = functions
        self._counts = multiprocessing.RawArray(ctypes.c_long, COUNTED)

    def zero(self) -> None:
        """Resets all counts."""
        self._counts[:] = [0] * COUNTED

    def read(self) -> tuple[int, ...]:
        """Returns the current counts."""
        return tuple(self._counts[: len(self._functions)])

    def wrap(self) -> None:
        """Replaces the functions by counting ones, in a child."""
        for place, (owner, name, work) in enumerate(self._functions):
            setattr(owner, name, self._counted(getattr(owner, name), place, work))

    def _counted(self, function: Callable[..., Any], place: int, work: Callable[..., int]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            self._counts[place] += work(*args, **kwargs)
            return found

        return counted


def run(words: Sequence[str], counters: Counters, log: Path, seconds: float | None = None) -> Ran:
    """Runs ase-enf in a child, and kills it after ``seconds`` if it runs that long.

    Args:
        words: Words of the command line.
        counters: Counters of its work.
        log: File for its output.
        seconds: Time until it is killed; None for no limit.

    Returns:
        Result of the child.

    Raises:
        RuntimeError: If the command fails by itself.
    """
    counters.zero()
    child = os.fork()
    if not child:
        _work(words, counters, log)
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        took = time.monotonic() - began
        if ended:
            break
        if seconds is not None and took >= seconds:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(words)}: exit code {code}: {log.read_text().strip()[-300:]}")
    return Ran(took, code != 0, counters.read())


def _work(words: Sequence[str], counters: Counters, log: Path) -> None:
    """Runs the command in the child."""
    code = 70
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        counters.wrap()
        code = command_line(list(words))
    finally:
        os._exit(code)
