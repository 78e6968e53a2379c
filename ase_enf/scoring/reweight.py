"""Reweighting: samples of a flow as samples of the Boltzmann distribution of any ASE calculator (Noé et al. 2019)."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kB
from tqdm import tqdm

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS, Solver, resolve_solver
from ase_enf.flow.likelihood import log_likelihood, path_error
from ase_enf.flow.model import ENF, check_flow
from ase_enf.flow.quadrature import check_intervals
from ase_enf.sampling.generate import check_counts
from ase_enf.sampling.sampler import Draft, Sampler

# Configurations given at once to a calculator that takes many.
ENERGY_BATCH = 1024
# A calculator that failed on each of the first structures will not do better on the rest.
HOPELESS = 10
# An integration error above this many nats, in the weighted mean, is worth a warning.
ROUGH = 0.1
# With fewer effective samples nobody can tell an error: it would be that of the few that happened to be found.
FEW = 10


class ReweightingError(RuntimeError):
    """The calculator gave no energy to weigh by."""


@runtime_checkable
class BatchCalculator(Protocol):
    """A calculator that takes many structures of one composition at once, which :func:`reweight` makes use of.

    Example:
        >>> from ase_enf.data import particles
        >>> isinstance(particles.DW4(), BatchCalculator)
        True
    """

    def batch_energies(self, positions: np.ndarray) -> np.ndarray:
        """Returns the energies (B,), eV, of structures with positions (B, M, n), Å; n is the flow's dimension."""


class Estimate(NamedTuple):
    """A weighted average."""

    value: np.ndarray  # (...), in the units of the observable
    stderr: np.ndarray  # (...)


@dataclass(frozen=True, eq=False, repr=False)
class Reweighted:
    """Samples of a flow with their weights under a Boltzmann distribution.

    log w_i = −U(x_i) / kT − log p(x_i)

    Sums run over all n samples; one whose energy is missing or not finite stays, with weight zero. With ``clip`` the
    ⌈clip · n⌉ largest weights are lowered to the smallest of them in everything but ``log_weights``, which biases
    averages and free energy for a smaller variance.

    Args:
        samples: n structures with positions in Å, their energy in ``calc`` and ``enf_log_likelihood`` and
            ``enf_log_weight`` in ``info``.
        log_weights: log w, nats, shape (n,), never clipped; −inf for a weight of zero.
        energies: U, eV, shape (n,); NaN where the calculator failed.
        log_prob: Log-density of the flow on the zero-mean subspace, nats of Å^−((M − 1) n), shape (n,).
        log_prob_error: Estimated integration error of ``log_prob``, nats, shape (n,).
        temperature: K.
        clip: Fraction of the weights that are clipped; None for none.
        failed: Number of samples with weight zero because their energy is missing or not finite.
        redrawn: Number of integrations that failed and were drawn again; the free energy counts them with weight zero.
    """

    samples: list[Atoms]
    log_weights: np.ndarray
    energies: np.ndarray
    log_prob: np.ndarray
    log_prob_error: np.ndarray
    temperature: float
    clip: float | None = None
    failed: int = 0
    redrawn: int = 0

    @property
    def kT(self) -> float:  # noqa: N802 (the physicists' name)
        """Thermal energy, eV."""
        return kB * self.temperature

    @cached_property
    def weights(self) -> np.ndarray:
        """Normalised weights w_i / Σ_j w_j after clipping, shape (n,)."""
        w = np.exp(self._used - self._used.max())
        return w / w.sum()

    @property
    def effective_sample_size(self) -> float:
        """Kish's effective sample size, ``(Σ w)² / Σ w²``, between 1 and n."""
        return float(1.0 / np.square(self.weights).sum())

    @property
    def too_few(self) -> bool:
        """Whether there are fewer than ten effective samples, too few for any error bar."""
        return self.effective_sample_size < FEW

    @property
    def free_energy(self) -> float:
        """Free energy of the calculator, eV, relative to a normalised density.

        F = −kT ln ∫ exp(−U / kT) dx = −kT ln mean_i w_i

        over centred positions in Å; masses, and M! of like atoms, are not counted.
        """
        peak = self._used.max()
        return float(-self.kT * (peak + math.log(np.exp(self._used - peak).sum() / self._attempts)))

    @property
    def free_energy_stderr(self) -> float:
        """Standard error of ``free_energy``, eV: by the delta method, and the integration error, added in squares.

        Infinite with fewer than ten effective samples: the samples cannot tell then what they have missed.
        """
        if self.too_few:
            return math.inf
        attempts = self._attempts
        relative = (attempts / self.effective_sample_size - 1.0) / max(attempts - 1, 1)
        return self.kT * math.sqrt(max(relative, 0.0) + self.integration_error**2)

    @property
    def integration_error(self) -> float:
        """Weighted mean of ``log_prob_error``, nats: what quadrature and fixed steps may do to log w."""
        counted = self.weights > 0  # without a weight, the error need not be finite
        return float(self.weights[counted] @ self.log_prob_error[counted])

    @property
    def clipped(self) -> int:
        """Number of weights that clipping lowered."""
        return int((self._used < self.log_weights).sum())

    def average(self, observable: Callable[[Atoms], Any] | np.ndarray) -> Estimate:
        """Averages an observable over the Boltzmann distribution, ``Σ_i w_i A_i / Σ_i w_i``.

        The standard error is that of a ratio by the delta method, √(Σ_i w̃_i² (A_i − Â)²) with normalised w̃; with fewer
        than ten effective samples it is infinite, because the samples cannot tell then what they have missed.

        Args:
            observable: A function of one ``Atoms``, called where the weight is not zero, or its values, shape (n, ...).

        Raises:
            ValueError: If there is not one value a sample, or one that counts is not finite.

        Example:
            >>> energies = np.tile([1.0, 3.0], 8)
            >>> result = Reweighted([], np.zeros(16), energies, np.zeros(16), np.zeros(16), temperature=300.0)
            >>> result.average(result.energies)
            Estimate(value=array(2.), stderr=array(0.25))
        """
        counts = np.flatnonzero(self.weights)
        if callable(observable):
            values = np.array([observable(self.samples[i]) for i in counts], dtype=float)
        else:
            values = np.asarray(observable, dtype=float)
            if values.ndim == 0 or len(values) != len(self.weights):
                raise ValueError(f"observable of shape {values.shape}: need one value for each of {len(self.weights)}")
            values = values[counts]
        finite = np.isfinite(values).reshape(len(counts), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"observable is not finite for sample {counts[~finite][0]}, which has a weight")
        weights = self.weights[counts]
        mean = np.tensordot(weights, values, axes=1)
        variance = np.tensordot(weights**2, np.square(values - mean), axes=1)
        error = np.full_like(variance, math.inf) if self.too_few else np.sqrt(variance)
        return Estimate(np.asarray(mean), np.asarray(error))

    def __repr__(self) -> str:
        n, size = len(self.log_weights), self.effective_sample_size
        clip = "no clipping" if self.clip is None else f"{self.clipped} largest weights clipped (clip={self.clip:g})"
        few = ", too few to be believed" if self.too_few else ""
        return (
            f"effective sample size {size:.1f} of n = {n} ({100 * size / n:.1f} %){few}, {clip}; "
            f"F = {self.free_energy:.6g} ± {self.free_energy_stderr:.2g} eV at {self.temperature:g} K; "
            f"integration error {self.integration_error:.2g} nats; {self.failed} energies failed, "
            f"{self.redrawn} integrations drawn again"
        )

    @property
    def _attempts(self) -> int:
        return len(self.log_weights) + self.redrawn

    @cached_property
    def _used(self) -> np.ndarray:
        """Log weights after clipping."""
        if not self.clip:
            return self.log_weights
        some = np.sort(self.log_weights[np.isfinite(self.log_weights)])
        return np.minimum(self.log_weights, some[-min(math.ceil(self.clip * len(self.log_weights) - 1e-9), len(some))])


def reweight(
    flow: ENF,
    calculator: Any,
    n: int,
    temperature: float,
    seed: int = 0,
    n_atoms: int | None = None,
    formula: str | None = None,
    symbols: str | Sequence[str] | None = None,
    clip: float | None = None,
    solver: str | Solver | None = None,
    steps: int | None = None,
    intervals: int = INTERVALS,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Reweighted:
    """Draws n structures of one composition with their density, and weighs them by a calculator's Boltzmann factor.

    log w = −U(x) / kT − log p(x),  log p(x) = log p_Z(z) + ∫_0^1 Tr J dt + log |det of the scaling|,  x = g(z)

    The density comes from the path that makes the sample, with the exact trace by quadrature. Sample i depends on
    ``(seed, i)`` alone and is that of ``generate`` with this seed and solver and without churn, up to the integration
    error: the path also stops at the nodes of the quadrature. That error is estimated for each sample (of the
    quadrature, and of the path by the way back with a coarser solver) and stated.

    Args:
        flow: A flow with an exact likelihood: ``features="none"``, or "given" with a formula. Weights are as good as
            its dtype: ``load(..., dtype="float64")`` where it matters.
        calculator: Any ASE calculator of energies, eV. A :class:`BatchCalculator` is given many structures at once.
        n: How many.
        temperature: K; 1 / ``ase.units.kB`` = 11604.5 K makes kT one eV, for systems in reduced units.
        seed: Non-negative.
        n_atoms: Size M, for "none" where the flow knows several.
        formula: Composition, for "given".
        symbols: Elements that the calculator sees, for "none", such as "Ar13" or a list; "X" when None.
        clip: Fraction of the largest weights to lower to the smallest of them; see :class:`Reweighted`.
        solver: A ``Solver`` or the name of a method; that of ``score`` by default.
        steps: Number of fixed steps, when ``solver`` is a name or None.
        intervals: Of the quadrature of the trace, a multiple of 8; more lower the integration error.
        batch_size: Structures integrated together.
        device: Where to compute; where the flow is when None.
        progress: Show bars; by default on a terminal only.

    Returns:
        Samples, weights, effective sample size, free energy and averages; printed, they say all in one line. Warnings
        count energies that failed (weight zero), and name an integration error above 0.1 nats and fewer than ten
        effective samples, which give no error bar.

    Raises:
        ValueError: For a joint flow, whose likelihood is a bound; where the composition is not one; for a bad option.
        ReweightingError: If the calculator fails on all of the first batch, or on the first ten one by one.
        GenerationError: If a structure fails to integrate ten times.

    Example:
        >>> from ase.calculators.lj import LennardJones
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="none", sizes={3: 1}, hidden=8, layers=1)).double()
        >>> result = reweight(flow, LennardJones(rc=20), n=4, temperature=300.0, symbols="Ar3")
        >>> bool(1 <= result.effective_sample_size <= 4), result.samples[0].get_chemical_formula()
        (True, 'Ar3')
    """
    check_flow(flow)
    _check(flow, n, temperature, seed, clip, intervals, batch_size)
    numbers = _numbers(flow, symbols, n_atoms, formula)
    size = n_atoms if numbers is None else len(numbers)
    _check_one_composition(flow, size, formula)
    show = sys.stderr.isatty() if progress is None else progress
    chosen = resolve_solver(solver, steps, flow.likelihood_solver)
    sampler = DensitySampler(flow, seed, size, formula, chosen, batch_size, device, intervals=intervals)
    energies_of = _Energies(calculator, flow.config.dimension)
    samples: list[Atoms] = []
    # A calculator that cannot do the first batch ends it there.
    for part in filter(len, (range(n)[:batch_size], range(n)[batch_size:])):
        drawn = list(sampler.stream(part, show))
        if numbers is not None:
            for atoms in drawn:
                atoms.numbers = numbers
        energies_of.add(drawn, show)
        samples += drawn
    densities = [sampler.densities[atoms.info["enf_index"], atoms.info["enf_attempts"] - 1] for atoms in samples]
    log_prob, error = np.array(densities).T
    energies = np.array(energies_of.values)
    finite = np.isfinite(energies)
    log_weights = np.where(finite, -np.where(finite, energies, 0.0) / (kB * temperature) - log_prob, -math.inf)
    for atoms, energy, density, weight in zip(samples, energies, log_prob, log_weights, strict=True):
        atoms.info["enf_log_likelihood"], atoms.info["enf_log_weight"] = float(density), float(weight)
        if math.isfinite(energy):
            atoms.calc = SinglePointCalculator(atoms, energy=float(energy))
    redrawn = sum(atoms.info["enf_attempts"] - 1 for atoms in samples)
    failed = int((~finite).sum())
    result = Reweighted(samples, log_weights, energies, log_prob, error, float(temperature), clip, failed, redrawn)
    if failed:
        warnings.warn(
            f"{failed} of {n} structures have no finite energy and count with weight zero ({energies_of.reason})",
            stacklevel=2,
        )
    if not result.integration_error <= ROUGH:
        warnings.warn(
            f"the integration error of the weights is {result.integration_error:.2g} nats; "
            f"use intervals={2 * intervals} or a finer solver",
            stacklevel=2,
        )
    if n >= FEW and result.too_few:
        warnings.warn(
            f"{result.effective_sample_size:.1f} effective samples of {n} are too few for averages or a free energy; "
            "use a larger n, another temperature (1 eV / kB is 11604.5 K), or a flow trained nearer to this calculator",
            stacklevel=2,
        )
    return result


class DensitySampler(Sampler):
    """The sampler of ``generate``, which also keeps the log-density of what it draws and its estimated error."""

    def __init__(self, *request: Any, intervals: int) -> None:
        super().__init__(*request)
        self.intervals = intervals
        self.densities: dict[tuple[int, int], tuple[float, float]] = {}  # (index, attempt) → nats, nats

    def sample(self, drafts: list[Draft]) -> Batch:
        """Takes drafts to data; a density that is not finite makes a draft fail."""
        z_x, z_h, mask, context = self.latents(drafts)
        with torch.no_grad():
            flow = self.flow.flow(mask, context, self.solver)
            data = flow.inverse(z_x, z_h, divergence.exact, intervals=self.intervals)
            encoded = self.flow.encoded(data.x, data.h, mask, context)
            terms = log_likelihood(encoded, z_x.double(), z_h.double(), -data.ladj.double())
            by_path, _ = path_error(flow, data.x, data.h, terms.log_base, data.traces, divergence.exact)
            log_prob, error = terms.log_prob, data.error.double() + by_path
            batch = self.flow.decode(data.x, data.h, mask, context)
        for draft, *density in zip(drafts, log_prob.tolist(), error.tolist(), strict=True):
            self.densities[draft.index, draft.attempt] = tuple(density)
        known = torch.isfinite(log_prob)[:, None, None]
        return batch._replace(positions=torch.where(known, batch.positions, math.nan))


class _Energies:
    """U of structures in eV, NaN where the calculator failed, and why it first did."""

    def __init__(self, calculator: Any, dimension: int) -> None:
        self.calculator, self.dimension = calculator, dimension
        self.many = calculator.batch_energies if isinstance(calculator, BatchCalculator) else None
        self.values: list[float] = []
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the first one that is missing is missing."""
        return self._reason or "its energies are not finite"

    def add(self, samples: list[Atoms], progress: bool) -> None:
        """Computes more; raises ReweightingError if there is none after the first ones."""
        first = not self.values
        size = ENERGY_BATCH if self.many else 1
        with tqdm(total=len(samples), disable=not progress, unit="energy", dynamic_ncols=True) as bar:
            for k in range(0, len(samples), size):
                self.values += self._chunk(samples[k : k + size])
                bar.update(len(samples[k : k + size]))
                if first and size == 1 and k + 1 == HOPELESS and not np.isfinite(self.values).any():
                    break
        if first and not np.isfinite(self.values).any():
            raise ReweightingError(
                f"{type(self.calculator).__name__} gave no finite energy ({self.reason}); check symbols and units"
            )

    def _chunk(self, samples: list[Atoms]) -> list[float]:
        try:
            if self.many:
                return _energies_together(self.many, samples, self.dimension)
            return [_energy(self.calculator, samples[0])]
        except ReweightingError:
            raise
        except Exception as error:  # each calculator has errors of its own
            where = f"batch_energies() of {len(samples)} structures: " if self.many else ""
            self._reason = self._reason or where + f"{type(error).__name__}: {error}".splitlines()[0]
            return [math.nan] * len(samples)


def _energy(calculator: Any, atoms: Atoms) -> float:
    atoms = atoms.copy()  # the calculator keeps what it was given
    atoms.calc = calculator
    return float(atoms.get_potential_energy())


def _energies_together(many: Callable[[np.ndarray], Any], samples: list[Atoms], dimension: int) -> list[float]:
    values = np.asarray(many(np.stack([atoms.positions[:, :dimension] for atoms in samples])), dtype=float)
    if values.shape != (len(samples),):
        raise ReweightingError(
            f"batch_energies() gave shape {values.shape} for {len(samples)} structures; need one for each"
        )
    return values.tolist()


def _check(
    flow: ENF, n: int, temperature: float, seed: int, clip: float | None, intervals: int, batch_size: int
) -> None:
    if not flow.config.mode.exact:
        raise ValueError("features='joint': its likelihood is a bound, no density to weigh by; use 'none' or 'given'")
    check_counts(n, seed, batch_size)
    check_intervals(intervals)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature}: must be a positive number of K")
    if clip is not None and not 0 <= clip < 1:
        raise ValueError(f"clip={clip}: must be a fraction of the weights, from 0 to below 1")


def _numbers(
    flow: ENF, symbols: str | Sequence[str] | None, n_atoms: int | None, formula: str | None
) -> np.ndarray | None:
    """Returns the atomic numbers that the calculator sees, None for those that the flow gives."""
    if symbols is None:
        return None
    if flow.config.knows_types:
        raise ValueError(f"symbols={symbols!r}: this model has types of its own; give a formula")
    try:
        numbers = Atoms(symbols).numbers
    except (KeyError, ValueError) as error:
        raise ValueError(f"symbols={symbols!r}: no chemical symbols ({error}); write them like Ar13") from None
    if n_atoms is not None and n_atoms != len(numbers):
        raise ValueError(f"symbols={symbols!r} are {len(numbers)} atoms, but n_atoms={n_atoms}; leave one of them out")
    return numbers


def _check_one_composition(flow: ENF, n_atoms: int | None, formula: str | None) -> None:
    """Raises unless all samples will have one composition: energies of different ones have no common weights."""
    if flow.config.graph:
        raise ValueError(
            f"the flow {flow.name!r} is one of molecular graphs, which reweight does not draw; use one of given "
            "elements"
        )
    if flow.config.types_given and formula is None:
        raise ValueError("weights compare within one composition; give a formula")
    sizes = list(flow.size_prior.counts)
    if not flow.config.knows_types and n_atoms is None and len(sizes) > 1:
        raise ValueError(f"weights compare within one size, this model saw {sizes[0]} to {sizes[-1]}; give n_atoms")
