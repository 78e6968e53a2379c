"""What conditions a flow: properties of the molecule, and its graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_enf.atoms.batch import Batch, to_batch
from ase_enf.chem.graph import perceived_bonds
from ase_enf.flow import divergence
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import GRAPH_FEATURES, SPREAD, Condition, graph_features
from ase_enf.flow.divergence import Moment
from ase_enf.flow.model import ENF
from ase_enf.training.build import widened
from ase_enf.training.objectives import FlowMatching, drop_conditions

NAMES = ("CH3CH2OH", "H2O", "C2H6")
GAP = Condition.of("gap", "eV", np.array([3.0, 5.0, 7.0, 9.0]), np.array([3, 9, 9, 8]))
ALPHA = Condition.of("alpha", "Bohr³", np.array([10.0, 40.0]), np.array([3, 9]))


@pytest.fixture
def molecules(device) -> Batch:
    """Molecules with bonds and two properties, one of which is unknown for the second molecule."""
    atoms = [molecule(name) for name in NAMES]
    batch = to_batch(atoms, ("H", "C", "O"), dtype=torch.float64)
    bonds = torch.zeros(3, 9, 9, dtype=torch.uint8)
    for row, item in enumerate(atoms):
        bonds[row, : len(item), : len(item)] = torch.from_numpy(perceived_bonds(item))
    values = torch.tensor([[5.0, 30.0], [8.0, torch.nan], [6.0, 28.0]], dtype=torch.float64)
    return batch._replace(conditions=values, bonds=bonds).to(device)


@pytest.fixture(params=["conditions joint", "conditions given", "conditions none", "graph"])
def conditioned(request, make_flow) -> ENF:
    """Returns a flow far from the identity, conditioned by properties or by a graph."""
    kind, _, features = request.param.partition(" ")
    fields = {"graph": True} if kind == "graph" else {"conditions": (GAP, ALPHA)}
    sizes = {"sizes": {3: 1, 8: 1, 9: 1}, "layers": 3, "radial": 2}
    return make_flow(features or "given", **fields, **sizes).double()


def test_graph_features_are_bonds_and_neighbours_of_neighbours():
    ring = torch.zeros(6, 6, dtype=torch.uint8)
    for k in range(5):  # a chain of five and one atom alone
        ring[k, (k + 1) % 5] = ring[(k + 1) % 5, k] = 4 if k else 2
    features = graph_features(ring[None], torch.float64)[0]
    assert features.shape == (6, 6, GRAPH_FEATURES) and torch.equal(features, features.transpose(0, 1))
    assert features[0, 1].tolist() == [0, 1, 0, 0, 0, 0] and features[1, 2].tolist() == [0, 0, 0, 1, 0, 0]
    assert features[0, 2].tolist() == [0, 0, 0, 0, 1, 0]  # in a ring of five no atoms are three bonds apart
    assert not features[..., 5].any() and not features[5].any() and not features.diagonal(dim1=0, dim2=1).any()
    chain = torch.diag(torch.ones(3, dtype=torch.uint8), 1)
    far = graph_features((chain + chain.T)[None], torch.float64)[0]
    assert far[0, 3].tolist() == [0, 0, 0, 0, 0, 1] and far[..., 5].sum() == 2


def test_closed_form_is_the_trace_of_the_jacobian(conditioned, molecules):
    flow = conditioned
    noise = torch.zeros(*molecules.mask.shape, flow.config.flow_features, dtype=torch.float64)
    data = flow.encode(molecules, noise)
    velocity, t = flow.velocity(data.mask, data.context), torch.tensor(0.4, dtype=torch.float64)
    closed = divergence.exact(Moment(velocity, t), data.x, data.h)
    plain = divergence.exact(lambda x, h: velocity(t, x, h), data.x, data.h)
    for ours, theirs in zip(closed, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert closed.trace.abs().min() > 0.01


def test_the_condition_matters_and_the_order_of_atoms_does_not(conditioned, molecules):
    flow = conditioned
    noise = torch.zeros(*molecules.mask.shape, flow.config.flow_features, dtype=torch.float64)
    value = flow.log_prob(molecules, noise, estimate_path_error=False).log_prob
    order = torch.tensor([2, 0, 1, 5, 7, 3, 4, 8, 6])  # the first molecule fills the batch
    first = molecules.select(torch.tensor([0]))
    shuffled = Batch(*(t[:, order] for t in first[:4]), first.conditions, first.bonds[:, order][:, :, order])
    assert torch.allclose(flow.log_prob(shuffled, noise[:1], estimate_path_error=False).log_prob, value[:1], atol=1e-9)
    changed = molecules._replace(conditions=molecules.conditions - 1.0, bonds=(molecules.bonds > 0).to(torch.uint8) * 2)
    other = flow.log_prob(changed, noise, estimate_path_error=False).log_prob
    assert (other - value).abs().min() > 1e-4


def test_rotations_and_reflections_change_no_conditional_density(conditioned, molecules):
    flow = conditioned
    noise = torch.zeros(*molecules.mask.shape, flow.config.flow_features, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turned = molecules._replace(positions=molecules.positions @ (turn * torch.tensor([-1.0, 1.0, 1.0])).T)
    one, other = (flow.log_prob(batch, noise, estimate_path_error=False).log_prob for batch in (molecules, turned))
    assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize(
    ("features", "more"), [("joint", {"conditions": (GAP, ALPHA)}), ("given", {"graph": True, "conditions": (GAP,)})]
)
def test_new_inputs_of_weight_zero_leave_a_flow_as_it_was(make_flow, molecules, features, more):
    before = make_flow(features, layers=3, sizes={3: 1, 8: 1, 9: 1}).double()
    fields = {name: getattr(before.config, name) for name in before.config.__dataclass_fields__}
    after = ENF(ENFConfig(**(fields | more))).double()
    after.load_state_dict(widened(before.state_dict(), before.config, after.config), strict=True)
    noise = torch.zeros(*molecules.mask.shape, before.config.flow_features, dtype=torch.float64)
    molecules = molecules._replace(conditions=molecules.conditions[:, : len(after.config.conditions)])
    one, other = (model.log_prob(molecules, noise, estimate_path_error=False) for model in (before, after))
    assert torch.allclose(one.log_prob, other.log_prob, rtol=0, atol=1e-10)
    assert torch.allclose(one.ladj, other.ladj, rtol=0, atol=1e-10)


def test_unknown_numbers_are_zero_and_said_to_be_unknown(make_flow, molecules):
    flow = make_flow("given", conditions=(GAP, ALPHA)).double()
    nodes = flow.encode(molecules).context[..., 3:]
    expected = SPREAD * (5.0 - GAP.mean) / GAP.std, SPREAD * (30.0 - ALPHA.mean) / ALPHA.std, 1.0, 1.0
    assert torch.allclose(nodes[0, 0], torch.tensor(expected, dtype=torch.float64))
    assert nodes[1, 0, 1:].tolist() == [0.0, 1.0, 0.0] and not nodes[1, 3:].any()  # and nothing at padding
    bare = flow.encode(molecules._replace(conditions=None)).context
    assert not bare[..., 3:].any()


def test_training_forgets_conditions_at_random():
    values = torch.arange(6.0).expand(20_000, 6)
    batch = Batch(*(torch.zeros(20_000, 1, 1),) * 4, values)
    kept = ~drop_conditions(batch, torch.Generator().manual_seed(0)).conditions.isnan()
    counts = torch.bincount(kept.sum(dim=1), minlength=7) / len(kept)
    assert abs(counts[0] - 0.1) < 0.01 and abs(counts[1] - 0.4 - 0.5 * 6 * 0.7 * 0.3**5) < 0.015
    assert (kept.double().mean(dim=0) - (0.4 / 6 + 0.5 * 0.7)).abs().max() < 0.015  # and none more than another
    assert drop_conditions(batch._replace(conditions=None)).conditions is None


def test_a_condition_knows_its_training_set():
    assert (GAP.mean, GAP.low, GAP.high) == (6.0, 3.0, 9.0)
    assert GAP.size_weights(5.0, 5.0) == {9: 0.5} and GAP.size_weights(2.9, 9.1) == {3: 1.0, 8: 1.0, 9: 1.0}
    assert GAP.size_weights(3.9, 3.9) == {3: 1.0}  # empty: the nearest bin
    draws = [GAP.draw(np.random.default_rng(k), 4.0, 8.0, 9) for k in range(300)]
    assert 4.0 <= min(draws) < 5.1 and 6.9 < max(draws) <= 8.0
    assert 0.4 < np.mean(np.array(draws) < 6.0) < 0.6  # one molecule of nine atoms at 5, one at 7
    assert all(3.0 <= GAP.draw(np.random.default_rng(k), 3.0, 4.0, 8) <= 4.0 for k in range(20))
    GAP.check(9.1)
    for wrong, words in (((12.0,), "outside what this model was trained on, 3 to 9 eV"), ((5.0, 4.0), "in that order")):
        with pytest.raises(ValueError, match=words):
            GAP.check(*wrong)


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match="every name may occur once"):
        ENFConfig(conditions=(GAP, GAP))
    with pytest.raises(ValueError, match="graph=True needs features='given'"):
        ENFConfig(graph=True)
    with pytest.raises(ValueError, match="'kernel' knows no conditions"):
        ENFConfig(features="none", network="kernel", conditions=(GAP,))
    with pytest.raises(ValueError, match="at least two different values"):
        Condition.of("gap", "eV", np.ones(3), np.full(3, 4))
    with pytest.raises(ValueError, match="give the batch its bonds"):
        flow = ENF(ENFConfig(features="given", species=("H", "O"), graph=True, hidden=8, layers=1))
        flow.encode(to_batch([molecule("H2O")], flow.species))


@pytest.mark.parametrize(("features", "fields"), [("joint", {"conditions": (GAP, ALPHA)}), ("given", {"graph": True})])
def test_a_conditioned_step_never_waits_for_the_host(molecules, features, fields):
    """Reading a value, or mixing devices, fails on the device "meta", which has no values."""
    with torch.device("meta"):
        flow = ENF(ENFConfig(features=features, species=("H", "C", "O"), hidden=8, layers=2, **fields))
    batch = molecules.to("meta", torch.float32)
    loss = FlowMatching()(flow, batch).loss
    loss.backward()
    assert loss.device.type == "meta" and flow.dynamics.network.embed.weight.grad.shape[0] == 8
