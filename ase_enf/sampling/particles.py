"""Particles: several trials of a molecule, integrated together, of which those survive that fit what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# (t, predicted positions (B, M, n), predicted features (B, M, F)) → misfit U of each, shape (B,).
Misfit = Callable[[float, Tensor, Tensor], Tensor]

# U of a particle that is not finite, so that others replace it.
LOST = 1e30


class Particles:
    """Selects among P particles of each molecule: sequential Monte Carlo along the path.

    From step to step, the weight of a particle changes with the misfit U of its predicted end,

        log w ← log w + U_before − U,

    and where the effective number (Σ w)² / Σ w² falls below P/2, all P are resampled systematically, as in the particle
    methods of Trippe et al. (2022) and Wu et al. (2023). The terms that fresh noise of the kept atoms contributes to
    their weights are left out.

    Args:
        misfit: U of predicted ends, −log p(what is known | predicted end) up to a constant.
        count: P; the particles of one molecule are neighbours in the batch.
        generators: Random generators, one for each molecule, so that none depends on the rest of its batch.
        until: The smallest time t at which U is evaluated.

    Example:
        >>> misfit = lambda t, x, h: torch.tensor([40.0, 40.0, 40.0, 40.0])
        >>> particles = Particles(misfit, 4, [np.random.default_rng(0)])
        >>> particles.select(0.5, None, None) is None  # the first call only records U
        True
        >>> particles.misfit = lambda t, x, h: torch.tensor([80.0, 0.0, 80.0, 80.0])
        >>> particles.select(0.4, None, None).tolist()
        [1, 1, 1, 1]
    """

    def __init__(
        self, misfit: Misfit, count: int, generators: Sequence[np.random.Generator], until: float = 0.0
    ) -> None:
        self.misfit, self.count, self.generators, self.until = misfit, count, generators, until
        self._log_weights: Tensor | None = None  # (G, P) of G molecules
        self._before: Tensor | None = None  # U at the last call, (G, P)

    def select(self, t: float, x: Tensor, h: Tensor) -> Tensor | None:
        """Returns the batch indices of the particles to continue with, or None to keep all; the host reads nothing."""
        if t < self.until:
            return None
        now = self.misfit(t, x, h).double().view(len(self.generators), self.count)
        now = torch.nan_to_num(now, nan=LOST, posinf=LOST)
        if self._before is None:
            self._log_weights, self._before = torch.zeros_like(now), now
            return None
        log_weights = self._log_weights + self._before - now
        weights = torch.softmax(log_weights, dim=1)
        few = (1.0 / weights.square().sum(dim=1, keepdim=True)) < self.count / 2
        places = torch.arange(self.count, device=now.device)
        own = torch.where(few, _places(weights, (self._uniform(now) + places) / self.count), places)
        self._log_weights = torch.where(few, 0.0, log_weights)
        self._before = now.gather(1, own)
        return self._in_batch(own)

    def last(self) -> Tensor:
        """Returns the place of one particle of each molecule, drawn by the final weights."""
        if self._log_weights is None:  # U was never evaluated: all weights are equal
            return self._in_batch(torch.zeros(len(self.generators), 1, dtype=torch.long))
        weights = torch.softmax(self._log_weights, dim=1)
        return self._in_batch(_places(weights, self._uniform(weights)))

    def _uniform(self, like: Tensor) -> Tensor:
        """Draws a number in [0, 1) for each molecule, shape (G, 1)."""
        drawn = [[generator.random()] for generator in self.generators]
        return torch.tensor(drawn, dtype=like.dtype, device=like.device)

    def _in_batch(self, own: Tensor) -> Tensor:
        first = self.count * torch.arange(len(own), device=own.device)
        return (own + first.unsqueeze(1)).flatten()


def _places(weights: Tensor, ticks: Tensor) -> Tensor:
    """Returns which of the P intervals, into which weights (G, P) divide (0, 1), each of the ticks (G, T) is in."""
    below = ticks.unsqueeze(2) > weights.cumsum(dim=1).unsqueeze(1)
    return below.sum(dim=2).clamp(max=weights.shape[1] - 1)
