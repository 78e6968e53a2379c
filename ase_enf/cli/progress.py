"""Messages of a command at work, one line each on standard error."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Protocol

QUIET_SECONDS = 60.0
"""Seconds between progress messages of long work where there is no terminal."""


class Growing(Protocol):
    """What results are saved in one by one: a file of structures, or a table."""

    @property
    def path(self) -> str | Path | None:
        """Where it is saved; None if it is printed."""

    @property
    def count(self) -> int:
        """Number of results saved."""

    @property
    def can_append(self) -> bool:
        """Whether ``--append`` continues it."""


def say(text: str) -> None:
    """Prints one line for the user on standard error."""
    print(f"ase-enf: {text}", file=sys.stderr)


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun.

    Example:
        >>> counted(1, "molecule"), counted(2, "molecule")
        ('1 molecule', '2 molecules')
    """
    return f"{count} {noun}" + "s" * (count != 1)


def lasting(seconds: float) -> str:
    """Returns an expected time in words, rounded up.

    Example:
        >>> lasting(50), lasting(70), lasting(3 * 3600)
        ('about 1 minute', 'about 2 minutes', 'about 3 hours')
    """
    minutes = max(1, math.ceil(seconds / 60))
    return f"about {counted(minutes, 'minute') if minutes < 120 else counted(math.ceil(minutes / 60), 'hour')}"


def show_warning(message: Warning | str, *_: object) -> None:
    """Prints a warning in one line; replaces ``warnings.showwarning``."""
    say(f"warning: {' '.join(str(message).split())}")


class Minutely:
    """Says once a minute, where no terminal shows a bar, how much is done and how long the rest takes.

    Args:
        noun: Name of one result.
        of: What follows the noun, such as " of this process".

    Example:
        >>> Minutely("molecule")(1, 300)  # a minute has not passed yet
    """

    def __init__(self, noun: str, of: str = "") -> None:
        self._noun, self._of = noun, of
        self._before = self._said = monotonic()
        self._done = 0  # results at the time ``_before``, from which the pace is taken
        self._fresh = True

    def __call__(self, done: int, total: int | None) -> None:
        """Is told that ``done`` of ``total`` results are there; None for no end."""
        now = monotonic()
        if done != total and now - self._said >= QUIET_SECONDS:
            self._said = now
            if total is None:
                say(f"{counted(done, self._noun)}{self._of}")
            else:
                left = lasting((now - self._before) * (total - done) / max(done - self._done, 1))
                say(f"{done} of {counted(total, self._noun)}{self._of}, {left} left")
        if self._fresh:  # the first results come from a small batch, or from an earlier run that is resumed
            self._before, self._done, self._fresh = now, done, False


def progress(noun: str, of: str = "") -> Minutely | None:
    """Returns the ``progress`` of a function: a bar on a terminal, and otherwise a line a minute; see ``Minutely``."""
    return None if sys.stderr.isatty() else Minutely(noun, of)


class Staged:
    """Says what each stage does as it begins, and once a minute how far it is, where no terminal shows a bar.

    Example:
        >>> Staged()("training a flow", "step", 1, 6000)  # on standard error
    """

    def __init__(self) -> None:
        self._what, self._told = "", Minutely("")

    def __call__(self, what: str, noun: str, done: int, total: int | None) -> None:
        """Is told that ``done`` of ``total`` results of a stage are there."""
        if what != self._what:
            self._what, self._told = what, Minutely(noun)
            say(what)
        self._told(done, total)


@contextlib.contextmanager
def kept(
    file: Growing,
    noun: str,
    total: int,
    start: int,
    by_number: bool,
    again: bool = False,
) -> Iterator[None]:
    """Reports, if the work ends early, what is saved and how to continue.

    Args:
        file: Where results are saved.
        noun: Name of one result.
        total: Number of results requested.
        start: Index of the first of them.
        by_number: Whether the command takes the number of results that remain, as ``-n``.
        again: Whether repeating the same command continues the work.
    """
    try:
        yield
    except BaseException:
        if 0 < file.count < total:
            where = "printed" if file.path is None else f"in {file.path}"
            rest = f" -n {total - file.count}" if by_number else ""
            output = "" if file.path is None else " --append" if file.can_append else " -o ANOTHER"
            how = "the same command continues" if again else f"continue with --start {start + file.count}{rest}{output}"
            say(f"{file.count} of {counted(total, noun)} {'is' if file.count == 1 else 'are'} {where}; {how}")
        raise
