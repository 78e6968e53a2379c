"""Densities: they integrate to one, bounds stay below the exact value, and settings do not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from scipy.stats import norm

import ase_enf
from ase_enf.flow import base, divergence
from ase_enf.flow.continuous import ContinuousFlow, Solver
from ase_enf.flow.dynamics import BoundDynamics, Dynamics
from ase_enf.geometry import center
from ase_enf.nn.egnn import EGNN
from ase_enf.scoring.score import score

SOLVER = Solver("rk4", steps=16, warp=2.0)


def two_particles(n: int, stir, trained: bool) -> Dynamics:
    """Returns a flow of two particles in n dimensions, far from the identity or fitted to distances near 2."""
    dynamics = Dynamics(EGNN(in_features=1, out_features=0, hidden=8, layers=2)).double()
    if not trained:
        return stir(dynamics, 0.8).double()
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(256, 2, dtype=torch.bool)
    optimizer = torch.optim.Adam(dynamics.parameters(), lr=0.02)
    for _ in range(150):  # flow matching
        d = torch.randn(256, 1, n, generator=generator, dtype=torch.float64)
        d = d / d.norm(dim=-1, keepdim=True) * (2 + 0.2 * torch.randn(256, 1, 1, generator=generator))
        x = torch.cat([d, -d], dim=1) / 2
        z = center(torch.randn(256, 2, n, generator=generator, dtype=torch.float64), mask)
        t = torch.rand(256, generator=generator, dtype=torch.float64)
        dx, _ = dynamics(t, torch.lerp(x, z, t[:, None, None]), x[..., :0], mask)
        optimizer.zero_grad()
        (dx - (z - x)).square().mean().backward()
        optimizer.step()
    return dynamics.requires_grad_(False)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_two_particles_integrate_to_one_on_the_subspace(stir, n, trained):
    """With x = (d, −d)/√2 the subspace is the space of d, and p depends on |d| alone."""
    dynamics = two_particles(n, stir, trained)
    r = torch.linspace(1e-4, 14.0, 500, dtype=torch.float64)
    x = torch.zeros(len(r), 2, n, dtype=torch.float64)
    x[:, 0, 0], x[:, 1, 0] = r / math.sqrt(2), -r / math.sqrt(2)
    mask = torch.ones(len(r), 2, dtype=torch.bool)
    flow = ContinuousFlow(BoundDynamics(dynamics, mask), mask, SOLVER)
    with torch.no_grad():
        z = flow.forward(x, x[..., :0], divergence.exact)
    log_p = base.position_log_prob(z.x, mask) + z.ladj
    surface = 2.0 if n == 1 else 2 * math.pi * r
    assert log_p[-1] < -15  # the tail is inside the grid
    assert torch.trapezoid(log_p.exp() * surface, r).item() == pytest.approx(1.0, abs=5e-4)
    gaussian = -0.5 * r**2 - 0.5 * n * math.log(2 * math.pi)
    assert (log_p - gaussian).abs().max() > 0.2  # not the base distribution
    if trained:  # it has learned the distance
        assert r[(log_p + torch.log(torch.as_tensor(surface))).argmax()].item() == pytest.approx(math.sqrt(2), abs=0.15)


@pytest.fixture
def linear_flow(make_flow):
    """Returns a flow with dh/dt = a h and fixed positions, for which every probability has a closed form."""
    flow = make_flow("joint", species=("H", "C"), sizes={2: 1, 3: 3}, feature_shift=(0.5, 0.4, 3.5),
                     feature_scale=(1.3, 0.8, 0.3)).double()  # fmt: skip
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        network = flow.dynamics.network
        network.embed.weight[:3, :3] = torch.eye(3)
        network.out.weight[:, :3] = 0.6 * torch.eye(3)
    return flow


def exact_log_probability(flow, atoms: Atoms) -> float:
    """Returns log p(x, h, M), from a Gaussian of positions and the probability of each atom's type and charge."""
    config = flow.config
    shift, width = np.array(config.feature_shift), math.exp(-0.6) / np.array(config.feature_scale)
    m = len(atoms)
    x = (atoms.positions - atoms.positions.mean(axis=0)) / config.position_scale
    total = -0.5 * (x**2).sum() - 0.5 * 3 * (m - 1) * math.log(2 * math.pi * config.position_scale**2)
    for symbol, charge in zip(atoms.symbols, atoms.numbers, strict=True):
        true = config.species.index(symbol)
        sign = 1 if true == 0 else -1
        total += norm.logcdf(sign * (shift[0] - shift[1]) / math.hypot(width[0], width[1]))
        total += math.log(np.diff(norm.cdf([charge, charge + 1], shift[2], width[2]))[0])
    return total + math.log(config.sizes[m] / sum(config.sizes.values()))


@pytest.mark.parametrize("atoms", [Atoms("CH", [(0, 0, 0), (0, 0, 1.1)]), molecule("CH2_s1A1d")])
def test_bound_grows_with_its_draws_and_stays_below_the_exact_value(linear_flow, batch_of, atoms):
    flow, count = linear_flow, 8192
    flow.q.type_noise, flow.q.charge_noise = 1.2, 1.5  # a q with wide tails: few draws are loose, many tight
    exact = exact_log_probability(flow, atoms)
    noise = torch.randn(count, len(atoms), 3, dtype=torch.float64).to(flow.device)
    batch = batch_of([atoms], flow).repeat(count)
    weights = flow.log_prob(batch.to(dtype=torch.float64), noise, solver=Solver("rk4", steps=1), intervals=8).log_prob
    means = []
    for draws in (1, 8, 64):
        bounds = torch.logsumexp(weights.view(-1, draws), dim=1) - math.log(draws)
        means.append(bounds.mean().item())
        assert means[-1] < exact + 4 * bounds.std().item() / math.sqrt(len(bounds))
    assert means[0] < means[1] < means[2]
    assert exact - means[0] > 1.0 and exact - means[2] < 0.1 * (exact - means[0])
    total = torch.logsumexp(weights, dim=0).item() - math.log(count)
    assert exact - 0.5 < total < exact + 0.2  # all draws together


def test_settings_do_not_change_it(make_flow, features):
    """Fixed and adaptive steps, a molecule alone and in a batch."""
    flow = make_flow(features).double()
    atoms = [molecule("H2O"), molecule("CH3OH") if features != "joint" else molecule("CH4"), molecule("HCO")]
    for item in atoms:
        item.rattle(0.05, seed=1)
    fixed = score(flow, atoms, importance_samples=2, trace="exact", solver=Solver("rk4", steps=40), max_stderr=1e-4)
    tight = Solver("dopri5", rtol=1e-9, atol=1e-9)
    adaptive = score(flow, atoms, importance_samples=2, trace="exact", solver=tight, max_stderr=1e-4)
    alone = score(flow, atoms[1], importance_samples=2, trace="exact", solver=Solver("rk4", steps=40), max_stderr=1e-4)
    assert adaptive.log_likelihood.to_numpy() == pytest.approx(fixed.log_likelihood.to_numpy(), rel=1e-5)
    assert alone.log_likelihood[0] == pytest.approx(fixed.log_likelihood[1], abs=1e-9)


def test_precision_of_the_shipped_model():
    """float32 costs some thousandths of a nat on a score of tens."""
    atoms = [molecule("H2O"), molecule("CH3OH"), molecule("C6H6")]
    options = {"trace": "exact", "importance_samples": 1, "max_stderr": math.inf}
    single, double = (
        score(ase_enf.load("qm9-small", device="cpu", dtype=dtype), atoms, **options).log_likelihood
        for dtype in ("float32", "float64")
    )
    assert ((single - double).abs() < 0.02).all()
