"""MMFF94 with the forces of another method, and structures displaced on that surface."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculatorSetupError
from ase.optimize import BFGS
from ase.units import kB

from ase_enf.chem.anchored import Anchored
from ase_enf.chem.mmff import MMFF94, conformers
from ase_enf.data import DataError
from ase_enf.data.compact import from_atoms, read_npz
from ase_enf.data.displaced import displaced
from benchmarks import thermal_set, thermal_wells

KELVIN = 300.0


def at(surface, positions):
    energies, forces = surface(positions[:, :, None, None])
    return float(energies[0, 0]), forces[:, :, 0, 0]


@pytest.mark.parametrize("name", ["H2O", "CH3CH2OH", "C6H6", "CH3COOH"])
def test_the_forces_at_the_geometry_are_those_given_and_elsewhere_those_of_the_energy(name):
    atoms = molecule(name)
    wanted = -MMFF94(atoms).surface(atoms.positions * 1.01)[1]  # any without net force and torque
    surface = Anchored(atoms, wanted)
    # What pairs cannot reproduce (out of a plane, where both forces vanish by symmetry) remains.
    assert np.abs(at(surface, atoms.positions)[1] - wanted).max() == pytest.approx(surface.residual, abs=1e-10)
    assert surface.residual < 0.02
    x = atoms.positions + 0.05 * np.random.default_rng(0).standard_normal((len(atoms), 3))
    direction = np.random.default_rng(1).standard_normal(x.shape)
    h = 1e-5
    slope = (at(surface, x + h * direction)[0] - at(surface, x - h * direction)[0]) / (2 * h)
    forces = at(surface, x)[1]
    assert slope == pytest.approx(-np.sum(forces * direction), rel=1e-5)
    assert np.abs(forces.sum(axis=0)).max() < 1e-9 > np.abs(np.cross(x, forces).sum(axis=0)).max()


def test_zero_forces_make_the_geometry_a_minimum():
    """A geometry that is no minimum of MMFF94 becomes one of the anchored force field."""
    atoms = molecule("CH3CH2OH")
    surface = Anchored(atoms, np.zeros((9, 3)))
    at_rest = at(surface, atoms.positions)[0]
    rng = np.random.default_rng(0)
    near = [at(surface, atoms.positions + 0.02 * rng.standard_normal((9, 3)))[0] for _ in range(20)]
    assert min(near) > at_rest
    atoms.calc = MMFF94(atoms)
    before = atoms.positions.copy()
    BFGS(atoms, logfile=None).run(fmax=0.01)
    assert np.abs(atoms.get_all_distances() - Atoms(atoms.symbols, before).get_all_distances()).max() > 0.01


def test_displaced_structures_have_the_energy_of_equipartition():
    """Benzene is nearly harmonic with a single minimum: <U − U_0> = (3 M − 6) kT / 2."""
    atoms, kt = molecule("C6H6"), kB * 300.0
    surface = Anchored(atoms, np.zeros((12, 3)))
    least = at(surface, atoms.positions)[0]
    frames = [frame for seed in range(40) for frame in displaced(atoms, np.zeros((12, 3)), 300.0, n=3, seed=seed)]
    energies = np.array([at(surface, frame.positions)[0] - least for frame in frames])
    assert energies.mean() / (15 * kt) == pytest.approx(1.0, abs=0.1)
    assert energies.std() / kt == pytest.approx(15**0.5, rel=0.25)
    assert np.abs(frames[5].positions.mean(axis=0)).max() < 1e-12
    again = displaced(atoms, np.zeros((12, 3)), 300.0, n=3, seed=1)
    assert np.array_equal(again[2].positions, frames[5].positions)


def test_what_cannot_be_displaced_is_refused():
    water = molecule("H2O")
    with pytest.raises(DataError, match="temperature=0"):
        displaced(water, np.zeros((3, 3)), 0.0)
    with pytest.raises(DataError, match="n=0"):
        displaced(water, np.zeros((3, 3)), 300.0, n=0)
    with pytest.raises(ValueError, match=r"need \(3, 3\)"):
        displaced(water, np.zeros((2, 3)), 300.0)
    with pytest.raises(DataError, match="0% of the trajectories"):
        displaced(water, np.array([[0, 0, 90.0], [0, 60.0, -45.0], [0, -60.0, -45.0]]), 300.0)
    with pytest.raises(CalculatorSetupError, match="no molecule yet"):
        MMFF94().surface(water.positions)


def test_a_set_keeps_its_splits_and_its_pieces(tmp_path, monkeypatch, capsys):
    names = ["H2O", "CH4", "NH3", "CH3OH", "C2H6", "HCN"]
    data, codes = [molecule(name) for name in names], [0, 0, 0, 1, 2, 0]
    for k, atoms in enumerate(data):
        atoms.info["qm9_index"] = k + 1
    (tmp_path / "qm9.npz").write_bytes(thermal_set.packed(from_atoms(data, codes)))
    monkeypatch.setattr(thermal_set, "PIECE", 2)
    arguments = [str(tmp_path / "qm9.npz"), str(tmp_path / "set"), "--calculator", "mmff"]
    monkeypatch.setattr(sys, "argv", ["thermal_set", *arguments])
    thermal_set.main()
    table = read_npz(tmp_path / "set" / "thermal.npz")
    assert table.positions.dtype == np.float32 and set(table.split.tolist()) == {0, 1}
    found = dict(zip(table.gdb_index.tolist(), table.split.tolist(), strict=True))
    assert found == {1: 0, 2: 0, 3: 0, 4: 1, 6: 0} and len(table.n_atoms) == 15
    said = capsys.readouterr().out
    assert "12 structures for training, 3 for validation, of 5 molecules; 0 of 5 left out" in said
    monkeypatch.setattr(thermal_set, "piece", None)  # existing pieces are reused
    thermal_set.main()
    assert capsys.readouterr().out == said


def test_minima_are_relaxed_and_populated_by_their_free_energies():
    atoms = molecule("trans-butane")
    found = thermal_wells.wells(atoms, "mmff", KELVIN, 24, seed=0)
    assert [sum(well.found for well in found), len(found)] == [24, 2]  # trans, and the two mirror images of gauche
    trans, gauche = found
    for well in found:
        assert np.abs(well.forces).max() < thermal_wells.SETTLED
        curvatures, modes = thermal_wells.hessian(well.atoms)
        assert curvatures.shape == (3 * 14 - 6,) and curvatures.min() > 0
        assert np.abs(modes.T @ modes - np.eye(36)).max() < 1e-9
    wide = [well.atoms.get_all_distances()[np.ix_(range(4), range(4))].max() for well in found]
    assert wide[1] < 3.3 < 3.7 < wide[0]
    # gauche lies 0.03 eV above trans, and two of three minima are gauche
    share = thermal_wells.populations([trans._replace(found=1), gauche._replace(found=2)], KELVIN)[1]
    assert share == pytest.approx(2 / (2 + math.exp((gauche.free_energy - trans.free_energy) / (kB * KELVIN))))
    assert 0.2 < share < 0.5


def test_the_free_energy_of_a_minimum_is_minus_kt_times_the_logarithm_of_its_integral():
    """Of water: ∫ exp(−U / kT) r² r'² sin θ dr dr' dθ, by 3^(3/2) for orthonormal coordinates, without the 8 π²."""
    kelvin = 20.0  # narrow, so that it is harmonic
    well = thermal_wells.settled(molecule("H2O"), "mmff", kelvin, 1)
    surface, at_rest = MMFF94(well.atoms).surface, well.atoms.get_distance(0, 1)
    angle = np.radians(well.atoms.get_angle(1, 0, 2))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    total = 0.0
    for (u, wu), (v, wv), (a, wa) in itertools.product(zip(nodes, weights, strict=True), repeat=3):
        r, s, theta = at_rest + 0.03 * u, at_rest + 0.03 * v, angle + 0.15 * a
        x = np.array([[0, 0, 0], [r, 0, 0], [s * np.cos(theta), s * np.sin(theta), 0]])
        volume = 0.03 * 0.03 * 0.15 * wu * wv * wa * r**2 * s**2 * np.sin(theta)
        total += volume * math.exp(-surface(x)[0] / (kB * kelvin))
    assert math.log(total / 3**1.5) == pytest.approx(-well.free_energy / (kB * kelvin), abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_embedded_conformers_differ_for_every_seed(seed):
    found = conformers(molecule("trans-butane"), 12, seed)
    energies = [MMFF94(atoms).surface(atoms.positions)[0] for atoms in found]
    assert max(energies) - min(energies) > 0.02  # eV: trans and gauche
    other = conformers(molecule("trans-butane"), 12, seed + 1)
    assert not any(np.allclose(a.positions, b.positions, atol=1e-3) for a in found for b in other)
