"""Guidance: towards the requested properties, from the velocities with and without conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import read, write
from commands import error_of, run

from ase_enf.atoms.batch import Batch
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import Condition, Context
from ase_enf.flow.continuous import ContinuousFlow, Solver
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler, sample_stochastic
from ase_enf.geometry import center, random_rotations
from ase_enf.sampling.generate import generate
from ase_enf.sampling.guidance import GuidedVelocity, guided_velocity
from ase_enf.sampling.path import paths

GAP = Condition.of("gap", "eV", np.array([3.0, 5.0, 7.0, 9.0]), np.array([3, 5, 5, 5]))
# Few steps, as the tests hold for any number.
WAYS = pytest.mark.parametrize("way", [{"solver": "midpoint", "steps": 3}, {"steps": 4}], ids=["flow", "stochastic"])


def conditioned(**config) -> ENF:
    torch.manual_seed(0)
    config = {"species": ("H", "C", "O"), "sizes": {3: 1, 5: 3}, "conditions": (GAP,), "path": "linear"} | config
    flow = ENF(ENFConfig(hidden=16, layers=2, **config)).double().eval().requires_grad_(False)
    flow.dynamics.network.embed.weight.normal_(std=0.5)
    for layer in flow.dynamics.network.layers:
        layer.position_out.weight.normal_(std=0.3)  # fresh weights hardly move the positions
    return flow


@pytest.fixture(scope="module")
def flow() -> ENF:
    return conditioned()


def apart(some, others) -> float:
    return max(np.abs(a.positions - b.positions).max() for a, b in zip(some, others, strict=True))


@WAYS
def test_a_weight_of_one_is_the_conditional_flow_and_zero_the_free_one(flow, way):
    asked = {"n_atoms": 5, "properties": {"gap": 8.0}, "seed": 3} | way
    plain, free = generate(flow, 2, **asked), generate(flow, 2, **asked | {"properties": None})
    one, zero, two = (generate(flow, 2, **asked, guidance=weight) for weight in (1, 0, 2))
    for same, known in zip(one, plain, strict=True):
        assert np.array_equal(same.positions, known.positions) and same.info == known.info
    assert apart(zero, free) < 1e-12
    assert min(apart(plain, free), apart(two, plain), apart(two, free)) > 1e-3


def test_the_velocity_is_the_combination_of_both(flow):
    x, h = center(torch.randn(2, 5, 3).double(), mask := torch.ones(2, 5, dtype=torch.bool)), torch.randn(2, 5, 4)
    h = h.double()
    bare = Batch(x, h[..., :0], h[..., :1], mask)
    context, free = flow.context(bare._replace(conditions=torch.tensor([[4.0], [8.0]]))), flow.context(bare)
    for t in (torch.tensor(0.3), torch.tensor([0.2, 0.7])):  # one time for all, and one for each
        known, unknown = flow.velocity(mask, context)(t, x, h), flow.velocity(mask, free)(t, x, h)
        guided = guided_velocity(flow, mask, context, free, 2.5)(t, x, h)
        for ours, a, b in zip(guided, known, unknown, strict=True):
            torch.testing.assert_close(ours, b + 2.5 * (a - b), rtol=0, atol=1e-12)
            assert (a - b).abs().max() > 1e-3


def test_a_flow_of_graphs_and_properties_keeps_its_graph_in_both():
    flow = conditioned(features="given", graph=True)
    x, mask = center(torch.randn(1, 3, 3).double(), torch.ones(1, 3, dtype=torch.bool)), torch.ones(1, 3) > 0
    bonds = torch.tensor([[[0, 1, 0], [1, 0, 2], [0, 2, 0]]])
    batch = Batch(x, torch.eye(3).double()[None], x[..., :1], mask, torch.tensor([[8.0]]), bonds)
    context, free = flow.context(batch), flow.context(batch._replace(conditions=None))
    assert isinstance(context, Context)
    t, h = torch.tensor(0.4), x[..., :0]
    known, unknown = flow.velocity(mask, context)(t, x, h)[0], flow.velocity(mask, free)(t, x, h)[0]
    guided = guided_velocity(flow, mask, context, free, -1.0)(t, x, h)[0]
    torch.testing.assert_close(guided, 2 * unknown - known, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_gaussians_of_another_mean_are_drawn_at_w_times_that_mean(weight):
    """With p(x | c) = N(μ, s²) and p(x) = N(0, s²), guidance draws from p(x | c)^w p(x)^(1 − w) = N(w μ, s²)."""
    mask, std = torch.ones(1, 4, dtype=torch.bool), 0.5
    mean = center(torch.randn(1, 4, 3).double(), mask)

    def both(t, x, h):  # v = E[z − x | x_t] of each Gaussian on the path
        means = torch.cat([mean, torch.zeros_like(mean)]).expand_as(x)
        spread = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / spread * (x - (1 - t) * means) - means, h

    velocity = GuidedVelocity(both, weight)
    z, none = center(torch.randn(1, 4, 3).double(), mask), torch.zeros(1, 4, 0).double()
    by_flow = ContinuousFlow(velocity, mask, Solver("rk4", steps=64)).inverse(z, none).x
    torch.testing.assert_close(by_flow, weight * mean + std * z, rtol=0, atol=1e-4)


def test_data_in_one_point_is_drawn_at_w_times_that_point():
    mask = torch.ones(2, 4, dtype=torch.bool)
    point = center(torch.randn(1, 4, 3).double(), mask[:1])
    places = torch.cat([point, 0 * point]).repeat_interleave(2, dim=0)  # under c, and under none
    velocity = GuidedVelocity(lambda t, x, h: ((x - places) / t, h), weight=2.5)
    draw = lambda: (center(torch.randn(2, 4, 3).double(), mask), torch.zeros(2, 4, 0).double())  # noqa: E731
    x, _ = sample_stochastic(velocity, *draw(), draw, StochasticSampler(steps=6))
    torch.testing.assert_close(x, 2.5 * point.expand_as(x), rtol=0, atol=1e-10)


def test_guidance_is_equivariant(flow):
    mask = torch.ones(2, 5, dtype=torch.bool)
    x, h = center(torch.randn(2, 5, 3).double(), mask), torch.randn(2, 5, 4).double()
    bare = Batch(x, h[..., :0], h[..., :1], mask)
    velocity = guided_velocity(
        flow, mask, flow.context(bare._replace(conditions=torch.tensor([[4.0], [8.0]]))), flow.context(bare), 3.0
    )
    turn, order, t = random_rotations(1, 3, dtype=torch.float64)[0], torch.tensor([2, 0, 4, 1, 3]), torch.tensor(0.3)
    turn = -turn  # a reflection, too
    dx, dh = velocity(t, x, h)
    turned = velocity(t, (x @ turn.T)[:, order], h[:, order])
    torch.testing.assert_close(turned[0], (dx @ turn.T)[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(turned[1], dh[:, order], rtol=0, atol=1e-12)
    assert dx.mean(dim=1).abs().max() < 1e-12


def test_nothing_waits_for_the_host():
    """Reading a value, or mixing devices, fails on the device "meta", which has no values."""
    flow = conditioned().to("meta")
    mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
    x, h = (torch.zeros(2, 5, width, dtype=torch.float64, device="meta") for width in (3, 4))
    bare = Batch(x, h[..., :0], h[..., :1], mask)
    context = flow.context(bare._replace(conditions=torch.zeros(2, 1, device="meta")))
    velocity = guided_velocity(flow, mask, context, flow.context(bare), 2.0)
    noise = lambda: (x, h)  # noqa: E731
    assert flow.sample(x, h, mask, context, StochasticSampler(steps=3), noise, velocity).positions.is_meta


def test_molecules_say_their_guidance_and_depend_on_no_batch(flow, tmp_path):
    asked = {"properties": {"gap": "4:9"}, "guidance": 2.0, "steps": 3}
    drawn = generate(flow, 5, **asked, batch_size=8)
    assert {atoms.info["enf_guidance"] for atoms in drawn} == {2.0}
    assert apart(drawn, generate(flow, 5, **asked, batch_size=1)) < 1e-10
    write(tmp_path / "some.extxyz", drawn)
    assert [atoms.info for atoms in read(tmp_path / "some.extxyz", index=":")] == [atoms.info for atoms in drawn]
    assert "enf_guidance" not in generate(flow, 1, properties={"gap": 5}, steps=3)[0].info


@WAYS
def test_paths_end_in_the_molecules_that_guidance_draws(flow, way):
    asked = {"properties": {"gap": 8.0}, "guidance": 3.0, "n_atoms": 5} | way
    drawn, (path,) = generate(flow, 1, **asked), paths(flow, 1, frames=3, **asked)
    assert apart([path.molecule], drawn) < 1e-12 and path.molecule.info == drawn[0].info


def test_a_fragment_is_completed_under_guidance(flow):
    water = molecule("H2O")
    asked = {"fragment": water, "n_atoms": 5, "steps": 4, "properties": {"gap": 8.0}}
    plain, guided = (generate(flow, 1, **asked, guidance=weight)[0] for weight in (1.0, 4.0))
    assert np.abs(guided.positions[:3] - water.positions).max() < 1e-6
    assert guided.info["enf_guidance"] == 4.0 and apart([guided], [plain]) > 1e-3


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (float("nan"), "guidance=nan: must be a finite number, 1 for none"),
        (float("inf"), "guidance=inf: must be a finite number"),
        ("much", "guidance='much': must be a finite number"),
        (None, "guidance=None: must be a finite number"),
        (2.0, "guidance=2: needs a property to guide to; ask for one of gap, or leave it out"),
    ],
)
def test_what_cannot_guide(flow, guidance, message):
    with pytest.raises(ValueError, match=message):
        generate(flow, 1, guidance=guidance)


def test_a_model_that_never_dropped_anything_cannot_be_guided():
    with pytest.raises(ValueError, match="guidance=2: this model has no conditions to guide to; leave guidance out"):
        generate(ENF(ENFConfig(species=("H", "O"), sizes={3: 1}, hidden=8, layers=1)), 1, guidance=2.0)


def test_the_command_guides(flow, tmp_path, capsys):
    weights, output = tmp_path / "flow.safetensors", tmp_path / "some.extxyz"
    flow.save(weights)
    words = ["generate", weights, "-n", 2, "--steps", 3, "-o", output, "--overwrite"]
    assert run(*words, "--property", "gap=5", "--guidance", 2) == 0
    assert [atoms.info["enf_guidance"] for atoms in read(output, index=":")] == [2.0, 2.0]
    assert "needs a property to guide to" in error_of(capsys, *words, "--guidance", 2)
    assert "guidance=nan: must be a finite number" in error_of(capsys, *words, "--guidance", "nan")
