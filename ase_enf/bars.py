"""Progress of long work: a bar on a terminal, or a function that is told how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

Progress = bool | Callable[[int, int | None], None] | None
"""Whether to show a bar, None for on a terminal only; or a function of the number of results so far and of all.

The second number is None where there is no end.
"""


def of_part(progress: Progress, before: int, total: int, each: int = 1) -> Progress:
    """Returns the progress of one part of some work, given that of the whole.

    Args:
        progress: That of the whole.
        before: Number of results of earlier parts.
        total: Number of results of the whole, counted by the function.
        each: How many results count as one.

    Returns:
        A function that tells the function of the whole; whether to show a bar is the same for each part.

    Example:
        >>> of_part(lambda done, total: print(done, "of", total), before=4, total=10)(2, 3)
        6 of 10
    """
    return (lambda done, _: progress((before + done) // each, total)) if callable(progress) else progress


class Bar(tqdm):
    """A progress bar that may also be silent, or tell a function of every update.

    Args:
        total: Number of results, None for no end.
        progress: See ``Progress``.
        unit: Name of one result.
        initial: Number of results that are there already.

    Example:
        >>> with Bar(3, lambda done, total: print(done, "of", total), "molecule") as bar:
        ...     _ = bar.update(2)
        2 of 3
    """

    def __init__(self, total: int | None, progress: Progress, unit: str, initial: int = 0) -> None:
        self._report = progress if callable(progress) else None
        self._done = initial
        shown = sys.stderr.isatty() if progress is None else progress is True
        super().__init__(total=total, initial=initial, disable=not shown, unit=unit, dynamic_ncols=True)
        self._all = total  # a disabled bar keeps no total

    def update(self, n: float | None = 1) -> bool | None:
        """Counts ``n`` more results."""
        self._done += int(n or 0)
        if n and self._report is not None:
            self._report(self._done, self._all)
        return super().update(n)
