"""Particles: several trials of a molecule on their way together, of which those go on that fit what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# (t, predicted positions (B, M, n), predicted features (B, M, F)) → misfit U of each, shape (B,).
Misfit = Callable[[float, Tensor, Tensor], Tensor]

# U of a particle that is no longer finite; others replace it.
LOST = 1e30


class Particles:
    """Which of P particles of each molecule go on: sequential Monte Carlo along the path.

    The weight of a particle changes with the misfit U of its predicted end from step to step,

        log w ← log w + U_before − U,

    and where the effective number (Σ w)² / Σ w² falls below P/2, all P are drawn anew by their weights, systematically,
    as in the particle methods of Trippe et al. (2022) and Wu et al. (2023). What the renewed noise of the kept atoms
    adds to the weights there is left out.

    Args:
        misfit: U of predicted ends, −log p(what is known | them) to a constant.
        count: P. Particles of a molecule stand beside each other in a batch.
        generators: Sources of randomness, one a molecule, so that none depends on its batch mates.
        until: The least time t at which U is looked at.

    Example:
        >>> misfit = lambda t, x, h: torch.tensor([40.0, 40.0, 40.0, 40.0])
        >>> particles = Particles(misfit, 4, [np.random.default_rng(0)])
        >>> particles.select(0.5, None, None) is None  # the first look only begins
        True
        >>> particles.misfit = lambda t, x, h: torch.tensor([80.0, 0.0, 80.0, 80.0])
        >>> particles.select(0.4, None, None).tolist()
        [1, 1, 1, 1]
    """

    def __init__(
        self, misfit: Misfit, count: int, generators: Sequence[np.random.Generator], until: float = 0.0
    ) -> None:
        self.misfit, self.count, self.generators, self.until = misfit, count, generators, until
        self._log_weights = np.zeros((len(generators), count))
        self._before: NDArray[np.float64] | None = None

    def select(self, t: float, x: Tensor, h: Tensor) -> Tensor | None:
        """Returns places in the batch of the particles that go on, None for all as they are."""
        if t < self.until:
            return None
        now = self.misfit(t, x, h).double().cpu().numpy().reshape(self._log_weights.shape)
        now = np.nan_to_num(now, nan=LOST, posinf=LOST)
        if self._before is not None:
            self._log_weights += self._before - now
        self._before = now
        weights = self._weights()
        few = 1.0 / np.square(weights).sum(axis=1) < self.count / 2
        if not few.any():
            return None
        own = np.tile(np.arange(self.count), (len(weights), 1))
        for row in np.flatnonzero(few):
            own[row] = _systematic(weights[row], self.generators[row])
            self._log_weights[row] = 0.0
        self._before = np.take_along_axis(now, own, axis=1)
        return self._places(own)

    def last(self) -> Tensor:
        """Returns the place of one particle a molecule, drawn by the weights at the end."""
        drawn = [
            generator.choice(self.count, p=weights)
            for generator, weights in zip(self.generators, self._weights(), strict=True)
        ]
        return self._places(np.array(drawn)[:, None])

    def _weights(self) -> NDArray[np.float64]:
        relative = np.exp(self._log_weights - self._log_weights.max(axis=1, keepdims=True))
        return relative / relative.sum(axis=1, keepdims=True)

    def _places(self, own: NDArray[np.int64]) -> Tensor:
        first = self.count * np.arange(len(own))
        return torch.from_numpy((own + first[:, None]).ravel())


def _systematic(weights: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Draws as many places as there are weights, each w P times to the next whole number up or down."""
    count = len(weights)
    ticks = (generator.random() + np.arange(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), ticks), count - 1)
