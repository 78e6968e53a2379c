"""``Atoms`` to RDKit molecules and SMILES: by the distance table, by RDKit's perception, or by Open Babel's.

The table (``ase_enf.chem.bonds``) is the published metric: it looks at distances only, never fails and never corrects
anything. RDKit and Open Babel search for a sensible Lewis structure; both are imported inside the functions that use
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.chem.bonds import bond_orders, structures

if TYPE_CHECKING:
    from rdkit.Chem import Mol

_MAX_ITERATIONS = 20_000  # limit of RDKit's search over bond orders, which does not end for some inputs


class PerceptionError(ValueError):
    """A structure for which RDKit or Open Babel finds no bond orders."""


class Reading(NamedTuple):
    """RDKit's reading of a bond graph.

    Attributes:
        smiles: Canonical SMILES of all its fragments; None if RDKit cannot sanitise the graph.
        largest: Canonical SMILES of its largest fragment; None if ``smiles`` is.
        complete: Whether the graph can be sanitised and no atom lacks a bond, that is, has unpaired electrons.
    """

    smiles: str | None
    largest: str | None
    complete: bool


def to_mol(atoms: Atoms, method: str = "table") -> Mol:
    """Returns an RDKit molecule with all atoms in their order and the positions as its conformer.

    Missing hydrogens are not added; an atom that lacks one is a radical. The molecule from "rdkit" is sanitised; those
    from "table" and "openbabel" are not, see ``sanitise``.

    Args:
        atoms: A molecule, positions in Å; it is not modified.
        method: "table" (the published distance table), "rdkit" (``rdDetermineBonds`` for a total charge of zero: formal
            charges where they give a closed shell, radicals where they do not, no stereochemistry) or "openbabel"
            (``ConnectTheDots`` and ``PerceiveBondOrders``).

    Returns:
        An ``rdkit.Chem.Mol`` with a 3D conformer.

    Raises:
        TypeError: If ``atoms`` is not an ``Atoms``.
        ValueError: If the method is unknown, or the structure is periodic or has a position that is not finite.
        PerceptionError: If "rdkit" or "openbabel" finds no bond orders.

    Reference:
        Kim & Kim 2015, Bull. Korean Chem. Soc. 36, 1769, for the search of "rdkit".

    Example:
        >>> from ase.build import molecule
        >>> mol = to_mol(molecule("C2H4"))
        >>> mol.GetNumAtoms(), mol.GetNumBonds(), mol.GetConformer().Is3D()
        (6, 5, True)
    """
    if method not in _PERCEIVE:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(map(repr, _PERCEIVE))}")
    if not isinstance(atoms, Atoms):
        raise TypeError(f"expected one ase.Atoms, got a {type(atoms).__name__}")
    structures(atoms)
    if not np.isfinite(atoms.positions).all():
        raise ValueError(f"{atoms.get_chemical_formula()} has positions that are NaN or infinite")
    return _PERCEIVE[method](atoms)


def to_smiles(atoms: Atoms, method: str = "table") -> str | None:
    """Returns the canonical SMILES of a structure, or None if it has none.

    Hydrogens are implicit, stereochemistry is left out, and fragments are separated by dots. An atom that lacks bonds
    is written as a radical, such as ``[CH3]``.

    Args:
        atoms: A molecule, positions in Å; it is not modified.
        method: "table", "rdkit" or "openbabel"; see ``to_mol``.

    Returns:
        The SMILES; None if no bond orders are found, RDKit cannot sanitise them, or an atom is ASE's dummy "X".

    Raises:
        TypeError: If ``atoms`` is not an ``Atoms``.
        ValueError: If the method is unknown, or the structure is periodic or has a position that is not finite.

    Example:
        >>> from ase.build import molecule
        >>> to_smiles(molecule("CH3CH2OH")), to_smiles(molecule("CH3"))
        ('CCO', '[CH3]')
    """
    try:
        mol = to_mol(atoms, method)
    except PerceptionError:
        return None
    sound = None if 0 in atoms.numbers else sanitise(mol)
    return None if sound is None else canonical_smiles(sound)


def bond_graph(
    numbers: NDArray[np.integer],  # (M,)
    orders: NDArray[np.integer],  # (M, M)
) -> Mol:
    """Returns the RDKit molecule of a matrix of bond orders, without conformer and not sanitised.

    Args:
        numbers: Atomic numbers, shape (M,).
        orders: Bond orders 0 to 3, symmetric, shape (M, M).

    Returns:
        A molecule whose atoms take no implicit hydrogens.

    Example:
        >>> import numpy as np
        >>> bond_graph(np.array([6, 8]), np.array([[0, 3], [3, 0]])).GetBondWithIdx(0).GetBondTypeAsDouble()
        3.0
    """
    from rdkit import Chem

    kinds = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    mol = Chem.RWMol()
    for number in numbers.tolist():
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    first, second = np.nonzero(np.triu(orders))
    for i, j, order in zip(first.tolist(), second.tolist(), orders[first, second].tolist(), strict=True):
        mol.AddBond(i, j, kinds[order])
    return mol.GetMol()


def read_graph(
    numbers: NDArray[np.integer],  # (M,)
    orders: NDArray[np.integer],  # (M, M)
) -> Reading:
    """Reads a matrix of bond orders with RDKit and returns all that the metrics need, in one pass.

    Args:
        numbers: Atomic numbers, shape (M,).
        orders: Bond orders 0 to 3, symmetric, shape (M, M).

    Returns:
        SMILES of the whole graph and of its largest fragment, and whether no atom lacks a bond.

    Example:
        >>> import numpy as np
        >>> read_graph(np.array([8, 1, 2]), np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]]))
        Reading(smiles='[He].[OH]', largest='[OH]', complete=False)
    """
    mol = None if 0 in numbers else sanitise(bond_graph(numbers, orders))  # RDKit reads X as a wildcard
    if mol is None or mol.GetNumAtoms() == 0:
        return Reading(None, None, False)
    smiles = canonical_smiles(mol)
    largest = smiles if "." not in smiles else largest_fragment(mol)
    return Reading(smiles, largest, not any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()))


def sanitise(mol: Mol) -> Mol | None:
    """Returns a sanitised copy of a molecule (valences, aromaticity, conjugation), or None if RDKit rejects it.

    Args:
        mol: A molecule; it is not modified.

    Returns:
        The copy, or None.

    Example:
        >>> from ase.build import molecule
        >>> sanitise(to_mol(molecule("C6H6"), "rdkit")).GetBondWithIdx(0).GetIsAromatic()
        True
    """
    from rdkit import Chem

    copy = Chem.Mol(mol)
    with quiet_rdkit():
        try:
            Chem.SanitizeMol(copy)
        except ValueError:  # RDKit's MolSanitizeException is a subclass
            return None
    return copy


def canonical_smiles(mol: Mol) -> str:
    """Returns the canonical SMILES of a molecule, with implicit hydrogens and no stereochemistry, isotopes or labels.

    Args:
        mol: A sanitised molecule; it is not modified.

    Returns:
        The SMILES, which does not depend on the order of the atoms.

    Example:
        >>> from rdkit import Chem
        >>> canonical_smiles(Chem.MolFromSmiles("O([H])[C@H](F)C"))
        'CC(O)F'
    """
    from rdkit import Chem

    with quiet_rdkit():
        return Chem.MolToSmiles(Chem.RemoveHs(_unmarked(mol)), isomericSmiles=False)


def _unmarked(mol: Mol) -> Mol:
    """Returns a copy without stereochemistry, isotopes and labels, as RDKit removes no hydrogen marked by one."""
    from rdkit import Chem

    plain = Chem.Mol(mol)
    Chem.RemoveStereochemistry(plain)
    for atom in plain.GetAtoms():
        atom.SetIsotope(0)
        atom.SetAtomMapNum(0)
    return plain


def normalise_smiles(smiles: str) -> str | None:
    """Returns a SMILES in the form that ``to_smiles`` writes.

    Args:
        smiles: Any SMILES.

    Returns:
        The canonical SMILES without stereochemistry, isotopes and labels, or None if RDKit cannot read it.

    Example:
        >>> normalise_smiles("OCC"), normalise_smiles("[2H]C"), normalise_smiles("C(")
        ('CCO', 'C', None)
    """
    from rdkit import Chem

    with quiet_rdkit():
        mol = Chem.MolFromSmiles(smiles)
    return None if mol is None else canonical_smiles(mol)


def largest_fragment(mol: Mol) -> str:
    """Returns the canonical SMILES of the fragment with the most atoms, hydrogens included.

    Among fragments of equal size, the last SMILES in alphabetical order is taken, so that the result does not depend on
    the order of the atoms.

    Args:
        mol: A sanitised molecule with at least one atom; it is not modified.

    Returns:
        The SMILES.

    Example:
        >>> from rdkit import Chem
        >>> largest_fragment(Chem.AddHs(Chem.MolFromSmiles("CO.C")))
        'CO'
    """
    from rdkit import Chem

    fragments = Chem.GetMolFrags(mol, asMols=True, sanitizeFrags=False)
    most = max(fragment.GetNumAtoms() for fragment in fragments)
    return max(canonical_smiles(fragment) for fragment in fragments if fragment.GetNumAtoms() == most)


def rdkit_version() -> str:
    """Returns the version of RDKit; canonical SMILES are comparable only within one version.

    Example:
        >>> rdkit_version().split(".")[0].isdigit()
        True
    """
    from rdkit import rdBase

    return rdBase.rdkitVersion


def _table_mol(atoms: Atoms) -> Mol:
    orders = bond_orders(atoms.numbers[None], atoms.positions[None])[0]
    return _with_conformer(bond_graph(atoms.numbers, orders), atoms)


def _rdkit_mol(atoms: Atoms) -> Mol:
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    unbonded = _with_conformer(bond_graph(atoms.numbers, np.zeros((len(atoms), len(atoms)), dtype=np.int8)), atoms)
    for charged in (True, False):  # nitro groups need formal charges; radicals are found only without them
        mol = Chem.Mol(unbonded)
        with quiet_rdkit():
            try:
                rdDetermineBonds.DetermineBonds(
                    mol, charge=0, allowChargedFragments=charged, embedChiral=False, maxIterations=_MAX_ITERATIONS
                )
                return mol
            except (ValueError, RuntimeError) as error:  # MolSanitizeException is a ValueError
                reason = error
    raise PerceptionError(f"RDKit finds no bonds for {atoms.get_chemical_formula()}: {reason}") from reason


def _openbabel_mol(atoms: Atoms) -> Mol:
    from openbabel import openbabel as ob  # not pybel: it fails without libXrender

    mol = ob.OBMol()
    mol.BeginModify()
    for number, (x, y, z) in zip(atoms.numbers.tolist(), atoms.positions.tolist(), strict=True):
        atom = mol.NewAtom()
        atom.SetAtomicNum(number)
        atom.SetVector(x, y, z)
    mol.EndModify()
    with _quiet_openbabel(ob):
        mol.ConnectTheDots()
        mol.PerceiveBondOrders()
    orders = np.zeros((len(atoms), len(atoms)), dtype=np.int8)
    for bond in ob.OBMolBondIter(mol):
        i, j = bond.GetBeginAtomIdx() - 1, bond.GetEndAtomIdx() - 1  # Open Babel counts from 1
        orders[i, j] = orders[j, i] = bond.GetBondOrder()
    if orders.max(initial=0) > 3:
        raise PerceptionError(f"Open Babel gives {atoms.get_chemical_formula()} a bond of order {orders.max()}")
    graph = bond_graph(atoms.numbers, orders)
    for atom, perceived in zip(graph.GetAtoms(), ob.OBMolAtomIter(mol), strict=True):
        atom.SetFormalCharge(perceived.GetFormalCharge())
    return _with_conformer(graph, atoms)


_PERCEIVE: dict[str, Callable[[Atoms], Mol]] = {
    "table": _table_mol,
    "rdkit": _rdkit_mol,
    "openbabel": _openbabel_mol,
}


def _with_conformer(mol: Mol, atoms: Atoms) -> Mol:
    """Makes the positions of atoms, Å, the only conformer of a molecule, which it changes and returns."""
    from rdkit import Chem

    conformer = Chem.Conformer(len(atoms))
    conformer.Set3D(True)
    if len(atoms):
        conformer.SetPositions(np.array(atoms.positions, dtype=np.float64))
    mol.RemoveAllConformers()
    mol.AddConformer(conformer, assignId=True)
    return mol


@contextmanager
def quiet_rdkit() -> Iterator[None]:
    """Suppresses RDKit's messages about broken molecules."""
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield


@contextmanager
def _quiet_openbabel(ob: object) -> Iterator[None]:
    """Suppresses Open Babel's messages, and restores its global log level at the end."""
    log = ob.obErrorLog
    level = log.GetOutputLevel()
    log.SetOutputLevel(-1)
    try:
        yield
    finally:
        log.SetOutputLevel(level)
