"""A velocity that is recorded once and replayed draws the same molecules as an evaluated one."""

from __future__ import annotations

import functools

import pytest
import torch

from ase_enf.atoms.batch import Batch
from ase_enf.flow.continuous import ContinuousFlow, Solver
from ase_enf.flow.divergence import exact, hutchinson
from ase_enf.flow.replay import Replayed, replayed
from ase_enf.flow.stochastic import StochasticSampler, sample_stochastic
from ase_enf.geometry import center

SIZE, ATOMS = 3, 5


def again(work):
    """Takes the place of a CUDA graph: repeats the work at every call."""
    work()
    return work


@pytest.fixture
def flow(features, make_flow):
    return make_flow(features, path="linear", parameterisation="denoising")


@pytest.fixture
def latent(flow):
    """Draws latent molecules, one of them with two atoms fewer."""
    mask = torch.ones(SIZE, ATOMS, dtype=torch.bool)
    mask[0, -2:] = False
    generator = torch.Generator().manual_seed(0)

    def draw():
        x, h = (
            torch.randn(SIZE, ATOMS, width, generator=generator, dtype=flow.dtype)
            for width in (3, flow.config.flow_features)
        )
        return center(x, mask), h * mask.unsqueeze(-1)

    draw.mask, draw.restart = mask, lambda: generator.manual_seed(0)
    return draw


def velocity_of(flow, latent):
    """Returns the velocity for molecules, whose elements are given if they do not flow."""
    types = torch.eye(ATOMS, len(flow.species), dtype=flow.dtype).expand(SIZE, -1, -1) * latent.mask.unsqueeze(-1)
    x = torch.zeros(SIZE, ATOMS, 3, dtype=flow.dtype)
    return flow.velocity(latent.mask, flow.context(Batch(x, types, x[..., :1], latent.mask)))


def test_the_stochastic_sampler_draws_the_same(flow, latent):
    ends = []
    for wrap in (lambda v, *_: v, lambda v, x, h: replayed(v, x, h, again)):
        latent.restart()
        start = latent()
        with torch.no_grad():
            velocity = wrap(velocity_of(flow, latent), *start)
            ends.append(sample_stochastic(velocity, *start, latent, StochasticSampler(steps=8)))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], start[0])


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_flow_itself_draws_the_same(flow, latent, method):
    start, velocity = latent(), velocity_of(flow, latent)
    with torch.no_grad():
        ends = [
            ContinuousFlow(v, latent.mask, Solver(method, steps=4)).inverse(*start)
            for v in (velocity, replayed(velocity, *start, again))
        ]
    assert torch.equal(ends[0].x, ends[1].x) and torch.equal(ends[0].h, ends[1].h) and ends[0].nfe == ends[1].nfe


def test_what_is_kept_of_one_evaluation_stays(flow, latent):
    (x, h), (y, g) = latent(), latent()
    velocity = velocity_of(flow, latent)
    fast = Replayed(velocity, x, h, again)
    half, one = torch.tensor(0.5, dtype=flow.dtype), torch.tensor(1.0, dtype=flow.dtype)
    with torch.no_grad():
        kept = fast(half, x, h)
        other = fast(one, y, g)
        assert all(torch.equal(*pair) for pair in zip(kept, velocity(half, x, h), strict=True))
        assert all(torch.equal(*pair) for pair in zip(other, velocity(one, y, g), strict=True))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_likelihoods_are_the_same(flow, latent, trace):
    (x, h), velocity = latent(), velocity_of(flow, latent)
    generator = torch.Generator().manual_seed(1)
    probes = tuple(torch.randn(2, *part.shape, generator=generator, dtype=part.dtype) for part in (x, h))
    method = exact if trace == "exact" else functools.partial(hutchinson, probes=probes)
    with torch.no_grad():
        plain, fast = (
            ContinuousFlow(v, latent.mask, Solver("rk4", steps=4)).forward(x, h, method, intervals=8)
            for v in (velocity, replayed(velocity, x, h, again))
        )
    assert torch.equal(plain.ladj, fast.ladj) and torch.equal(plain.x, fast.x)
    assert plain.ladj.abs().min() > 1e-6


def test_gradients_are_those_of_the_velocity(flow, latent):
    (x, h), velocity = latent(), velocity_of(flow, latent)
    half, fast = torch.tensor(0.5, dtype=flow.dtype), replayed(velocity, x, h, again)
    gradients = []
    for field in (velocity, fast):
        leaf = x.clone().requires_grad_(True)
        gradients += torch.autograd.grad(field(half, leaf, h)[0].square().sum(), leaf)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_other_shapes_are_evaluated(flow, latent):
    (x, h), velocity = latent(), velocity_of(flow, latent)
    fast = Replayed(velocity, x, h, again)
    fast.replay = None  # a replay would fail
    times = torch.full((SIZE,), 0.5, dtype=flow.dtype)
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(fast(times, x, h), velocity(times, x, h), strict=True))


def test_what_cannot_be_recorded_is_evaluated(flow, latent):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    velocity = velocity_of(flow, latent)
    with pytest.warns(UserWarning, match=r"CUDA graph \(operation not permitted when stream is capturing\)"):
        assert replayed(velocity, *latent(), refuse) is velocity


def test_full_memory_is_not_hidden(flow, latent):
    def full(work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        replayed(velocity_of(flow, latent), *latent(), full)


def test_a_replay_is_not_recorded_again(flow, latent):
    start = latent()
    once = replayed(velocity_of(flow, latent), *start, again)
    assert replayed(once, *start, again) is once


def test_off_a_gpu_nothing_changes(flow, latent):
    velocity = velocity_of(flow, latent)
    assert replayed(velocity, *latent()) is velocity


def test_nothing_waits_for_the_host(features, make_flow):
    flow = make_flow(features, path="linear").to("meta")
    x = torch.empty(SIZE, ATOMS, 3, dtype=flow.dtype, device="meta")
    mask = torch.empty(SIZE, ATOMS, dtype=torch.bool, device="meta")
    types = torch.empty(SIZE, ATOMS, len(flow.species), dtype=flow.dtype, device="meta")
    h = x.new_empty(SIZE, ATOMS, flow.config.flow_features)
    velocity = flow.velocity(mask, flow.context(Batch(x, types, x[..., :1], mask)))
    with torch.no_grad():
        dx, dh = replayed(velocity, x, h, again)(x.new_empty(()), x, h)
    assert dx.is_meta and dx.shape == x.shape and dh.shape == h.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_gives_the_same_numbers(features, make_flow):
    flow = make_flow(features, path="linear").float().to("cuda")
    x = torch.randn(SIZE, ATOMS, 3, device="cuda")
    mask = torch.ones(SIZE, ATOMS, dtype=torch.bool, device="cuda")
    h = torch.randn(SIZE, ATOMS, flow.config.flow_features, device="cuda")
    types = torch.eye(ATOMS, len(flow.species), device="cuda").expand(SIZE, -1, -1)
    velocity = flow.velocity(mask, flow.context(Batch(x, types, x[..., :1], mask)))
    fast, half = replayed(velocity, x, h), torch.tensor(0.5, device="cuda")
    assert isinstance(fast, Replayed)
    with torch.no_grad():
        for scale in (1.0, 2.0):
            for ours, theirs in zip(fast(half, scale * x, h), velocity(half, scale * x, h), strict=True):
                torch.testing.assert_close(ours, theirs)
