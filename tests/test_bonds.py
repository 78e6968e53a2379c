"""Bonds and stability: the published table, and invariances of its verdict."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from ase.data import atomic_numbers
from scipy.spatial.transform import Rotation

from ase_enf.chem.bonds import (
    QM9_LENGTHS,
    VALENCES,
    WIDER_LENGTHS,
    bond_orders,
    n_fragments,
    pair_distances,
    size_groups,
    stability,
    structures,
)

STABLE = ("CH4", "NH3", "H2O", "HF", "H2", "C2H2", "C2H4", "C2H6", "HCN", "CH3CHO", "CH3CH2OH", "CO2", "F2", "N2H4")
UNSTABLE = ("CH3", "OH", "CO", "C6H6", "NO2", "CH")  # benzene: 1.395 Å is a single bond to the table


def pair_order(pair: str, distance: float) -> int:
    numbers = np.array([[atomic_numbers[symbol] for symbol in pair.split("-")]])
    return int(bond_orders(numbers, np.array([[[0.0, 0, 0], [distance, 0, 0]]]))[0, 0, 1])


def published_order(pair: str, distance: float) -> int:
    """The nested rule of the paper, one pair at a time, written independently of the vectorised form."""
    single, double, triple = (QM9_LENGTHS[order].get(pair, -1000) for order in (1, 2, 3))
    if 100 * distance >= single + 10:
        return 0
    if 100 * distance >= double + 5:
        return 1
    return 3 if 100 * distance < triple + 3 else 2


@pytest.mark.parametrize("name", STABLE)
def test_known_molecules_are_stable(name: str) -> None:
    assert stability(molecule(name)).stable.tolist() == [True]


@pytest.mark.parametrize("name", UNSTABLE)
def test_known_molecules_are_unstable(name: str) -> None:
    assert stability(molecule(name)).stable.tolist() == [False]


def test_counts_of_a_radical() -> None:
    stable_atoms, n_atoms, stable = stability(molecule("CH3"))
    assert (stable_atoms[0], n_atoms[0], stable[0]) == (3, 4, False)


@pytest.mark.parametrize("pair", list(QM9_LENGTHS[1]))
def test_orders_follow_the_nested_rule_at_all_distances(pair: str) -> None:
    for distance in np.arange(0.5, 2.0, 0.0037):
        assert pair_order(pair, distance) == published_order(pair, distance)


@pytest.mark.parametrize(
    ("pair", "boundary", "below"),
    [("C-C", 1.64, 1), ("C-C", 1.39, 2), ("C-C", 1.23, 3), ("C-O", 1.16, 3), ("H-H", 0.84, 1)],
)
def test_a_threshold_itself_is_outside(pair: str, boundary: float, below: int) -> None:
    assert pair_order(pair, np.nextafter(boundary, 0)) == below
    assert pair_order(pair, boundary) == below - 1


def test_the_wider_table_leaves_the_elements_of_qm9_alone() -> None:
    for order in (1, 2, 3):
        assert not QM9_LENGTHS[order].keys() & WIDER_LENGTHS[order].keys()
        for pair in WIDER_LENGTHS[order]:
            assert not set(pair.split("-")) <= {"H", "C", "N", "O", "F"}


def test_every_bonding_element_has_a_valence() -> None:
    elements = {s for table in (QM9_LENGTHS, WIDER_LENGTHS) for pair in table[1] for s in pair.split("-")}
    assert elements <= VALENCES.keys()


def test_wider_elements_bond() -> None:
    assert stability([molecule("SiH4"), molecule("PH3"), molecule("HCl"), molecule("BCl3")]).stable.all()


def test_elements_outside_the_table_never_bond_and_are_unstable() -> None:
    lithium_fluoride = molecule("LiF")
    orders = bond_orders(lithium_fluoride.numbers[None], lithium_fluoride.positions[None])
    assert not orders.any()
    assert stability(lithium_fluoride).stable_atoms.tolist() == [0]


def test_phosphorus_has_two_valences() -> None:
    pf5 = Atoms("PF5", [(0, 0, 0), (1.58, 0, 0), (-1.58, 0, 0), (0, 1.58, 0), (0, -1.58, 0), (0, 0, 1.58)])
    assert stability([pf5, molecule("PF3")]).stable.all()


def test_orders_are_symmetric_without_self_bonds(rng: np.random.Generator) -> None:
    numbers = rng.choice([1, 6, 7, 8, 9], size=(4, 12))
    orders = bond_orders(numbers, rng.normal(size=(4, 12, 3)))
    assert np.array_equal(orders, orders.transpose(0, 2, 1))
    assert not np.diagonal(orders, axis1=1, axis2=2).any()


def test_padding_changes_nothing() -> None:
    ethanol = molecule("CH3CH2OH")
    numbers = np.pad(ethanol.numbers, (0, 3))[None]
    positions = np.concatenate([ethanol.positions, np.full((3, 3), np.nan)])[None]
    orders = bond_orders(numbers, positions)
    assert np.array_equal(orders[:, :9, :9], bond_orders(ethanol.numbers[None], ethanol.positions[None]))
    assert not orders[:, 9:].any()


def test_the_order_of_atoms_does_not_matter(rng: np.random.Generator) -> None:
    for name in g2.names:
        atoms = molecule(name)
        assert stability(atoms[rng.permutation(len(atoms))]).stable_atoms == stability(atoms).stable_atoms


def test_rotation_reflection_and_translation_do_not_matter(rng: np.random.Generator) -> None:
    for name in g2.names:
        moved = molecule(name)
        rotation = Rotation.random(random_state=rng.integers(2**31)).as_matrix()
        moved.positions = -(moved.positions @ rotation) + rng.normal(size=3)
        assert stability(moved).stable_atoms == stability(molecule(name)).stable_atoms


def test_a_verdict_does_not_depend_on_batch_mates() -> None:
    atoms = [molecule(name) for name in g2.names]
    together = stability(atoms)
    alone = [stability(item) for item in atoms]
    assert together.stable_atoms.tolist() == [int(one.stable_atoms[0]) for one in alone]
    assert together.stable.tolist() == [bool(one.stable[0]) for one in alone]
    assert together.n_atoms.tolist() == [len(item) for item in atoms]


def test_groups_hold_every_structure_once() -> None:
    atoms = [molecule(name) for name in g2.names] + [Atoms("H2", [(0, 0, 0), (0, 0, 0.74)])] * 3
    index = np.concatenate([group.index for group in size_groups(atoms)])
    assert sorted(index) == list(range(len(atoms)))


def test_fragments_agree_with_a_graph_library(rng: np.random.Generator) -> None:
    from scipy.sparse.csgraph import connected_components

    orders = np.triu(rng.random((30, 14, 14)) < 0.08, 1).astype(np.int8)
    orders += orders.transpose(0, 2, 1)
    assert n_fragments(orders).tolist() == [connected_components(one)[0] for one in orders]


def test_a_long_chain_is_one_fragment() -> None:
    orders = np.eye(50, k=1, dtype=np.int8) + np.eye(50, k=-1, dtype=np.int8)
    assert n_fragments(orders[None]).tolist() == [1]


def test_distances_agree_with_ase() -> None:
    atoms = molecule("C6H6")
    assert np.allclose(pair_distances(atoms.positions[None])[0], atoms.get_all_distances(), atol=1e-12)


def test_a_structure_without_atoms_is_not_stable() -> None:
    assert stability([Atoms(), molecule("CH4")]).stable.tolist() == [False, True]


def test_ases_dummy_atom_is_counted_and_unstable() -> None:
    dummy = Atoms("XH2", [(5, 0, 0), (0, 0, 0), (0, 0, 0.74)])
    assert stability(dummy)._asdict() == {"stable_atoms": [2], "n_atoms": [3], "stable": [False]}


def test_no_structures_give_empty_counts() -> None:
    assert [len(column) for column in stability([])] == [0, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_positions_that_are_not_finite_name_the_structure(value: float) -> None:
    broken = molecule("CH4")
    broken.positions[2, 1] = value
    with pytest.raises(ValueError, match="structure 2 has positions that are NaN or infinite"):
        stability([molecule("H2O"), molecule("CH4"), broken])
    with pytest.raises(ValueError, match="structure 0"):
        bond_orders(broken.numbers[None], broken.positions[None])


def test_periodic_structures_are_refused() -> None:
    with pytest.raises(ValueError, match="structure 1 .* is periodic"):
        stability([molecule("CH4"), bulk("Si")])


@pytest.mark.parametrize("number", [-1, 119, 1000])
def test_atomic_numbers_of_no_element_name_the_structure(number: int) -> None:
    with pytest.raises(ValueError, match=f"structure 1 has the atomic number {number}: .*; correct it"):
        stability([molecule("CH4"), Atoms([1, number], [(0, 0, 0), (0, 0, 1)])])


def test_what_is_not_atoms_is_named() -> None:
    with pytest.raises(TypeError, match="structure 1 is a str"):
        structures([molecule("CH4"), "CH4"])


def test_wrong_shapes_say_what_is_expected() -> None:
    with pytest.raises(ValueError, match="a single structure is a batch of one"):
        bond_orders(np.array([1, 1]), np.zeros((2, 3)))


def test_the_input_is_not_modified() -> None:
    atoms = [molecule(name) for name in STABLE]
    stability(atoms)
    assert all(item == molecule(name) for item, name in zip(atoms, STABLE, strict=True))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
