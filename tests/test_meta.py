"""Nothing waits for the host: code that runs on ``torch.device("meta")``, which has no values, reads none.

That device also refuses tensors of another one. ``test_captured`` tests a training step in this way.
"""

from __future__ import annotations

import functools

import pytest
import torch

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import EVALUATIONS_PER_STEP, ContinuousFlow, Solver
from ase_enf.flow.likelihood import log_likelihood
from ase_enf.flow.stochastic import StochasticSampler

META = torch.device("meta")
SIZE, ATOMS = 2, 4


@pytest.fixture(params=["velocity", "denoising"])
def flow(features, make_flow, request):
    """A small flow of each feature mode, configured as trained by flow matching, without values."""
    return make_flow(features, path="linear", parameterisation=request.param).to(META)


@pytest.fixture
def batch(flow) -> Batch:
    one = torch.empty(SIZE, ATOMS, 3, dtype=flow.dtype, device=META)
    types = torch.empty(SIZE, ATOMS, len(flow.species), dtype=flow.dtype, device=META)
    return Batch(one, types, one[..., :1], torch.empty(SIZE, ATOMS, dtype=torch.bool, device=META))


def latent(flow, batch) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.empty(SIZE, ATOMS, flow.config.flow_features, dtype=flow.dtype, device=META)
    return torch.empty_like(batch.positions), h


def test_the_device_refuses_what_waits(batch):
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(batch.mask.any())
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.mask.nonzero()


@pytest.mark.parametrize("method", EVALUATIONS_PER_STEP)
def test_a_solve_of_fixed_steps(flow, batch, method):
    path = flow.flow(batch.mask, flow.context(batch), Solver(method, steps=3, warp=2.0))
    for way in (path.forward, path.inverse):
        end = way(*latent(flow, batch))
        assert end.x.is_meta and end.x.shape == batch.positions.shape
        assert end.nfe == 3 * EVALUATIONS_PER_STEP[method]


def test_an_adaptive_solve_waits(flow, batch):
    with pytest.raises((RuntimeError, NotImplementedError)):
        flow.flow(batch.mask, flow.context(batch), Solver()).forward(*latent(flow, batch))


def test_the_stochastic_sampler(flow, batch):
    noise = functools.partial(latent, flow, batch)
    drawn = flow.sample(*noise(), batch.mask, flow.context(batch), StochasticSampler(steps=4), noise)
    assert drawn.positions.is_meta and drawn.positions.shape == batch.positions.shape
    assert drawn.types.shape == batch.types.shape


def test_an_exact_likelihood_with_its_error(flow, batch):
    noise = latent(flow, batch)[1]
    found = flow.log_prob(batch, noise, intervals=8)
    assert found.log_prob.is_meta and found.error.is_meta and found.log_prob.shape == (SIZE,)
    assert found.nfe > 9 + 8 * 4  # nodes, and four evaluations a step between them; then the path of the error


def test_a_likelihood_by_probes(flow, batch):
    noise = latent(flow, batch)[1]
    probes = tuple(torch.empty(2, *part.shape, dtype=flow.dtype, device=META) for part in (batch.positions, noise))
    trace = functools.partial(divergence.hutchinson, probes=probes)
    assert flow.log_prob(batch, noise, trace, intervals=8).samples.shape == (2, SIZE)


def test_a_likelihood_and_its_gradient(flow, batch):
    """As in the calculator: exact traces with their graph."""
    positions = batch.positions.clone().requires_grad_(True)
    data = flow.encode(batch._replace(positions=positions), latent(flow, batch)[1])
    trace = functools.partial(divergence.exact, create_graph=True)
    path = ContinuousFlow(flow.velocity(data.mask, data.context), data.mask, Solver("rk4", steps=1))
    z = path.forward(data.x, data.h, trace, intervals=8)
    (gradient,) = torch.autograd.grad(log_likelihood(data, z.x, z.h, z.ladj).log_density.sum(), positions)
    assert gradient.is_meta and gradient.shape == positions.shape
