"""What conditions a flow: features of nodes, features of pairs, and properties of the whole molecule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Number of equal bins of a histogram between the smallest and the largest value of the training set.
BINS = 100
# Units of the network's input in one standard deviation of a condition. Adam moves a weight by about the learning rate,
# however small its gradient, so an input with a wide spread is learned sooner.
SPREAD = 10.0
# How far outside the range of the training set a requested value may be, as a fraction of that range.
MARGIN = 0.05
# Bond orders: 1, 2, 3 and aromatic (4 in ``Batch.bonds``).
BOND_KINDS = 4
# Two more columns mark atoms two and three bonds apart.
GRAPH_FEATURES = BOND_KINDS + 2


class Context(NamedTuple):
    """Features that condition the dynamics of a batch and do not flow; either may be None."""

    nodes: Tensor | None  # (B, M, K)
    pairs: Tensor | None  # (B, M, M, A)


def split_context(context: Tensor | Context | None) -> Context:
    """Returns a context with both parts; a tensor holds features of the nodes only.

    Example:
        >>> split_context(torch.zeros(1, 2, 3)).pairs is None
        True
    """
    return context if isinstance(context, Context) else Context(context, None)


def graph_features(bonds: Tensor, dtype: torch.dtype) -> Tensor:
    """Features a_ij of a molecular graph: the kind of bond, one-hot, and whether i and j are two or three bonds apart.

    An angle fixes the distance of atoms two bonds apart, a torsion that of atoms three bonds apart.

    Args:
        bonds: 0 for no bond, 1, 2, 3, or 4 for an aromatic bond; integers, symmetric, shape (B, M, M).
        dtype: Floating type of the result.

    Returns:
        Shape (B, M, M, 6).

    Example:
        >>> chain = torch.tensor([[[0, 2, 0], [2, 0, 1], [0, 1, 0]]])
        >>> features = graph_features(chain, torch.float32)
        >>> features[0, 0, 1].tolist(), features[0, 0, 2].tolist()
        ([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    """
    kinds = torch.arange(1, BOND_KINDS + 1, device=bonds.device)
    step = bonds.ne(0).to(dtype)
    itself = torch.eye(bonds.shape[-1], dtype=torch.bool, device=bonds.device)
    near = bonds.ne(0) | itself
    apart, reached = [], step
    for _ in range(2):
        reached = reached @ step
        new = reached.gt(0) & ~near
        near = near | new
        apart.append(new)
    return torch.cat([bonds.unsqueeze(-1) == kinds, torch.stack(apart, dim=-1)], dim=-1).to(dtype)


@dataclass(frozen=True)
class Condition:
    """A property c of the whole molecule that conditions a flow, such as the gap, and its statistics in training.

    The network sees 10 (c − mean) / std, and whether c is known.

    Args:
        name: Key in ``info``.
        unit: Unit of the value, in words; empty where it was not stated.
        mean: Mean over the training set.
        std: Standard deviation over the training set.
        low: Smallest value in the training set.
        high: Largest value in the training set.
        counts: Histogram of the training set for each number of atoms: counts in ``BINS`` equal bins from low to high.

    Raises:
        ValueError: If the numbers are not finite, do not spread, or do not form such histograms.

    Example:
        >>> gap = Condition.of("gap", "eV", np.array([4.0, 6.0, 8.0]), np.array([9, 9, 18]))
        >>> gap.mean, sorted(gap.counts), gap.size_weights(6.0, 6.0)
        (6.0, [9, 18], {9: 0.5})
    """

    name: str
    unit: str
    mean: float
    std: float
    low: float
    high: float
    counts: Mapping[int, tuple[int, ...]]

    def __post_init__(self) -> None:
        counts = {int(size): tuple(map(int, row)) for size, row in self.counts.items()}
        object.__setattr__(self, "counts", counts)
        numbers = (self.mean, self.std, self.low, self.high)
        if not all(map(math.isfinite, numbers)) or self.std <= 0 or self.low >= self.high:
            raise ValueError(
                f"condition {self.name!r}: mean {self.mean:g}, std {self.std:g}, {self.low:g} to {self.high:g} are no "
                "spread of numbers; a condition needs at least two different values"
            )
        if not counts or any(len(row) != BINS or min(row) < 0 for row in counts.values()):
            raise ValueError(f"condition {self.name!r}: counts needs {BINS} counts for each number of atoms")

    @classmethod
    def of(cls, name: str, unit: str, values: NDArray[np.floating], sizes: NDArray[np.integer]) -> Self:
        """Returns the condition of a training set.

        Args:
            name: Key in ``info``.
            unit: Unit of the values.
            values: Value of each molecule, shape (N,).
            sizes: Number of atoms of each molecule, shape (N,).

        Raises:
            ValueError: If all values are equal, or one is not finite.
        """
        values = np.asarray(values, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        edges = np.linspace(low, high, BINS + 1)
        counts = {int(size): tuple(np.histogram(values[sizes == size], edges)[0].tolist()) for size in np.unique(sizes)}
        return cls(name, unit, float(values.mean()), float(values.std()), low, high, counts)

    def check(self, low: float, high: float | None = None) -> None:
        """Checks a requested value or range against the training set.

        Args:
            low: The value, or the lower end of the range.
            high: The upper end of the range; None for a single value.

        Raises:
            ValueError: If it is not finite, in the wrong order, or far outside the training set.
        """
        high = low if high is None else high
        span, unit = MARGIN * (self.high - self.low), f" {self.unit}" if self.unit else ""
        asked = f"{low:g}" if low == high else f"{low:g}:{high:g}"
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"property {self.name}={asked}: must be a finite number, or low:high in that order")
        if high < self.low - span or low > self.high + span or (low == high and not self._near(low, span)):
            raise ValueError(
                f"property {self.name}={asked}{unit}: is outside what this model was trained on, {self.low:.4g} to "
                f"{self.high:.4g}{unit}; ask for a value in that range"
            )

    def _near(self, value: float, span: float) -> bool:
        return self.low - span <= value <= self.high + span

    def size_weights(self, low: float, high: float) -> dict[int, float]:
        """Returns p(c in the bins from low to high | M) in the training set for every M where it is not zero.

        If those bins are empty, the range is widened bin by bin until it holds a molecule.

        Args:
            low: Lower end of the range, in the unit of the property.
            high: Upper end of the range.

        Returns:
            Number M of atoms → probability.
        """
        first, last = self._bins(low, high)
        table = np.array(list(self.counts.values()))
        while not table[:, first : last + 1].any():
            first, last = max(first - 1, 0), min(last + 1, BINS - 1)
        inside = table[:, first : last + 1].sum(axis=1) / np.maximum(table.sum(axis=1), 1)
        return {size: float(part) for size, part in zip(self.counts, inside, strict=True) if part}

    def draw(self, rng: np.random.Generator, low: float, high: float, size: int) -> float:
        """Draws a value between low and high from a histogram of the training set.

        The histogram is that of molecules with ``size`` atoms; if it is empty there, that of all molecules.

        Args:
            rng: Source of randomness.
            low: Lower end of the range, in the unit of the property.
            high: Upper end of the range.
            size: Number M of atoms.

        Returns:
            A value, in the unit of the property.
        """
        if low == high:
            return low
        edges = np.linspace(self.low, self.high, BINS + 1)
        inside = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)  # width of each bin
        rows = [np.array(self.counts[size])] if size in self.counts else []
        rows.append(np.sum(list(self.counts.values()), axis=0))
        for row in rows:
            weights = row * inside
            if weights.sum() > 0:
                chosen = rng.choice(BINS, p=weights / weights.sum())
                return float(rng.uniform(max(edges[chosen], low), min(edges[chosen + 1], high)))
        return float(rng.uniform(max(low, self.low), min(high, self.high)))

    def _bins(self, low: float, high: float) -> tuple[int, int]:
        """Returns the first and the last bin that a range touches."""
        places = (np.array([low, high]) - self.low) / (self.high - self.low) * BINS
        first, last = np.clip(places.astype(int), 0, BINS - 1)
        return int(first), int(last)


def read_conditions(items: Sequence[Condition | Mapping[str, Any]]) -> tuple[Condition, ...]:
    """Returns conditions, given as such or as mappings read from JSON.

    Raises:
        ValueError: If two have the same name.
    """
    conditions = tuple(item if isinstance(item, Condition) else Condition(**item) for item in items)
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(f"conditions {', '.join(names)}: every name may occur once")
    return conditions


def condition_features(values: Tensor | None, like: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns the network's input for the conditions, the same for all atoms of a molecule.

    Args:
        values: Values in their own units, NaN where unknown, shape (B, C); None where none is known.
        like: A tensor of shape (B, M, ...) that sets shape, dtype and device.
        mean: Mean of each condition, shape (C,).
        std: Standard deviation of each condition, shape (C,).

    Returns:
        Scaled values, zero where unknown, then 1 where known and 0 where not, shape (B, M, 2 C).

    Example:
        >>> values, like = torch.tensor([[7.0, torch.nan]]), torch.zeros(1, 1, 3)
        >>> condition_features(values, like, torch.tensor([5.0, 0.0]), torch.tensor([2.0, 1.0])).tolist()
        [[[10.0, 0.0, 1.0, 0.0]]]
    """
    size, atoms = like.shape[:2]
    if values is None:
        return like.new_zeros(size, atoms, 2 * len(mean))
    known = ~torch.isnan(values)
    scaled = torch.where(known, SPREAD * (values - mean) / std, 0.0)
    return torch.cat([scaled, known.to(like.dtype)], dim=-1).unsqueeze(1).expand(-1, atoms, -1)
