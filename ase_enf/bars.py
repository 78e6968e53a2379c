"""Progress of long work: a bar on a terminal, or a function that is told how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

Progress = bool | Callable[[int, int | None], None] | None
"""Whether to show a bar, None for on a terminal only; or a function of the number of results so far and of all.

The second number is None where there is no end.
"""


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
