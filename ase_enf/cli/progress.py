"""What a command says while it works: a line each on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ase_enf.atoms.io import GrowingFile
    from ase_enf.cli.outputs import GrowingTable

QUIET_SECONDS = 60.0
"""Seconds after which long work says how far it is where there is no terminal."""

_Item = TypeVar("_Item")


def say(text: str) -> None:
    """Says one line, as all that is said to the user."""
    print(f"ase-enf: {text}", file=sys.stderr)


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun.

    Example:
        >>> counted(1, "molecule"), counted(2, "molecule")
        ('1 molecule', '2 molecules')
    """
    return f"{count} {noun}" + "s" * (count != 1)


def show_warning(message: Warning | str, *_: object) -> None:
    """Says a warning in one line; takes the place of ``warnings.showwarning``."""
    say(f"warning: {' '.join(str(message).split())}")


def minutely(stream: Iterator[_Item], total: int, noun: str) -> Iterator[_Item]:
    """Yields what comes, and says once a minute how far that is where no terminal shows a bar."""
    said = time.monotonic()
    for count, item in enumerate(stream, start=1):
        yield item
        if not sys.stderr.isatty() and time.monotonic() - said >= QUIET_SECONDS and count < total:
            say(f"{count} of {counted(total, noun)}")
            said = time.monotonic()


@contextlib.contextmanager
def kept(file: GrowingFile | GrowingTable, noun: str, total: int, start: int, by_number: bool) -> Iterator[None]:
    """Says what is kept of work that ends early, and how to go on."""
    try:
        yield
    except BaseException:
        if file.count:
            there = f"{file.count} of {counted(total, noun)} {'is' if file.count == 1 else 'are'} in {file.path}"
            rest = f" -n {total - file.count}" if by_number else ""
            output = "--append" if file.can_append else "-o ANOTHER"
            say(f"{there}; go on with --start {start + file.count}{rest} {output}")
        raise
