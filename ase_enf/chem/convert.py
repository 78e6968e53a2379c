"""``Atoms`` to RDKit molecules and SMILES: by the distance table, by RDKit's perception, by Open Babel's.

The three ways differ in what they may do. The table (``ase_enf.chem.bonds``) is the published metric: it looks at
distances only, never fails and never corrects anything. RDKit and Open Babel look for a sensible Lewis structure.
RDKit and Open Babel are imported inside the functions that use them.
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

_MAX_ITERATIONS = 20_000  # of RDKit's search over bond orders: without a bound some inputs never return


class PerceptionError(ValueError):
    """A structure for which RDKit or Open Babel finds no bond orders."""


class Reading(NamedTuple):
    """What RDKit makes of a bond graph.

    Attributes:
        smiles: canonical SMILES of all its fragments, None where RDKit cannot sanitise the graph.
        largest: canonical SMILES of its largest fragment, None where ``smiles`` is.
        complete: whether it can be sanitised and no atom lacks a bond (equivalently an implicit hydrogen).
    """

    smiles: str | None
    largest: str | None
    complete: bool


def to_mol(atoms: Atoms, method: str = "table") -> Mol:
    """An RDKit molecule with all atoms, in their order, and their positions as its conformer.

    Nothing is added: hydrogens that are missing stay missing (the atom is a radical). The molecule of "table" and
    "openbabel" is not yet sanitised, see ``sanitise``; that of "rdkit" is.

    Args:
        atoms: A molecule, positions in Å. It is not modified.
        method: "table" (the published distance table), "rdkit" (``rdDetermineBonds`` for a total charge of zero: formal
            charges where they make a closed shell, radicals where they do not, no stereochemistry) or "openbabel"
            (``ConnectTheDots``, ``PerceiveBondOrders``).

    Returns:
        An ``rdkit.Chem.Mol`` with a 3D conformer.

    Raises:
        TypeError: ``atoms`` is not an ``Atoms``.
        ValueError: The method is unknown, or the structure is periodic or has a position that is not finite.
        PerceptionError: "rdkit" or "openbabel" finds no bond orders.

    Reference:
        Kim & Kim 2015, Bull. Korean Chem. Soc. 36, 1769 for the search of "rdkit".

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
    """The canonical SMILES of a structure, or None where there is none.

    Hydrogens are implicit, stereochemistry is left out, fragments are separated by dots. An atom that lacks bonds is
    written as the radical it is, ``[CH3]``.

    Args:
        atoms: A molecule, positions in Å. It is not modified.
        method: "table", "rdkit" or "openbabel", see ``to_mol``.

    Returns:
        The SMILES; None when no bond orders are found, RDKit cannot sanitise them, or an atom is ASE's dummy "X".

    Raises:
        TypeError: ``atoms`` is not an ``Atoms``.
        ValueError: The method is unknown, or the structure is periodic or has a position that is not finite.

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
    """The RDKit molecule of a matrix of bond orders, without conformer and not sanitised.

    Args:
        numbers: shape (M,), atomic numbers.
        orders: shape (M, M), symmetric, 0 to 3.

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
    """What RDKit makes of a matrix of bond orders: everything the metrics ask of a structure, in one pass.

    Args:
        numbers: shape (M,), atomic numbers.
        orders: shape (M, M), symmetric, 0 to 3.

    Returns:
        SMILES of the whole and of its largest fragment, and whether no atom lacks a bond.

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
    """A sanitised copy of a molecule (valences, aromaticity, conjugation), or None where RDKit refuses.

    Args:
        mol: A molecule. It is not modified.

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
        except ValueError:  # every MolSanitizeException of RDKit is one
            return None
    return copy


def canonical_smiles(mol: Mol) -> str:
    """The canonical SMILES of a sanitised molecule, hydrogens implicit, without stereochemistry, isotopes or labels.

    Args:
        mol: A sanitised molecule. It is not modified.

    Returns:
        The SMILES, the same for every order of the atoms.

    Example:
        >>> from rdkit import Chem
        >>> canonical_smiles(Chem.MolFromSmiles("O([H])[C@H](F)C"))
        'CC(O)F'
    """
    from rdkit import Chem

    with quiet_rdkit():
        return Chem.MolToSmiles(Chem.RemoveHs(_unmarked(mol)), isomericSmiles=False)


def _unmarked(mol: Mol) -> Mol:
    """The molecule without stereochemistry, isotopes and labels: RDKit removes no hydrogen that is marked by one."""
    from rdkit import Chem

    plain = Chem.Mol(mol)
    Chem.RemoveStereochemistry(plain)
    for atom in plain.GetAtoms():
        atom.SetIsotope(0)
        atom.SetAtomMapNum(0)
    return plain


def normalise_smiles(smiles: str) -> str | None:
    """Any SMILES in the form that ``to_smiles`` writes.

    Args:
        smiles: Any SMILES.

    Returns:
        The canonical SMILES without stereochemistry, isotopes and labels, or None where RDKit cannot read it.

    Example:
        >>> normalise_smiles("OCC"), normalise_smiles("[2H]C"), normalise_smiles("C(")
        ('CCO', 'C', None)
    """
    from rdkit import Chem

    with quiet_rdkit():
        mol = Chem.MolFromSmiles(smiles)
    return None if mol is None else canonical_smiles(mol)


def largest_fragment(mol: Mol) -> str:
    """The canonical SMILES of the connected fragment with the most atoms (hydrogens count).

    Among fragments of one size the last SMILES in alphabetical order is taken: the answer then does not depend on
    the order of the atoms.

    Args:
        mol: A sanitised molecule with at least one atom. It is not modified.

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
    """The version of the installed RDKit: canonical SMILES are comparable within one version.

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
    for charged in (True, False):  # nitro groups need formal charges; radicals are found only without
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
    """Gives a molecule of this module the positions of its atoms, Å, as its only conformer."""
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
    """Keeps RDKit's messages about broken molecules off the terminal, and restores its settings at the end."""
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield


@contextmanager
def _quiet_openbabel(ob: object) -> Iterator[None]:
    """The same for Open Babel, whose log level is global."""
    log = ob.obErrorLog
    level = log.GetOutputLevel()
    log.SetOutputLevel(-1)
    try:
        yield
    finally:
        log.SetOutputLevel(level)
