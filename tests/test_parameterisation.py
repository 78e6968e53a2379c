"""Parameterisations: each obeys its equations, and its closed-form trace is that of the Jacobian."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ase_enf.flow import divergence
from ase_enf.flow.divergence import Moment
from ase_enf.flow.dynamics import Dynamics
from ase_enf.flow.model import ENF
from ase_enf.flow.parameterisation import PARAMETERISATIONS, Parameterisation
from ase_enf.geometry import center


@pytest.fixture
def point():
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    h = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
    return mask, center(x, mask), h


@pytest.mark.parametrize("kind", PARAMETERISATIONS)
@pytest.mark.parametrize("features", ["joint", "given", "none"])
@pytest.mark.parametrize("t", [0.03, 0.6])
def test_the_closed_form_is_the_trace_of_the_jacobian(make_flow, point, kind, features, t):
    mask, x, h = point
    small = make_flow(features, layers=2, hidden=8).double()
    width = small.config.flow_features
    context = h[..., : small.config.context_features] if features == "given" else None
    flow = ENF(dataclasses.replace(small.config, parameterisation=kind, feature_std=0.3)).double()
    flow.load_state_dict(small.state_dict())
    velocity, h = flow.velocity(mask, context), h[..., :width]
    moment = torch.tensor([t, 0.5 * t], dtype=torch.float64)
    closed = divergence.exact(Moment(velocity, moment), x, h)
    by_autograd = divergence.exact(lambda x, h: velocity(moment, x, h), x, h)
    torch.testing.assert_close(closed.trace, by_autograd.trace, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(closed.dx, by_autograd.dx)
    torch.testing.assert_close(closed.dh, by_autograd.dh)


class Molecule(torch.nn.Module):
    """A network that returns a given molecule, in the scale of its input."""

    def __init__(self, x, h, scale):
        super().__init__()
        self.x, self.h, self.scale = x, h, scale

    def forward(self, nodes, x, pairs):
        return self.h, self.x * self.scale


def test_the_endpoint_of_a_perfect_network_gives_the_straight_path(point):
    mask, x, h = point
    z_x, z_h = center(torch.randn_like(x), mask), torch.randn_like(h) * mask.unsqueeze(-1)
    t = 0.4
    dynamics = Dynamics(Molecule(x, h, 1.0), Parameterisation("endpoint", offset=1e-12))
    dx, dh = dynamics(torch.tensor(t), torch.lerp(x, z_x, t), torch.lerp(h, z_h, t), mask)
    torch.testing.assert_close(dx, z_x - x)
    torch.testing.assert_close(dh, z_h - h)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_denoising_with_an_idle_network_is_the_flow_of_gaussian_data(t):
    """If the network returns zero, the velocity is the best linear one, E[z − x | x_t] = Cov / Var x_t."""
    std = 0.3
    c = Parameterisation("denoising", feature_std=std)(torch.tensor(t, dtype=torch.float64))
    variance = ((1 - t) * std) ** 2 + t**2
    assert c.h_skip.item() == pytest.approx((t - (1 - t) * std**2) / variance)
    assert c.h_in.item() ** 2 * variance == pytest.approx(1.0)
    assert c.h_out.item() ** 2 == pytest.approx(1 + std**2 - c.h_skip.item() ** 2 * variance)


@pytest.mark.parametrize("kind", ["velocity", "endpoint", "denoising"])
def test_velocities_turn_and_do_not_shift(make_flow, point, kind):
    from ase_enf.geometry import random_rotations

    mask, x, h = point
    small = make_flow("joint", layers=2, hidden=8).double()
    flow = ENF(dataclasses.replace(small.config, parameterisation=kind)).double()
    h = h[..., : flow.config.flow_features]
    rotation = random_rotations(1, 3, torch.Generator().manual_seed(1), torch.float64)[0]
    t = torch.tensor(0.2, dtype=torch.float64)
    dx, dh = flow.velocity(mask)(t, x, h)
    turned_x, turned_h = flow.velocity(mask)(t, x @ rotation.T, h)
    torch.testing.assert_close(turned_x, dx @ rotation.T)
    torch.testing.assert_close(turned_h, dh)
    assert dx.sum(dim=1).abs().max() < 1e-12


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="parameterisation 'x' is unknown; choose one of"):
        Parameterisation("x")
