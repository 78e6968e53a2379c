"""Entries of ``info`` as plain Python values, which databases and JSON can hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from ase_enf.values import shown


def as_plain(value: Any, name: str) -> Any:
    """Returns a value as plain Python values and arrays of numbers, which ase.db and JSON can hold.

    Args:
        value: An entry of ``info`` or of ``arrays``, or all of them.
        name: Name of the value in an error.

    Raises:
        ValueError: If there is no such form of it, or two keys are equal as text.

    Example:
        >>> as_plain({"n": np.int64(3), 2: ("a", None)}, "info")
        {'n': 3, '2': ['a', None]}
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return value.astype(value.dtype.newbyteorder("="), copy=False)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "mMV":  # times would become bare numbers
        value = value.tolist()
    if isinstance(value, dict):
        return {key: as_plain(item, f"{name}[{key!r}]") for key, item in text_keys(value, name).items()}
    if isinstance(value, list | tuple):
        return [as_plain(item, name) for item in value]
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float | complex) or hasattr(value, "ase_objtype"):
        return value
    if hasattr(value, "todict"):
        return as_plain(value.todict(), name)
    raise ValueError(
        f"{name} = {shown(value)}: the file would hold no {type(value).__name__}; remove it, or make it numbers and "
        "texts"
    )


def text_keys(values: dict[Any, Any], name: str) -> dict[str, Any]:
    """Returns a dictionary with its keys as text.

    Args:
        values: A dictionary with keys of any kind.
        name: Name of the dictionary in an error.

    Raises:
        ValueError: If two keys are equal as text.

    Example:
        >>> text_keys({1: "one"}, "info")
        {'1': 'one'}
    """
    named = {str(key): value for key, value in values.items()}
    if len(named) < len(values):
        raise ValueError(f"{name}: two of its keys are the same as texts ({shown(list(values))}); rename one")
    return named
