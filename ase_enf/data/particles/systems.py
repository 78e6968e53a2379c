"""The systems by name, with their double-well and Lennard-Jones energies, and configurations as ``Atoms``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike

from ase_enf.data import DataError
from ase_enf.data.particles.system import Array, System


@dataclass(frozen=True)
class DoubleWell:
    """Pair energy of DW4, ``v(d) = b (d − d0)² + c (d − d0)⁴`` (the linear term of Köhler et al. 2020 has a = 0).

    Example:
        >>> DoubleWell()(np.array([36.0]))[0]
        array([-1.6])
    """

    b: float = -4.0
    c: float = 0.9
    d0: float = 4.0

    def __call__(self, r2: Array) -> tuple[Array, Array]:
        """Returns v and v'(d)/d at squared distances."""
        d = r2**0.5  # also for tensors
        y = d - self.d0
        y2 = y * y
        return y2 * (self.b + self.c * y2), y * (2 * self.b + 4 * self.c * y2) / d


@dataclass(frozen=True)
class LennardJonesPair:
    """Pair energy of LJ13 and LJ55, ``v(d) = ε [d⁻¹² − 2 d⁻⁶]``, with its minimum −ε at d = r_m = 1.

    Example:
        >>> LennardJonesPair(2.0)(np.array([1.0]))[0]
        array([-2.])
    """

    epsilon: float = 1.0

    def __call__(self, r2: Array) -> tuple[Array, Array]:
        """Returns v and v'(d)/d at squared distances."""
        inverse = 1.0 / r2
        s = inverse * inverse * inverse
        value = s - 2.0
        value = value * s
        slope = s - 1.0
        slope *= s
        slope *= inverse
        slope *= -12.0 * self.epsilon
        value = value * self.epsilon
        return value, slope


def lennard_jones(factor: float = 1.0, n_atoms: int = 13, name: str | None = None) -> System:
    """Lennard-Jones particles in the harmonic trap of LJ13 and LJ55.

    Args:
        factor: Factor of the pair energy, but not of the trap.
        n_atoms: Number M of particles.
        name: Its name; by default ``lj13``, ``lj13-factor2`` and so on.

    Returns:
        The system, in three dimensions.

    Raises:
        DataError: If factor is not positive, or there are fewer than two particles.

    Example:
        >>> lennard_jones(2.0).name, lennard_jones(n_atoms=2).degrees_of_freedom
        ('lj13-factor2', 3)
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise DataError(f"factor={factor}: must be positive; 1 is the paper's, 2 that of Klein and Noé 2023")
    if not (n_atoms >= 2 and n_atoms == int(n_atoms)):
        raise DataError(f"n_atoms={n_atoms}: must be a whole number, at least 2")
    name = name or f"lj{n_atoms}" + ("" if factor == 1 else f"-factor{factor:g}")
    # Colder and larger systems need more; with these, neighbours of LJ55 still exchange at a rate of a third.
    rungs = max(8, round((0.7 + 0.35 * factor) * 13 * (n_atoms / 13) ** (2 / 3)))
    return System(name, n_atoms, 3, LennardJonesPair(factor), trap=1.0, reference=1.0, power=4, rungs=rungs)


SYSTEMS = {
    "dw4": System("dw4", 4, 2, DoubleWell(), reference=0.22, power=2, rungs=10),
    "lj13": lennard_jones(1.0),
    "lj13-factor2": lennard_jones(2.0),
    "lj55-factor2": lennard_jones(2.0, 55),
}
"""Name → system."""


def resolve(system: System | str) -> System:
    """Returns the system of a name.

    Raises:
        DataError: If there is no such system.

    Example:
        >>> resolve("lj13").degrees_of_freedom
        36
    """
    if isinstance(system, System):
        return system
    if system not in SYSTEMS:
        raise DataError(f"system {system!r} is none of {', '.join(SYSTEMS)}")
    return SYSTEMS[system]


def to_atoms(system: System | str, positions: ArrayLike) -> list[Atoms]:
    """Returns configurations as ``Atoms``: ``X4`` in the xy plane for DW4, ``X13`` for LJ13, ``X55`` for LJ55.

    Args:
        system: A system or its name.
        positions: Shape (B, M, n).

    Returns:
        B structures, without a calculator; ``DW4``, ``LJ13`` and ``LJ55`` are those for energies.

    Raises:
        DataError: If the shape is not that of the system.

    Example:
        >>> to_atoms("dw4", np.ones((2, 4, 2)))[1]
        Atoms(symbols='X4', pbc=False)
    """
    return flat_atoms(resolve(system).checked(positions))


def flat_atoms(positions: Array) -> list[Atoms]:
    """Returns configurations of any system, shape (B, M, n), as ``Atoms`` of dummy symbols, in the xy plane if n is 2.

    Example:
        >>> flat_atoms(np.ones((2, 3, 2)))[0]
        Atoms(symbols='X3', pbc=False)
    """
    full = np.zeros((*positions.shape[:2], 3))
    full[:, :, : positions.shape[2]] = positions
    return [Atoms(f"X{full.shape[1]}", one) for one in full]
