"""``Atoms`` to tensors and back, and one clear line for every unusable input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.data import chemical_symbols
from ase.formula import Formula

from ase_enf.atoms.batch import (
    Batch,
    canonical_order,
    check_atoms,
    formula_numbers,
    one_or_many,
    species_of,
    to_atoms,
    to_batch,
)

SPECIES = ("H", "C", "O")


def moved(atoms: Atoms, position, index: int = 0) -> Atoms:
    changed = atoms.copy()
    changed.positions[index] = position
    return changed


def test_round_trip_is_the_identity_up_to_centring(methane, water, ethanol):
    atoms = [methane, water, ethanol]
    for before, after in zip(atoms, to_atoms(to_batch(atoms, SPECIES, dtype=torch.float64), SPECIES), strict=True):
        assert after.symbols.get_chemical_formula("reduce") == before.symbols.get_chemical_formula("reduce")
        assert np.allclose(after.positions, before.positions - before.positions.mean(axis=0), atol=1e-14)
        assert not after.pbc.any() and not after.cell.any()


def test_two_dimensions_survive_the_round_trip():
    flat = Atoms("X4", positions=[[0, 0, 1.5], [4, 0, 1.5], [0, 4, 1.5], [4, 5, 1.5]])
    batch = to_batch([flat], (), dimension=2, dtype=torch.float64)
    assert batch.positions.shape == (1, 4, 2) and batch.types.shape == (1, 4, 0)
    (back,) = to_atoms(batch, ())
    assert np.allclose(back.get_all_distances(), flat.get_all_distances()) and not back.positions[:, 2].any()


def test_batch_holds_what_its_table_says(methane, water):
    batch = to_batch([methane, water], SPECIES, max_atoms=6)
    assert [tuple(t.shape) for t in batch[:4]] == [(2, 6, 3), (2, 6, 3), (2, 6, 1), (2, 6)]
    assert batch[4:] == (None, None)
    assert batch.n_atoms.tolist() == [5, 3]
    for field in batch[:3]:
        assert (field[~batch.mask] == 0).all() and field.dtype == torch.float32
    assert batch.charges[0, :5, 0].tolist() == methane.numbers.tolist()
    assert (batch.types.sum(dim=-1) == batch.mask).all()
    assert batch.positions.sum(dim=1).abs().max() < 1e-6


def test_centring_happens_before_rounding(water):
    far = water.copy()
    far.positions += 1e6
    near, away = to_batch([water, far], SPECIES).positions
    assert (near - away).abs().max() < 1e-6


def test_select_and_repeat(methane, water):
    batch = to_batch([methane, water], SPECIES)
    assert torch.equal(batch.select(torch.tensor([1])).charges, batch.charges[1:])
    assert batch.select(torch.tensor([True, False])).n_atoms.tolist() == [5]
    assert batch.repeat(2).n_atoms.tolist() == [5, 5, 3, 3]
    assert batch.to(dtype=torch.float64).mask.dtype == torch.bool


def test_batch_is_immutable(water):
    with pytest.raises(AttributeError):
        to_batch([water], SPECIES).mask = None
    assert isinstance(to_batch([water], SPECIES), Batch)


BAD = {
    "periodic": (lambda a: Atoms(a, pbc=[True, False, False], cell=[9, 9, 9]), ("periodic", "True", "pbc = False")),
    "one atom": (lambda a: a[:1], ("1 atom", "at least 2")),
    "empty": (lambda a: a[:0], ("0 atom", "at least 2")),
    "nan": (lambda a: moved(a, [np.nan, 0, 0]), ("atom 0", "nan", "repair")),
    "infinite": (lambda a: moved(a, [0, np.inf, 0], 2), ("atom 2", "inf", "repair")),
    "unknown element": (lambda a: Atoms("SiH", positions=[[0, 0, 0], [0, 0, 1.5]]), ("Si", "H, C, O", "train")),
    "two on one point": (lambda a: moved(a, a.positions[1], 2), ("atoms 1 and 2", "remove")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_with_index_value_and_remedy(case, water):
    spoil, words = BAD[case]
    bad = spoil(water)
    for call in (lambda: check_atoms(bad, SPECIES, 7), lambda: to_batch([water] * 7 + [bad], SPECIES)):
        with pytest.raises(ValueError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message and message.startswith("structure 7 (")
        assert all(word in message for word in words), message


def test_structures_off_the_plane_are_refused_in_two_dimensions(methane):
    with pytest.raises(ValueError, match=r"structure 1 .CH4.: .*xy plane.*set z to 0"):
        to_batch([Atoms("C2", positions=[[0, 0, 0], [0, 1, 0]]), methane], SPECIES, dimension=2)


def test_good_input_passes_whatever_the_elements_when_positions_alone_count(ethanol):
    check_atoms(ethanol, SPECIES)
    check_atoms(Atoms("AuU", positions=[[0, 0, 0], [0, 0, 2.5]]), ())


def test_inputs_are_never_modified(ethanol):
    before = ethanol.copy()
    batch = to_batch([ethanol], SPECIES)
    check_atoms(ethanol, SPECIES)
    canonical_order(ethanol)
    (back,) = to_atoms(batch, SPECIES)
    back.positions += 1.0
    assert ethanol == before and np.array_equal(ethanol.positions, before.positions)
    assert torch.equal(batch.positions, to_batch([ethanol], SPECIES).positions)


def test_one_or_many(water):
    assert one_or_many(water) == [water]
    assert one_or_many(a for a in (water, water)) == [water, water]
    with pytest.raises(TypeError, match=r"structure 1: expected ase\.Atoms, got str"):
        one_or_many([water, "water.xyz"])
    for wrong in (Path("water.xyz"), "water.xyz", None):
        with pytest.raises(TypeError, match=r"expected ase.Atoms or several, got .*ase.io.read"):
            one_or_many(wrong)


def test_species_are_sorted_by_atomic_number(methane, ethanol):
    assert species_of([molecule("HF"), ethanol, methane]) == ("H", "C", "O", "F")


@pytest.mark.parametrize(("formula", "numbers"), [("CH4", [6, 1, 1, 1, 1]), ("(OH)2", [8, 8, 1, 1])])
def test_formula_numbers(formula, numbers):
    assert formula_numbers(formula).tolist() == numbers


@pytest.mark.parametrize("formula", ["", "C7H1O(", "Qq2", "7", "C0"])
def test_formulas_that_are_none_are_refused(formula):
    with pytest.raises(ValueError, match=r"write it like C7H10O2") as caught:
        formula_numbers(formula)
    assert repr(formula) in str(caught.value)


def test_canonical_order_follows_element_and_distance_not_the_file(ethanol):
    generator = np.random.default_rng(0)
    ethanol.positions += 0.05 * generator.standard_normal((9, 3))  # no two atoms equivalent
    rank = canonical_order(ethanol)
    assert sorted(rank) == list(range(9))
    ordered = ethanol[np.argsort(rank)]
    distance = np.linalg.norm(ordered.positions - ordered.positions.mean(axis=0), axis=1)
    keys = list(zip(ordered.numbers, distance, strict=True))
    assert keys == sorted(keys)
    shuffle = generator.permutation(9)
    assert np.array_equal(canonical_order(ethanol[shuffle]), rank[shuffle])
    turned = ethanol.copy()
    turned.rotate(77, (1, 2, 3))
    assert np.array_equal(canonical_order(turned), rank)


@pytest.mark.parametrize("name", ["CH4", "C2H6", "C6H6", "C3H6_D3h", "NH3"])
def test_canonical_order_of_a_symmetric_molecule_is_one_up_to_isometry(name):
    """Whichever of the equivalent atoms comes first, the labelled structures are congruent."""
    atoms = molecule(name)
    generator = np.random.default_rng(0)

    def distances(a):
        return a[np.argsort(canonical_order(a))].get_all_distances()

    before = distances(atoms)
    for _ in range(8):
        shuffled = atoms[generator.permutation(len(atoms))]
        shuffled.rotate(360 * generator.random(), generator.standard_normal(3))
        assert np.allclose(distances(shuffled), before, atol=1e-5)


@pytest.mark.parametrize("number", [-1, 119, 1000])
def test_atomic_numbers_of_no_element_name_the_structure(number):
    odd = Atoms([1, number], [(0, 0, 0), (0, 0, 1)])
    for refuses in (one_or_many, lambda many: to_batch(many, ["H"])):
        with pytest.raises(ValueError, match=f"^structure 1: has the atomic number {number}; .*, correct it$"):
            refuses([molecule("H2"), odd])


@pytest.mark.parametrize("smiles", ["CCO", "C1CC1", "CC(C)O", "OCCO", "CC#N", "NN", "C%10CC%10", "ClCCl"])
def test_a_smiles_is_no_formula(smiles):
    with pytest.raises(ValueError, match="is a SMILES, and a formula counts every atom, hydrogens too; write C2H6O"):
        formula_numbers(smiles)


@pytest.mark.parametrize(
    "formula", ["CO", "C2O", "CO2", "CH3CH2OH", "C2N2", "CF4", "C3O2", "CHCl3", "HCN", "CaCO3", "N2"]
)
def test_formulas_are_no_smiles(formula):
    assert Formula(formula).count() == Counter(chemical_symbols[z] for z in formula_numbers(formula))
    assert formula_numbers(Atoms("CCO").symbols).tolist() == [6, 6, 8]


def _with_charges(atoms, charges):
    atoms.set_initial_charges(charges)


def _with_moments(atoms, moments):
    atoms.set_initial_magnetic_moments(moments)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda atoms: atoms.info.update(charge=1), r"a net charge of 1 \(info\['charge'\]\)"),
        (lambda atoms: atoms.info.update(total_charge=-2.0), "a net charge of -2"),
        (lambda atoms: atoms.info.update(charge=np.array([0.2, 0.4, 0.4])), "a net charge of 1"),
        (lambda atoms: _with_charges(atoms, [-1, 0, 0]), r"a net charge of -1 \(initial charges\)"),
        (lambda atoms: atoms.info.update(multiplicity=3), "a spin of 3"),
        (lambda atoms: atoms.info.update(spin=2), "a spin of 2"),
        (lambda atoms: _with_moments(atoms, [2, 0, 0]), "a magnetic moment of 2"),
    ],
)
def test_a_stated_charge_or_spin_is_refused(water, state, words):
    state(water)
    with pytest.raises(ValueError, match=rf"^structure 3 \(H2O\): states {words}") as caught:
        check_atoms(water, ("H", "O"), 3)
    assert "\n" not in str(caught.value)
    check_atoms(water, ())  # a flow of positions is of one system, whatever its elements
    with pytest.raises(ValueError, match=words):
        to_batch([water], ("H", "O"))


@pytest.mark.parametrize(
    "state",
    [
        lambda atoms: atoms.info.update(charge=0, total_charge=0.0, multiplicity=1, spin=1),  # of several programs
        lambda atoms: atoms.info.update(spin=0, charge="neutral"),
        lambda atoms: _with_charges(atoms, [-0.8, 0.4, 0.4001]),  # partial charges
        lambda atoms: _with_moments(atoms, [0.5, -0.5, 0.0]),
    ],
)
def test_a_neutral_structure_may_say_so(water, state):
    state(water)
    check_atoms(water, ("H", "O"))


def test_a_radical_of_lowest_spin_is_taken():
    radical = molecule("CH3")  # ASE gives it the moment of one electron
    radical.info.update(multiplicity=2, spin=1)
    check_atoms(radical, ("H", "C"))
