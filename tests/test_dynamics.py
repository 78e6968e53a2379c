"""The velocity field: on the subspace, masked, equivariant in every feature mode, and dependent on time."""

from __future__ import annotations

import pytest
import torch

from ase_enf.flow.dynamics import Dynamics, build_network
from ase_enf.geometry import masked_mean, random_rotations

MODES = {"joint": (3, 0), "given": (0, 3), "none": (0, 0)}  # flowing features, context features


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture
def dynamics(mode, stir, dtype):
    def build(kind: str = "egnn", n: int = 3) -> Dynamics:
        flowing, context = mode
        network = build_network(kind, flowing + context + 1, flowing, n, hidden=8, layers=2, attention=True)
        return stir(Dynamics(network), scale=1.5).to(dtype)

    return build


@pytest.fixture
def state(mode, dtype):
    def build(n: int = 3):
        flowing, context = mode
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        real = mask.unsqueeze(-1)
        x = 1.5 * torch.randn(2, 5, n, dtype=torch.float64).to(dtype)
        h, c = (torch.randn(2, 5, k, dtype=torch.float64).to(dtype) * real for k in (flowing, context))
        return torch.tensor(0.3, dtype=dtype), (x - masked_mean(x, mask)) * real, h, mask, c if context else None

    return build


@pytest.mark.parametrize("kind", ["egnn", "gnn"])
@pytest.mark.parametrize("n", [2, 3])
def test_velocity_has_no_mean_and_is_zero_at_padding(dynamics, state, tolerance, kind, n):
    t, x, h, mask, context = state(n)
    dx, dh = dynamics(kind, n)(t, x, h, mask, context)
    assert dx.shape == x.shape and dh.shape == h.shape
    assert torch.allclose(masked_mean(dx, mask), torch.zeros_like(dx[:, :1]), **tolerance)
    assert (dx[~mask] == 0).all() and (dh[~mask] == 0).all()
    assert dx[mask].abs().max() > 0.05


@pytest.mark.parametrize("n", [2, 3])
def test_egnn_dynamics_are_equivariant(dynamics, state, tolerance, n):
    t, x, h, mask, context = state(n)
    q = random_rotations(1, n, torch.Generator().manual_seed(0), torch.float64)[0].to(x)
    q[0] *= -1  # a reflection as well
    field = dynamics("egnn", n)
    dx, dh = field(t, x, h, mask, context)
    dx_turned, dh_turned = field(t, x @ q.T, h, mask, context)
    assert torch.allclose(dx_turned, dx @ q.T, **tolerance)
    assert torch.allclose(dh_turned, dh, **tolerance)


def test_gnn_dynamics_are_not_equivariant(dynamics, state):
    t, x, h, mask, context = state()
    q = random_rotations(1, 3, torch.Generator().manual_seed(0), torch.float64)[0].to(x)
    field = dynamics("gnn")
    assert (field(t, x @ q.T, h, mask, context)[0] - field(t, x, h, mask, context)[0] @ q.T).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["egnn", "gnn"])
def test_padding_and_batch_mates_change_nothing(dynamics, state, tolerance, kind):
    t, x, h, mask, context = state()
    field = dynamics(kind)
    dx, dh = field(t, x, h, mask, context)
    alone = field(t, x[1:, :3], h[1:, :3], mask[1:, :3], None if context is None else context[1:, :3])
    assert torch.allclose(alone[0][0], dx[1, :3], **tolerance)
    assert torch.allclose(alone[1][0], dh[1, :3], **tolerance)


def test_time_may_be_one_or_one_for_each_molecule(dynamics, state, tolerance):
    _, x, h, mask, context = state()
    field = dynamics()
    times = torch.tensor([0.1, 0.9], dtype=x.dtype)
    both, _ = field(times, x, h, mask, context)
    for k in range(2):
        single, _ = field(times[k], x, h, mask, context)
        assert torch.allclose(single[k], both[k], **tolerance)
    assert (field(times[0], x, h, mask, context)[0] - both)[1].abs().max() > 1e-3  # the time has an effect


def test_context_steers_the_velocity(dynamics, state, mode):
    t, x, h, mask, context = state()
    if context is None:
        pytest.skip("no context in this mode")
    field = dynamics()
    assert (field(t, x, h, mask, context)[0] - field(t, x, h, mask, -context)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["egnn", "gnn"])
def test_every_parameter_gets_a_gradient(dynamics, state, kind):
    field = dynamics(kind)
    with torch.no_grad():  # where the tanh is not saturated
        for parameter in field.parameters():
            parameter.mul_(0.5)
    dx, dh = field(*state())
    (dx.square().sum() + dh.square().sum()).backward()
    for name, parameter in field.named_parameters():
        assert parameter.grad is not None, name
        if name == "network.out.bias" and kind == "gnn":  # pushes all atoms alike, which centring removes
            assert parameter.grad[:3].abs().max() < 1e-4
            continue
        assert parameter.grad.abs().sum() > 0, name


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"network 'transformer' is unknown; choose one of egnn, gnn, simple, kernel"):
        build_network("transformer", 1, 0, 3, 8, 1, True)
