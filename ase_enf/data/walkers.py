"""Walkers of Hamiltonian Monte Carlo on the energies of any ASE calculator.

The total momentum is zero in every draw, in the metric of the inertias, so that the relative positions are sampled
exactly. The inertias are no masses: the density does not depend on them, and a heavier hydrogen allows longer steps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.chem.topology import Topology
from ase_enf.data import DataError
from ase_enf.data.mcmc import exchange, tuned
from ase_enf.data.series import Array

# Inertia of hydrogen, that of any other element being one, and the first step in the units that follow.
LIGHT, FIRST_STEP = 0.3, 0.02


class Forces:
    """U and F of arrays of positions by a calculator; one that it cannot do has an infinite energy.

    Args:
        atoms: A structure, of which elements, charges and magnetic moments are kept.
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
        """Takes (M, 3, K, C), Å; returns (K, C), eV, and (M, 3, K, C), eV / Å."""
        energies, forces = np.full(x.shape[2:], np.inf), np.zeros_like(x)
        for place in np.ndindex(x.shape[2:]):
            positions = x[(..., *place)]
            if (wanted is not None and not wanted[place]) or not np.isfinite(positions).all():
                continue
            self.calls += 1
            try:
                self.atoms.positions = positions
                energy, force = self.atoms.get_potential_energy(), self.atoms.get_forces()
            except Exception as error:  # each calculator has errors of its own
                self.reason = self.reason or f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if math.isfinite(energy) and np.isfinite(force).all():
                energies[place], forces[(..., *place)] = energy, force
        return energies, forces


class Walkers:
    """The state of C walkers of K replicas each; arrays end in (K, C).

    Args:
        starts: Structures from which the walkers start in turn.
        evaluate: Energies and forces.
        kt: Thermal energy of each replica, eV, shape (K,); the first is that of the run.
        walkers: C.
        leapfrog: Steps of a trajectory.
        seed: Of everything.
        topology: Bonds that no trajectory may change, None for all.

    Raises:
        DataError: If there is no energy of a structure to start from.

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
    ) -> None:
        self.evaluate, self.kt, self.leapfrog, self.topology = evaluate, kt[:, None], leapfrog, topology
        self.rng = np.random.default_rng(seed)
        first = np.stack([starts[k % len(starts)].positions for k in range(walkers)], axis=-1)  # (M, 3, C)
        self.x = np.repeat((first - first.mean(axis=0))[:, :, None], len(kt), axis=2)
        self.inertia = np.where(starts[0].numbers == 1, LIGHT, 1.0)[:, None, None, None]
        self.energies, self.forces = evaluate(self.x)
        if not np.isfinite(self.energies).all():
            reason = evaluate.reason or "it is not finite"
            raise DataError(f"atoms: the calculator has no energy of a structure to start from ({reason})")
        self.step_size = np.full((len(kt), 1), FIRST_STEP)
        self.sweeps = self.refused = 0

    def sweep(self, adapt: bool, hard: bool = False) -> Array:
        """Moves every replica by one trajectory and exchanges neighbours.

        Args:
            adapt: Whether to tune the steps, which is right in the burn-in only.
            hard: Whether to tune them in large paces.

        Returns:
            Rates of acceptance (K) and of exchange (K − 1), in one array.
        """
        self.sweeps += 1
        with np.errstate(over="ignore", invalid="ignore"):  # a trajectory may run into a wall: it is refused
            accepted = self._trajectory().mean(axis=1)
            exchanged = np.zeros(len(self.kt) - 1)
            for parity in (0, 1):
                exchanged[parity::2] = exchange(
                    1.0 / self.kt, self.energies, (self.x, self.energies, self.forces), parity, self.rng
                )
        if adapt:
            self.step_size *= tuned(accepted)[:, None] ** (4 if hard else 1)
        return np.concatenate([accepted, exchanged])

    def _trajectory(self) -> NDArray[np.bool_]:
        """Returns which replicas, (K, C), were moved."""
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
            going &= np.isfinite(energies)  # what has left the calculator's reach is refused, and costs no more
            momentum += (0.5 if i == self.leapfrog - 1 else 1.0) * step * forces
        accepted = np.log(self.rng.random(before.shape)) < before - self._total(energies, momentum)
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
