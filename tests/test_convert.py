"""Atoms to RDKit molecules and SMILES, by each of the three methods."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2

from ase_enf.chem.bonds import bond_orders
from ase_enf.chem.convert import (
    PerceptionError,
    bond_graph,
    canonical_smiles,
    largest_fragment,
    normalise_smiles,
    read_graph,
    sanitise,
    to_mol,
    to_smiles,
)

pytest.importorskip("rdkit")

METHODS = [
    pytest.param(method, marks=pytest.mark.skipif(find_spec(needs) is None, reason=f"needs {needs}"))
    for method, needs in (("table", "rdkit"), ("rdkit", "rdkit"), ("openbabel", "openbabel"))
]
KNOWN = {
    "CH4": "C", "H2O": "O", "CH3CH2OH": "CCO", "CH3CHO": "CC=O", "HCN": "C#N", "C2H2": "C#C", "CH3COCH3": "CC(C)=O",
    "HCOOH": "O=CO", "CH3CN": "CC#N",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "smiles"), KNOWN.items())
def test_known_smiles(name: str, smiles: str, method: str) -> None:
    assert to_smiles(molecule(name), method) == smiles


@pytest.mark.parametrize("method", METHODS[1:])
def test_perception_finds_the_aromatic_ring_that_the_table_misses(method: str) -> None:
    assert to_smiles(molecule("C6H6"), method) == "c1ccccc1"
    assert to_smiles(molecule("C6H6")) != "c1ccccc1"


@pytest.mark.parametrize("method", METHODS)
def test_a_mol_keeps_atoms_their_order_and_positions(method: str) -> None:
    atoms = molecule("CH3CH2OH")
    mol = to_mol(atoms, method)
    assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == atoms.numbers.tolist()
    assert mol.GetNumConformers() == 1
    assert mol.GetConformer().Is3D()
    assert np.array_equal(mol.GetConformer().GetPositions(), atoms.positions)


@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_not_modified(method: str) -> None:
    atoms = molecule("CH3CHO")
    to_smiles(atoms, method)
    assert atoms == molecule("CH3CHO")


def test_the_mol_of_the_table_has_the_tables_bonds() -> None:
    for name in g2.names:
        atoms = molecule(name)
        orders = bond_orders(atoms.numbers[None], atoms.positions[None])[0]
        bonds = {(b.GetBeginAtomIdx(), b.GetEndAtomIdx()): b.GetBondTypeAsDouble() for b in to_mol(atoms).GetBonds()}
        assert bonds == {(i, j): orders[i, j] for i, j in zip(*np.nonzero(np.triu(orders)), strict=True)}


def test_smiles_do_not_depend_on_the_order_of_atoms() -> None:
    rng = np.random.default_rng(0)
    for name in g2.names:
        atoms = molecule(name)
        assert to_smiles(atoms[rng.permutation(len(atoms))]) == to_smiles(atoms)


def test_smiles_are_canonical_already() -> None:
    for name in g2.names:
        smiles = to_smiles(molecule(name))
        assert smiles is None or normalise_smiles(smiles) == smiles


def test_hydrogens_are_never_added() -> None:
    assert to_smiles(molecule("CH3")) == "[CH3]"


def test_fragments_are_separated_by_dots() -> None:
    methane, water = molecule("CH4"), molecule("H2O")
    water.positions += 8
    assert to_smiles(methane + water) == "C.O"


def test_too_many_bonds_have_no_smiles() -> None:
    crowded = Atoms("CH5", [(0, 0, 0), (1.1, 0, 0), (-1.1, 0, 0), (0, 1.1, 0), (0, -1.1, 0), (0, 0, 1.1)])
    assert to_smiles(crowded) is None
    assert sanitise(to_mol(crowded)) is None


def test_rdkit_finding_nothing_is_an_error_of_to_mol_and_none_of_to_smiles() -> None:
    scattered = Atoms("C7N2", [(1.2 * (i % 3), 1.2 * (i // 3), 0) for i in range(9)])
    with pytest.raises(PerceptionError, match="C7N2"):
        to_mol(scattered, "rdkit")
    assert to_smiles(scattered, "rdkit") is None


def test_a_single_atom_and_none_at_all() -> None:
    assert to_mol(Atoms("He")).GetNumAtoms() == 1
    assert to_mol(Atoms()).GetNumAtoms() == 0


def test_sanitise_leaves_its_argument_alone() -> None:
    from rdkit import Chem

    mol = Chem.MolFromSmiles("C1=CC=CC=C1", sanitize=False)
    assert sanitise(mol).GetBondWithIdx(0).GetIsAromatic()
    assert not mol.GetBondWithIdx(0).GetIsAromatic()


def test_the_largest_fragment_does_not_depend_on_order() -> None:
    from rdkit import Chem

    for smiles in ("CO.NN.C", "NN.C.CO"):
        assert largest_fragment(Chem.AddHs(Chem.MolFromSmiles(smiles))) == "NN"  # 6 atoms each, the later name


def test_complete_means_that_no_atom_needs_a_hydrogen() -> None:
    """Radical electrons of atoms without implicit hydrogens correspond to the implicit hydrogens of others."""
    for number in (5, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53):
        for hydrogens in range(5):
            numbers = np.array([number] + [1] * hydrogens)
            orders = np.zeros((hydrogens + 1, hydrogens + 1), dtype=np.int8)
            orders[0, 1:] = orders[1:, 0] = 1
            willing = bond_graph(numbers, orders)
            willing.GetAtomWithIdx(0).SetNoImplicit(False)
            sound = sanitise(willing)
            missing = sound is not None and sum(atom.GetNumImplicitHs() for atom in sound.GetAtoms())
            assert read_graph(numbers, orders).complete == (sound is not None and missing == 0), (number, hydrogens)


def test_readings_agree_with_to_smiles() -> None:
    for name in g2.names:
        atoms = molecule(name)
        orders = bond_orders(atoms.numbers[None], atoms.positions[None])[0]
        assert read_graph(atoms.numbers, orders).smiles == to_smiles(atoms)


def test_canonical_smiles_leave_out_stereochemistry() -> None:
    from rdkit import Chem

    left, right = (Chem.MolFromSmiles(smiles) for smiles in ("C[C@H](O)F", "C[C@@H](O)F"))
    assert canonical_smiles(left) == canonical_smiles(right)


# Neutral molecules whose closed shell has formal charges, by RDKit's own embedding.
CHARGED = ("C[N+](=O)[O-]", "[C-]#[O+]", "C[N+]#[C-]", "C=[N+]=[N-]", "CN=[N+]=[N-]", "C[N+](C)(C)[O-]")


@pytest.mark.parametrize("smiles", CHARGED)
def test_neutral_molecules_with_formal_charges_are_perceived(smiles: str) -> None:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    AllChem.UFFOptimizeMolecule(mol)
    atoms = Atoms([a.GetAtomicNum() for a in mol.GetAtoms()], mol.GetConformer().GetPositions())
    assert to_smiles(atoms, "rdkit") == normalise_smiles(smiles)


@pytest.mark.parametrize(("name", "smiles"), [("CH3NO2", "C[N+](=O)[O-]"), ("O3", "O=[O+][O-]"), ("CH3", "[CH3]")])
def test_formal_charges_come_before_radicals(name: str, smiles: str) -> None:
    assert to_smiles(molecule(name), "rdkit") == smiles


@pytest.mark.parametrize("method", METHODS)
def test_an_atom_of_no_element_has_no_smiles(method: str) -> None:
    assert to_smiles(Atoms("X"), method) is None


def test_labels_of_atoms_are_left_out() -> None:
    for smiles in ("[2H]OC", "[13CH3:4]O", "[H:1]OC", "C[18O][3H]"):
        assert normalise_smiles(smiles) == "CO"
    assert normalise_smiles("[H]/N=C/C") == "CC=N"  # a hydrogen that only marks the side of a bond


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown method 'xyz2mol': choose one of 'table'"):
        to_smiles(molecule("CH4"), "xyz2mol")
    with pytest.raises(TypeError, match="expected one ase.Atoms, got a list"):
        to_mol([molecule("CH4")])
    with pytest.raises(ValueError, match="periodic"):
        to_smiles(bulk("Si"))
    broken = molecule("CH4")
    broken.positions[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        to_smiles(broken)


def test_nothing_is_printed_and_rdkits_log_works_afterwards() -> None:
    """In a separate process, because RDKit writes to the file descriptor, which pytest may not capture."""
    code = (
        "from ase import Atoms; from ase_enf.chem import to_smiles; from rdkit import Chem; import sys\n"
        "five = Atoms('CH5', [(0,0,0), (1.1,0,0), (-1.1,0,0), (0,1.1,0), (0,-1.1,0), (0,0,1.1)])\n"
        "assert to_smiles(five) is None and to_smiles(five, 'rdkit') is None\n"
        "sys.stderr.write('---'); sys.stderr.flush(); Chem.MolFromSmiles('C(')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stderr.split("---")
    assert (done.stdout, before) == ("", "")
    assert "SMILES Parse Error" in after


def test_importing_is_light() -> None:
    code = "import sys, ase_enf.chem; print(sorted({'torch', 'rdkit', 'openbabel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
