"""Noise of generate: by numpy on a CPU, by a counter on other devices; molecule i depends on (seed, i) only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ase_enf.flow.base import sample_latent
from ase_enf.flow.continuous import Solver
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.sampling import noise
from ase_enf.sampling.generate import generate, igenerate
from ase_enf.sampling.noise import CounterNoise, Drawing, HostNoise, noise_source
from ase_enf.sampling.request import Request
from ase_enf.sampling.sampler import Sampler

STEPS = {"churn": StochasticSampler(steps=6), "ode": Solver("midpoint", steps=4)}
# Of two atoms, positions of the first; the second is opposite.
PINNED = [0.309348003953, -0.412837324525, 0.170704431774]
DRAWINGS = [Drawing(5, 0), Drawing(0, 2), Drawing(2**33, 0)]


@pytest.fixture
def on_the_device(monkeypatch):
    """Draws as on a GPU on any device."""
    monkeypatch.setattr(noise, "HOST_DEVICES", ())


@pytest.fixture(params=STEPS)
def solver(request):
    return STEPS[request.param]


@pytest.fixture
def matched(features, make_flow):
    compositions = {"compositions": {"H2O": 3, "CH4": 1, "CHO": 2}} if features == "given" else {}
    return make_flow(features, layers=1, path="linear", **compositions).double()


def assert_same(drawn, reference):
    assert [atoms.info["enf_index"] for atoms in drawn] == [atoms.info["enf_index"] for atoms in reference]
    for a, b in zip(drawn, reference, strict=True):
        assert a.numbers.tolist() == b.numbers.tolist()
        assert np.allclose(a.positions, b.positions, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_no_batch_decides_a_molecule(on_the_device, matched, solver, batch_size):
    reference = generate(matched, 7, seed=3, solver=solver)
    assert len({len(atoms) for atoms in reference}) > 1
    assert_same(generate(matched, 9, seed=3, solver=solver, batch_size=batch_size)[:7], reference)
    assert_same(list(igenerate(matched, 3, seed=3, solver=solver, start=4)), reference[4:])
    other = generate(matched, 7, seed=4, n_atoms=3, solver=solver)
    same = generate(matched, 7, seed=3, n_atoms=3, solver=solver)
    assert all(np.abs(a.positions - b.positions).max() > 1e-3 for a, b in zip(other, same, strict=True))


def test_no_order_decides_a_molecule(on_the_device, matched, solver):
    sampler = Sampler(matched, Request(seed=3, n_atoms=3, solver=solver, batch_size=8))
    drafts = [sampler.draft(index, attempt) for index, attempt in ((0, 0), (7, 0), (7, 1), (2, 0))]
    forwards, backwards = sampler.sample(drafts), sampler.sample(drafts[::-1])
    assert torch.allclose(forwards.positions, backwards.positions.flip(0), rtol=0, atol=1e-10)
    alone = torch.cat([sampler.sample([draft]).positions for draft in drafts])
    assert torch.allclose(forwards.positions, alone, rtol=0, atol=1e-10)


def test_the_device_decides_the_noise(matched):
    assert isinstance(noise_source(0, matched), HostNoise)
    assert isinstance(noise_source(0, matched.to("meta")), CounterNoise)


def test_a_cpu_draws_what_it_always_drew(matched):
    """Latent molecules come from numpy's streams (index, attempt), fresh noise from (index, attempt, 1)."""
    features = matched.config.flow_features

    def numpys(*key):
        return np.random.default_rng(np.random.SeedSequence(3, spawn_key=key))

    source = noise_source(3, matched)
    x, h = source.latents(DRAWINGS, 4)
    fresh = source.renewed(DRAWINGS, 4)
    renewed = [fresh() for _ in range(2)]
    for k, (index, attempt) in enumerate(DRAWINGS):
        expected = sample_latent(numpys(index, attempt), 4, 3, features)
        assert np.array_equal(x[k], expected[0]) and np.array_equal(h[k], expected[1])
        rng = numpys(index, attempt, 1)
        for drawn in renewed:
            expected = sample_latent(rng, 4, 3, features)
            assert np.array_equal(drawn[0][k], expected[0]) and np.array_equal(drawn[1][k], expected[1])


def test_the_streams_of_a_cpu_are_pinned(make_flow):
    """The numbers are pinned, so that no change of numpy or this package alters the molecules of a seed unnoticed."""
    x, _ = HostNoise(0, make_flow("none", layers=1).double()).latents([Drawing(0, 0)], 2)
    assert x[0].tolist() == [pytest.approx(PINNED), pytest.approx([-value for value in PINNED])]


@pytest.mark.parametrize("kind", [HostNoise, CounterNoise])
def test_noise_is_of_the_base_distribution(make_flow, kind):
    source = kind(1, make_flow("joint", layers=1).double())
    drawings = [Drawing(index, 0) for index in range(4000)]
    fresh = source.renewed(drawings, 3)
    draws = [source.latents(drawings, 3), fresh(), fresh()]
    for x, h in draws:
        assert x.mean(dim=1).abs().max() < 1e-14
        projector = torch.kron(torch.eye(3) - 1 / 3, torch.eye(3)).double()
        assert (torch.cov(x.flatten(1).T) - projector).abs().max() < 5 * 2**0.5 / len(drawings) ** 0.5
        assert abs(h.mean()) < 5 / h.numel() ** 0.5 and abs(h.var() - 1) < 5 * (2 / h.numel()) ** 0.5
    for one, other in ((0, 1), (1, 2), (0, 2)):  # draws are independent
        product = draws[one][1] * draws[other][1]
        assert abs(product.mean()) < 5 / product.numel() ** 0.5


def test_nothing_is_read_back(features, make_flow, solver):
    """On the meta device, which has no values, molecules are drawn to the end.

    Completions of fragments are an exception: the host decides which particles continue.
    """
    flow = make_flow(features, layers=1, path="linear", sizes={5: 1}, compositions={"CH4": 1}).to("meta")
    sampler = Sampler(flow, Request(solver=solver, batch_size=8))
    batch = sampler.sample([sampler.draft(index, 0) for index in range(3)])
    assert batch.positions.is_meta and batch.positions.shape == (3, 5, 3)
