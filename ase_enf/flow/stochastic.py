"""The stochastic sampler: draws molecules by the reverse diffusion of a flow trained by flow matching.

Each step replaces part of the noise by fresh noise, so that the errors of earlier steps fade. The molecules follow the
distribution of the flow's path only as far as the velocity is accurate, and they have no likelihood.
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
from ase_enf.values import check_churn, check_whole

# Draws fresh latent positions (B, M, n), centred, and features (B, M, F).
Noise = Callable[[], tuple[Tensor, Tensor]]
# Overwrites predicted positions (B, M, n) and features (B, M, F) with what is known of the data.
Correction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Resamples the batch at time t from predicted positions and features: indices of the molecules to continue with (B,),
# or None to keep the batch as it is.
Selection = Callable[[float, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class StochasticSampler:
    """Settings of a sampler that replaces part of the noise by fresh noise at each step.

    Args:
        steps: Number of steps, with one evaluation of the velocity each.
        warp: Steps lie at ``t = (k / steps)^warp``; above 1 they are denser near the data.
        churn: η ≥ 0, how much noise is replaced, as a diffusion with g² = 2 η t / (1 − t): 0 replaces none, 1 is the
            reverse diffusion of the path, and with larger values the errors of earlier steps fade sooner.

    Raises:
        ValueError: If steps is below 1, warp is not positive, or churn is negative or not finite.

    Example:
        >>> str(StochasticSampler(steps=64, churn=20))
        'stochastic, 64 steps, warp 2, churn 20'
    """

    method: ClassVar[str] = "stochastic"
    steps: int = 128
    warp: float = 2.0
    churn: float = 50.0

    def __post_init__(self) -> None:
        check_whole("sampler steps", self.steps, 1)
        if not 0 < self.warp < math.inf:
            raise ValueError(f"sampler warp={self.warp}: must be positive")
        check_churn(self.churn)

    def __str__(self) -> str:
        return f"{self.method}, {self.steps} steps, warp {self.warp:g}, churn {self.churn:g}"

    def times(self) -> list[float]:
        """Returns the ``steps + 1`` times from noise (t = 1) to data (t = 0).

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
    """Takes latent to data space along x_t = (1 − t) x + t z, with fresh noise ε, to second order in the steps.

    A step from t to t' < t is

        x_t' = (t'/t) e^(−ηλ) x_t + (1 − t') (1 − e^(−(1 + η)λ)) [D + λ/(2λ_0) (D − D_0)] + t' √(1 − e^(−2ηλ)) ε

    where D = x_t − t v(t, x_t) predicts the data (flow matching makes it their mean given x_t), λ is the change of
    log((1 − t)/t), and the index 0 marks the previous step. This is DPM-Solver++(2M) of Lu et al. (2022), whose
    stochastic form has η = 1. The first and the last step are of first order, and the last adds no noise. Features h
    are treated alike.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``.
        x: Latent positions, centred, shape (B, M, n).
        h: Latent features, shape (B, M, F).
        noise: Draws ε; called steps − 2 times if ``begin`` is 1.
        sampler: Steps, warp and churn.
        correct: Corrects D before it is used.
        begin: Time t of x and h, in (0, 1]; later times of the sampler are left out.
        select: Resamples the batch at each step, from D before it is corrected.

    Returns:
        Positions (B, M, n) and features (B, M, F) at t = 0.

    Example:
        If all data lie at the origin, v = x_t / t, and the sampler finds it exactly:

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
        if start == 1.0:  # log((1 − t)/t) is infinite here: a plain step without fresh noise
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
