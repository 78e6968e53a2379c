"""Reweights samples of a flow to the Boltzmann distribution of any ASE calculator (Noé et al. 2019)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kB

from ase_enf.bars import Progress, of_part
from ase_enf.chem.convert import PerceptionError
from ase_enf.chem.graph import graph_of_atoms
from ase_enf.flow.continuous import INTERVALS, Solver, resolve_solver
from ase_enf.flow.model import ENF, check_flow
from ase_enf.flow.quadrature import check_intervals
from ase_enf.sampling.request import Request
from ase_enf.scoring.density import DensitySampler
from ase_enf.scoring.energies import BatchCalculator as BatchCalculator
from ase_enf.scoring.energies import Energies
from ase_enf.scoring.energies import ReweightingError as ReweightingError
from ase_enf.values import check_counts

# A weighted mean integration error above this many nats causes a warning.
ROUGH = 0.1
# With fewer effective samples no error is stated: it would only reflect the few samples that happened to be found.
FEW = 10


class Estimate(NamedTuple):
    """A weighted average."""

    value: np.ndarray  # (...), in the units of the observable
    stderr: np.ndarray  # (...)


@dataclass(frozen=True, eq=False, repr=False)
class Reweighted:
    """Samples of a flow with their weights for a Boltzmann distribution.

    log w_i = −U(x_i) / kT − log p(x_i)

    Sums run over all n samples; those whose energy is missing or not finite are kept with weight zero. With ``clip``
    the ⌈clip · n⌉ largest weights are lowered to the smallest of them everywhere except in ``log_weights``: averages
    and free energies then have less variance, and a bias.

    Args:
        samples: n structures with positions in Å, their energy in ``calc`` and ``enf_log_likelihood`` and
            ``enf_log_weight`` in ``info``.
        log_weights: log w, nats, shape (n,), never clipped; −inf for a weight of zero.
        energies: U, eV, shape (n,); NaN where the calculator failed.
        log_prob: Log-density of the flow on the zero-mean subspace, nats of Å^−((M − 1) n), shape (n,).
        log_prob_error: Estimated integration error of ``log_prob``, nats, shape (n,).
        temperature: K.
        clip: Fraction of the weights that are clipped, or None.
        failed: Number of samples whose energy is missing or not finite; their weight is zero.
        redrawn: Number of failed integrations that were drawn again; in the free energy they count with weight zero.
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
        """Whether there are fewer than ten effective samples, which is too few for an error bar."""
        return self.effective_sample_size < FEW

    @property
    def free_energy(self) -> float:
        """Free energy of the calculator, eV, relative to a normalised density.

        F = −kT ln ∫ exp(−U / kT) dx = −kT ln mean_i w_i

        over centred positions in Å, without the contributions of masses and of permutations of like atoms.
        """
        peak = self._used.max()
        return float(-self.kT * (peak + math.log(np.exp(self._used - peak).sum() / self._attempts)))

    @property
    def free_energy_stderr(self) -> float:
        """Standard error of ``free_energy``, eV: that of the delta method and the integration error, squares added.

        It is infinite with fewer than ten effective samples, which cannot tell what they have missed.
        """
        if self.too_few:
            return math.inf
        attempts = self._attempts
        relative = (attempts / self.effective_sample_size - 1.0) / max(attempts - 1, 1)
        return self.kT * math.sqrt(max(relative, 0.0) + self.integration_error**2)

    @property
    def integration_error(self) -> float:
        """Weighted mean of ``log_prob_error``, nats: the effect of quadrature and solver on log w."""
        counted = self.weights > 0  # with weight zero, the error need not be finite
        return float(self.weights[counted] @ self.log_prob_error[counted])

    @property
    def clipped(self) -> int:
        """Number of weights that clipping lowered."""
        return int((self._used < self.log_weights).sum())

    def average(self, observable: Callable[[Atoms], Any] | np.ndarray) -> Estimate:
        """Averages an observable over the Boltzmann distribution, ``Σ_i w_i A_i / Σ_i w_i``.

        The standard error is that of a ratio by the delta method, √(Σ_i w̃_i² (A_i − Â)²) with normalised w̃; with
        fewer than ten effective samples, which cannot tell what they have missed, it is infinite.

        Args:
            observable: A function of one ``Atoms``, called for samples with a weight, or its values, shape (n, ...).

        Raises:
            ValueError: If there is not one value for each sample, or the value of a sample with a weight is not finite.

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
    molecule: Atoms | str | None = None,
    clip: float | None = None,
    solver: str | Solver | None = None,
    steps: int | None = None,
    intervals: int = INTERVALS,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: Progress = None,
) -> Reweighted:
    """Draws n structures of one composition, and weights them for a calculator's Boltzmann distribution.

    log w = −U(x) / kT − log p(x),  log p(x) = log p_Z(z) + ∫_0^1 Tr J dt + log |det of the scaling|,  x = g(z)

    The density comes from the path that makes the sample, with the exact trace by quadrature. Sample i depends on
    ``(seed, i)`` alone. It is the one that ``generate`` draws with this seed and solver and without churn, up to the
    integration error, as the path also stops at the nodes of the quadrature. The integration error of every density is
    estimated: that of the quadrature, and that of the path by the way back with a coarser solver.

    Args:
        flow: A flow with an exact likelihood: ``features="none"``, or "given" with a formula or, if it is one of
            molecular graphs, with a molecule. Weights are as accurate as its dtype: use
            ``load(..., dtype="float64")`` where that matters.
        calculator: Any ASE calculator of energies, eV. A :class:`BatchCalculator` is given many structures at once.
        n: Number of structures.
        temperature: K; for systems in reduced units, 1 / ``ase.units.kB`` = 11604.5 K makes kT one eV.
        seed: Seed of the random numbers, at least 0.
        n_atoms: Size M, for "none" if the flow knows several sizes.
        formula: Composition, for "given".
        symbols: For "none": the elements that the calculator sees, such as "Ar13" or a list; by default "X".
        molecule: For a flow of molecular graphs: a structure, whose bonds draws get, atoms in its order, or a SMILES.
            The density is then that of atoms with names: of the orders of equal atoms, which a formula has all of, only
            those of this graph are drawn.
        clip: Fraction of the weights, the largest ones, that is lowered to the smallest of them; see
            :class:`Reweighted`.
        solver: A ``Solver`` or the name of a method; by default that of ``score``.
        steps: Number of fixed steps, when ``solver`` is a name or None.
        intervals: Number of intervals of the quadrature of the trace, a multiple of 8; more of them lower the
            integration error.
        batch_size: Structures integrated together.
        device: Where to compute; None for the device of the flow.
        progress: Whether to show progress bars, by default on a terminal only; or a function that is told how many
            structures are done and of how many: a drawn one counts half until its energy is there.

    Returns:
        Samples, weights, effective sample size, free energy and averages; ``print`` sums them up in one line. Warnings
        tell of energies that failed (weight zero), of an integration error above 0.1 nats, and of fewer than ten
        effective samples, which give no error bar.

    Raises:
        ValueError: For a joint flow, whose likelihood is a bound; if samples would differ in composition; for a bad
            option.
        ReweightingError: If the calculator fails on all of the first batch, or on the first ten one by one.
        GenerationError: If the integration of a structure fails ten times.

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
    asked = _graph(flow, molecule)
    _check_one_composition(flow, size, formula)
    chosen = resolve_solver(solver, steps, flow.likelihood_solver)
    request = Request(
        seed=seed, n_atoms=size, formula=formula, solver=chosen, batch_size=batch_size, device=device, **asked
    )
    sampler = DensitySampler(flow, request, intervals)
    energies = Energies(calculator, flow.config.dimension)
    samples: list[Atoms] = []
    # The first batch comes alone: a calculator that can do none of it ends the work there.
    for part in filter(len, (range(n)[:batch_size], range(n)[batch_size:])):
        drawn = list(sampler.stream(part, of_part(progress, 2 * part.start, n, each=2)))
        if numbers is not None:
            for atoms in drawn:
                atoms.numbers = numbers
        energies.add(drawn, of_part(progress, 2 * part.start + len(part), n, each=2))
        samples += drawn
    result = _weigh(samples, np.array(energies.values), sampler.densities, float(temperature), clip)
    _warn(result, energies.reason, intervals)
    return result


def _weigh(
    samples: list[Atoms],
    energies: np.ndarray,
    densities: Mapping[tuple[int, int], tuple[float, float]],
    temperature: float,
    clip: float | None,
) -> Reweighted:
    """Returns samples with their weights, and writes density, weight and energy into each of them."""
    attempts = [atoms.info["enf_attempts"] for atoms in samples]
    indices = [atoms.info["enf_index"] for atoms in samples]
    drawn = [densities[index, attempt - 1] for index, attempt in zip(indices, attempts, strict=True)]
    log_prob, error = np.array(drawn).T
    finite = np.isfinite(energies)
    log_weights = np.where(finite, -np.where(finite, energies, 0.0) / (kB * temperature) - log_prob, -math.inf)
    for atoms, energy, density, weight in zip(samples, energies, log_prob, log_weights, strict=True):
        atoms.info["enf_log_likelihood"], atoms.info["enf_log_weight"] = float(density), float(weight)
        if math.isfinite(energy):
            atoms.calc = SinglePointCalculator(atoms, energy=float(energy))
    failed, redrawn = int((~finite).sum()), sum(attempts) - len(samples)
    return Reweighted(samples, log_weights, energies, log_prob, error, temperature, clip, failed, redrawn)


def _warn(result: Reweighted, reason: str, intervals: int) -> None:
    """Warns of missing energies, a large integration error and too few effective samples."""
    n = len(result.samples)
    if result.failed:
        warnings.warn(
            f"{result.failed} of {n} structures have no finite energy and count with weight zero ({reason})",
            stacklevel=3,
        )
    if not result.integration_error <= ROUGH:
        warnings.warn(
            f"the integration error of the weights is {result.integration_error:.2g} nats; "
            f"use intervals={2 * intervals} or a finer solver",
            stacklevel=3,
        )
    if n >= FEW and result.too_few:
        warnings.warn(
            f"{result.effective_sample_size:.1f} effective samples of {n} are too few for averages or a free energy; "
            "use a larger n, another temperature (1 eV / kB is 11604.5 K), or a flow trained nearer to this calculator",
            stacklevel=3,
        )


def _check(
    flow: ENF, n: int, temperature: float, seed: int, clip: float | None, intervals: int, batch_size: int
) -> None:
    if not flow.config.mode.exact:
        raise ValueError(
            "features='joint': its likelihood is a bound, not a density for weights; use 'none' or 'given'"
        )
    check_counts(n, seed, batch_size)
    check_intervals(intervals)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature}: must be a positive number of K")
    if clip is not None and not 0 <= clip < 1:
        raise ValueError(f"clip={clip}: must be a fraction of the weights, from 0 to below 1")


def _numbers(
    flow: ENF, symbols: str | Sequence[str] | None, n_atoms: int | None, formula: str | None
) -> np.ndarray | None:
    """Returns the atomic numbers that the calculator sees; None if they are those of the flow."""
    if symbols is None:
        return None
    if flow.config.knows_types:
        raise ValueError(f"symbols={symbols!r}: this model has types of its own; give a formula")
    try:
        numbers = Atoms(symbols).numbers
    except (KeyError, ValueError) as error:
        raise ValueError(f"symbols={symbols!r}: not chemical symbols ({error}); write them like Ar13") from None
    if n_atoms is not None and n_atoms != len(numbers):
        raise ValueError(f"symbols={symbols!r} are {len(numbers)} atoms, but n_atoms={n_atoms}; leave one of them out")
    return numbers


def _graph(flow: ENF, molecule: Atoms | str | None) -> dict[str, Any]:
    """Returns the fields of a request that say which molecular graph to draw; none if the flow knows no graphs.

    Raises:
        ValueError: If a molecule is missing, given to a flow without graphs, or without a graph.
    """
    if not flow.config.graph:
        if molecule is not None:
            raise ValueError(f"molecule: the flow {flow.name!r} knows no molecular graphs; give a formula instead")
        return {}
    if molecule is None:
        raise ValueError(
            f"the flow {flow.name!r} is one of molecular graphs; give the molecule, as a structure or a SMILES"
        )
    if isinstance(molecule, str):
        return {"smiles": molecule}
    try:
        return {"graph": graph_of_atoms(molecule)}
    except PerceptionError as error:
        raise ValueError(
            f"molecule: {error}; use a flow of given elements, or give the bonds by info['enf_bonds']"
        ) from None


def _check_one_composition(flow: ENF, n_atoms: int | None, formula: str | None) -> None:
    """Raises unless all samples have one composition: weights of different ones cannot be compared."""
    if flow.config.types_given and not flow.config.graph and formula is None:
        raise ValueError("weights only compare within one composition; give a formula")
    sizes = list(flow.size_prior.counts)
    if not flow.config.knows_types and n_atoms is None and len(sizes) > 1:
        raise ValueError(
            f"weights only compare within one size, and this model saw {sizes[0]} to {sizes[-1]}; give n_atoms"
        )
