"""The stochastic sampler: molecules by the reverse diffusion of a flow that flow matching has trained.

Its molecules have the distribution of the flow's path only as far as the velocity is right; noise that is renewed on
the way lets a trained velocity correct what it has done wrong before. There is no likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ase_enf.flow.divergence import Velocity

# Draws fresh latent positions (B, M, n), centred, and features (B, M, F).
Noise = Callable[[], tuple[Tensor, Tensor]]
# Puts what is known of the data into predicted positions (B, M, n) and features (B, M, F).
Correction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# At a time t, chooses by predicted positions and features which molecules go on: places (B,), None for all as they are.
Selection = Callable[[float, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class StochasticSampler:
    """How molecules are drawn with noise that is renewed on the way.

    Args:
        steps: Number of steps, each one evaluation of the velocity.
        warp: Steps lie at ``t = (k / steps)^warp``: above 1 they are denser near the data.
        churn: η, how much noise is renewed: 1 is the reverse diffusion of the path, g² = 2 η t / (1 − t), and the
            larger, the sooner what the velocity did wrong is forgotten; 0 renews none.

    Raises:
        ValueError: For steps < 1, a warp that is not positive, a churn that is negative or not finite.

    Example:
        >>> str(StochasticSampler(steps=64, churn=20))
        'stochastic, 64 steps, warp 2, churn 20'
    """

    method: ClassVar[str] = "stochastic"
    steps: int = 128
    warp: float = 2.0
    churn: float = 50.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler steps={self.steps}: need at least 1")
        if not 0 < self.warp < math.inf:
            raise ValueError(f"sampler warp={self.warp}: must be positive")
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"sampler churn={self.churn}: must be a finite number, at least 0")

    def __str__(self) -> str:
        return f"{self.method}, {self.steps} steps, warp {self.warp:g}, churn {self.churn:g}"

    def times(self) -> list[float]:
        """Returns the times from noise to data, steps + 1 of them.

        Example:
            >>> StochasticSampler(steps=2).times()
            [1.0, 0.25, 0.0]
        """
        return [(1.0 - k / self.steps) ** self.warp for k in range(self.steps + 1)]


def sample_stochastic(
    velocity: Velocity,
    x: Tensor,
    h: Tensor,
    noise: Noise,
    sampler: StochasticSampler,
    correct: Correction | None = None,
    begin: float = 1.0,
    select: Selection | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes latent to data space along x_t = (1 − t) x + t z, with renewed noise ε, to second order in the steps.

    From t to t' < t, with D = x_t − t v(t, x_t), which flow matching makes the mean of the data given x_t,

        x_t' = (t'/t) e^(−ηλ) x_t + (1 − t') (1 − e^(−(1 + η)λ)) [D + λ/(2λ_0) (D − D_0)] + t' √(1 − e^(−2ηλ)) ε

    where λ is the step of log((1 − t)/t) and _0 marks the step before: DPM-Solver++(2M) of Lu et al. (2022), whose
    stochastic form has η = 1. The first and the last step are of first order; the last renews nothing. Features h go
    the same way.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``.
        x: Latent positions, centred, shape (B, M, n).
        h: Latent features, shape (B, M, F).
        noise: Draws ε; steps − 2 times, when it begins at 1.
        sampler: Steps and churn.
        correct: What becomes of D before it is used.
        begin: Time t of x and h, in (0, 1]; those of the steps that are later are left out.
        select: Which molecules go on at each step, some of them several times, by D before it is corrected.

    Returns:
        Positions and features at t = 0.

    Example:
        All data in one point, v = (x_t − 0) / t, is found exactly:

        >>> from ase_enf.geometry import center
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> draw = lambda: (center(torch.randn(1, 3, 2), mask), torch.zeros(1, 3, 0))
        >>> x, h = sample_stochastic(lambda t, x, h: (x / t, h), *draw(), draw, StochasticSampler(steps=8))
        >>> x.abs().max().item() < 1e-6
        True
    """
    before: tuple[Tensor, ...] = ()
    step_before = math.inf
    for start, end in pairwise([begin, *(t for t in sampler.times() if t < begin)]):
        rates = velocity(torch.full((), start, dtype=x.dtype, device=x.device), x, h)
        data = tuple(state - start * rate for state, rate in zip((x, h), rates, strict=True))
        if select is not None and (places := select(start, *data)) is not None:
            x, h, data = x[places], h[places], tuple(mean[places] for mean in data)
            before = tuple(mean[places] for mean in before)
        if correct is not None:
            data = correct(*data)
        if end == 0.0:
            break
        if start == 1.0:  # of what x_1 holds of the data nothing is left
            x, h = (end * state + (1.0 - end) * mean for state, mean in zip((x, h), data, strict=True))
        else:
            step = _log_snr(end) - _log_snr(start)
            kept, renewed = math.exp(-sampler.churn * step), -math.expm1(-2.0 * sampler.churn * step)
            ahead = step / (2.0 * step_before)
            slopes = [mean - old for mean, old in zip(data, before or data, strict=True)]
            gain = -(1.0 - end) * math.expm1(-(1.0 + sampler.churn) * step)
            x, h = (
                end / start * kept * state + gain * (mean + ahead * slope) + end * math.sqrt(renewed) * fresh
                for state, mean, slope, fresh in zip((x, h), data, slopes, noise(), strict=True)
            )
            step_before = step
        before = data
    return data


def _log_snr(t: float) -> float:
    """Returns log((1 − t)/t)."""
    return math.log1p(-t) - math.log(t)
