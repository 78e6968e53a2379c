"""Flow matching has its known optimum, maximum likelihood agrees with ``log_prob``; both train the whole model."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.continuous import Solver
from ase_enf.geometry import center
from ase_enf.training.objectives import FlowMatching, NegativeLogLikelihood

SOLVER = Solver("dopri5", rtol=1e-6, atol=1e-6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def molecules(flow, batch_of, methane, water):
    return batch_of([methane, water], flow)


class Linear(torch.nn.Module):
    """dx/dt = (a + b t) x: with Gaussian data of variance s² the best velocity at t is x · (t − (1 − t) s²) / σ_t²."""

    def __init__(self, at):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.at = at

    def forward(self, t, x, h, mask, context=None):
        return self.gain * self.at(t)[:, None, None] * x, h


def gaussian_model(spread: float):
    """Returns a model of positions whose velocity is optimal for data N(0, spread²) if the gain is one."""

    def best(t):
        return (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)

    config = ENFConfig(features="none", species=())

    def encode(batch, noise):
        return SimpleNamespace(x=batch.positions, h=batch.positions[..., :0], mask=batch.mask, context=None)

    return SimpleNamespace(config=config, dynamics=Linear(best), encode=encode)


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("power", [1.0, 1.3])
def test_flow_matching_of_gaussian_data_has_its_known_optimum(spread, power):
    """At the optimum the loss is E[s² / σ_t²] with σ_t² = (1 − t)² s² + t², and its gradient vanishes."""
    size = 8000
    generator = seeded()
    mask = torch.arange(4)[None] < torch.tensor([4, 3])[:, None].repeat(size // 2, 1)
    x = center(spread * torch.randn(size, 4, 3, generator=generator, dtype=torch.float64), mask)
    batch = Batch(x, x[..., :0], torch.ones(size, 4, 1, dtype=torch.float64), mask)
    model = gaussian_model(spread)
    loss, value = FlowMatching(time_power=power)(model, batch, generator)
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64) ** power
    known = (spread**2 / ((1 - t) ** 2 * spread**2 + t**2)).mean()
    assert loss.item() == pytest.approx(known.item(), rel=0.03)
    assert value == loss and not value.requires_grad
    (slope,) = torch.autograd.grad(loss, model.dynamics.gain)
    with torch.no_grad():
        model.dynamics.gain.fill_(1.3)
    off = FlowMatching(time_power=power)(model, batch, seeded(1)).loss
    (steep,) = torch.autograd.grad(off, model.dynamics.gain)
    assert off > 1.02 * loss and steep > 0
    assert slope.abs() < 0.1 * steep


def test_flow_matching_counts_the_dimensions_of_the_subspace():
    """With a velocity of zero, the loss is E‖z − x‖² / D = 1 + s² for every size, with D = (M − 1) n."""
    size, spread = 20_000, 0.5
    for width in (2, 5):
        mask = torch.ones(size, width, dtype=torch.bool)
        x = center(spread * torch.randn(size, width, 3, generator=seeded(), dtype=torch.float64), mask)
        model = gaussian_model(spread)
        with torch.no_grad():
            model.dynamics.gain.fill_(0.0)
        batch = Batch(x, x[..., :0], torch.ones(size, width, 1, dtype=torch.float64), mask)
        assert FlowMatching()(model, batch, seeded(1)).loss.item() == pytest.approx(1.25, rel=0.03)


def test_feature_weight_weighs_the_features(make_flow, batch_of, methane):
    flow = make_flow("joint")
    batch = batch_of([methane], flow)
    losses = [FlowMatching(feature_weight=w)(flow, batch, seeded()).loss.item() for w in (0.0, 1.0, 2.0)]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-5)
    assert losses[1] > losses[0] > 0


@pytest.mark.parametrize("adjoint", [True, False])
def test_nll_value_is_minus_log_prob_with_the_same_noise_and_probe(flow, molecules, adjoint):
    objective = NegativeLogLikelihood(SOLVER, regularisation=0.0, adjoint=adjoint)
    loss, value = objective(flow, molecules, seeded())
    generator = seeded()  # the objective's draws again, in its order
    shape = (*molecules.mask.shape, flow.config.flow_features)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float32).to(molecules.positions)
    like = flow.encode(molecules, noise)
    probes = divergence.draw_probes(like.x, like.h, 1, generator)
    trace = functools.partial(_probed, probes=probes)
    expected = flow.log_prob(molecules, noise, trace, SOLVER).log_prob.mean()
    assert value.item() == pytest.approx(-expected.item(), abs=2e-3)
    assert loss.item() == pytest.approx(value.item())


def _probed(field, x, h, probes):
    return divergence.hutchinson(field, x, h, probes)


def test_nll_of_an_unseen_size_is_infinite_under_joint_alone(make_flow, batch_of, methane):
    quick = NegativeLogLikelihood(Solver("euler", steps=2))
    for features, infinite in (("joint", True), ("given", False)):
        flow = make_flow(features, sizes={3: 1})
        assert math.isinf(quick(flow, batch_of([methane], flow), seeded()).value) == infinite


def test_regularisation_enters_the_loss_and_not_the_value(flow, molecules):
    loose, tight = (
        NegativeLogLikelihood(Solver("rk4", steps=3), regularisation=r)(flow, molecules, seeded()) for r in (0.0, 0.1)
    )
    assert tight.value.item() == pytest.approx(loose.value.item())
    assert tight.loss > loose.loss + 1e-3


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_nll_draws_the_probe_it_is_told_to(make_flow, batch_of, water, probe, monkeypatch):
    drawn = []
    draw = divergence.draw_probes
    monkeypatch.setattr(divergence, "draw_probes", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    flow = make_flow("none")
    NegativeLogLikelihood(Solver("euler", steps=1), probe=probe)(flow, batch_of([water], flow), seeded())
    assert bool((drawn[0][0].abs() == 1).all()) == (probe == "rademacher")


OBJECTIVES = {
    "flow_matching": FlowMatching(),
    "nll adjoint": NegativeLogLikelihood(Solver("dopri5", rtol=1e-2, atol=1e-2)),
    "nll direct": NegativeLogLikelihood(Solver("rk4", steps=2), adjoint=False),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dequantizer", ["fixed", "learned"])
def test_objectives_train_every_parameter(features, make_flow, batch_of, methane, water, name, dequantizer):
    if dequantizer == "learned" and (features != "joint" or name == "flow_matching"):
        pytest.skip("no q to learn")
    flow = make_flow(features, dequantizer=dequantizer)
    loss, _ = OBJECTIVES[name](flow, batch_of([methane, water], flow), seeded())
    loss.backward()
    for parameter_name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_repeat_with_their_generator_and_leave_the_global_one_alone(flow, molecules, name):
    state = torch.get_rng_state()
    first, again, other = (OBJECTIVES[name](flow, molecules, seeded(seed)).loss.item() for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_nll_gradient_is_that_of_finite_differences(make_flow, batch_of, water, dtype):
    if dtype != torch.float64:
        pytest.skip("finite differences need float64")
    flow = make_flow("joint", dequantizer="learned")
    batch = batch_of([water], flow)
    for objective in (
        NegativeLogLikelihood(Solver("rk4", steps=4), 0.1, adjoint=False),
        NegativeLogLikelihood(Solver("dopri5", rtol=1e-8, atol=1e-8), 0.1, adjoint=True),
    ):
        weights = [flow.dynamics.network.layers[0].messages.edge_out.weight, flow.q.network.out.weight]
        gradients = torch.autograd.grad(objective(flow, batch, seeded()).loss, weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            step, losses = 1e-5, []
            with torch.no_grad():
                for sign in (1, -1):
                    weight[0, 1] += sign * step
                    losses.append(objective(flow, batch, seeded()).loss.item())
                    weight[0, 1] -= sign * step
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[0, 1].item(), rel=1e-3, abs=1e-5)
