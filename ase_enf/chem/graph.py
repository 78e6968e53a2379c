"""Molecular graphs: from SMILES, from positions, and as text in ``info``.

A graph is a matrix of bonds: 0 for none, 1, 2, 3 for bond orders, and 4 for an aromatic bond by RDKit's model of
aromaticity, so that the choice of the Kekulé structure does not matter. Hydrogens are explicit atoms. Charges, radicals
and stereochemistry are not part of a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.chem.convert import PerceptionError, bond_graph, canonical_smiles, quiet_rdkit, sanitise, to_mol

if TYPE_CHECKING:
    from rdkit.Chem import Mol

AROMATIC = 4
BONDS_KEY = "enf_bonds"
"""Key in ``info`` under which a structure carries its graph, as ``write_bonds`` writes it."""


class Graph(NamedTuple):
    """A molecule without positions.

    Attributes:
        numbers: Atomic numbers, hydrogens included, shape (M,).
        bonds: Bonds 0 to 4, symmetric, shape (M, M).
        smiles: Canonical SMILES without stereochemistry.
    """

    numbers: NDArray[np.int64]
    bonds: NDArray[np.int8]
    smiles: str


def graph_of_smiles(smiles: str) -> Graph:
    """Returns the graph of a SMILES.

    Args:
        smiles: SMILES of one neutral closed-shell molecule; its stereochemistry is ignored.

    Returns:
        The graph: atoms in the order of the SMILES, then the implicit hydrogens.

    Raises:
        ValueError: If RDKit cannot read it, or it has charges, radicals, isotopes, or several fragments.

    Example:
        >>> water = graph_of_smiles("O")
        >>> water.numbers.tolist(), water.bonds.tolist()
        ([8, 1, 1], [[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    """
    from rdkit import Chem

    with quiet_rdkit():
        mol = Chem.MolFromSmiles(str(smiles).strip())
    if mol is None or not mol.GetNumAtoms():
        raise ValueError(f"smiles {smiles!r}: RDKit cannot read it; write it like CCO")
    if reason := _unfit(mol):
        raise ValueError(f"smiles {smiles!r}: has {reason}; give one neutral closed-shell molecule")
    whole = Chem.AddHs(mol)
    return Graph(np.array([atom.GetAtomicNum() for atom in whole.GetAtoms()]), _bonds(whole), canonical_smiles(mol))


def graph_of_atoms(atoms: Atoms) -> Graph:
    """Returns the graph of a structure, with its atoms in their order.

    Args:
        atoms: A molecule; its bonds are those of ``bonds_of``.

    Raises:
        PerceptionError: See ``perceived_bonds``; also if RDKit rejects the bonds in ``info``.
        ValueError: If the text in ``info`` is not a graph of its atoms.

    Example:
        >>> from ase.build import molecule
        >>> graph_of_atoms(molecule("CH3CH2OH")).smiles
        'CCO'
    """
    bonds = bonds_of(atoms)
    return Graph(atoms.numbers.astype(np.int64), bonds, _smiles_of(atoms.numbers, bonds))


def has_stereo(smiles: str) -> bool:
    """Whether a SMILES specifies stereochemistry.

    Example:
        >>> has_stereo("F/C=C/F"), has_stereo("C[C@H](O)F"), has_stereo("CCO")
        (True, True, False)
    """
    return any(mark in smiles for mark in "@/\\")


def perceived_bonds(atoms: Atoms) -> NDArray[np.int8]:
    """Returns the graph that RDKit perceives from the positions of a structure.

    Args:
        atoms: A molecule; it is not modified.

    Returns:
        Bonds 0 to 4, symmetric, shape (M, M).

    Raises:
        PerceptionError: If RDKit finds no bonds, or finds charges, radicals or several fragments.

    Example:
        >>> from ase.build import molecule
        >>> perceived_bonds(molecule("C6H6"))[:3, :3].tolist()
        [[0, 4, 0], [4, 0, 4], [0, 4, 0]]
    """
    mol = sanitise(to_mol(atoms, "rdkit"))  # sanitising perceives aromaticity
    if mol is None:
        raise PerceptionError(f"{atoms.get_chemical_formula()} has, by its positions, bonds that RDKit rejects")
    if reason := _unfit(mol):
        raise PerceptionError(f"{atoms.get_chemical_formula()} has, by its positions, {reason}")
    return _bonds(mol)


def bonds_of(atoms: Atoms) -> NDArray[np.int8]:
    """Returns the graph that a structure carries in ``info["enf_bonds"]``, or else the perceived one.

    Args:
        atoms: A molecule; it is not modified.

    Returns:
        Bonds 0 to 4, symmetric, shape (M, M).

    Raises:
        PerceptionError: See ``perceived_bonds``.
        ValueError: If the text in ``info`` is not a graph of its atoms.

    Example:
        >>> bonds_of(Atoms("H2", info={"enf_bonds": "0-1-1"})).tolist()
        [[0, 1], [1, 0]]
    """
    text = atoms.info.get(BONDS_KEY)
    return perceived_bonds(atoms) if text is None else read_bonds(str(text), len(atoms))


def write_bonds(bonds: NDArray[np.integer]) -> str:
    """Returns a graph as text that every file format keeps: ``i-j-bond`` for each bond, separated by spaces.

    Args:
        bonds: Bonds 0 to 4, symmetric, shape (M, M).

    Example:
        >>> write_bonds(np.array([[0, 2], [2, 0]]))
        '0-1-2'
    """
    first, second = np.nonzero(np.triu(bonds))
    return " ".join(f"{i}-{j}-{bonds[i, j]}" for i, j in zip(first.tolist(), second.tolist(), strict=True))


def read_bonds(text: str, n_atoms: int) -> NDArray[np.int8]:
    """Returns the graph that ``write_bonds`` wrote as text.

    Args:
        text: The text.
        n_atoms: Number M of atoms.

    Returns:
        Bonds 0 to 4, symmetric, shape (M, M).

    Raises:
        ValueError: If the text is not a list of bonds, or an index is not below ``n_atoms``.

    Example:
        >>> read_bonds("0-1-2", 2).tolist()
        [[0, 2], [2, 0]]
    """
    bonds = np.zeros((n_atoms, n_atoms), dtype=np.int8)
    try:
        for word in text.split():
            i, j, kind = (int(part) for part in word.split("-"))
            if not (0 <= i < n_atoms and 0 <= j < n_atoms and i != j and 1 <= kind <= AROMATIC):
                raise ValueError
            bonds[i, j] = bonds[j, i] = kind
    except ValueError:
        raise ValueError(
            f"info[{BONDS_KEY!r}]={text[:40]!r}: is no list of bonds i-j-kind between {n_atoms} atoms; remove it to "
            "have the bonds perceived"
        ) from None
    return bonds


def _smiles_of(numbers: NDArray[np.integer], bonds: NDArray[np.integer]) -> str:
    """Returns the canonical SMILES of a graph."""
    from rdkit import Chem

    mol = bond_graph(numbers, np.where(bonds == AROMATIC, 1, bonds))
    for bond in mol.GetBonds():
        if bonds[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()] == AROMATIC:
            bond.SetBondType(Chem.BondType.AROMATIC)
            for part in (bond, bond.GetBeginAtom(), bond.GetEndAtom()):
                part.SetIsAromatic(True)
    sound = sanitise(mol)
    if sound is None:
        raise PerceptionError(f"info[{BONDS_KEY!r}]: RDKit rejects these bonds; remove it to have the bonds perceived")
    return canonical_smiles(sound)


def _unfit(mol: Mol) -> str | None:
    """Returns in words what a graph cannot express of a molecule, or None if it expresses everything."""
    from rdkit import Chem

    atoms = list(mol.GetAtoms())
    if any(atom.GetAtomicNum() == 0 for atom in atoms):
        return "an atom of no element"
    if any(atom.GetFormalCharge() for atom in atoms):
        return "formal charges"
    if any(atom.GetNumRadicalElectrons() for atom in atoms):
        return "unpaired electrons"
    if any(atom.GetIsotope() for atom in atoms):
        return "isotopes"
    if len(Chem.GetMolFrags(mol)) > 1:
        return "several fragments"
    return None


def _bonds(mol: Mol) -> NDArray[np.int8]:
    bonds = np.zeros((mol.GetNumAtoms(), mol.GetNumAtoms()), dtype=np.int8)
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = bonds[j, i] = AROMATIC if bond.GetIsAromatic() else int(bond.GetBondTypeAsDouble())
    return bonds
