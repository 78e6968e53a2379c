"""Keywords of earlier versions: using one is an error that gives the current name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def refuse_renamed(where: str, given: Mapping[str, Any], renamed: Mapping[str, str]) -> None:
    """Checks that no keyword has been renamed.

    Args:
        where: Name of the function or class that takes the keywords.
        given: Keywords with their values.
        renamed: Names in earlier versions → current names.

    Raises:
        TypeError: If a keyword is that of an earlier version; the message says what to write instead.

    Example:
        >>> refuse_renamed("score", {"draws": 3}, {"draws": "importance_samples"})
        Traceback (most recent call last):
            ...
        TypeError: score: draws is now called importance_samples; write importance_samples=3
    """
    for old in sorted(given.keys() & renamed.keys()):
        new = renamed[old]
        raise TypeError(f"{where}: {old} is now called {new}; write {new}={given[old]!r}")


def renamed_keywords(renamed: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that makes a function refuse keywords of earlier versions; see :func:`refuse_renamed`.

    Args:
        renamed: Names in earlier versions → current names.

    Example:
        >>> @renamed_keywords({"colour": "color"})
        ... def paint(color):
        ...     return color
        >>> paint(color="red")
        'red'
        >>> paint(colour="red")
        Traceback (most recent call last):
            ...
        TypeError: paint: colour is now called color; write color='red'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse_renamed(function.__name__, kwargs, renamed)
            return function(*args, **kwargs)

        return checked

    return decorate
