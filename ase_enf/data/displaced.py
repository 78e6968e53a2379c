"""Thermally displaced structures of a molecule about a given geometry, for sets of very many molecules.

Hamiltonian Monte Carlo from the geometry, on MMFF94 corrected to have the forces of another method there
(``ase_enf.chem.anchored``). With GFN2-xTB as the method, the mean GFN2-xTB energy of such structures above the minimum
is within about ten percent of that of its own ensemble, (3 M − 6) kT / 2 for a harmonic molecule; with MMFF94 alone it
is half as much again. A molecule needs one calculation by the method instead of some two hundred.
"""

from __future__ import annotations

import math

import numpy as np
from ase import Atoms
from ase.units import kB
from numpy.typing import NDArray

from ase_enf.chem.anchored import Anchored
from ase_enf.chem.topology import Topology
from ase_enf.data import DataError
from ase_enf.data.walkers import Walkers

# Steps of a trajectory; their length in the units of ``Walkers`` (nine in ten trajectories of a molecule of 18 atoms
# are accepted at 300 K); trajectories before the first structure, and between two structures.
LEAPFROG, STEP, BURN_IN, SPACING = 24, 0.055, 6, 4
# Below this rate of acceptance MMFF94 does not suit the forces: bonds differ, or it does not know the strain.
LEAST_ACCEPTED = 0.4


def displaced(atoms: Atoms, forces: NDArray[np.floating], temperature: float, n: int = 1, seed: int = 0) -> list[Atoms]:
    """Returns structures of a molecule, displaced as at a temperature.

    Args:
        atoms: The molecule at the geometry from which it is displaced, near a minimum, Å.
        forces: Its forces there by the method to imitate, shape (M, 3), eV/Å; zeros make the geometry a minimum.
        temperature: K.
        n: Number of structures.
        seed: Seed of the random numbers, at least 0.

    Returns:
        n centred structures with the bonds of the molecule; ``info`` has their ``thermal_temperature`` in K.

    Raises:
        DataError: If a number is out of range, or if most trajectories are refused.
        CalculatorSetupError: If MMFF94 has no parameters for the molecule.

    Reference:
        Duane, Kennedy, Pendleton & Roweth 1987, Phys. Lett. B 195, 216.

    Example:
        >>> from ase.build import molecule
        >>> ethanol = molecule("CH3CH2OH")
        >>> frames = displaced(ethanol, np.zeros((9, 3)), 300.0, n=2)
        >>> len(frames), bool(np.abs(frames[0].get_distance(0, 1) - ethanol.get_distance(0, 1)) < 0.2)
        (2, True)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature={temperature}: must be a positive number of K")
    if n < 1 or seed < 0:
        raise DataError(f"n={n}, seed={seed}: need at least one structure, and a seed of at least 0")
    topology = Topology(atoms)
    kt = np.array([kB * temperature])
    state = Walkers([atoms], Anchored(atoms, forces), kt, 1, LEAPFROG, seed, topology)
    state.step_size[:] = STEP
    frames, accepted = [], []
    for k in range(n):
        accepted += [state.sweep(adapt=False)[0] for _ in range(SPACING if k else BURN_IN)]
        frames.append(Atoms(atoms.numbers, state.x[:, :, 0, 0].copy()))
        frames[-1].info["thermal_temperature"] = float(temperature)
    if np.mean(accepted) < LEAST_ACCEPTED:
        raise DataError(
            f"{atoms.symbols}: {np.mean(accepted):.0%} of the trajectories were accepted: MMFF94 does not know this "
            "molecule; leave it out, or sample it by the method itself"
        )
    return frames
