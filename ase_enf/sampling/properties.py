"""Requested properties: values or ranges, the sizes that go with them, and the values that are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ase_enf.flow.weights import read_header, shipped, shipped_path

if TYPE_CHECKING:
    from ase_enf.flow.context import Condition
    from ase_enf.flow.model import ENF

# Prefix of the keys in ``info`` of the values that conditioned a molecule.
CONDITION_KEY = "enf_condition_"
# Added to p(c | M), so that no combination of properties rules out every size.
SMALLEST_SHARE = 1e-4


class PropertyRequest:
    """What a user asks of the conditions of a flow, checked.

    Args:
        flow: A flow.
        properties: For each name a value or a range, (low, high) or "low:high", within which values are drawn as
            frequently as in the training set. Conditions of the flow that are not named stay unknown.

    Raises:
        ValueError: For a property that the flow does not know, a value that is not a number, or one far outside
            training.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> from ase_enf.flow.context import Condition
        >>> from ase_enf.flow.model import ENF
        >>> gap = Condition.of("gap", "eV", np.array([4.0, 8.0]), np.array([3, 5]))
        >>> request = PropertyRequest(ENF(ENFConfig(conditions=(gap,), hidden=8, layers=1)), {"gap": "4:5"})
        >>> request.ranges
        {'gap': (4.0, 5.0)}
    """

    def __init__(self, flow: ENF, properties: Mapping[str, Any] | None) -> None:
        self.conditions = flow.config.conditions
        known = {condition.name: condition for condition in self.conditions}
        self.ranges: dict[str, tuple[float, float]] = {}
        for name, asked in dict(properties or {}).items():
            if name not in known:
                raise ValueError(f"property {name!r}: {_knows(flow, name)}")
            self.ranges[name] = read_range(name, asked)
            known[name].check(*self.ranges[name])

    def size_weights(self, counts: Mapping[int, int]) -> dict[int, float]:
        """Returns the weights of the sizes M, multiplied by p(c | M) of every requested property.

        p(M | c) ∝ p(M) Π_k p(c_k | M), with the properties taken to be independent within a size.
        """
        weights = {size: float(count) for size, count in counts.items()}
        for condition, low, high in self._asked():
            shares = condition.size_weights(low, high)
            weights = {size: weight * (shares.get(size, 0.0) + SMALLEST_SHARE) for size, weight in weights.items()}
        return weights

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.float64] | None:
        """Draws the value of every condition for a molecule of ``size`` atoms, NaN where none is requested.

        For a flow without conditions it draws nothing and returns None.
        """
        if not self.conditions:
            return None
        values = {condition.name: condition.draw(rng, low, high, size) for condition, low, high in self._asked()}
        return np.array([values.get(condition.name, math.nan) for condition in self.conditions])

    def _asked(self) -> list[tuple[Condition, float, float]]:
        return [(c, *self.ranges[c.name]) for c in self.conditions if c.name in self.ranges]

    def info(self, values: NDArray[np.float64] | None) -> dict[str, float]:
        """Returns the entries of ``info`` about the values that conditioned a molecule."""
        if values is None:
            return {}
        named = zip(self.conditions, values.tolist(), strict=True)
        return {f"{CONDITION_KEY}{c.name}": value for c, value in named if not math.isnan(value)}


def read_range(name: str, asked: Any) -> tuple[float, float]:
    """Returns the smallest and the largest requested value.

    Raises:
        ValueError: If ``asked`` is neither a number nor two of them.

    Example:
        >>> read_range("gap", 5), read_range("gap", "4:6"), read_range("gap", (4, 6))
        ((5.0, 5.0), (4.0, 6.0), (4.0, 6.0))
    """
    parts = asked.split(":") if isinstance(asked, str) else np.ravel(np.asarray(asked, dtype=object)).tolist()
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"property {name}={asked!r}: must be a number, or a range low:high")
    return numbers[0], numbers[-1]


def read_properties(items: list[str] | None) -> dict[str, str]:
    """Returns properties by name from strings ``name=value`` or ``name=low:high``, as on the command line.

    Raises:
        ValueError: For any other string, or a name that occurs twice.

    Example:
        >>> read_properties(["gap=5.2", "alpha=70:80"])
        {'gap': '5.2', 'alpha': '70:80'}
    """
    properties: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name and equals and value) or name in properties:
            raise ValueError(f"property {item!r}: write each once, as NAME=VALUE or NAME=LOW:HIGH")
        properties[name.strip()] = value.strip()
    return properties


def _knows(flow: ENF, name: str) -> str:
    if not flow.config.conditions:
        models = [model for model in shipped() if name in _conditions_of(model)]
        other = f", or use {models[0]}" if models else ""
        return f"this model has no conditions; train one with --condition {name}{other}"
    known = (f"{c.name} ({c.unit})" if c.unit else c.name for c in flow.config.conditions)
    return f"is unknown to this model, which knows {', '.join(known)}"


def _conditions_of(model: str) -> list[str]:
    """Returns the names of the conditions of a shipped flow."""
    return [condition["name"] for condition in read_header(shipped_path(model))["config"].get("conditions", ())]
