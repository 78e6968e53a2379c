"""The likelihood is one differentiable function of a batch and its noise, for all callers."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch

import ase_enf
from ase_enf.flow import divergence
from ase_enf.flow.continuous import Solver
from ase_enf.flow.likelihood import log_likelihood
from ase_enf.flow.quadrature import clenshaw_curtis
from ase_enf.scoring.calculator import smeared_log_likelihood

SOLVER = Solver("rk4", steps=1, warp=2.0)


@pytest.fixture
def molecules(flow, batch_of, methane, water):
    return batch_of([methane, water], flow)


def noise_for(flow, batch):
    generator = torch.Generator().manual_seed(3)
    shape = (*batch.mask.shape, flow.config.flow_features)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(batch.positions)


def test_the_calculator_and_log_prob_have_one_density(flow, molecules, tolerance):
    """At the mean of q and without p_M, which has no forces."""
    asked = flow.log_prob(molecules, 0 * noise_for(flow, molecules), solver=SOLVER, intervals=16)
    with torch.no_grad():
        density = smeared_log_likelihood(flow, molecules, SOLVER, intervals=16)
    assert torch.allclose(density, asked.log_density, **tolerance)
    assert torch.allclose(asked.log_prob, asked.log_density + asked.log_size, **tolerance)


def test_a_way_back_has_the_density_of_the_way_there(flow, molecules):
    """As in ``reweight``: ladj changes its sign with the direction; the other terms are those of the data."""
    data = flow.encode(molecules, noise_for(flow, molecules))
    path = flow.flow(data.mask, data.context, Solver("rk4", steps=32))
    with torch.no_grad():
        there = path.forward(data.x, data.h, divergence.exact, intervals=32)
        back = path.inverse(there.x, there.h, divergence.exact, intervals=32)
    again = flow.encoded(back.x, back.h, data.mask, data.context, data.log_q)
    one = log_likelihood(data, there.x, there.h, there.ladj)
    other = log_likelihood(again, there.x, there.h, -back.ladj)
    for field in ("log_base", "ladj", "log_q", "log_size", "log_prob"):
        assert torch.allclose(getattr(one, field), getattr(other, field), atol=2e-3), field
    assert one.ladj.abs().min() > 0.1


def test_its_gradient_is_that_of_finite_differences(flow, batch_of, water):
    """With respect to the positions, through path and trace."""
    batch = batch_of([water], flow).to(dtype=torch.float64)
    flow = flow.double()
    noise = noise_for(flow, batch)
    trace = functools.partial(divergence.exact, create_graph=True)

    def value(positions):
        data = flow.encode(batch._replace(positions=positions), noise)
        z = flow.flow(data.mask, data.context, SOLVER).forward(data.x, data.h, trace, intervals=8)
        return log_likelihood(data, z.x, z.h, z.ladj).log_prob.sum()

    positions = batch.positions.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(positions), positions)
    along = torch.zeros_like(positions)
    along[0, 0, 1], along[0, 1, 1] = 1e-4, -1e-4  # a bond of water, which lies in the plane of y and z
    change = (value(positions + along) - value(positions - along)).item() / 2
    assert change == pytest.approx((gradient * along).sum().item(), rel=1e-5)
    assert abs(change) > 1e-6


def test_its_terms_are_summed_in_one_place():
    """No other module of the package uses the densities of the base, without which the terms cannot be summed."""
    package = Path(ase_enf.__file__).parent
    names = {"position_log_prob", "feature_log_prob"}
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if getattr(node, "attr", getattr(node, "id", None)) in names
    }
    assert users == {"flow/likelihood.py"}


def test_traces_that_are_known_serve_again(flow, molecules):
    """On a converged path, reusing the traces from half the intervals reduces only the cost."""
    flow, batch = flow.double(), molecules.to(dtype=torch.float64)
    noise, everything = noise_for(flow, batch), torch.arange(len(batch.mask))
    options = {"noise": noise, "solver": Solver("rk4", steps=200)}
    half, anew = (flow.log_prob(batch, **options, intervals=intervals) for intervals in (8, 16))
    known = half.known(everything)
    again = flow.log_prob(batch, **options, intervals=16, before=known)
    torch.testing.assert_close(again.log_prob, anew.log_prob, rtol=0.0, atol=1e-7)
    torch.testing.assert_close(again.traces, anew.traces, rtol=0.0, atol=1e-6)
    raised = flow.log_prob(batch, **options, intervals=16, before=known._replace(traces=known.traces + 1.0))
    shift = torch.full_like(anew.log_prob, clenshaw_curtis(16)[1][::2].sum().item())
    torch.testing.assert_close(raised.log_prob - again.log_prob, shift, rtol=0.0, atol=1e-9)
    assert torch.equal(again.path_error, half.path_error) and (again.error > half.path_error).all()
    assert again.nfe < anew.nfe - 8
    (last,) = everything[-1:]
    alone = batch._replace(**{name: value[-1:] for name, value in batch._asdict().items() if torch.is_tensor(value)})
    options["noise"] = noise[-1:]
    one = flow.log_prob(alone, **options, intervals=16, before=half.known(last[None]))
    assert one.log_prob.item() == pytest.approx(again.log_prob[-1].item(), abs=1e-9)
