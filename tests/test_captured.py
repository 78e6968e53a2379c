"""The captured training step: equal to the trainer's optimizers, skips non-finite steps, independent of padding."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.flow.model import ENF
from ase_enf.training.captured import CapturedSteps, DeviceSet, FlatOptimizer
from ase_enf.training.objectives import FlowMatching
from ase_enf.training.optimizers import build_optimizers


@pytest.fixture
def data():
    atoms = [molecule(name) for name in ("H2O", "CH4", "CH3OH", "C2H6")] * 4
    return MoleculeSet(atoms, ("H", "C", "O"), 3)


def test_flat_steps_are_those_of_torch(make_flow):
    flow = make_flow("given", hidden=8, layers=2).float()
    other = copy.deepcopy(flow)
    flat = FlatOptimizer(flow, learning_rate=1e-3, matrix_rate=1e-2, matrix_decay=0.1)
    parameters = list(other.parameters())
    known = build_optimizers(other.dynamics.network, parameters, "muon", 1e-3, 1e-2, 0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, theirs in zip(flow.parameters(), other.parameters(), strict=True):
            gradient = torch.randn(mine.shape, generator=generator)
            mine.grad.copy_(gradient)
            theirs.grad = gradient.clone()
        flat.norms.fill_(1e9)  # so that nothing is clipped
        flat.step(torch.tensor(1.0))
        known.step()
    start = make_flow("given", hidden=8, layers=2).float()
    for name, mine in flow.named_parameters():
        theirs, before = dict(other.named_parameters())[name], dict(start.named_parameters())[name]
        moved = (theirs - before).norm()
        # The iteration of Muon runs in bfloat16, and in another order.
        assert (mine - theirs).norm() < 0.02 * moved, name


def test_a_step_that_is_not_finite_changes_nothing(make_flow):
    flow = make_flow("given", hidden=8, layers=2).float()
    flat = FlatOptimizer(flow)
    flat.gradient.normal_()
    flat.step(torch.tensor(1.0))
    before = {name: value.clone() for name, value in flat.tensors().items() if name != "skipped"}
    flat.gradient[3] = torch.nan
    flat.step(torch.tensor(1.0))
    after = flat.tensors()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after["skipped"] == 1 and after["count"] == 1


def test_a_gradient_of_zero_does_not_clip_those_that_follow(make_flow):
    flow = make_flow("given", hidden=8, layers=2).float()
    flat = FlatOptimizer(flow)
    flat.step(torch.tensor(1.0))  # the gradient is zero
    before = flat.weights.clone()
    flat.gradient.fill_(1e-3)
    flat.step(torch.tensor(1.0))
    assert flat.first.norm() > 0 and not torch.equal(flat.weights[: flat.others], before[: flat.others])
    assert flat.recent_norms() == [pytest.approx(float(flat.norm))]


def test_batches_of_the_device_are_those_of_the_set(data):
    index = torch.tensor([0, 5, 2])
    here = DeviceSet(data, torch.device("cpu"), (5, 9)).batch(index, 9)
    there = data.batch(index)
    width = there.mask.shape[1]
    for mine, theirs in zip(here[:4], there[:4], strict=True):
        assert torch.equal(mine[:, :width], theirs) and not mine[:, width:].any()
    assert here[4:] == there[4:] == (None,) * len(here[4:])  # no conditions


def test_batches_of_the_device_know_conditions_and_graphs():
    atoms = [molecule(name) for name in ("H2O", "CH4", "CH3OH")]
    bonds = [np.arange(len(item) ** 2).reshape(len(item), -1) % 5 for item in atoms]
    known = MoleculeSet(
        atoms, ("H", "C", "O"), 3, conditions=np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]), bonds=bonds
    )
    index = torch.tensor([2, 0])
    here = DeviceSet(known, torch.device("cpu"), (5,)).batch(index, 9)
    there = known.batch(index)
    width = there.mask.shape[1]
    torch.testing.assert_close(here.conditions, there.conditions, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(here.bonds[:, :width, :width], there.bonds)
    assert not here.bonds[:, width:].any() and not here.bonds[:, :, width:].any()


def test_widths_that_no_molecule_needs_are_left_out(data):
    device_set = DeviceSet(data, torch.device("cpu"), (2, 3, 4, 5))
    assert device_set.widths == (3, 5, 8) and all(len(members) for members in device_set.members)


def test_an_epoch_has_every_molecule_at_most_once_and_of_its_width(data):
    device_set = DeviceSet(data, torch.device("cpu"), (3, 5))
    plan = device_set.epoch(4, torch.Generator().manual_seed(0))
    taken = torch.cat([index for _, index in plan])
    assert len(taken) == len(set(taken.tolist())) == len(data)
    for k, index in plan:
        assert data.sizes[index].max() <= device_set.widths[k]


def test_steps_learn_and_go_on_from_a_saved_state(make_flow, data):
    flow = make_flow("given", species=("H", "C", "O"), hidden=8, layers=2).float()
    device_set = DeviceSet(data, torch.device("cpu"))

    def run(flow: ENF, count: int, state: dict | None) -> tuple[FlatOptimizer, float]:
        optimizer = FlatOptimizer(flow)
        if state:
            optimizer.load(state)
        steps = CapturedSteps(flow, device_set, FlowMatching(), optimizer, 4, compile=False, capture=False)
        for _ in range(count):
            steps(len(device_set.widths) - 1, torch.tensor([0, 1, 2, 3]))
        return optimizer, float(steps.loss_sum)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        once, first = run(copy.deepcopy(flow), 6, None)
        torch.manual_seed(0)
        half, _ = run(copy.deepcopy(flow), 3, None)
        twice, _ = run(copy.deepcopy(flow), 3, half.tensors())
        torch.testing.assert_close(once.weights, twice.weights, rtol=0, atol=0)
        _, late = run(flow, 60, None)
    assert late / 60 < first / 6


def test_rounded_products_change_velocities_little(make_flow):
    flow = make_flow("joint", hidden=32, layers=3).float()
    mask = torch.ones(3, 6, dtype=torch.bool)
    x = torch.randn(3, 6, 3)
    x, h = x - x.mean(dim=1, keepdim=True), torch.randn(3, 6, flow.config.flow_features)
    t = torch.tensor([0.02, 0.3, 0.9])
    exact = flow.velocity(mask)(t, x, h)
    flow.dynamics.network.multiply_in(torch.bfloat16)
    rounded = flow.velocity(mask)(t, x, h)
    for one, other in zip(exact, rounded, strict=True):
        assert 0 < (one - other).norm() < 0.01 * one.norm()


@pytest.mark.parametrize("features", ["joint", "given", "none"])
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_a_step_never_waits_for_the_host(make_flow, data, features, products):
    """Reading a value, or mixing devices, fails on the device "meta", which has no values."""
    meta = torch.device("meta")
    flow = make_flow(features, species=("H", "C", "O") if features != "none" else ()).float()
    flow = ENF(dataclasses.replace(flow.config, parameterisation="denoising")).to(meta)
    flow.dynamics.network.multiply_in(products)
    device_set = DeviceSet(data, meta)
    optimizer = FlatOptimizer(flow)
    steps = CapturedSteps(flow, device_set, FlowMatching("beta", 1.8), optimizer, 4, compile=False, capture=False)
    steps(0, torch.zeros(4, dtype=torch.long, device=meta))
    assert steps.loss_sum.is_meta and optimizer.weights.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(steps.loss_sum)  # such a read would have been noticed
