"""MMFF94 corrected so that its forces at one geometry are those of another method, from one calculation by that method.

The stiffnesses of a force field are about right, but its minima are not: its bonds and angles are shifted by half a
standard deviation or more of a thermal ensemble at 300 K. A constant force between the atoms of every pair at most
three bonds apart shifts the minima and leaves the stiffnesses almost unchanged.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.sparse.csgraph import shortest_path

from ase_enf.chem.mmff import MMFF94
from ase_enf.chem.topology import Topology

Array = NDArray[np.float64]
# Most bonds between the atoms of a pair: with three, the pairs determine bond lengths, angles and torsions.
REACH = 3
# Combinations of pairs with singular values below this fraction of the largest (planar parts) get no force.
_CUT = 1e-2


class Anchored:
    """U(x) = U_MMFF(x) − Σ_ij c_ij |x_i − x_j|, with c such that −∇U(x_0) matches given forces.

    The coefficients c are the least-squares solution of smallest norm. An object is called as ``ase_enf.data.walkers``
    calls an energy.

    Args:
        atoms: The molecule at x_0, Å.
        forces: Its forces at x_0 by another method, shape (M, 3), eV/Å, without net force or torque.

    Raises:
        ValueError: If there is not one force for each atom.
        CalculatorSetupError: If MMFF94 has no parameters for the molecule, or bonds are not found.

    Example:
        >>> from ase.build import molecule
        >>> water = molecule("H2O")
        >>> surface = Anchored(water, np.zeros((3, 3)))
        >>> energies, forces = surface(water.positions[:, :, None, None])
        >>> energies.shape, bool(np.abs(forces).max() < 1e-9)
        ((1, 1), True)
    """

    reason = ""

    def __init__(self, atoms: Atoms, forces: Array) -> None:
        if np.shape(forces) != (len(atoms), 3):
            raise ValueError(f"forces of shape {np.shape(forces)}: need ({len(atoms)}, 3), one for each atom")
        self.field = MMFF94(atoms)
        apart = shortest_path(Topology(atoms).bonds.astype(float), unweighted=True)
        i, j = np.nonzero(np.triu(apart <= REACH, 1))
        self.incidence = (np.eye(len(atoms))[i] - np.eye(len(atoms))[j]).T  # (M, pairs)
        unit = self.incidence.T @ atoms.positions
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        gradients = np.einsum("mp,pk->pmk", self.incidence, unit).reshape(len(i), -1)  # of the distances
        missing = np.ravel(forces - self.field.surface(atoms.positions)[1])
        self.strengths: Array = np.linalg.lstsq(gradients.T, missing, rcond=_CUT)[0]
        self.residual = float(np.abs(self.strengths @ gradients - missing).max())
        self.calls = 0

    def __call__(self, x: Array, wanted: NDArray[np.bool_] | None = None) -> tuple[Array, Array]:
        """Computes energies and forces of several geometries.

        Args:
            x: Positions, shape (M, 3, K, C), Å.
            wanted: Which of them to compute, shape (K, C); all when None. The others get an infinite energy.

        Returns:
            Energies, shape (K, C), eV, infinite where positions are not finite; and forces, shape (M, 3, K, C), eV/Å.
        """
        energies, forces = np.full(x.shape[2:], np.inf), np.zeros_like(x)
        for place in np.ndindex(x.shape[2:]):
            here = x[(..., *place)]
            if (wanted is not None and not wanted[place]) or not np.isfinite(here).all():
                continue
            self.calls += 1
            energies[place], forces[(..., *place)] = self._at(here)
        return energies, forces

    def _at(self, positions: Array) -> tuple[float, Array]:
        energy, forces = self.field.surface(positions)
        difference = self.incidence.T @ positions
        r = np.sqrt(np.square(difference).sum(axis=1))
        return energy - float(self.strengths @ r), forces + self.incidence @ (
            (self.strengths / r)[:, None] * difference
        )
