"""The calculator: forces are derivatives of the energy, which depends on the shape of a molecule only."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, Calculator, CalculatorSetupError
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

import ase_enf.scoring.calculator as module
from ase_enf.atoms.batch import to_batch
from ase_enf.flow.continuous import INTERVALS, Solver
from ase_enf.flow.loading import load
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.scoring.calculator import DEFAULT_SMEAR, ENFCalculator, log_likelihood_gradient, smeared_log_likelihood

STEPS = 3


@pytest.fixture
def float64_flow(features, make_flow):
    return make_flow(features, layers=1).double()


def rattled(name: str = "H2O") -> Atoms:
    atoms = molecule(name)
    atoms.rattle(0.1, seed=3)
    return atoms


def energy(flow, atoms: Atoms, **options) -> float:
    atoms = atoms.copy()
    atoms.calc = ENFCalculator(flow, kT=1.0, steps=STEPS, **options)
    return atoms.get_potential_energy()


def slope(flow, atoms: Atoms, direction: np.ndarray, d: float = 1e-3) -> float:
    """Returns the derivative of the energy along a direction, by central differences of fourth order."""
    values = {}
    for step in (-2, -1, 1, 2):
        moved = atoms.copy()
        moved.positions += step * d * direction
        values[step] = energy(flow, moved)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * d)


def test_forces_are_the_derivative_of_the_energy(float64_flow):
    atoms = rattled()
    direction = np.random.default_rng(4).standard_normal((3, 3))
    expected = -slope(float64_flow, atoms, direction)
    atoms.calc = ENFCalculator(float64_flow, kT=1.0, steps=STEPS)
    assert abs(expected) > 0.01
    assert (atoms.get_forces() * direction).sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_forces_do_not_depend_on_where_they_are_asked_for(make_flow, tmp_path, without):
    make_flow("given", layers=1).save(tmp_path / "flow.safetensors")
    atoms, found = rattled(), []

    def forces() -> np.ndarray:
        atoms.calc = ENFCalculator(load(tmp_path / "flow.safetensors", device="cpu"), kT=1.0, steps=STEPS)
        return atoms.get_forces()

    found.append(forces())
    with without():
        found.append(forces())
        outside = ENFCalculator(load(tmp_path / "flow.safetensors", device="cpu"), kT=1.0, steps=STEPS)
    atoms.calc = outside
    found.append(atoms.get_forces())
    assert all(np.array_equal(found[0], others) for others in found[1:])


def test_forces_agree_with_those_of_ase(make_flow):
    from ase.calculators.fd import calculate_numerical_forces

    atoms = rattled()
    atoms.calc = ENFCalculator(make_flow("given", layers=1).double(), kT=1.0, steps=STEPS)
    expected = calculate_numerical_forces(atoms, eps=1e-4)
    assert np.abs(atoms.get_forces() - expected).max() < 1e-6 * np.abs(expected).max()


def test_forces_of_a_network_that_is_not_invariant_are_derivatives_too(make_flow):
    """Positions are centred before the network sees them, which the gradient must include."""
    flow = make_flow("given", network="gnn", layers=1).double()
    atoms, direction = rattled(), np.random.default_rng(4).standard_normal((3, 3))
    expected = -slope(flow, atoms, direction)
    atoms.calc = ENFCalculator(flow, kT=1.0, steps=STEPS)
    assert abs(expected) > 0.01
    assert (atoms.get_forces() * direction).sum() == pytest.approx(expected, rel=1e-6)
    assert np.abs(atoms.get_forces().sum(axis=0)).max() < 1e-12


def test_no_net_force_and_no_net_torque(float64_flow):
    atoms = rattled("CH4")
    atoms.calc = ENFCalculator(float64_flow, kT=1.0, steps=STEPS)
    forces = atoms.get_forces()
    assert np.abs(forces).max() > 0.1
    assert np.abs(forces.sum(axis=0)).max() < 1e-10
    assert np.abs(np.cross(atoms.positions, forces).sum(axis=0)).max() < 1e-9


def test_energy_is_invariant_and_forces_turn_along(float64_flow):
    atoms = rattled("CH4")
    atoms.calc = ENFCalculator(float64_flow, kT=1.0, steps=STEPS)
    value, forces = atoms.get_potential_energy(), atoms.get_forces()
    turn = -Rotation.random(random_state=5).as_matrix()  # with a reflection
    order = np.array([3, 0, 4, 2, 1])
    moved = atoms[order]
    moved.positions = moved.positions @ turn.T + [3.0, -2.0, 7.0]
    moved.calc = ENFCalculator(float64_flow, kT=1.0, steps=STEPS)
    assert moved.get_potential_energy() == pytest.approx(value, abs=1e-9)
    assert np.allclose(moved.get_forces(), forces[order] @ turn.T, rtol=0, atol=1e-9)


def test_energy_is_minus_kt_log_p(float64_flow):
    atoms = rattled()
    solver = Solver("rk4", steps=5, warp=2.0)
    likelihood = log_likelihood_gradient(float64_flow, atoms, solver)
    atoms.calc = ENFCalculator(float64_flow, kT=0.3, solver=solver)
    assert atoms.get_potential_energy() == pytest.approx(-0.3 * likelihood.log_likelihood, rel=1e-13)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert np.allclose(atoms.get_forces(), 0.3 * likelihood.gradient, rtol=1e-13)
    assert atoms.calc.results["log_likelihood"] == likelihood.log_likelihood


@pytest.mark.parametrize("features", ["given", "none"])
def test_log_likelihood_is_that_of_score(make_flow, features):
    import ase_enf

    flow, solver, atoms = make_flow(features).double(), Solver("rk4", steps=16, warp=2.0), rattled()
    row = ase_enf.score(flow, atoms, trace="exact", solver=solver, max_stderr=math.inf).iloc[0]
    ours = log_likelihood_gradient(flow, atoms, solver, intervals=INTERVALS)  # as score starts
    assert ours.log_likelihood == pytest.approx(row.log_likelihood, abs=1e-9)


def test_optimisers_go_downhill(make_flow):
    atoms = rattled()
    atoms.calc = ENFCalculator(make_flow("given", layers=1).double(), kT=1.0, steps=STEPS)
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=5)
    assert atoms.get_potential_energy() < before - 0.01


def test_a_recalculation_follows_the_atoms_and_kt(make_flow):
    atoms = rattled()
    atoms.calc = ENFCalculator(make_flow("given", layers=1).double(), kT=1.0, steps=STEPS)
    before = atoms.get_potential_energy()
    atoms.positions[0] += 0.2
    after = atoms.get_potential_energy()
    assert after != before
    atoms.calc.set(kT=2.0)
    assert atoms.get_potential_energy() == pytest.approx(2 * after, rel=1e-12)
    for bad in (-1.0, 0.0, math.inf, math.nan):
        with pytest.raises(CalculatorSetupError, match="must be a positive energy"):
            atoms.calc.set(kT=bad)


def test_two_dimensions(make_flow):
    flow = make_flow("none", dimension=2, layers=1).double()
    atoms = Atoms("X4", [(0, 0, 0), (4, 0.3, 0), (0.5, 4, 0), (4, 4.4, 0)])
    direction = np.random.default_rng(4).standard_normal((4, 3)) * [1.0, 1.0, 0.0]
    expected = -slope(flow, atoms, direction)
    atoms.calc = ENFCalculator(flow, kT=1.0, steps=STEPS)
    forces = atoms.get_forces()
    assert not forces[:, 2].any()
    assert abs(expected) > 0.1
    assert (forces * direction).sum() == pytest.approx(expected, rel=1e-6)


def test_ase_itself_is_left_alone(make_flow):
    before = list(Calculator.implemented_properties)
    for _ in range(2):
        ENFCalculator(make_flow("given", layers=1))
    assert Calculator.implemented_properties == before
    assert ENFCalculator.implemented_properties == ["energy", "free_energy", "forces"]
    assert "implemented_properties" in vars(ENFCalculator)


def test_parameters_are_json_scalars(make_flow):
    calculator = ENFCalculator(make_flow("given", layers=1), kT=np.float64(0.5), solver=Solver("rk4", steps=3))
    assert json.loads(json.dumps(calculator.todict())) == {
        "kT": 0.5, "model": "unnamed", "solver": "rk4", "steps": 3, "smear": 0.0,
    }  # fmt: skip
    assert all(type(value) in (int, float, str) for value in calculator.parameters.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "dopri5"}, "'dopri5' is adaptive"),
        ({"solver": Solver()}, "'dopri5' is adaptive"),
        ({"solver": StochasticSampler(churn=2.0)}, "churn 2: has no likelihood; give a Solver"),
        ({"kT": 0.0}, "kT=0"),
        ({"kT": -1.0}, "kT=-1"),
        ({"kT": math.nan}, "kT=nan"),
        ({"smear": 10**400}, "int too large"),
    ],
)
def test_bad_settings(make_flow, options, words):
    with pytest.raises(CalculatorSetupError, match=words) as caught:
        ENFCalculator(make_flow("given", layers=1), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (Atoms("H2", [(0, 0, 0), (0, 0, 1)], cell=[5, 5, 5], pbc=True), "periodic"),
        (Atoms("HCl", [(0, 0, 0), (0, 0, 1)]), "Cl unknown"),
        (Atoms("H"), "at least 2"),
        (Atoms("H2"), "one point"),
        (Atoms("H2", [(0, 0, 0), (0, 0, math.nan)]), "non-finite"),
    ],
)
def test_structures_it_cannot_take(make_flow, atoms, words):
    atoms.calc = ENFCalculator(make_flow("given", layers=1))
    with pytest.raises(CalculatorSetupError, match=words) as caught:
        atoms.get_potential_energy()
    assert "\n" not in str(caught.value)


def test_a_failed_calculation_is_said(make_flow):
    flow = make_flow("given", layers=1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.fill_(torch.nan)
    atoms = molecule("H2O")
    atoms.calc = ENFCalculator(flow)
    with pytest.raises(CalculationFailed, match="H2O is not finite"):
        atoms.get_forces()


def test_the_flow_and_the_atoms_are_not_modified(make_flow):
    flow, atoms = make_flow("joint", layers=1), rattled()
    before, positions = {name: value.clone() for name, value in flow.state_dict().items()}, atoms.positions.copy()
    log_likelihood_gradient(flow, atoms)
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert np.array_equal(atoms.positions, positions)


def test_energy_alone_computes_no_forces(make_flow, monkeypatch):
    flow, atoms = make_flow("given", layers=1).double(), rattled()
    atoms.calc = ENFCalculator(flow, kT=1.0, steps=STEPS)
    forces = atoms.get_forces()
    both = atoms.get_potential_energy()  # known by now
    monkeypatch.setattr(module, "log_likelihood_gradient", None)
    assert np.array_equal(atoms.get_forces(), forces) and atoms.get_potential_energy() == both
    again = rattled()
    again.calc = ENFCalculator(flow, kT=1.0, steps=STEPS)
    assert again.get_potential_energy() == pytest.approx(both, abs=1e-11)
    assert "forces" not in again.calc.results


@pytest.mark.parametrize("asked", ["energy", "forces"])
def test_the_cost_falls_with_the_steps(make_flow, monkeypatch, asked):
    flow, calls, plain = make_flow("given", layers=1).double(), [], module.divergence.exact
    monkeypatch.setattr(module.divergence, "exact", lambda *a, **k: calls.append(1) or plain(*a, **k))
    counts = []
    for steps in (8, 16, 48):
        atoms, calls[:] = rattled(), []
        atoms.calc = ENFCalculator(flow, kT=1.0, steps=steps)
        atoms.calc.get_property(asked, atoms)
        counts.append(len(calls))
    assert counts == [9, 17, 49]


def matched(make_flow, features: str = "given"):
    """Returns a flow configured as trained by flow matching."""
    flow = make_flow(features, layers=1, scale=0.5).double()
    flow.config = dataclasses.replace(flow.config, path="linear")
    return flow


@pytest.mark.parametrize("features", ["joint", "given"])
def test_smeared_forces_are_the_derivative_of_the_smeared_energy(make_flow, features):
    flow, atoms = matched(make_flow, features), rattled()
    direction = np.random.default_rng(4).standard_normal((3, 3))
    expected = -slope(flow, atoms, direction)
    atoms.calc = ENFCalculator(flow, kT=1.0, steps=STEPS)
    assert atoms.calc.parameters["smear"] == DEFAULT_SMEAR
    assert abs(expected) > 0.01
    assert (atoms.get_forces() * direction).sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smear", [0.0, 0.2, 0.7])
def test_smeared_data_of_a_gaussian_are_a_wider_gaussian(make_flow, smear):
    """For the flow of x_t = (1 − t) x + t z with Gaussian data of width w, p_σ is a Gaussian of width √(w² + σ²)."""
    flow = make_flow("none", layers=1, position_scale=1.4, sizes={3: 1}).double()
    flow.config = dataclasses.replace(flow.config, path="linear")
    width = 0.3  # of the data, in units of the flow

    def velocity(t, x, h):
        variance = (1 - t) ** 2 * width**2 + t**2
        return (x - x.mean(dim=1, keepdim=True)) * (t - (1 - t) * width**2) / variance, h

    flow.velocity = lambda mask, context=None: velocity
    atoms = rattled()
    batch = to_batch([atoms], (), dtype=torch.float64)
    with torch.no_grad():
        value = smeared_log_likelihood(flow, batch, Solver("rk4", steps=96, warp=2.0), smear=smear)
    variance = (1.4 * width) ** 2 + smear**2
    centred = atoms.positions - atoms.positions.mean(axis=0)
    expected = -0.5 * (centred**2).sum() / variance - 0.5 * 6 * math.log(2 * math.pi * variance)
    assert value.item() == pytest.approx(expected, abs=1e-4)


def test_data_can_be_smeared_after_flow_matching_only(make_flow):
    flow = make_flow("given", layers=1)
    assert ENFCalculator(flow).parameters["smear"] == 0.0
    with pytest.raises(CalculatorSetupError, match=r"smear=0\.1: only a flow trained by flow matching"):
        ENFCalculator(flow, smear=0.1)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(CalculatorSetupError, match="must be a length in Å"):
            ENFCalculator(matched(make_flow), smear=bad)
