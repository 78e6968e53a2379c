"""Conformers of a molecule with their free energies, for a thermal set of very many molecules.

Conformers come from distance geometry and MMFF94. Each is relaxed by another method, with the curvature
of MMFF94 at the start. Its free energy in Cartesian coordinates is harmonic,

    F = U − (kT / 2) Σ_k ln(2π kT / λ_k) − (kT / 2) ln det I,

with the non-zero eigenvalues λ of the Hessian and the inertia tensor I of atoms of mass one. Attempts are assumed to
fall on the minima uniformly, so that one found twice counts twice: equal atoms in other places, and mirror images, are
minima of their own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.optimize import BFGS
from ase.units import kB
from numpy.typing import NDArray

from ase_enf.chem.mmff import MMFF94, conformers
from ase_enf.chem.topology import Topology
from ase_enf.ensemble.calculators import calculator

Array = NDArray[np.float64]
# Largest number of steps, and of an atom in one, Å; the force at which they end, eV/Å.
STEPS, LONGEST, SETTLED = 30, 0.15, 0.05
# The smallest curvature, and that of rigid motions, eV/Å²; the length of a finite difference, Å.
SOFTEST, RIGID, DIFFERENCE = 0.15, 70.0, 1e-3
# Attempts whose MMFF94 energies differ by less have the same minimum or equivalent ones, eV.
SAME = 2e-4
# A minimum is left out when the energy by the method would still fall by more, eV.
UNSETTLED = 0.03


class Well(NamedTuple):
    """A minimum."""

    atoms: Atoms
    forces: Array  # (M, 3), eV/Å, by the method
    free_energy: float  # eV
    found: int  # how often


def wells(atoms: Atoms, method: str, temperature: float, attempts: int, seed: int) -> list[Well]:
    """Finds minima of a molecule and their harmonic free energies.

    Args:
        atoms: The molecule.
        method: Name of a calculator.
        temperature: K.
        attempts: Number of embedded conformers.
        seed: Seed of the embedding.

    Returns:
        The minima that keep the bonds of the molecule; none if all fail.

    Raises:
        CalculatorSetupError: If MMFF94 has no parameters for the molecule.
    """
    embedded = conformers(atoms, attempts, seed)
    energies = [MMFF94(start).surface(start.positions)[0] for start in embedded]
    groups: list[list[int]] = []
    for k in np.argsort(energies):
        if groups and energies[k] - energies[groups[-1][0]] < SAME:
            groups[-1].append(int(k))
        else:
            groups.append([int(k)])
    topology = Topology(atoms)
    found = [settled(embedded[group[0]], method, temperature, len(group)) for group in groups]
    return [well for well in found if well is not None and topology.holds(well.atoms.positions)]


def settled(start: Atoms, method: str, temperature: float, found: int) -> Well | None:
    """Moves a conformer to a minimum by a method; None if it does not get there."""
    atoms = start.copy()
    atoms.calc = calculator(method, atoms)
    curvatures, modes = hessian(atoms)
    stiffness = np.maximum(curvatures, SOFTEST)
    optimiser = BFGS(atoms, logfile=None, maxstep=LONGEST)
    optimiser.H0 = RIGID * np.eye(len(modes)) + (modes * (stiffness - RIGID)) @ modes.T
    optimiser.run(fmax=SETTLED, steps=STEPS)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    below = 0.5 * float(np.sum((forces.ravel() @ modes) ** 2 / stiffness))
    if not below < UNSETTLED:
        return None
    kt = kB * temperature
    centred = atoms.positions - atoms.positions.mean(axis=0)
    inertia = np.sum(centred**2) * np.eye(3) - centred.T @ centred
    moments = np.linalg.eigvalsh(inertia)  # one is zero for a linear molecule
    entropy = 0.5 * (np.sum(np.log(2 * math.pi * kt / stiffness)) + np.sum(np.log(moments[moments > 1e-6])))
    return Well(Atoms(atoms.numbers, atoms.positions), forces, energy - below - kt * float(entropy), found)


def hessian(atoms: Atoms) -> tuple[Array, Array]:
    """Returns the eigenvalues, shape (3 M − 6,), eV/Å², and eigenvectors of MMFF94's Hessian without rigid motions."""
    surface, x = MMFF94(atoms).surface, atoms.positions
    size = x.size
    matrix = np.empty((size, size))
    for k, step in enumerate(DIFFERENCE * np.eye(size).reshape(size, -1, 3)):
        matrix[k] = ((surface(x - step)[1] - surface(x + step)[1]) / (2 * DIFFERENCE)).ravel()
    centred = x - x.mean(axis=0)
    rigid = [np.tile(axis, (len(x), 1)).ravel() for axis in np.eye(3)]
    rigid += [np.cross(axis, centred).ravel() for axis in np.eye(3)]
    inner = np.linalg.svd(np.array(rigid))[2][np.linalg.matrix_rank(np.array(rigid), tol=1e-6) :].T  # (3 M, 3 M − 6)
    values, vectors = np.linalg.eigh(inner.T @ (matrix + matrix.T) @ inner / 2)
    return values, inner @ vectors


def populations(found: list[Well], temperature: float) -> Array:
    """Returns the probabilities of minima, n exp(−F / kT) / Σ."""
    logs = np.array([math.log(well.found) - well.free_energy / (kB * temperature) for well in found])
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
