"""Thermal ensembles of any ASE calculator: structures with the density exp(−U / kT) over centred positions.

Hamiltonian Monte Carlo (Duane et al. 1987): momenta are drawn from their Gaussian distribution, a leapfrog trajectory
follows, and a Metropolis test on the total energy makes the density exact for any time step. This is not true of
dynamics with a thermostat: their time step biases the density, and ASE's ``Langevin`` with its default ``fixcm=True``
does not sample the canonical density of a small molecule of unequal masses at all (as its documentation says).

Several walkers share the length of the steps, which is tuned in the burn-in and fixed afterwards, and nothing else.
Against barriers that keep walkers apart, each may be a ladder of replicas at higher temperatures that exchange their
configurations, and may turn one side of the molecule about a bond.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kB
from numpy.typing import NDArray

from ase_enf.atoms.files import atomic_write
from ase_enf.bars import Bar, Progress
from ase_enf.chem.topology import Topology
from ase_enf.data import DataError
from ase_enf.data.mcmc import r_hat
from ase_enf.data.series import Array, autocorrelation_time, standard_error
from ase_enf.data.walkers import Forces, Walkers
from ase_enf.data.walkers import turn as turn_about

# Steps of a trajectory: about half a period of a torsion where a step is a sixth of the period of a bond.
LEAPFROG = 24
# Sweeps between two saves of the state.
SAVE_EVERY = 100
# Walkers agree if they stay below: a rule of thumb for few chains of Vehtari et al. 2021.
R_HAT = 1.1
# Number of standard errors by which the virial may be off.
_OFF = 5.0
_SAME_ENERGY = 1e-3  # eV; iterative calculators reproduce their energies better than this


class Diagnostics(NamedTuple):
    """How well a run mixed; errors are standard errors that account for autocorrelation.

    Attributes:
        energy: <U>, eV.
        energy_stderr: Error of ``energy``, eV.
        temperature: <−x·F> / ((3 M − 3) kB), K, which is the temperature of the run by equipartition.
        temperature_stderr: Error of ``temperature``, K.
        autocorrelation: The longest integrated autocorrelation time of the energy and of the sorted distances, frames.
        effective_size: Number of frames over ``autocorrelation``.
        r_hat: The largest r_hat of the same observables among half walkers; 1 if they agree, NaN for too few frames.
        acceptance: Rate of acceptance of trajectories, at each temperature.
        exchange: Rate of exchange between neighbouring temperatures.
        turned: Rate of acceptance of the turns about each bond, at the temperature of the run.
        refused: Number of trajectories at the temperature of the run that were refused because they changed a bond.
        calls: Number of calls of the calculator in the whole run.
    """

    energy: float
    energy_stderr: float
    temperature: float
    temperature_stderr: float
    autocorrelation: float
    effective_size: float
    r_hat: float
    acceptance: tuple[float, ...]
    exchange: tuple[float, ...]
    turned: tuple[float, ...]
    refused: int
    calls: int

    def trouble(self, temperature: float) -> str:
        """Says why the run cannot be in equilibrium at this temperature, K; empty if it may be."""
        if not abs(self.temperature - temperature) < _OFF * self.temperature_stderr:
            value = f"{self.temperature:.1f} ± {self.temperature_stderr:.1f} K"
            return f"the virial has a temperature of {value}; raise burn_in"
        if not self.r_hat < R_HAT:
            return f"the walkers disagree (r_hat {self.r_hat:.2f}); raise n or spacing, or give hotter rungs"
        return ""


@dataclass(frozen=True)
class Ensemble:
    """What :func:`run` returns.

    Args:
        frames: n structures in the order of sweeps, and of the walkers within each sweep; ``info`` has their
            ``thermal_energy`` in eV, ``thermal_walker`` and ``thermal_temperature`` in K.
        walkers: Number C of walkers; frame i belongs to walker i mod C.
        diagnostics: How well the run mixed.
    """

    frames: list[Atoms]
    walkers: int
    diagnostics: Diagnostics

    @property
    def energies(self) -> Array:
        """U, eV, shape (n,)."""
        return np.array([atoms.info["thermal_energy"] for atoms in self.frames])


def sample(atoms: Atoms | Sequence[Atoms], calculator: Any, temperature: float, n: int, **options: Any) -> list[Atoms]:
    """Samples structures of one molecule or cluster from exp(−U / kT), with any ASE calculator.

    Args:
        atoms: One structure, or several (conformers) from which the walkers start in turn.
        calculator: An ASE calculator of energies and forces.
        temperature: K.
        n: How many.
        options: Options of :func:`run`.

    Returns:
        n centred structures with their energy in ``calc`` and ``info``; a warning says if they are not in equilibrium.

    Raises:
        DataError: As :func:`run`.

    Example:
        >>> from ase.calculators.lj import LennardJones
        >>> pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.1]])
        >>> frames = sample(pair, LennardJones(rc=50), 1000.0, 8, burn_in=50, leapfrog=4, keep_bonds=False)
        >>> len(frames), sorted(frames[0].info)
        (8, ['thermal_energy', 'thermal_temperature', 'thermal_walker'])
    """
    ensemble = run(atoms, calculator, temperature, n, **options)
    trouble = ensemble.diagnostics.trouble(temperature) if math.isfinite(ensemble.diagnostics.r_hat) else ""
    if trouble:
        warnings.warn(f"{ensemble.frames[0].get_chemical_formula()} at {temperature:g} K: {trouble}", stacklevel=2)
    return ensemble.frames


def run(
    atoms: Atoms | Sequence[Atoms],
    calculator: Any,
    temperature: float,
    n: int,
    *,
    seed: int = 0,
    walkers: int = 8,
    spacing: int = 1,
    leapfrog: int = LEAPFROG,
    burn_in: int = 200,
    hotter: Sequence[float] = (),
    keep_bonds: bool = True,
    turn: Sequence[Sequence[int]] = (),
    out: str | Path | None = None,
    progress: Progress = None,
) -> Ensemble:
    """Samples like :func:`sample`, and returns diagnostics as well.

    Args:
        atoms: One structure, or several with the same atoms in the same order.
        calculator: An ASE calculator of energies and forces.
        temperature: K.
        n: Number of structures in all.
        seed: Seed of all random numbers; it gives the same structures with the same calculator on the same kind of
            machine.
        walkers: Number of independent walkers.
        spacing: Number of trajectories between two structures of a walker.
        leapfrog: Number of steps of a trajectory.
        burn_in: Number of first trajectories of every walker, which tune the lengths of the steps and are left out.
        hotter: Temperatures of further replicas of every walker, ascending, K; neighbours exchange configurations.
        keep_bonds: Whether to refuse trajectories that end with other bonds (by distance) than the first structure. The
            ensemble is then that of this molecule, without the products of its reactions.
        turn: Bonds, each given by the indices of its two atoms. After every trajectory, one side of the molecule is
            rotated about each of them by a random angle, with its own Metropolis test and one call of the calculator.
            Rotamers are then reached whatever the barrier. Do not name double bonds: their isomers would be mixed.
        out: A file (.npz) to which the state is saved, and from which an interrupted run continues, or a finished one
            with a larger n.
        progress: Whether to show a progress bar, by default on a terminal only; or a function that is told, before
            the first sweep of the walkers and after each, how many are done and of how many, with those of the burn-in.

    Returns:
        Structures and diagnostics.

    Raises:
        DataError: If a number is out of range, the structures differ in composition or bonds or are periodic, the
            calculator gives no energy for them, or ``out`` holds another run.

    Example:
        >>> from ase.calculators.lj import LennardJones
        >>> pair = Atoms("Ar2", [[0, 0, 0], [0, 0, 1.1]])
        >>> found = run(pair, LennardJones(rc=50), 1000.0, 400, burn_in=50, leapfrog=4, keep_bonds=False)
        >>> 400 < found.diagnostics.temperature < 2000
        True
    """
    starts = _checked(atoms, temperature, hotter, n, seed, walkers, spacing, leapfrog, burn_in)
    topology = _kept_bonds(starts) if keep_bonds else None
    bonds = (topology or Topology(starts[0])).bonds if turn else np.zeros((0, 0), bool)
    turns = [turn_about(bonds, *_pair(two)) for two in turn]
    temperatures = np.array([temperature, *hotter], dtype=float)
    settings = {
        "symbols": str(starts[0].symbols), "temperatures": temperatures.tolist(), "seed": seed, "walkers": walkers,
        "spacing": spacing, "leapfrog": leapfrog, "burn_in": burn_in, "keep_bonds": keep_bonds,
        "calculator": type(calculator).__name__, "turn": [[one.first, one.second] for one in turns],
    }  # fmt: skip
    state = Walkers(starts, Forces(starts[0], calculator), kB * temperatures, walkers, leapfrog, seed, topology, turns)
    sweeps = spacing * -(-n // walkers)
    book = _Book(settings, None if out is None else Path(out))
    book.restore(state)
    with Bar(burn_in + sweeps, progress, "sweep", initial=state.sweeps) as bar:
        bar.set_description("thermal")
        if callable(progress) and state.sweeps < burn_in + sweeps:  # a sweep of a slow calculator takes long
            progress(state.sweeps, burn_in + sweeps)
        for i in range(state.sweeps - burn_in, sweeps):
            rates = state.sweep(adapt=i < 0, hard=i < -burn_in // 2)
            if i >= 0:
                book.note(state, rates, keep=(i + 1) % spacing == 0)
            if (i + 1) % SAVE_EVERY == 0 or i + 1 == sweeps:
                book.save(state)
            bar.update(1)
    return book.ensemble(starts[0], temperature, n, state)


def _checked(
    atoms: Atoms | Sequence[Atoms],
    temperature: float,
    hotter: Sequence[float],
    n: int,
    seed: int,
    walkers: int,
    spacing: int,
    leapfrog: int,
    burn_in: int,
) -> list[Atoms]:
    """Returns the structures to start from, as a list."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature={temperature}: must be a positive number of K")
    if list(hotter) != sorted({temperature, *hotter} - {temperature}) or not all(t > temperature for t in hotter):
        raise DataError(f"hotter={list(hotter)}: must ascend from above temperature={temperature:g} K")
    for name, value, least in (
        ("n", n, 1), ("seed", seed, 0), ("walkers", walkers, 1), ("spacing", spacing, 1), ("leapfrog", leapfrog, 1),
        ("burn_in", burn_in, 0),
    ):  # fmt: skip
        if value < least:
            raise DataError(f"{name}={value}: must be at least {least}")
    listed = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    if not listed or not all(isinstance(item, Atoms) for item in listed):
        raise DataError("atoms: give one ase.Atoms or several")
    for place, item in enumerate(listed):
        if item.pbc.any():
            raise DataError(f"structure {place} is periodic; set `atoms.pbc = False` if its cell means nothing")
        if len(item) < 2 or not np.array_equal(item.numbers, listed[0].numbers):
            raise DataError(f"structure {place} is {item.symbols}, the first {listed[0].symbols}; give one molecule")
    return listed


def _kept_bonds(starts: Sequence[Atoms]) -> Topology:
    """Returns the bonds of the first structure, which all must have."""
    topology = Topology(starts[0])
    if not all(topology.holds(start.positions) for start in starts):
        raise DataError("atoms: not all structures have the bonds of the first; give conformers, or keep_bonds=False")
    return topology


def _pair(two: Sequence[int]) -> tuple[int, int]:
    if len(two) != 2:
        raise DataError(f"turn {list(two)}: need the indices of two bonded atoms")
    return int(two[0]), int(two[1])


class _Book:
    """The record of a run, in memory and in its file."""

    def __init__(self, settings: dict[str, Any], path: Path | None) -> None:
        self.settings, self.path = settings, path
        self.positions: list[Array] = []  # (C, M, 3) each
        self.energies: list[Array] = []  # (C,) each
        self.virials: list[Array] = []  # (C,) each
        self.rates: Array | float = 0.0
        self.swept = 0

    def note(self, state: Walkers, rates: Array, keep: bool) -> None:
        """Records one sweep, and with ``keep`` its configurations."""
        self.rates, self.swept = self.rates + rates, self.swept + 1
        if keep:
            self.positions.append(state.x[:, :, 0].transpose(2, 0, 1).copy())
            self.energies.append(state.energies[0].copy())
            self.virials.append(state.virial())

    def save(self, state: Walkers) -> None:
        """Writes everything that the rest of the run depends on, completely or not at all."""
        if self.path is None:
            return
        about = {
            "settings": self.settings, "rng": state.rng.bit_generator.state, "sweeps": state.sweeps,
            "swept": self.swept, "refused": int(state.refused), "calls": state.evaluate.calls,
        }  # fmt: skip
        with atomic_write(self.path) as handle:
            np.savez(
                handle, about=np.array(json.dumps(about)), x=state.x, step_size=state.step_size,
                rates=np.asarray(self.rates), energies=np.array(self.energies), virials=np.array(self.virials),
                positions=np.array(self.positions), current=state.energies, forces=state.forces,
            )  # fmt: skip

    def restore(self, state: Walkers) -> None:
        """Restores the state from the file, if there is one."""
        if self.path is None or not self.path.exists():
            return
        try:
            with np.load(self.path, allow_pickle=False) as file:
                saved = {name: file[name] for name in file.files}
            about = json.loads(str(saved["about"]))
            theirs = {"turn": []} | about["settings"]  # earlier versions did not have it
            different = [name for name in self.settings if theirs[name] != self.settings[name]]
        except Exception as error:  # zipfile, numpy and json have many kinds of errors
            raise DataError(f"{self.path}: not the state of a thermal run ({error}); name another file") from error
        if different:
            name = different[0]
            raise DataError(
                f"{self.path}: holds a run with {name}={theirs[name]!r}, not {self.settings[name]!r}; name another file"
            )
        state.x, state.step_size = saved["x"], saved["step_size"]
        state.rng.bit_generator.state = about["rng"]
        state.energies, state.forces = state.evaluate(state.x)
        if not np.allclose(state.energies, saved["current"], rtol=0, atol=_SAME_ENERGY):
            raise DataError(f"{self.path}: the calculator gives other energies than that of the run; name another file")
        if "forces" in saved:  # exactly those of the run, which evaluated them before it centred the positions
            state.energies, state.forces = saved["current"], saved["forces"]
        state.sweeps, state.refused, state.evaluate.calls = about["sweeps"], about["refused"], about["calls"]
        self.swept = about["swept"]
        self.rates = saved["rates"] if saved["rates"].ndim else 0.0
        self.positions, self.energies, self.virials = (
            list(saved[name]) for name in ("positions", "energies", "virials")
        )

    def ensemble(self, atoms: Atoms, temperature: float, n: int, state: Walkers) -> Ensemble:
        """Returns the first n structures, with diagnostics of the series."""
        walkers = self.settings["walkers"]
        kept = -(-n // walkers)  # a file may have more
        series = [np.array(values[:kept]) for values in (self.positions, self.energies, self.virials)]
        frames = []
        for k in range(n):
            row, walker = divmod(k, walkers)
            frame = Atoms(atoms.numbers, series[0][row, walker])
            energy = float(series[1][row, walker])
            frame.calc = SinglePointCalculator(frame, energy=energy)
            frame.info["thermal_energy"], frame.info["thermal_walker"] = energy, walker
            frame.info["thermal_temperature"] = float(temperature)
            frames.append(frame)
        rates = np.asarray(self.rates) / self.swept
        return Ensemble(frames, walkers, _diagnostics(atoms.numbers, *series, rates, state))


def _diagnostics(
    numbers: NDArray[np.integer], positions: Array, energies: Array, virials: Array, rates: Array, state: Walkers
) -> Diagnostics:
    """Returns the diagnostics of series of S frames of C walkers, shapes (S, C, ...)."""
    per_kelvin = kB * (3 * len(numbers) - 3)
    observables = _observables(numbers, positions, energies)
    varying = observables[..., observables.std(axis=(0, 1)) > 0]
    half, rungs = len(varying) // 2, len(state.kt)
    halves = np.concatenate([varying[:half], varying[-half:]], axis=1) if half > 3 else None
    slowest = float(np.max(autocorrelation_time(varying), initial=1.0))
    return Diagnostics(
        energy=float(energies.mean()),
        energy_stderr=float(standard_error(energies)),
        temperature=float(virials.mean() / per_kelvin),
        temperature_stderr=float(standard_error(virials) / per_kelvin),
        autocorrelation=slowest,
        effective_size=energies.size / slowest,
        r_hat=math.nan if halves is None else float(np.max(r_hat(halves))),
        acceptance=tuple(rates[:rungs].tolist()),
        exchange=tuple(rates[rungs : 2 * rungs - 1].tolist()),
        turned=tuple(rates[2 * rungs - 1 :].tolist()),
        refused=int(state.refused),
        calls=state.evaluate.calls,
    )


def _observables(numbers: NDArray[np.integer], positions: Array, energies: Array) -> Array:
    """Returns the energy and the distances between atoms of each pair of elements, sorted, shape (S, C, 1 + pairs).

    Sorted distances do not tell equal atoms apart, so that a methyl group need not turn.
    """
    rows, columns = np.triu_indices(len(numbers), 1)
    distances = np.linalg.norm(positions[:, :, rows] - positions[:, :, columns], axis=-1)  # (S, C, pairs)
    kinds = np.minimum(numbers[rows], numbers[columns]) * 1000 + np.maximum(numbers[rows], numbers[columns])
    parts = [np.sort(distances[..., kinds == kind], axis=-1) for kind in np.unique(kinds)]
    return np.concatenate([energies[..., None], *parts], axis=-1)
