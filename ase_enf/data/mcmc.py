"""Hamiltonian Monte Carlo of particle systems, with replica exchange to a harmonic system, and their free energies.

A *ladder* is K + 1 replicas at 0 = λ_0 < ... < λ_K = 1, replica k with the density ``exp(−U_k)`` on the zero-mean
subspace,

    U_k = (1 − λ_k) U_ref + λ_k U,    U_ref = ½ k Σ_i |x_i − x̄|²,    λ = u^power.

A sweep draws replica 0 anew from its Gaussian, moves every other replica by one HMC trajectory (Duane et al. 1987) and
tries to exchange neighbours (Swendsen and Wang 1986). HMC moves far at an acceptance of 0.8, where MALA, which is HMC
of one step, diffuses. The barriers of DW4 (4.4 kT for each pair) and the condensation of LJ13 are left to the exchange,
which brings to the target configurations that began as independent Gaussian draws at λ_0. Each such *renewal* is an
independent start, and their number measures how well a run mixed. As λ_0 is analytic, a ladder also gives ln Z.

Ladders share only the lengths of their trajectories: step sizes, which are tuned in the burn-in and fixed afterwards,
and a random factor of each sweep. All standard errors here come from the spread of the means of ladders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import t
from tqdm import tqdm

from ase_enf.data import DataError
from ase_enf.data.fetch import hide
from ase_enf.data.particles import Array, System, resolve

LADDERS, BURN_IN, LEAPFROG = 64, 500, 8
TARGET_ACCEPTANCE = 0.8
# More than a hundred sweeps that mix show by chance. The level is that of Student's t, as there may be only two
# ladders.
_R_HAT, _LEVEL = 1.3, 1e-4


class Diagnostics(NamedTuple):
    """How well a run mixed; the standard errors are those of the means of independent ladders."""

    energy: float  # <U>, kT
    energy_stderr: float
    equipartition: float  # <x·∇U>, which is (M − 1) n
    equipartition_stderr: float
    drift: float  # change of <U> from the first to the second half of the sweeps, kT; 0 in equilibrium
    drift_stderr: float
    r_hat: float  # of U among half ladders; 1 if they agree
    effective_size: float  # of U: its variance / energy_stderr²
    renewals: float  # independent configurations that reached λ = 1, in each ladder
    acceptance: tuple[float, ...]  # (K,), of the trajectories, λ_1 to λ_K
    exchange: tuple[float, ...]  # (K,), between neighbours
    sweeps: int
    ladders: int

    def trouble(self, degrees_of_freedom: int) -> str:
        """Says why the run cannot be in equilibrium; empty if it may be."""
        off, limit = self.equipartition - degrees_of_freedom, float(t.isf(_LEVEL / 2, self.ladders - 1))
        if not abs(self.drift) < limit * self.drift_stderr:
            change = f"{self.drift:.2g} ± {self.drift_stderr:.2g}"
            return f"<U> changed by {change} from the first half of the run to the second"
        if not abs(off) < limit * self.equipartition_stderr:
            value = f"{self.equipartition:.2f} ± {self.equipartition_stderr:.2f}"
            return f"<x·∇U> is {value}, by equipartition it is {degrees_of_freedom}"
        if not self.r_hat < _R_HAT:
            return f"the energies of half chains disagree (r_hat {self.r_hat:.2f})"
        return ""


class _Ladders:
    """The state of C ladders; arrays end in (K + 1, C)."""

    def __init__(
        self, system: System, path: Array, ladders: int, rng: np.random.Generator, start: Array | None
    ) -> None:
        self.system, self.path, self.rng = system, path[:, None], rng
        self.replicas = (len(path), ladders)
        self.shape = (system.n_atoms, system.dimension, *self.replicas)
        self.x = self._dispersed() if start is None else np.broadcast_to(start[:, :, None, None], self.shape).copy()
        self.x -= self.x.mean(axis=0)
        self.work, self.gradient = self._evaluate(self.x)
        self.born = np.full(self.replicas, -1)  # the sweep in which the configuration was drawn from the reference
        self.step_size = np.full((len(path) - 1, 1), 0.1 / math.sqrt(system.reference))
        self.sweeps = 0

    def _normal(self, *shape: int) -> Array:
        z = self.rng.standard_normal((self.system.n_atoms, self.system.dimension, *shape))
        return z - z.mean(axis=0)

    def _dispersed(self) -> Array:
        """The draw of lowest energy among 16 of twice the reference's width: independent, hot, without overlaps."""
        best, least = np.zeros(self.shape), np.full(self.replicas, np.inf)
        for _ in range(16):
            x = self._normal(*self.replicas) * 2.0 / math.sqrt(self.system.reference)
            energy = self.system.gradient(x.reshape(*self.shape[:2], -1))[0].reshape(self.replicas)
            better = energy < least
            best, least = np.where(better, x, best), np.where(better, energy, least)
        return best

    def _evaluate(self, x: Array) -> tuple[Array, Array]:
        """Returns U − U_ref and ∇U."""
        energy, gradient = self.system.gradient(x.reshape(*x.shape[:2], -1))
        return energy.reshape(x.shape[2:]) - self._reference(x), gradient.reshape(x.shape)

    def _reference(self, x: Array) -> Array:
        return 0.5 * self.system.reference * np.einsum("mnkc,mnkc->kc", x, x)

    def target(self) -> tuple[Array, Array]:
        """Returns U and x·∇U at λ = 1, shape (C,)."""
        x = self.x[:, :, -1:]
        return (self.work[-1:] + self._reference(x))[0], np.einsum("mnkc,mnkc->c", x, self.gradient[:, :, -1:])

    def sweep(self, adapt: bool) -> tuple[Array, Array]:
        """Draws replica 0, moves the others and exchanges neighbours; ``adapt`` tunes the steps.

        Returns:
            Rates of acceptance and of exchange, shapes (K,).
        """
        self.sweeps += 1
        fresh = self._normal(1, self.replicas[1]) / math.sqrt(self.system.reference)
        self.x[:, :, :1] = fresh
        self.work[:1], self.gradient[:, :, :1] = self._evaluate(fresh)
        self.born[0] = self.sweeps
        with np.errstate(over="ignore", invalid="ignore"):  # a trajectory that runs into a wall is refused
            accepted = self._trajectory()
            exchanged = np.zeros(len(self.path) - 1)
            for parity in (0, 1):
                exchanged[parity::2] = self._swap(parity)
        if adapt:
            self.step_size *= tuned(accepted)[:, None]
        return accepted, exchanged

    def _trajectory(self) -> Array:
        path = self.path[1:]
        x, work, gradient = self.x[:, :, 1:], self.work[1:], self.gradient[:, :, 1:]
        step = self.step_size * self.rng.uniform(0.7, 1.3)  # random lengths, against periodic trajectories

        def slope(x: Array, gradient: Array) -> Array:
            return (1 - path) * self.system.reference * x + path * gradient

        momentum = self._normal(*work.shape)
        before = self._reference(x) + path * work + 0.5 * np.einsum("mnkc,mnkc->kc", momentum, momentum)
        new, new_gradient = x, gradient
        momentum -= 0.5 * step * slope(new, new_gradient)
        for i in range(LEAPFROG):
            new = new + step * momentum
            new_work, new_gradient = self._evaluate(new)
            momentum -= (0.5 if i == LEAPFROG - 1 else 1.0) * step * slope(new, new_gradient)
        after = self._reference(new) + path * new_work + 0.5 * np.einsum("mnkc,mnkc->kc", momentum, momentum)
        accepted = np.log(self.rng.random(work.shape)) < before - after  # False for nan
        new -= new.mean(axis=0)  # rounding
        for old, proposed in ((x, new), (work, new_work), (gradient, new_gradient)):
            np.copyto(old, proposed, where=accepted)
        return accepted.mean(axis=1)

    def _swap(self, parity: int) -> Array:
        return exchange(self.path, self.work, (self.x, self.gradient, self.work, self.born), parity, self.rng)


def tuned(accepted: Array | float) -> Array:
    """Returns the factor that changes a step size in the burn-in, so that 0.8 of the trajectories are accepted.

    Args:
        accepted: Rate of acceptance of the latest trajectories.

    Example:
        >>> float(tuned(0.8)), bool(tuned(0.2) < 1)
        (1.0, True)
    """
    return np.exp(0.2 * (accepted - TARGET_ACCEPTANCE))


def exchange(
    rungs: Array, energies: Array, arrays: Sequence[NDArray[Any]], parity: int, rng: np.random.Generator
) -> Array:
    """Tries to exchange every second pair of neighbouring replicas; replica k has the density exp(−β_k U).

    A pair exchanges its configurations with probability min(1, exp((β_h − β_l) (U_h − U_l))) (Swendsen and Wang 1986).

    Args:
        rungs: β of the replicas, shape (K, 1), in units of 1 / U.
        energies: U of the replicas, shape (K, C), of C ladders.
        arrays: What moves with a configuration, changed in place; shapes end in (K, C).
        parity: 0 if the first pair is replicas 0 and 1, 1 if it is 1 and 2.
        rng: The source of random numbers.

    Returns:
        Rate of exchange of each pair, shape (number of pairs,).

    Example:
        >>> beta, u = np.array([[1.0], [0.5]]), np.array([[3.0], [1.0]])  # the colder one is higher
        >>> exchange(beta, u, (u,), 0, np.random.default_rng(0)), u.ravel()
        (array([1.]), array([1., 3.]))
    """
    stop = parity + 2 * ((len(energies) - parity) // 2)
    low, high = slice(parity, stop, 2), slice(parity + 1, stop, 2)
    log_ratio = (rungs[high] - rungs[low]) * (energies[high] - energies[low])
    swap = np.log(rng.random(log_ratio.shape)) < log_ratio
    for array in arrays:
        a, b = array[..., low, :], array[..., high, :]
        array[..., low, :], array[..., high, :] = np.where(swap, b, a), np.where(swap, a, b)
    return swap.mean(axis=1)


def r_hat(chains: Array) -> NDArray[np.float64]:
    """Returns the potential scale reduction factor: 1 if chains agree, more if they do not (Gelman and Rubin 1992).

    Args:
        chains: Series of observables, shape (S, C, ...): S values of each of C chains.

    Returns:
        Shape (...).

    Example:
        >>> round(float(r_hat(np.random.default_rng(0).standard_normal((1000, 4)))), 2)
        1.0
    """
    length = len(chains)
    within, between = chains.var(axis=0, ddof=1).mean(axis=0), chains.mean(axis=0).var(axis=0, ddof=1)
    return np.sqrt((length - 1) / length + between / within)


class Run(NamedTuple):
    """What ``run`` returns, for S sweeps of C ladders."""

    positions: Array  # (S // thin, C, M, n), of the target
    energy: Array  # (S, C), U of the target
    virial: Array  # (S, C), x·∇U of the target
    born: NDArray[np.int64]  # (S, C), the sweep in which the target's configuration left the reference
    work: Array  # (S, K + 1, C), U − U_ref; empty unless asked for
    acceptance: Array  # (K,)
    exchange: Array  # (K,)

    def diagnostics(self) -> Diagnostics:
        """Returns how well it mixed."""
        sweeps, ladders = self.energy.shape
        means, virials, half = self.energy.mean(axis=0), self.virial.mean(axis=0), sweeps // 2
        halves = np.concatenate([self.energy[:half], self.energy[-half:]], axis=1)  # (S / 2, 2 C)
        drifts = self.energy[-half:].mean(axis=0) - self.energy[:half].mean(axis=0)
        return Diagnostics(
            energy=float(means.mean()),
            energy_stderr=_stderr(means),
            equipartition=float(virials.mean()),
            equipartition_stderr=_stderr(virials),
            drift=float(drifts.mean()),
            drift_stderr=_stderr(drifts),
            r_hat=float(r_hat(halves)),
            effective_size=float(self.energy.var() / _stderr(means) ** 2),
            renewals=float(np.mean([len(np.unique(born)) - 1 for born in self.born.T])),
            acceptance=tuple(self.acceptance.tolist()),
            exchange=tuple(self.exchange.tolist()),
            sweeps=sweeps,
            ladders=ladders,
        )


def path(system: System) -> tuple[Array, Array]:
    """Returns λ of the rungs: 0, the Gauss-Legendre nodes in u, and 1.

    Returns:
        λ, shape (K + 1,), and the weights of ∫ dλ at the nodes, shape (K − 1,).

    Example:
        >>> from ase_enf.data.particles import resolve
        >>> rungs, weights = path(resolve("dw4"))  # ∫ λ dλ
        >>> round(float(weights @ rungs[1:-1]), 6)
        0.5
    """
    nodes, weights = np.polynomial.legendre.leggauss(system.rungs - 1)
    u = np.concatenate([[0.0], 0.5 * (nodes + 1), [1.0]])
    return u**system.power, 0.5 * weights * system.power * u[1:-1] ** (system.power - 1)


def run(
    system: System | str,
    seed: int | tuple[int, ...] = 0,
    *,
    sweeps: int,
    ladders: int = LADDERS,
    burn_in: int = BURN_IN,
    thin: int = 10,
    start: Array | None = None,
    work: bool = False,
    progress: bool | None = None,
) -> Run:
    """Runs independent ladders; see the module.

    Args:
        system: A system or its name.
        seed: Seed of all random numbers; it gives the same bits with the same numpy on the same kind of machine.
        sweeps: Number of sweeps of each ladder after the burn-in.
        ladders: Number C of ladders.
        burn_in: Number of first sweeps, which tune the step sizes and are left out.
        thin: Number of sweeps between two stored configurations.
        start: One configuration, shape (M, n), that all replicas start from; by default they start from independent hot
            ones.
        work: Whether to store U − U_ref of all replicas.
        progress: Whether to show a progress bar; by default on a terminal.

    Returns:
        Configurations and series of the target.

    Raises:
        DataError: If the system is unknown, a number is out of range, or the start has no finite energy.

    Example:
        >>> run("dw4", sweeps=20, ladders=3, burn_in=5).positions.shape
        (2, 3, 4, 2)
    """
    system = resolve(system)
    if ladders < 2 or sweeps < 4 or thin < 1 or burn_in < 0:
        raise DataError(f"ladders={ladders}, sweeps={sweeps}, thin={thin}, burn_in={burn_in}: at least 2, 4, 1 and 0")
    try:
        rng = np.random.default_rng(seed)
    except ValueError:
        raise DataError(f"seed={seed}: must not be negative") from None
    if start is not None:
        start = system.checked(np.asarray(start)[None])[0]
        if not np.isfinite(system.evaluate(start[None]).energy).all():
            raise DataError(f"start: {system.name} has no finite energy there; move coinciding particles apart")
    state = _Ladders(system, path(system)[0], ladders, rng, start)
    positions = np.empty((sweeps // thin, ladders, system.n_atoms, system.dimension))
    series = np.empty((2, sweeps, ladders))
    born, works = np.empty((sweeps, ladders), dtype=np.int64), np.empty((sweeps if work else 0, *state.replicas))
    rates = np.zeros((2, state.replicas[0] - 1))
    for i in tqdm(range(-burn_in, sweeps), desc=system.name, unit="sweep", disable=hide(progress)):
        latest = state.sweep(adapt=i < 0)
        if i < 0:
            continue
        rates += latest
        series[:, i], born[i] = state.target(), state.born[-1]
        if work:
            works[i] = state.work
        if (i + 1) % thin == 0:
            positions[i // thin] = state.x[:, :, -1].transpose(2, 0, 1)
    return Run(positions, *series, born, works, *(rates / sweeps))


def _stderr(means: Array) -> float:
    return float(means.std(ddof=1) / math.sqrt(len(means)))


class FreeEnergy(NamedTuple):
    """What ``free_energy`` returns: nats, on the zero-mean subspace; kT = 1."""

    log_z: float  # ln ∫ exp(−U), by BAR
    log_z_stderr: float
    entropy: float  # −∫ p ln p = <U> + ln Z
    entropy_stderr: float
    log_z_ti: float  # the same by thermodynamic integration
    log_z_ti_stderr: float
    diagnostics: Diagnostics


def free_energy(
    system: System | str,
    seed: int | tuple[int, ...] = 0,
    *,
    ladders: int = LADDERS,
    sweeps: int = 2000,
    burn_in: int = BURN_IN,
    progress: bool | None = None,
) -> FreeEnergy:
    """Partition function and differential entropy of a system, from the harmonic reference in two ways.

    ln Z_0 = ½ (M − 1) n ln 2π/k is analytic. Between neighbours the acceptance ratio of Bennett (J. Comput. Phys. 22,
    245 (1976)) needs no quadrature; ln Z = ln Z_0 − ∫ <U − U_ref>_λ dλ, by Gauss-Legendre in u, does, and uses the same
    configurations. The difference shows the errors of the quadrature and of rungs with too little overlap. Standard
    errors come from the spread between ladders, for BAR from the first-order influence of each (the infinitesimal
    jackknife).

    Args:
        system: A system or its name.
        seed: Seed of all random numbers.
        ladders: Number of independent ladders.
        sweeps: Number of sweeps of each ladder after the burn-in.
        burn_in: Number of sweeps before these.
        progress: Whether to show a progress bar; by default on a terminal.

    Returns:
        Values with standard errors.

    Raises:
        DataError: If the system is unknown, or a number is out of range.

    Example:
        >>> from ase_enf.data.particles import quadrature
        >>> result = free_energy("dw4", ladders=16, sweeps=200, burn_in=100)
        >>> abs(result.entropy - quadrature("dw4").entropy) < 0.1
        True
    """
    system = resolve(system)
    rungs, weights = path(system)
    settings = {"sweeps": sweeps, "ladders": ladders, "burn_in": burn_in, "thin": sweeps, "progress": progress}
    record = run(system, seed, work=True, **settings)
    start = 0.5 * system.degrees_of_freedom * math.log(2 * math.pi / system.reference)
    log_zs = start - _bar(record.work, rungs)  # (C,)
    entropies = log_zs + record.energy.mean(axis=0)
    integrals = start - weights @ record.work[:, 1:-1].mean(axis=0)  # (C,)
    return FreeEnergy(
        log_z=float(log_zs.mean()),
        log_z_stderr=_stderr(log_zs),
        entropy=float(entropies.mean()),
        entropy_stderr=_stderr(entropies),
        log_z_ti=float(integrals.mean()),
        log_z_ti_stderr=_stderr(integrals),
        diagnostics=record.diagnostics(),
    )


def _bar(work: Array, rungs: Array) -> Array:
    """Σ_k ΔF_k, each the root of Σ f(δ w_k − ΔF) = Σ f(ΔF − δ w_{k+1}), f(x) = 1 / (1 + eˣ), δ = λ_{k+1} − λ_k.

    Returns:
        Shape (C,): for each ladder that sum plus the influence of the ladder, which is C times the derivative with
        respect to its weight, where all C have weight 1. The mean is the sum; the standard error is that of the sum to
        first order.
    """
    totals = np.zeros(work.shape[2])
    for k, step in enumerate(np.diff(rungs)):
        forward, backward = step * work[:, k], step * work[:, k + 1]  # (S, C)

        def balance(shift: float, a: Array = forward, b: Array = backward) -> float:
            return float(expit(shift - a).sum() - expit(b - shift).sum())

        low, high = min(forward.min(), np.median(backward)) - 50, max(backward.max(), np.median(forward)) + 50
        shift = brentq(balance, low, high, xtol=1e-10)
        up, down = expit(shift - forward), expit(backward - shift)
        slope = (up * (1 - up) + down * (1 - down)).sum()  # of the balance
        totals += shift - len(totals) * (up - down).sum(axis=0) / slope
    return totals
