"""The stochastic sampler: it preserves the distribution, forgets errors, and is of second order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ase_enf.flow.continuous import ContinuousFlow, Solver
from ase_enf.flow.stochastic import StochasticSampler, sample_stochastic
from ase_enf.geometry import center

WIDTH = 0.4  # standard deviation of the data of `gaussian_path`


def mask_of(*sizes):
    return torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def gaussian_path(error=lambda t: 0.0):
    """Returns the velocity of flow matching for Gaussian data, E[z − x | x_t], with an error of its rate."""

    def velocity(t, x, h):
        rate = (t - (1 - t) * WIDTH**2) / ((1 - t) ** 2 * WIDTH**2 + t**2) + error(t)
        return rate * x, rate * h

    return velocity


def latent(mask, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        x, h = (torch.randn(*mask.shape, n, generator=generator, dtype=torch.float64) for n in (2, 2))
        return center(x, mask), h

    return noise


def renewed(mask, churn, steps=160, **path):
    """Returns the mean square of a degree of freedom at the data end, and its standard error."""
    noise = latent(mask)
    x, h = sample_stochastic(gaussian_path(**path), *noise(), noise, StochasticSampler(steps, churn=churn))
    assert center(x, mask).allclose(x, rtol=0, atol=1e-12)
    count = mask.sum() * (2 + 2) - 2 * len(mask)
    value = float((x.square().sum() + h.square().sum()) / count)
    return value, value * math.sqrt(2 / float(count))


@pytest.mark.parametrize("churn", [0.0, 0.5, 4.0])
def test_renewed_noise_leaves_the_distribution_what_it_is(churn):
    value, stderr = renewed(mask_of(*[3] * 4000), churn)
    assert abs(value - WIDTH**2) < 4 * stderr + 0.002 * WIDTH**2  # the steps


def test_renewed_noise_forgets_what_the_velocity_did_wrong():
    wrong = {"error": lambda t: -1.0 * float(t > 0.5)}  # which spreads the state by exp(0.5)
    mask = mask_of(*[3] * 1000)
    assert renewed(mask, 0.0, **wrong)[0] > 2.5 * WIDTH**2
    assert renewed(mask, 1.0, **wrong)[0] < 1.2 * WIDTH**2


def test_without_churn_it_is_the_flow_to_second_order():
    mask = mask_of(3, 4)
    x, h = latent(mask)()
    truth = ContinuousFlow(gaussian_path(), mask, Solver("rk4", steps=400, warp=2.0)).inverse(x, h)
    errors = []
    for steps in (40, 80, 160):
        ours = sample_stochastic(gaussian_path(), x, h, latent(mask, seed=1), StochasticSampler(steps, churn=0.0))
        errors.append(max((a - b).abs().max().item() for a, b in zip(ours, truth[:2], strict=True)))
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 3.5


def test_what_goes_in_comes_out_changed_by_it_and_by_all_noise():
    mask, steps = mask_of(3), 8
    x, h = latent(mask)()
    fresh = [latent(mask, seed=k + 1)() for k in range(steps)]

    def end(x, h, fresh):
        draws = iter(fresh)
        result = sample_stochastic(gaussian_path(), x, h, lambda: next(draws), StochasticSampler(steps, churn=2.0))
        return result[0], steps - sum(1 for _ in draws)

    reference, used = end(x, h, fresh)
    assert used == steps - 2  # the first step uses the given noise, and the last adds none
    for k in range(used):
        changed = [(2 * e, other) if i == k else (e, other) for i, (e, other) in enumerate(fresh)]
        assert (end(x, h, changed)[0] - reference).abs().max() > 1e-6
    assert (end(2 * x, h, fresh)[0] - reference).abs().max() > 1e-6


def test_every_step_is_one_evaluation():
    mask, times = mask_of(3), []
    velocity = gaussian_path()

    def counted(t, x, h):
        times.append(float(t))
        return velocity(t, x, h)

    sampler = StochasticSampler(steps=5)
    noise = latent(mask)
    sample_stochastic(counted, *noise(), noise, sampler)
    assert times == sampler.times()[:-1] and len(times) == 5


def test_no_step_waits_for_the_host(make_flow):
    """Reading a value, or mixing devices, fails on the device "meta", which has no values."""
    flow = make_flow("joint", layers=2).float().to("meta")
    mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
    x, h = (torch.zeros(2, 5, n, device="meta") for n in (3, flow.config.flow_features))
    x, h = sample_stochastic(flow.velocity(mask), x, h, lambda: (x, h), StochasticSampler(steps=4))
    assert x.is_meta and x.shape == (2, 5, 3) and h.shape == (2, 5, flow.config.flow_features)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number"),
        ({"warp": 0.0}, "warp=0.0: must be positive"),
        ({"warp": math.nan}, "warp=nan: must be positive"),
        ({"churn": -1.0}, "churn=-1.0: must be a finite number"),
        ({"churn": math.inf}, "churn=inf: must be a finite number"),
    ],
)
def test_bad_samplers_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        StochasticSampler(**fields)
