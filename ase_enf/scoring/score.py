"""Scoring: log-likelihoods of ``ase.Atoms`` with error bars, one row for each structure."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from ase_enf.atoms.batch import canonical_order, check_atoms, one_or_many
from ase_enf.bars import Bar, Progress
from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS, Solver, TraceMethod, resolve_solver
from ase_enf.flow.devices import out_of_memory, resolve_device
from ase_enf.flow.divergence import Divergence, Field
from ase_enf.flow.likelihood import Known, LogProb
from ase_enf.flow.model import ENF, check_flow
from ase_enf.renamed import renamed_keywords
from ase_enf.scoring.conditions import conditioned_batch
from ase_enf.scoring.importance import combine
from ase_enf.scoring.options import COLUMNS, RENAMED, check_options
from ase_enf.scoring.remarks import warn_of_errors, warn_of_sizes
from ase_enf.values import check_whole

# "auto" takes the exact trace up to this many dimensions M (n + F): in closed form, if its (M · width)² numbers fit
# (0.5 GB in float32), or by reverse passes.
CLOSED_FORM_DIMENSIONS, CLOSED_FORM_BLOCKS = 512, 2**27
AUTOGRAD_DIMENSIONS = 96
# The quadrature starts with INTERVALS and doubles them up to this many times.
DOUBLINGS = 3
# Rows times M² that are scored together: on a CPU they take some hundred MB a thread, and a GPU needs more to be busy.
PAIRS_TOGETHER = {"cpu": 2**15, "cuda": 2**20}
# Keys of the random streams. Those of ``generate`` have at most three numbers, so that no stream is shared.
NOISE_OF_Q, PROBES = (*b"score: noise of q",), (*b"score: probes",)


class Row(NamedTuple):
    """What one structure needs besides its positions."""

    index: int
    atoms: Atoms
    rank: np.ndarray  # (M,), canonical order
    seed: int


class Estimate(NamedTuple):
    """The answer for one structure."""

    log_likelihood: float
    stderr: float
    integration_error: float  # the part of stderr that more nodes would lower
    nfe: int


class _Attempt(NamedTuple):
    """How a likelihood is integrated, and for which rows of a batch."""

    places: np.ndarray
    intervals: int
    solver: Solver
    before: Known | None = None  # from half the intervals


@renamed_keywords(RENAMED)
def score(
    flow: ENF,
    atoms: Atoms | Iterable[Atoms],
    trace: str = "auto",
    probes: int = 4,
    importance_samples: int = 2,
    seed: int | Sequence[int] = 0,
    solver: str | Solver | None = None,
    steps: int | None = None,
    max_stderr: float = 0.2,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: Progress = None,
    first: int = 0,
    properties: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Returns the log-likelihoods of structures, in nats, with error bars.

    * ``features="none"``: exact log p(x | M); ``features="given"``: exact log p(x | types) (``kind`` "exact").
    * ``features="joint"``: a lower bound (``kind`` "bound"). The dequantiser q draws continuous numbers h̃ that round to
      the elements h; ``importance_samples`` of them, K in all, give the importance-weighted bound
      log p(x, h, M) ≥ E log 1/K Σ_k p(x, h̃_k, M) / q(h̃_k | h), tighter in K (Burda et al. 2016; K = 1 is eq. 12).
      With K > 1 and the "hutchinson" trace it is no bound (``kind`` "estimate"): the logarithm of a mean is not linear
      in the trace, so that the noise of the probes raises it, sometimes above the likelihood. With one draw, or with
      the exact trace, it is a bound.

    Positions are in Å and densities live on the zero-centre-of-mass subspace, so that values compare within one
    composition only; mirror images score the same. A row depends on its ``Atoms``, the seed and the options alone: the
    noise of q and of the probes is attached to atoms in a canonical order and is the same for every row, so that the
    order of atoms does not matter and chance does not tell conformers apart. (An adaptive solver chooses its steps for
    a whole batch: with one, a row depends on the rest of its batch within ``rtol`` and ``atol``.)

    Args:
        flow: A flow, as ``ase_enf.load`` returns it.
        atoms: One structure or many; never modified.
        trace: "exact" (invariant to rotation), "hutchinson" (an unbiased estimate of ladj), or "auto": exact up to 512
            dimensions M (n + F) where the trace has a closed form (all networks but "gnn"), and up to 96 elsewhere.
        probes: Number of Rademacher probes of "hutchinson".
        importance_samples: K, the number of draws h̃ from the dequantiser, for "joint".
        seed: Seed of the random numbers, one for all rows or one for each. With one, all rows use the same numbers,
            which is best for differences between conformers. For a mean over molecules give each its own
            (``seed=range(len(atoms))``), or the mean has the error of a single draw instead of many.
        solver: A ``Solver`` or the name of a method; None for ``ENF.likelihood_solver``. Fixed steps lead from node to
            node of the quadrature and of the solver's own grid, 48 intervals or more.
        steps: Number of steps of that grid, when ``solver`` is a name or None; below 50 it changes little.
        max_stderr: Where the estimated integration error, a part of ``stderr``, exceeds this many nats, the numbers of
            nodes and steps are doubled (for an adaptive solver, ``rtol`` and ``atol`` are divided by ten), at most
            three times; a warning names the structures that stay above it.
        batch_size: Number of structures, times K, that are integrated together.
        device: Where to compute; None for the device of the flow.
        progress: Whether to show a progress bar, by default on a terminal only; or a function that is told, after each
            batch, how many structures are scored and of how many.
        first: Number of the first structure in warnings, for a list that is scored in parts.
        properties: For a flow with conditions: values by name for all structures; conditions that are not named are
            unknown. With None each structure has its own from ``info`` (``info["gap"]``), and those that are missing
            there are unknown.

    Returns:
        One row for each structure, in order. ``stderr`` combines the integration error (of the quadrature and of the
        path) with the standard errors over probes and over draws (see ``importance.combine``; NaN for one probe, or one
        draw of a bound, whose spread is unknown). It is the error of the computation alone: it says neither how good
        the flow is nor how far a bound lies below the likelihood. ``probes`` is 0 for the exact trace,
        ``importance_samples`` 1 where nothing is drawn, ``nfe`` counts evaluations of the dynamics.

    Raises:
        TypeError: For a keyword that has been renamed; the message gives its new name.
        ValueError: For a bad structure (see ``atoms.batch.check_atoms``), a size that p_M never saw, an empty list, a
            bad option, a property that the flow does not know, or, for a flow of graphs, a structure without a
            molecular graph.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> score(flow, molecule("H2O"))[["kind", "trace", "n_atoms", "formula"]].values.tolist()
        [['exact', 'exact', 3, 'H2O']]
    """
    check_flow(flow)
    many = one_or_many(atoms)
    seeds = [seed] * len(many) if np.ndim(seed) == 0 else list(seed)
    check_request(flow, many, trace, probes, importance_samples, seeds, batch_size, max_stderr, properties)
    if device is not None and resolve_device(device) != flow.device:
        flow = copy.deepcopy(flow).to(resolve_device(device))
    samples = 1 if flow.config.mode.exact else importance_samples
    scorer = Scorer(flow, trace, probes, samples, max_stderr, batch_size)
    scorer.properties = properties
    scorer.solver = resolve_solver(solver, steps, flow.likelihood_solver)
    warn_of_sizes(flow, many, first)
    estimates = scorer.run(many, seeds, progress)
    values, _, errors, _ = zip(*estimates, strict=True)
    warn_of_errors(many, values, errors, max_stderr, first)
    rows = [scorer.table_row(item, estimate) for item, estimate in zip(many, estimates, strict=True)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def annotate(flow: ENF, atoms: Atoms | Iterable[Atoms], **options: object) -> list[Atoms]:
    """Returns copies of the structures with their score in ``info``, which extended xyz and ``.traj`` keep.

    The keys are ``enf_log_likelihood``, ``enf_log_likelihood_stderr`` (nats; left out when unknown),
    ``enf_log_likelihood_kind`` ("exact", "bound" or "estimate"), ``enf_log_likelihood_trace`` and
    ``enf_log_likelihood_model``.

    Args:
        flow: A flow.
        atoms: One structure or many; never modified.
        options: Those of :func:`score`.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> annotate(flow, molecule("H2O"))[0].info["enf_log_likelihood_kind"]
        'exact'
    """
    many = one_or_many(atoms)
    return with_scores(many, score(flow, many, **options), flow.name)


def with_scores(atoms: Iterable[Atoms], table: pd.DataFrame, model: str) -> list[Atoms]:
    """Returns copies of ``atoms`` with the rows of ``table`` in their ``info``; see :func:`annotate`."""
    result = []
    for original, row in zip(atoms, table.itertuples(), strict=True):
        item = original.copy()
        if results := _known_results(original):  # energies, which copy() drops
            item.calc = SinglePointCalculator(item, **results)
        item.info["enf_log_likelihood"] = float(row.log_likelihood)
        item.info.pop("enf_log_likelihood_stderr", None)  # of an earlier score
        if math.isfinite(row.stderr):
            item.info["enf_log_likelihood_stderr"] = float(row.stderr)
        item.info["enf_log_likelihood_kind"] = str(row.kind)
        item.info["enf_log_likelihood_trace"] = str(row.trace)
        item.info["enf_log_likelihood_model"] = model  # enf_model, if present, is the one that made the structure
        result.append(item)
    return result


def _known_results(atoms: Atoms) -> dict[str, Any]:
    """Returns the results of these positions that a calculator or a file holds already; computes nothing."""
    results = getattr(atoms.calc, "results", {})
    if isinstance(atoms.calc, Calculator) and atoms.calc.check_state(atoms):
        return {}
    return {name: value for name, value in results.items() if name in all_properties and value is not None}


class Scorer:
    """One request for scores: what all of its structures share."""

    def __init__(
        self, flow: ENF, trace: str, probes: int, importance_samples: int, max_stderr: float, batch_size: int
    ) -> None:
        self.flow = flow
        self.trace = trace
        self.probes = probes
        self.importance_samples = importance_samples
        self.max_stderr = max_stderr
        self.batch_size = batch_size
        self.together = batch_size  # fewer once memory was not enough
        self.solver = flow.likelihood_solver
        self.properties: Mapping[str, float] | None = None

    def trace_of(self, n_atoms: int) -> str:
        """Returns the method of the trace for a structure of this size, with "auto" resolved."""
        if self.trace != "auto":
            return self.trace
        config = self.flow.config
        dimensions = n_atoms * (config.dimension + config.flow_features)
        closed = self.flow.dynamics.has_closed_form and (n_atoms * config.hidden) ** 2 <= CLOSED_FORM_BLOCKS
        return "exact" if dimensions <= (CLOSED_FORM_DIMENSIONS if closed else AUTOGRAD_DIMENSIONS) else "hutchinson"

    def kind_of(self, n_atoms: int) -> str:
        """Returns the kind of score for a structure of this size: "exact", "bound", or "estimate" of a bound."""
        if self.flow.config.mode.exact:
            return "exact"
        # The logarithm of a mean over draws is not linear in the trace, so that the noise of the probes raises it.
        return "estimate" if self.importance_samples > 1 and self.trace_of(n_atoms) == "hutchinson" else "bound"

    def table_row(self, atoms: Atoms, estimate: Estimate) -> tuple[float | str | int, ...]:
        """Returns the row of the table for a structure, in the order of ``COLUMNS``."""
        size = len(atoms)
        trace, kind = self.trace_of(size), self.kind_of(size)
        probes = self.probes if trace == "hutchinson" else 0
        settings = (kind, trace, probes, self.importance_samples)
        return estimate.log_likelihood, estimate.stderr, *settings, estimate.nfe, size, atoms.get_chemical_formula()

    def run(self, atoms: list[Atoms], seeds: list[int], progress: Progress) -> list[Estimate]:
        """Returns one estimate for each structure, in order."""
        rows = [
            Row(index, item, self._rank(item), seed)
            for index, (item, seed) in enumerate(zip(atoms, seeds, strict=True))
        ]
        results: dict[int, Estimate] = {}
        with Bar(len(rows), progress, "structure") as bar:
            for group in self._groups(rows):
                for row, estimate in zip(group, self._within_memory(group), strict=True):
                    results[row.index] = estimate
                bar.update(len(group))
        return [results[index] for index in range(len(rows))]

    def _within_memory(self, rows: list[Row]) -> list[Estimate]:
        """Scores a batch, in smaller parts if memory is not enough for all of it."""
        estimates: list[Estimate] = []
        while len(estimates) < len(rows):
            part = rows[len(estimates) :][: self.together]
            try:
                estimates += self._estimate(part)
            except Exception as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                self.together = (len(part) + 1) // 2
                words = f"memory is not enough for {len(part)} structures at a time; continues with {self.together}"
                warnings.warn(words, stacklevel=2)
        return estimates

    def _rank(self, atoms: Atoms) -> np.ndarray:
        """Returns the order in which noise is attached to the atoms; without noise, any order does."""
        noisy = not self.flow.config.mode.exact or self.trace_of(len(atoms)) == "hutchinson"
        return canonical_order(atoms) if noisy else np.arange(len(atoms))

    def _groups(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Yields batches of structures of one size, smaller ones for larger structures: memory grows with the pairs."""
        for size in sorted({len(row.atoms) for row in rows}):
            pairs = PAIRS_TOGETHER.get(self.flow.device.type, PAIRS_TOGETHER["cpu"])
            together = max(1, min(self.batch_size, pairs // size**2) // self.importance_samples)
            members = [row for row in rows if len(row.atoms) == size]
            for k in range(0, len(members), together):
                yield members[k : k + together]

    def _estimate(self, rows: list[Row]) -> list[Estimate]:
        """Scores one batch, and once more those rows whose integration error is too large.

        This is decided for each row, so that a row does not depend on the rest of its batch.
        """
        answers: dict[int, Estimate] = {}
        evaluations = np.zeros(len(rows), dtype=int)
        work = [_Attempt(np.arange(len(rows)), INTERVALS, self.solver)]
        while work:
            attempt = work.pop()
            places = attempt.places
            out = self.log_prob([rows[place] for place in places], attempt)
            weights = (out.log_prob - out.ladj + out.samples).double()
            weights = weights.unflatten(-1, (len(places), self.importance_samples))  # (P, R, K)
            error, by_path = (
                part.double().view(len(places), self.importance_samples).amax(dim=1).cpu().numpy()
                for part in (out.error, out.path_error)
            )
            evaluations[places] += out.nfe * self.importance_samples
            for number, place in enumerate(places):
                row = weights[:, number].cpu().numpy()  # (P, K)
                answers[place] = self._answer(rows[place], row, error[number], evaluations[place])
            work += self._further(attempt, out, error, by_path)
        return [answers[place] for place in range(len(rows))]

    def _further(self, attempt: _Attempt, out: LogProb, error: np.ndarray, by_path: np.ndarray) -> Iterator[_Attempt]:
        """Yields what is to be tried where the error is too large, with twice the nodes.

        Where the path is good enough, the traces that are known serve again; elsewhere its solver becomes finer.
        """
        if attempt.intervals >= INTERVALS * 2**DOUBLINGS:
            return
        rough = ~(error <= self.max_stderr)  # also where it is not finite, which it may be on a finer path
        good = by_path <= self.max_stderr / 2
        draws = np.arange(self.importance_samples)
        for chosen, reused in ((rough & good, True), (rough & ~good, False)):
            if not chosen.any():
                continue
            places, intervals = attempt.places[chosen], 2 * attempt.intervals
            if reused:
                columns = chosen.nonzero()[0][:, None] * self.importance_samples + draws
                before = out.known(torch.from_numpy(columns.ravel()).to(out.path_error.device))
                yield _Attempt(places, intervals, attempt.solver, before)
            else:
                yield _Attempt(places, intervals, attempt.solver.finer(self.flow.dtype))

    def log_prob(self, rows: list[Row], attempt: _Attempt) -> LogProb:
        """Returns the terms of every row and draw, draws of a row side by side."""
        flow, config = self.flow, self.flow.config
        batch = conditioned_batch(flow, [row.atoms for row in rows], self.properties)
        noise = None if config.mode.exact else self.noise(rows, config.flow_features)
        batch, how = batch.repeat(self.importance_samples), (attempt.solver, attempt.intervals)
        return flow.log_prob(batch, noise, self._trace_method(rows), *how, before=attempt.before)

    def _answer(self, row: Row, weights: np.ndarray, error: float, evaluations: int) -> Estimate:
        value, stderr = combine(weights, float(error))
        # One draw of a bound, or one probe, says nothing about their spread.
        unknown = not self.flow.config.mode.exact and self.importance_samples == 1
        unknown |= self.probes == 1 and self.trace_of(len(row.atoms)) == "hutchinson"
        return Estimate(value, math.nan if unknown else stderr, error, int(evaluations))

    def noise(self, rows: list[Row], width: int) -> Tensor:
        """Returns the noise ε of q for every row and draw, shape (R K, M, width)."""
        stacked = np.concatenate(self.normals(NOISE_OF_Q, rows, (self.importance_samples, width)))
        return torch.from_numpy(stacked).to(device=self.flow.device, dtype=self.flow.dtype)

    def _trace_method(self, rows: list[Row]) -> TraceMethod:
        if self.trace_of(len(rows[0].atoms)) == "exact":
            return divergence.exact
        n, width = self.flow.config.dimension, self.flow.config.flow_features
        gaussian = np.stack(self.normals(PROBES, rows, (self.probes, n + width)), axis=1)  # (P, R, M, n + F)
        by_row = np.where(gaussian >= 0, 1.0, -1.0)
        v = torch.from_numpy(by_row.repeat(self.importance_samples, axis=1)).to(
            device=self.flow.device, dtype=self.flow.dtype
        )

        def estimate(field: Field, x: Tensor, h: Tensor) -> Divergence:
            return divergence.hutchinson(field, x, h, (v[..., :n], v[..., n:]))

        return estimate

    @staticmethod
    def normals(stream: tuple[int, ...], rows: list[Row], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Returns the noise of every row, (shape[0], M, shape[1]) each; it does not depend on further draws or atoms.

        Args:
            stream: ``NOISE_OF_Q`` or ``PROBES``, the purpose of the noise, so that the two are independent.
            rows: Structures of one size.
            shape: Number of draws, and of random numbers for each atom.
        """

        def draw(seed: int, place: int) -> np.ndarray:
            sequence = np.random.SeedSequence(seed, spawn_key=(*stream, place))
            return np.random.default_rng(sequence).standard_normal(shape)

        places = range(len(rows[0].atoms))
        by_seed = {seed: np.stack([draw(seed, place) for place in places]) for seed in {row.seed for row in rows}}
        return [by_seed[row.seed][row.rank].transpose(1, 0, 2) for row in rows]


def check_request(
    flow: ENF,
    atoms: Sequence[Atoms],
    trace: str,
    probes: int,
    importance_samples: int,
    seeds: Sequence[int],
    batch_size: int,
    max_stderr: float,
    properties: Mapping[str, float] | None = None,
) -> None:
    """Raises the ``ValueError`` that :func:`score` would raise, given a seed for each structure; computes nothing."""
    if not atoms:
        raise ValueError("no structures to score; the input is empty")
    if len(seeds) != len(atoms):
        raise ValueError(f"{len(seeds)} seeds for {len(atoms)} structures: give one for all or one for each")
    check_options(trace, probes, importance_samples, batch_size, max_stderr)
    for value in seeds:
        check_whole("seed", value, 0)
    for index, item in enumerate(atoms):
        check_atoms(item, flow.species, index, flow.config.dimension)
        if "log_size" in flow.config.mode.terms and len(item) not in flow.size_prior:
            seen = list(flow.size_prior.counts)
            raise ValueError(
                f"structure {index} ({item.get_chemical_formula()}): has {len(item)} atoms, a size this model never "
                f"saw (sizes {seen[0]} to {seen[-1]}), so log p_M is minus infinity; "
                "score it with a features='given' model"
            )
    if properties or flow.config.graph or flow.config.conditions:
        conditioned_batch(flow, atoms, properties)
