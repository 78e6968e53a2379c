"""Checks of plain values, and the names that users choose among; importing it needs neither numpy nor torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

DTYPES = ("float32", "float64")
"""Floating types of a flow."""

DEVICES = ("auto", "cpu", "cuda")
"""Kinds of devices; a number may follow, as in ``cuda:1``."""

SOLVERS = ("dopri5", "rk4", "midpoint", "euler")
"""Methods that integrate an ODE; the first chooses its own steps."""

BACKENDS = ("auto", "compiled", "triton", "torch")
"""What computes the pairs of an EGNN; "auto" tries the others in this order."""

NETWORKS = ("egnn", "gnn", "simple", "kernel")
"""Networks of the dynamics; the last two move positions only."""

DEQUANTIZERS = ("fixed", "learned")
"""Distributions q(h̃|h) of continuous features that round to the elements."""

PARAMETERISATIONS = ("velocity", "endpoint", "denoising")
"""Meanings of the output of the network."""

TRACES = ("auto", "exact", "hutchinson")
"""How the trace of the Jacobian is computed."""

OBJECTIVES = ("flow_matching", "nll")
"""What training minimises."""

TIMES = ("power", "beta")
"""Distributions of the times of flow matching."""

OPTIMIZERS = ("auto", "muon", "adamw")
"""Optimizers of training."""

SCHEDULES = ("cosine", "constant")
"""Learning rates after the warm-up."""


def shown(value: Any) -> str:
    """Returns the beginning of a value on one line, for messages.

    Example:
        >>> shown("two lines".split())
        "['two', 'lines']"
    """
    return " ".join(repr(value).split())[:60]


def check_whole(name: str, value: Any, least: int) -> int:
    """Returns a whole number; raises ``ValueError`` for anything else, arrays included, or one below ``least``."""
    if not isinstance(value, numbers.Integral):
        kind = "" if isinstance(value, numbers.Real | str) else f", not {type(value).__name__}"
        raise ValueError(f"{name}={' '.join(str(value).split())[:60]}: must be a whole number{kind}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name}={number}: must be at least {least}")
    return number


def check_counts(n: int, seed: int, batch_size: int, start: int = 0) -> None:
    """Raises ``ValueError`` unless n and batch_size are whole numbers from 1, and seed and start from 0."""
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("batch_size", batch_size, 1), ("start", start, 0)):
        check_whole(name, value, least)


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises ``ValueError`` unless a value is one of the known names.

    Example:
        >>> check_choice("solver", "rk5", SOLVERS)
        Traceback (most recent call last):
        ValueError: solver 'rk5' is unknown; choose one of dopri5, rk4, midpoint, euler
    """
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def check_dtype(dtype: Any) -> str:
    """Returns the name of a floating type, "float32" or "float64"; raises ``ValueError`` for any other.

    Example:
        >>> check_dtype("float64")
        'float64'
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {shown(dtype)} is unknown; choose {' or '.join(DTYPES)}")
    return name


def check_device(device: str) -> None:
    """Raises ``ValueError`` if a text names no device; whether the machine has it is not looked at.

    Example:
        >>> check_device("cuda:1")
        >>> check_device("gpu")
        Traceback (most recent call last):
        ValueError: device 'gpu' is unknown; choose auto, cpu or cuda
    """
    kind, colon, number = device.partition(":")
    if kind not in DEVICES or (colon and not number.isdigit()):
        raise ValueError(f"device {shown(device)} is unknown; choose auto, cpu or cuda")


def check_churn(churn: float) -> None:
    """Raises ``ValueError`` unless the churn of a stochastic sampler is a finite number, at least 0."""
    if not 0 <= churn < math.inf:
        raise ValueError(f"sampler churn={churn}: must be a finite number, at least 0")


def check_strength(strength: float) -> None:
    """Raises ``ValueError`` unless the strength by which a structure is varied is in (0, 1]."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: must be in (0, 1], where 1 leaves nothing of the positions")


def check_guidance(guidance: Any) -> float:
    """Returns the weight of a guidance; raises ``ValueError`` if it is not a finite number.

    Example:
        >>> check_guidance(2)
        2.0
    """
    try:
        weight = float(guidance)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"guidance={guidance!r}: must be a finite number, 1 for none")
    return weight
