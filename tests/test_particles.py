"""DW4, LJ13, LJ55: forces are derivatives, energies agree with closed forms, with ASE and with the calculators."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, CalculatorSetupError
from ase.calculators.fd import calculate_numerical_forces
from ase.calculators.lj import LennardJones
from ase.cluster import Icosahedron
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from ase_enf.data import DataError
from ase_enf.data.particles import (
    DW4,
    LJ13,
    LJ55,
    SYSTEMS,
    DoubleWell,
    System,
    lennard_jones,
    quadrature,
    resolve,
    to_atoms,
)

CALCULATORS = {"dw4": DW4, "lj13": LJ13, "lj13-factor2": lambda: LJ13(factor=2.0), "lj55-factor2": LJ55}


@pytest.fixture(params=SYSTEMS)
def system(request) -> System:
    return SYSTEMS[request.param]


def spread(system: System, count: int = 3) -> np.ndarray:
    """Returns configurations of ordinary energy: a distorted lattice."""
    side = np.arange(4 if system.n_atoms > 27 else 3) * (3.0 if system.dimension == 2 else 1.1)
    lattice = np.stack(np.meshgrid(*[side] * system.dimension), axis=-1).reshape(-1, system.dimension)
    noise = np.random.default_rng(0).normal(size=(count, system.n_atoms, system.dimension))
    return lattice[: system.n_atoms] + 0.08 * noise


def test_forces_are_derivatives(system):
    positions, step = spread(system), 1e-4
    forces, numerical = system.evaluate(positions).forces, np.empty_like(positions)
    for index in np.ndindex(positions.shape[1:]):
        shift = np.zeros(positions.shape[1:])
        shift[index] = step
        up, down = (system.evaluate(positions + sign * shift).energy for sign in (1, -1))
        numerical[:, *index] = (down - up) / (2 * step)
    assert np.abs(forces - numerical).max() < 1e-5 * np.abs(forces).max()
    assert np.abs(forces.sum(axis=1)).max() < 1e-10


def test_energies_of_tensors_are_those_of_arrays(system):
    """So do their derivatives, which give the forces by another method."""
    positions = spread(system)
    energy, forces = system.evaluate(positions)
    x = torch.from_numpy(positions).requires_grad_()
    (minus,) = torch.autograd.grad(-system.energy(x).sum(), x)
    assert np.allclose(system.energy(x).detach(), energy, rtol=1e-12)
    assert np.allclose(minus, forces, rtol=1e-10, atol=1e-10)
    assert np.allclose(system.energy(positions), energy, rtol=1e-12)
    assert system.energy(x.float()).dtype == torch.float32


def test_a_block_does_not_matter(system):
    """Energies of many configurations together equal those of each alone."""
    positions = spread(system, 300)
    many = system.evaluate(positions)
    for i in (0, 127, 128, 299):
        one = system.evaluate(positions[i : i + 1])
        assert one.energy[0] == pytest.approx(many.energy[i], rel=1e-12)
        assert np.allclose(one.forces[0], many.forces[i], rtol=1e-10, atol=1e-10)


def test_double_well_of_a_square():
    """Four sides of d0 and two diagonals: U = 2 v(√2 d0)."""
    y = 4 * (math.sqrt(2) - 1)
    square = [[(0, 0), (4, 0), (4, 4), (0, 4)]]
    assert resolve("dw4").evaluate(square).energy[0] == pytest.approx(2 * (-4 * y**2 + 0.9 * y**4), rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_lennard_jones_of_a_pair(factor):
    """At r_m the pair contributes −factor, and the trap ½ · 2 · (½)² without that factor."""
    pair = lennard_jones(factor, n_atoms=2)
    assert pair.evaluate([[(0, 0, 0), (1, 0, 0)]]).energy[0] == pytest.approx(-factor + 0.25, rel=1e-14)
    far = pair.evaluate([[(0, 0, 0), (100, 0, 0)]])
    assert far.energy[0] == pytest.approx(2500, rel=1e-9)
    assert far.forces[0, 0, 0] == pytest.approx(50, rel=1e-9)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_lennard_jones_is_that_of_ase_and_the_trap(factor):
    positions = spread(resolve("lj13"), 1)[0]
    atoms = Atoms("X13", positions)
    atoms.calc = LennardJones(sigma=2 ** (-1 / 6), epsilon=factor, rc=1e4)
    centred = positions - positions.mean(axis=0)
    energy, forces = atoms.get_potential_energy() + 0.5 * (centred**2).sum(), atoms.get_forces() - centred
    atoms.calc = LJ13(factor)
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    assert np.allclose(atoms.get_forces(), forces, rtol=1e-10, atol=1e-10)


def test_the_icosahedron_is_the_known_minimum():
    """The relaxed LJ13 cluster without the trap: −44.326801 ε (Hoare and Pal 1971)."""
    shape = Icosahedron("Ar", 2, latticeconstant=math.sqrt(2)).positions
    system, radii = lennard_jones(), np.linspace(0.9, 1.1, 20001)
    energies = [system.pair(((shape[i] - shape[j]) ** 2).sum() * radii**2)[0] for i in range(13) for j in range(i)]
    assert np.sum(energies, axis=0).min() == pytest.approx(-44.326801, abs=1e-6)


def test_the_mackay_icosahedron_is_the_known_minimum_of_55():
    """The relaxed LJ55 cluster without the trap: −279.248470 ε (Northby 1987), here at ε = 2."""
    cluster = replace(resolve("lj55-factor2"), trap=0.0)

    def energy(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, forces = cluster.evaluate(flat.reshape(1, 55, 3))
        return value[0], -forces.ravel()

    shape = Icosahedron("Ar", 3, latticeconstant=math.sqrt(2)).positions
    found = minimize(energy, shape.ravel(), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    assert found.fun == pytest.approx(2 * -279.248470, abs=1e-5)


def test_rigid_motions_and_exchanges_change_nothing(system):
    positions, rng = spread(system), np.random.default_rng(1)
    turn = (
        -Rotation.random(random_state=2).as_matrix() if system.dimension == 3 else np.array([[0.6, 0.8], [0.8, -0.6]])
    )
    order = rng.permutation(system.n_atoms)
    before, after = system.evaluate(positions), system.evaluate(positions[:, order] @ turn.T + 3.0)
    assert np.allclose(after.energy, before.energy, rtol=1e-12)
    assert np.allclose(after.forces, before.forces[:, order] @ turn.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_calculator_says_what_the_function_says(name):
    system, positions = SYSTEMS[name], spread(SYSTEMS[name])
    expected = system.evaluate(positions)
    for atoms, energy, forces in zip(to_atoms(name, positions), *expected, strict=True):
        atoms.calc = CALCULATORS[name]()
        assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-12)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        assert np.allclose(atoms.get_forces()[:, : system.dimension], forces, rtol=1e-10, atol=1e-12)
        assert not atoms.get_forces()[:, system.dimension :].any()
    assert np.allclose(CALCULATORS[name]().energies(positions), expected.energy, rtol=1e-12)
    with pytest.raises(CalculatorSetupError, match=r"it takes \(B, "):
        CALCULATORS[name]().energies(positions[:, 1:])


@pytest.mark.parametrize("name", SYSTEMS)
def test_forces_agree_with_those_of_ase(name):
    atoms = to_atoms(name, spread(SYSTEMS[name], 1))[0]
    atoms.calc = CALCULATORS[name]()
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[0, 3])[:, : SYSTEMS[name].dimension]
    assert np.allclose(atoms.get_forces()[[0, 3], : SYSTEMS[name].dimension], numerical, rtol=1e-5, atol=1e-4)


def test_atoms_are_flat_in_two_dimensions():
    atoms = to_atoms("dw4", spread(SYSTEMS["dw4"]))
    assert len(atoms) == 3
    assert atoms[0].get_chemical_formula() == "X4"
    assert not atoms[0].positions[:, 2].any()
    lifted = atoms[0].copy()
    lifted.positions[1, 2] += 1.0
    lifted.calc, atoms[0].calc = DW4(), DW4()
    assert lifted.get_potential_energy() == atoms[0].get_potential_energy()
    assert to_atoms("lj13", spread(SYSTEMS["lj13"]))[0].get_chemical_formula() == "X13"


def test_the_factor_can_be_set():
    atoms = to_atoms("lj13", spread(SYSTEMS["lj13"], 1))[0]
    atoms.calc = LJ13()
    before = atoms.get_potential_energy()
    atoms.calc.set(factor=2.0)
    trap = 0.5 * ((atoms.positions - atoms.positions.mean(axis=0)) ** 2).sum()
    assert atoms.get_potential_energy() - trap == pytest.approx(2 * (before - trap), rel=1e-12)
    assert atoms.calc.todict() == {"factor": 2.0}
    atoms.calc.set(factor="2")
    assert atoms.calc.todict() == {"factor": 2.0}


@pytest.mark.parametrize(
    ("atoms", "calculator", "words"),
    [
        (Atoms("X5", np.eye(5)[:, :3]), DW4, "has 4 particles"),
        (Atoms("X4", [(0, 0, 0), (0, 0, 0), (4, 0, 0), (0, 4, 0)]), DW4, "coincide"),
        (Atoms("X4", [(0, 0, 0), (math.nan, 0, 0), (4, 0, 0), (0, 4, 0)]), DW4, "finite"),
        (Atoms("X4", np.eye(4)[:, :3], cell=[9, 9, 9], pbc=True), DW4, "not periodic"),
        (Atoms("X12"), LJ13, "has 13 particles"),
        (Atoms("X13"), LJ13, "coincide"),
        (Atoms("X13"), LJ55, "has 55 particles"),
    ],
)
def test_structures_it_cannot_take(atoms, calculator, words):
    atoms.calc = calculator()
    with pytest.raises(CalculatorSetupError, match=words) as caught:
        atoms.get_potential_energy()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_is_positive(factor):
    with pytest.raises(DataError, match="must be positive"):
        lennard_jones(factor)
    with pytest.raises(CalculatorSetupError, match="must be positive"):
        LJ13(factor)


def test_unknown_names_and_shapes_are_refused():
    with pytest.raises(DataError, match="none of dw4, lj13, lj13-factor2, lj55-factor2"):
        resolve("dw5")
    with pytest.raises(DataError, match=r"takes \(B, 4, 2\)"):
        resolve("dw4").evaluate(np.zeros((1, 4, 3)))
    with pytest.raises(DataError, match=r"takes \(B, 13, 3\)"):
        to_atoms("lj13", np.zeros((13, 3)))
    with pytest.raises(CalculatorSetupError, match="no parameter 'sigma'"):
        LJ13().set(sigma=1.0)
    with pytest.raises(CalculatorSetupError, match="DW4 has no parameter 'b'"):
        DW4(b=-100.0)
    with pytest.raises(CalculatorSetupError, match=r"it takes \(B, 4, 2\)"):
        DW4().energies(np.zeros((5, 4, 3)))  # of a flow with the default dimension
    for n_atoms in (1, 2.5, -3):
        with pytest.raises(DataError, match="whole number, at least 2"):
            lennard_jones(n_atoms=n_atoms)
    with pytest.raises(DataError, match="four particles in two dimensions"):
        quadrature("lj13")


def test_ase_itself_is_left_alone():
    before = list(Calculator.implemented_properties)
    DW4(), LJ13()
    assert Calculator.implemented_properties == before


def test_quadrature_of_springs_is_gaussian():
    """½ κ Σ_{i<j} d² = ½ (4 κ) Σ |x − x̄|²: six Gaussian coordinates of variance 1 / 4κ."""
    springs = System("springs", 4, 2, lambda r2: (0.5 * r2, np.ones_like(r2)))
    result = quadrature(springs, extent=9.0)
    assert result.log_z == pytest.approx(3 * math.log(2 * math.pi / 4), abs=1e-9)
    assert result.energy == pytest.approx(3.0, abs=1e-9)


def test_quadrature_does_not_depend_on_its_grid():
    coarse, fine = quadrature("dw4"), quadrature("dw4", extent=8.5, spacing=0.11)
    assert np.allclose(coarse, fine, rtol=0, atol=1e-7)
    assert coarse.entropy == pytest.approx(7.1257226, abs=1e-6)


def test_a_quadrature_that_would_be_wrong_is_refused():
    wide = System("wide", 4, 2, DoubleWell(d0=7.0))
    with pytest.raises(DataError, match=r"at 8.0 is 3e-01 of its maximum; use a larger extent"):
        quadrature(wide)
    assert np.allclose(quadrature(wide, extent=14), quadrature(wide, extent=15, spacing=0.12), rtol=0, atol=1e-6)
    for extent, spacing in [(0.0, 0.1), (8.0, -0.1), (1.0, 2.0), (math.nan, 0.1)]:
        with pytest.raises(DataError, match="must be positive"):
            quadrature("dw4", extent, spacing)


def test_quadrature_takes_a_pair_energy_with_a_wall():
    """d⁻² + ½ d² has no value at d = 0, where its exp(−v) is zero."""
    walls = System("walls", 4, 2, lambda r2: (0.5 * r2 + 1 / r2, np.ones_like(r2)))
    assert np.allclose(quadrature(walls, 9.5, 0.1), quadrature(walls, 10.0, 0.08), rtol=0, atol=1e-4)
