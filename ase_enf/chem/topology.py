"""Bonded atoms by distance, and the order of atoms in which a structure has the bond graph of a molecule.

The rule is looser than the table of ``ase_enf.chem.bonds``, whose limits fit relaxed structures, so that a thermal
vibration does not break a bond. Bond orders are ignored.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from numpy.typing import NDArray

from ase_enf.chem.convert import bond_graph

# Largest bond length in sums of covalent radii (Cordero et al. 2008): longer than thermally stretched bonds, shorter
# than distances between atoms two bonds apart.
REACH = 1.3


def connectivity(
    numbers: NDArray[np.integer],  # (M,)
    positions: NDArray[np.float64],  # (M, 3)
) -> NDArray[np.bool_]:
    """Finds the pairs of atoms closer than 1.3 times the sum of their covalent radii.

    Args:
        numbers: Atomic numbers, shape (M,).
        positions: Positions, shape (M, 3), Å.

    Returns:
        Whether two atoms are bonded, shape (M, M), symmetric, False on the diagonal.

    Example:
        >>> from ase.build import molecule
        >>> water = molecule("H2O")
        >>> connectivity(water.numbers, water.positions).sum(axis=1)
        array([2, 1, 1])
    """
    radii = REACH * covalent_radii[numbers]
    square = np.square(positions[:, None] - positions[None]).sum(axis=-1)
    bonded = square < np.square(radii[:, None] + radii[None])
    np.fill_diagonal(bonded, False)
    return bonded


class Topology:
    """The bond graph of a molecule, for comparison with other structures.

    Args:
        atoms: The molecule, positions in Å.

    Example:
        >>> from ase.build import molecule
        >>> ethanol = molecule("CH3CH2OH")
        >>> same = Topology(ethanol)
        >>> order = same.match(ethanol[::-1])
        >>> same.holds(ethanol[::-1][order].positions)
        True
        >>> same.match(molecule("CH3OCH3")) is None
        True
    """

    def __init__(self, atoms: Atoms) -> None:
        self.numbers = atoms.numbers.copy()
        self.bonds = connectivity(atoms.numbers, atoms.positions)
        self.graph = bond_graph(self.numbers, self.bonds.astype(np.int8))

    def holds(self, positions: NDArray[np.float64]) -> bool:
        """Whether atoms at given positions have exactly the bonds of the molecule.

        Args:
            positions: Positions, shape (M, 3), Å, atoms in the order of the molecule.
        """
        return np.array_equal(connectivity(self.numbers, positions), self.bonds)

    def match(self, atoms: Atoms) -> NDArray[np.int64] | None:
        """Returns an order in which the atoms of a structure have the elements and bonds of the molecule.

        If equal atoms allow several, it is the given order if that is one of them, otherwise the first that RDKit
        finds.

        Args:
            atoms: A structure, positions in Å.

        Returns:
            Indices, shape (M,), such that ``atoms[order]`` is the molecule; None if there is no such order.
        """
        if len(atoms) != len(self.numbers):
            return None
        if np.array_equal(atoms.numbers, self.numbers) and self.holds(atoms.positions):
            return np.arange(len(atoms))
        if not np.array_equal(np.sort(atoms.numbers), np.sort(self.numbers)):
            return None
        bonds = connectivity(atoms.numbers, atoms.positions)
        if bonds.sum() != self.bonds.sum():  # a subgraph of as many bonds is the graph
            return None
        found = bond_graph(atoms.numbers, bonds.astype(np.int8)).GetSubstructMatch(self.graph)
        return np.array(found, dtype=np.int64) if found else None
