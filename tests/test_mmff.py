"""MMFF94 as a calculator: forces are derivatives of the energy, and atoms may have any order."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, CalculatorSetupError
from ase.calculators.fd import calculate_numerical_forces
from ase.optimize import BFGS
from ase.units import kcal, mol

from ase_enf.chem.mmff import MMFF94, conformers
from ase_enf.chem.topology import Topology, connectivity

# Names in ASE's collection: alkane, alcohol, amide, ring with heteroatoms, nitrile, nitro group.
NAMES = ("C2H6", "CH3CH2OH", "CH3CONH2", "C4H4NH", "CH3CN", "CH3NO2")


def rattled(name: str, seed: int = 0, stdev: float = 0.05) -> Atoms:
    atoms = molecule(name)
    atoms.rattle(stdev, seed=seed)
    return atoms


@pytest.mark.parametrize("variant", ["MMFF94", "MMFF94s"])
@pytest.mark.parametrize("name", NAMES)
def test_forces_are_the_gradient(name, variant):
    atoms = rattled(name)
    atoms.calc = MMFF94(molecule(name), variant=variant)
    numerical = calculate_numerical_forces(atoms, eps=1e-4)
    forces = atoms.get_forces()
    assert np.abs(forces).max() > 0.5
    assert np.allclose(forces, numerical, atol=2e-5)
    assert np.allclose(forces.sum(axis=0), 0, atol=1e-9)


def test_the_energy_is_rdkits_in_electronvolts():
    from rdkit.Chem import rdForceFieldHelpers as helpers

    from ase_enf.chem.convert import sanitise, to_mol

    atoms = molecule("CH3CH2OH")
    mol_ = sanitise(to_mol(atoms, "rdkit"))
    field = helpers.MMFFGetMoleculeForceField(mol_, helpers.MMFFGetMoleculeProperties(mol_))
    atoms.calc = MMFF94()
    assert atoms.get_potential_energy() == pytest.approx(field.CalcEnergy() * kcal / mol, rel=1e-12)
    assert atoms.get_potential_energy() == pytest.approx(field.CalcEnergy() * 0.0433641, rel=1e-5)


def test_order_rotation_and_reflection_do_not_matter():
    atoms, rng = rattled("CH3CH2OH"), np.random.default_rng(0)
    calculator = MMFF94(molecule("CH3CH2OH"))
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    order = rng.permutation(len(atoms))
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    other = atoms[order]
    other.positions = other.positions @ turn.T + [3.0, -1.0, 2.0]
    other.calc = calculator
    assert other.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    assert np.allclose(other.get_forces(), forces[order] @ turn.T, atol=1e-9)


def test_a_broken_molecule_and_another_one_have_no_energy():
    ethanol, calculator = molecule("CH3CH2OH"), MMFF94(molecule("CH3CH2OH"))
    broken = ethanol.copy()
    broken.positions[3] *= 2.0
    for atoms in (broken, molecule("CH3OCH3"), molecule("CH4")):
        atoms.calc = calculator
        with pytest.raises(CalculationFailed, match=r"does not have the bonds.*MMFF94\(\)"):
            atoms.get_potential_energy()
    ethanol.calc = calculator  # and the calculator still works
    assert np.isfinite(ethanol.get_potential_energy())


def test_given_orders_replace_perception():
    atoms = molecule("C2H4")
    orders = connectivity(atoms.numbers, atoms.positions).astype(int)
    orders[0, 1] = orders[1, 0] = 2
    given, perceived = atoms.copy(), atoms.copy()
    given.calc, perceived.calc = MMFF94(atoms, orders), MMFF94()
    assert given.get_potential_energy() == pytest.approx(perceived.get_potential_energy(), abs=1e-12)
    orders[0, 1] = orders[1, 0] = 3  # five bonds of a carbon
    given.calc = MMFF94(atoms, orders)
    with pytest.raises(CalculatorSetupError, match="rejects its bond orders"):
        given.get_potential_energy()


def test_bad_input():
    atoms = molecule("CH4")
    with pytest.raises(ValueError, match="variant='UFF'"):
        MMFF94(variant="UFF")
    with pytest.raises(ValueError, match="orders without atoms"):
        MMFF94(orders=np.zeros((5, 5)))
    with pytest.raises(ValueError, match=r"orders of shape \(2, 2\)"):
        MMFF94(atoms, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="n=0"):
        conformers(atoms, 0)
    argon = Atoms("Ar2", [[0, 0, 0], [0, 0, 4.0]], calculator=MMFF94())
    with pytest.raises(CalculatorSetupError, match="Ar2"):
        argon.get_potential_energy()


def test_it_relaxes_and_can_be_copied():
    atoms = rattled("CH3CONH2")
    atoms.calc = copy.deepcopy(MMFF94(molecule("CH3CONH2")))
    assert BFGS(atoms, logfile=None).run(fmax=0.01, steps=200)
    copied = atoms.copy()
    copied.calc = copy.deepcopy(atoms.calc)
    assert copied.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)


def test_conformers_keep_the_order_of_the_atoms_and_differ():
    atoms = molecule("trans-butane")
    found = conformers(atoms, 12, seed=1)
    assert len(found) == 12
    topology = Topology(atoms)
    assert all(topology.holds(conformer.positions) for conformer in found)
    carbons = np.flatnonzero(atoms.numbers == 6)
    widths = [conformer.get_all_distances()[np.ix_(carbons, carbons)].max() for conformer in found]
    assert min(widths) < 3.3 < 3.7 < max(widths)  # gauche and trans
    again = conformers(atoms, 12, seed=1)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_match_finds_the_order_of_a_shuffled_molecule(seed):
    atoms, rng = rattled("CH3CH2OH", seed), np.random.default_rng(seed)
    topology = Topology(molecule("CH3CH2OH"))
    order = rng.permutation(len(atoms))
    found = topology.match(atoms[order])
    assert topology.holds(atoms[order][found].positions)
    assert np.array_equal(topology.match(atoms), np.arange(9))  # the given order if it is one
