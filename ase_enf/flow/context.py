"""What conditions a flow: features of nodes, features of pairs, and numbers of the whole molecule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Equal bins of a histogram between the least and the largest value of the training set.
BINS = 100
# Standard deviations of a condition are so many units of the network's input. Adam moves a weight by the learning rate,
# however small its gradient, so that an input of a wide spread is learned sooner.
SPREAD = 10.0
# How far beyond the training set a value may be asked for, in parts of its range.
MARGIN = 0.05
# Bond orders: 1, 2, 3 and aromatic (4 in ``Batch.bonds``); then atoms two and three bonds apart.
BOND_KINDS = 4
GRAPH_FEATURES = BOND_KINDS + 2


class Context(NamedTuple):
    """Features that condition the dynamics of a batch and do not flow; either may be None."""

    nodes: Tensor | None  # (B, M, K)
    pairs: Tensor | None  # (B, M, M, A)


def split_context(context: Tensor | Context | None) -> Context:
    """Returns a context as both of its parts; a tensor is one of nodes alone.

    Example:
        >>> split_context(torch.zeros(1, 2, 3)).pairs is None
        True
    """
    return context if isinstance(context, Context) else Context(context, None)


def graph_features(bonds: Tensor, dtype: torch.dtype) -> Tensor:
    """Features a_ij of a molecular graph: the kind of bond, one-hot, and whether i and j are two or three bonds apart.

    Neighbours two bonds apart are those that an angle holds, three bonds apart those that a torsion does.

    Args:
        bonds: 0 for none, 1, 2, 3, or 4 for an aromatic bond; symmetric, shape (B, M, M), whole numbers.
        dtype: Of the result.

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
    """A number of the whole molecule that conditions a flow, such as its gap, and what training knows of it.

    The network sees 10 (c − mean) / std, and whether c is there at all.

    Args:
        name: Key in ``info``.
        unit: Of the value, in words; empty where nobody said.
        mean: Mean of the training set.
        std: Its standard deviation.
        low: Its least value.
        high: Its largest value.
        counts: Histogram of the training set for each number of atoms: counts in ``BINS`` equal bins from low to high.

    Raises:
        ValueError: For numbers that are no condition.

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
            unit: Of the values.
            values: Of each molecule, shape (N,).
            sizes: Number of atoms of each, shape (N,).
        """
        values = np.asarray(values, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        edges = np.linspace(low, high, BINS + 1)
        counts = {int(size): tuple(np.histogram(values[sizes == size], edges)[0].tolist()) for size in np.unique(sizes)}
        return cls(name, unit, float(values.mean()), float(values.std()), low, high, counts)

    def check(self, low: float, high: float | None = None) -> None:
        """Raises ``ValueError`` for a value, or a range, far outside the training set."""
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
        """Returns p(c in the bins from low to high | M) of the training set for every M, zero ones left out.

        Where no molecule is in those bins, the nearest ones that have some count.
        """
        first, last = self._bins(low, high)
        table = np.array(list(self.counts.values()))
        while not table[:, first : last + 1].any():
            first, last = max(first - 1, 0), min(last + 1, BINS - 1)
        inside = table[:, first : last + 1].sum(axis=1) / np.maximum(table.sum(axis=1), 1)
        return {size: float(part) for size, part in zip(self.counts, inside, strict=True) if part}

    def draw(self, rng: np.random.Generator, low: float, high: float, size: int) -> float:
        """Draws a value between low and high from the histogram, that of this number of atoms where it has any."""
        if low == high:
            return low
        edges = np.linspace(self.low, self.high, BINS + 1)
        inside = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)  # of each bin
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
    """Returns conditions from themselves or from what JSON makes of them.

    Raises:
        ValueError: If two have one name.
    """
    conditions = tuple(item if isinstance(item, Condition) else Condition(**item) for item in items)
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(f"conditions {', '.join(names)}: every name may occur once")
    return conditions


def condition_features(values: Tensor | None, like: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns what the network sees of the conditions, the same for all atoms, shape (B, M, 2 C).

    Args:
        values: In their own units, NaN where unknown, shape (B, C); None where nothing is known.
        like: Something of shape (B, M, ...), for shape, dtype and device.
        mean: Of each condition, shape (C,).
        std: Of each condition, shape (C,).

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
