"""Walkers of Hamiltonian Monte Carlo with the energies of any ASE calculator.

The total momentum of every draw is projected to zero in the metric of the inertias, so that relative positions are
sampled exactly. Inertias are not masses: the density does not depend on them, and heavier hydrogens allow longer steps.
Rotations of one side of the molecule about a bond pass barriers that no trajectory crosses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from ase_enf.chem.topology import Topology
from ase_enf.data import DataError
from ase_enf.data.mcmc import exchange, tuned
from ase_enf.data.series import Array

# Inertia of hydrogen, where that of all other elements is one; and the first length of a step, in the units that
# follow.
LIGHT, FIRST_STEP = 0.3, 0.02


class Forces:
    """U and F of arrays of positions by a calculator; where it fails, the energy is infinite.

    Args:
        atoms: A structure, which gives elements, charges and magnetic moments.
        calculator: An ASE calculator.

    Example:
        >>> from ase.calculators.lj import LennardJones
        >>> pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 2 ** (1 / 6)]])
        >>> energies, forces = Forces(pair, LennardJones(rc=50))(pair.positions[:, :, None, None])
        >>> energies.round(3), bool(np.abs(forces).max() < 1e-9)
        (array([[-1.]]), True)
    """

    def __init__(self, atoms: Atoms, calculator: Any) -> None:
        self.atoms = Atoms(atoms.numbers, atoms.positions, info=dict(atoms.info))
        for name in ("initial_charges", "initial_magmoms"):
            if name in atoms.arrays:
                self.atoms.set_array(name, atoms.arrays[name])
        self.atoms.calc = calculator
        self.calls = 0
        self.reason = ""

    def __call__(self, x: Array, wanted: NDArray[np.bool_] | None = None) -> tuple[Array, Array]:
        """Returns energies (K, C), eV, and forces (M, 3, K, C), eV/Å, at positions x (M, 3, K, C), Å."""
        energies, forces = np.full(x.shape[2:], np.inf), np.zeros_like(x)
        for place in np.ndindex(x.shape[2:]):
            positions = x[(..., *place)]
            if (wanted is not None and not wanted[place]) or not np.isfinite(positions).all():
                continue
            self.calls += 1
            try:
                self.atoms.positions = positions
                force = self.atoms.get_forces()  # first: a calculator that has forces has the energy, too
                energy = self.atoms.get_potential_energy()
            except Exception as error:  # each calculator has errors of its own
                self.reason = self.reason or f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if math.isfinite(energy) and np.isfinite(force).all():
                energies[place], forces[(..., *place)] = energy, force
        return energies, forces


class Turn(NamedTuple):
    """A bond about which one side of a molecule turns.

    Attributes:
        first: Index of the atom whose side stays.
        second: Index of the atom whose side turns.
        moved: Indices of the atoms that turn, shape (m,).
    """

    first: int
    second: int
    moved: NDArray[np.int64]


def turn(bonds: NDArray[np.bool_], first: int, second: int) -> Turn:
    """Returns which atoms turn about a bond: those on the side of its second atom, or of its first if they are fewer.

    Args:
        bonds: Which atoms are bonded, shape (M, M).
        first: Index of an atom.
        second: Index of an atom bonded to it.

    Raises:
        DataError: If the two are not bonded, or the bond is in a ring.

    Example:
        >>> chain = np.eye(4, k=1, dtype=bool) | np.eye(4, k=-1, dtype=bool)
        >>> turn(chain, 1, 2).moved, turn(chain, 0, 1).second
        (array([2, 3]), 0)
    """
    if not (0 <= min(first, second) and max(first, second) < len(bonds) and bonds[first, second]):
        raise DataError(f"turn ({first}, {second}): need the indices of two bonded atoms")
    cut = bonds.copy()
    cut[first, second] = cut[second, first] = False
    sides = connected_components(cut, directed=False)[1]
    if sides[first] == sides[second]:
        raise DataError(f"turn ({first}, {second}): this bond is in a ring; name another")
    if (sides == sides[second]).sum() > (sides == sides[first]).sum():
        first, second = second, first
    return Turn(first, second, np.flatnonzero(sides == sides[second]))


def _cross(a: Array, b: Array) -> Array:
    """Cross products of (3, K, C) and (m, 3, K, C), along the axis of size three."""
    return np.cross(a[None], b, axis=1)


class Walkers:
    """The state of C walkers of K replicas each; arrays end in (K, C).

    Args:
        starts: Structures that the walkers start from, in turn.
        evaluate: Returns energies and forces.
        kt: Thermal energy of each replica, eV, shape (K,); the first is that of the run.
        walkers: Number C of walkers.
        leapfrog: Number of steps of a trajectory.
        seed: Seed of all random numbers.
        topology: Bonds that no trajectory may change; None if all may change.
        turns: The bonds to turn about; see :func:`turn`.

    Raises:
        DataError: If the calculator gives no energy for a structure to start from.

    Example:
        >>> from ase.calculators.lj import LennardJones
        >>> pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.1]])
        >>> state = Walkers([pair], Forces(pair, LennardJones(rc=50)), np.array([0.1]), 3, 4, 0)
        >>> state.sweep(adapt=True).shape, state.x.shape
        ((1,), (2, 3, 1, 3))
    """

    def __init__(
        self,
        starts: list[Atoms],
        evaluate: Forces,
        kt: Array,  # (K,), eV
        walkers: int,
        leapfrog: int,
        seed: int,
        topology: Topology | None = None,
        turns: Sequence[Turn] = (),
    ) -> None:
        self.evaluate, self.kt, self.leapfrog, self.topology = evaluate, kt[:, None], leapfrog, topology
        self.turns = list(turns)
        self.rng = np.random.default_rng(seed)
        first = np.stack([starts[k % len(starts)].positions for k in range(walkers)], axis=-1)  # (M, 3, C)
        self.x = np.repeat((first - first.mean(axis=0))[:, :, None], len(kt), axis=2)
        self.inertia = np.where(starts[0].numbers == 1, LIGHT, 1.0)[:, None, None, None]
        self.energies, self.forces = evaluate(self.x)
        if not np.isfinite(self.energies).all():
            reason = evaluate.reason or "it is not finite"
            raise DataError(f"atoms: the calculator gives no energy for a structure to start from ({reason})")
        self.step_size = np.full((len(kt), 1), FIRST_STEP)
        self.sweeps = self.refused = 0

    def sweep(self, adapt: bool, hard: bool = False) -> Array:
        """Moves every replica by one trajectory and one turn about each bond, and exchanges neighbours.

        Args:
            adapt: Whether to tune the steps, which is allowed in the burn-in only.
            hard: Whether to tune them quickly.

        Returns:
            Rates of acceptance (K), of exchange (K − 1) and of the turns at the temperature of the run, in one array.
        """
        self.sweeps += 1
        with np.errstate(over="ignore", invalid="ignore"):  # a trajectory that runs into a wall is refused
            accepted = self._trajectory().mean(axis=1)
            turned = [self._turn(turn)[0].mean() for turn in self.turns]
            exchanged = np.zeros(len(self.kt) - 1)
            for parity in (0, 1):
                exchanged[parity::2] = exchange(
                    1.0 / self.kt, self.energies, (self.x, self.energies, self.forces), parity, self.rng
                )
        if adapt:
            self.step_size *= tuned(accepted)[:, None] ** (4 if hard else 1)
        return np.concatenate([accepted, exchanged, turned])

    def _trajectory(self) -> NDArray[np.bool_]:
        """Moves the replicas by one trajectory; returns which were accepted, shape (K, C)."""
        step = self.step_size * self.rng.uniform(0.7, 1.3, self.energies.shape)  # against periodic trajectories
        noise = self.rng.standard_normal(self.x.shape)
        momentum = np.sqrt(self.inertia * self.kt) * noise
        momentum -= self.inertia * (momentum.sum(axis=0) / self.inertia.sum())
        before = self._total(self.energies, momentum)
        x, forces, going = self.x, self.forces, np.full(before.shape, True)
        momentum = momentum + 0.5 * step * forces
        for i in range(self.leapfrog):
            x = x + step * momentum / self.inertia
            energies, forces = self.evaluate(x, going)
            going &= np.isfinite(energies)  # after a failure a trajectory is refused, and costs no more calls
            momentum += (0.5 if i == self.leapfrog - 1 else 1.0) * step * forces
        return self._decide(before - self._total(energies, momentum), x, energies, forces)

    def _turn(self, turn: Turn) -> NDArray[np.bool_]:
        """Turns one side of a bond by a uniform angle: a symmetric proposal that preserves volumes."""
        origin = self.x[turn.first]
        axis = self.x[turn.second] - origin
        axis = axis / np.linalg.norm(axis, axis=0)
        angle = self.rng.uniform(-np.pi, np.pi, self.energies.shape)
        arms = self.x[turn.moved] - origin
        along = (arms * axis).sum(axis=1, keepdims=True) * axis
        x = self.x.copy()
        x[turn.moved] = origin + along + np.cos(angle) * (arms - along) + np.sin(angle) * _cross(axis, arms)
        energies, forces = self.evaluate(x)
        return self._decide((self.energies - energies) / self.kt, x, energies, forces)

    def _decide(self, log_ratio: Array, x: Array, energies: Array, forces: Array) -> NDArray[np.bool_]:
        """Moves the replicas that the Metropolis test accepts, unless a bond has changed."""
        accepted = np.log(self.rng.random(log_ratio.shape)) < log_ratio
        if self.topology is not None:
            for place in zip(*np.nonzero(accepted), strict=True):
                if not self.topology.holds(x[(..., *place)]):
                    accepted[place] = False
                    self.refused += place[0] == 0
        x -= x.mean(axis=0)
        for old, new in ((self.x, x), (self.energies, energies), (self.forces, forces)):
            np.copyto(old, new, where=accepted)
        return accepted

    def _total(self, energies: Array, momentum: Array) -> Array:
        return (energies + 0.5 * (np.square(momentum) / self.inertia).sum(axis=(0, 1))) / self.kt

    def virial(self) -> Array:
        """Returns −x·F at the temperature of the run, eV, shape (C,)."""
        return -(self.x[:, :, 0] * self.forces[:, :, 0]).sum(axis=(0, 1))
