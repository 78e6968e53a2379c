"""Scoring: ``ase.Atoms`` to log-likelihoods with error bars, one row a structure."""

from __future__ import annotations

import copy
import math
import sys
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
from tqdm import tqdm

from ase_enf.atoms.batch import canonical_order, check_atoms, check_whole, one_or_many
from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS, Solver, TraceMethod, resolve_solver
from ase_enf.flow.devices import out_of_memory, resolve_device
from ase_enf.flow.divergence import Divergence, Field
from ase_enf.flow.likelihood import LogProb
from ase_enf.flow.model import ENF, check_flow
from ase_enf.scoring.conditions import conditioned_batch

COLUMNS = ("log_likelihood", "stderr", "kind", "trace", "probes", "draws", "nfe", "n_atoms", "formula")
TRACES = ("auto", "exact", "hutchinson")
# "auto" takes the exact trace up to this many dimensions M (n + F): by the closed form, where its blocks (M · width)²
# fit (0.5 GB in float32), or by reverse passes.
CLOSED_FORM_DIMENSIONS, CLOSED_FORM_BLOCKS = 512, 2**27
AUTOGRAD_DIMENSIONS = 96
# The quadrature starts with INTERVALS and doubles them up to this many times.
DOUBLINGS = 3
# Rows times M² that are scored together: a thread needs some hundred MB for them.
PAIRS_TOGETHER = 2**15
# Key words of the streams of noise; those of generate have keys of three numbers at most, so that none can be shared.
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


def score(
    flow: ENF,
    atoms: Atoms | Iterable[Atoms],
    trace: str = "auto",
    probes: int = 4,
    draws: int = 2,
    seed: int | Sequence[int] = 0,
    solver: str | Solver | None = None,
    steps: int | None = None,
    tolerance: float = 0.2,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    first: int = 0,
    properties: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Scores structures by their log-likelihood in nats, with an error bar.

    * ``features="none"``: exact log p(x | M); ``features="given"``: exact log p(x | types) (``kind`` "exact").
    * ``features="joint"``: a lower bound (``kind`` "bound"). The dequantiser q draws continuous numbers h̃ that round to
      the elements h; ``draws`` of them, K in all, give the importance-weighted bound
      log p(x, h, M) ≥ E log 1/K Σ_k p(x, h̃_k, M) / q(h̃_k | h), tighter in K (Burda et al. 2016; K = 1 is eq. 12).
      With K > 1 and the trace of "hutchinson" it is none (``kind`` "estimate"): the logarithm of a mean is not linear
      in the trace, whose noise lifts it, above the likelihood even. One draw, or the exact trace, keeps the bound.

    Positions are in Å and densities live on the zero-centre-of-mass subspace, so values compare within one
    composition only; mirror images score the same. A row depends on its ``Atoms``, the seed and the options alone:
    noise (of q, of the probes) is attached to atoms in a canonical order and is the same for every row, so the order of
    atoms does not matter, and conformers do not differ by the luck of their draws. (An adaptive solver chooses steps
    for a whole batch: with one, a row depends on its batch mates at the level of the tolerance.)

    Args:
        flow: A flow, as of ``ase_enf.load``.
        atoms: One structure or many; never modified.
        trace: "exact" (invariant to rotation), "hutchinson" (an unbiased estimate of ladj), or "auto": exact up to 512
            dimensions M (n + F) where the trace has a closed form (all networks but "gnn"), and up to 96 elsewhere.
        probes: Rademacher probes of "hutchinson".
        draws: K, the number of h̃ drawn by the dequantiser, for "joint".
        seed: Of the random numbers, one for all rows or one for each. With one, all rows use the same numbers, which is
            best for differences between conformers. The mean over a set of molecules wants a seed of its own for each
            (``seed=range(len(atoms))``), or its error is that of one draw and not that of many.
        solver: A ``Solver`` or the name of a method; see ``ENF.likelihood_solver``. Fixed steps are taken between the
            nodes of the quadrature and the solver's own grid, 48 intervals and more.
        steps: Number of steps of that grid, when ``solver`` is a name or None; below 50 it changes little.
        tolerance: Nodes and steps are doubled (of an adaptive solver, the tolerances are divided by ten), at most three
            times, where the estimated integration error exceeds this many nats; a warning names what stays above it.
        batch_size: Structures (times draws) integrated together.
        device: Where to compute; where the flow is when None.
        progress: Show a bar; by default on a terminal only.
        first: What warnings call the first structure, where a list is scored in parts.
        properties: Of a flow with conditions, values by name for all structures, those not named being unknown. When
            None each structure's own from ``info`` (``info["gap"]``); what is not there is unknown.

    Returns:
        One row a structure, in order. ``stderr`` joins the integration error (of the quadrature and of the path)
        and the standard errors over probes and over draws (see :func:`combine`; NaN for one probe, or one
        draw of a bound, whose spread is unknown). It is the error of the computation alone: neither how good the flow
        is nor how far a bound lies below the likelihood.
        ``probes`` is 0 for the exact trace, ``draws`` 1 where nothing is drawn, ``nfe`` counts evaluations of the
        dynamics.

    Raises:
        ValueError: For a bad structure (see ``molecules.check_atoms``), a size p_M never saw, no structure at all, a
            bad option, a property that the flow does not know, or a structure without a molecular graph for a flow of
            graphs.

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
    check_request(flow, many, trace, probes, draws, seeds, batch_size, tolerance, properties)
    if device is not None and resolve_device(device) != flow.device:
        flow = copy.deepcopy(flow).to(resolve_device(device))
    scorer = Scorer(flow, trace, probes, 1 if flow.config.mode.exact else draws, tolerance, batch_size)
    scorer.properties = properties
    scorer.solver = resolve_solver(solver, steps, flow.likelihood_solver)
    estimates = scorer.run(many, seeds, sys.stderr.isatty() if progress is None else progress)
    _warn(many, estimates, tolerance, first)
    rows = []
    for item, estimate in zip(many, estimates, strict=True):
        used = scorer.trace_of(len(item))
        rows.append(
            (
                estimate.log_likelihood,
                estimate.stderr,
                scorer.kind_of(len(item)),
                used,
                probes if used == "hutchinson" else 0,
                scorer.draws,
                estimate.nfe,
                len(item),
                item.get_chemical_formula(),
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _warn(atoms: list[Atoms], estimates: list[Estimate], tolerance: float, first: int) -> None:
    """Names the structures without a finite score, and those whose integration error stayed above the tolerance."""

    def say(places: list[int], words: str) -> None:
        if places:
            names = ", ".join(f"{first + k} ({atoms[k].get_chemical_formula()})" for k in places[:5])
            warnings.warn(f"{len(places)} structure(s) {words}: structure {names}", stacklevel=4)

    finite = [math.isfinite(estimate.log_likelihood) for estimate in estimates]
    say([k for k, good in enumerate(finite) if not good], "have no finite log-likelihood; use 200 steps or float64")
    rough = [k for k, e in enumerate(estimates) if finite[k] and not e.integration_error <= tolerance]
    worst = max((estimates[k].integration_error for k in rough), default=0.0)
    words = f"keep an integration error above tolerance={tolerance:g}, up to {worst:.2g} nats; take it into account"
    say(rough, words)


def annotate(flow: ENF, atoms: Atoms | Iterable[Atoms], **options: object) -> list[Atoms]:
    """Returns copies of the structures with their score in ``info``, which extended xyz and ``.traj`` keep.

    ``enf_log_likelihood``, ``enf_log_likelihood_stderr`` (nats; left out when unknown), ``enf_log_likelihood_kind``
    ("exact", "bound" or "estimate"), ``enf_log_likelihood_trace`` and ``enf_log_likelihood_model``.

    Args:
        flow: A flow.
        atoms: One structure or many; never modified.
        options: Of :func:`score`.

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
        if results := _known_results(original):  # energies, which copy leaves behind
            item.calc = SinglePointCalculator(item, **results)
        item.info["enf_log_likelihood"] = float(row.log_likelihood)
        item.info.pop("enf_log_likelihood_stderr", None)  # of an earlier score
        if math.isfinite(row.stderr):
            item.info["enf_log_likelihood_stderr"] = float(row.stderr)
        item.info["enf_log_likelihood_kind"] = str(row.kind)
        item.info["enf_log_likelihood_trace"] = str(row.trace)
        item.info["enf_log_likelihood_model"] = model  # enf_model, if there, says which one made the structure
        result.append(item)
    return result


def _known_results(atoms: Atoms) -> dict[str, Any]:
    """Returns what a calculator has computed, or a file told, of these positions; computes nothing."""
    results = getattr(atoms.calc, "results", {})
    if isinstance(atoms.calc, Calculator) and atoms.calc.check_state(atoms):
        return {}
    return {name: value for name, value in results.items() if name in all_properties and value is not None}


class Scorer:
    """One request: everything that its structures share."""

    def __init__(self, flow: ENF, trace: str, probes: int, draws: int, tolerance: float, batch_size: int) -> None:
        self.flow = flow
        self.trace = trace
        self.probes = probes
        self.draws = draws
        self.tolerance = tolerance
        self.batch_size = batch_size
        self.together = batch_size  # less where memory was not enough
        self.solver = flow.likelihood_solver
        self.properties: Mapping[str, float] | None = None

    def trace_of(self, n_atoms: int) -> str:
        """Returns the trace that "auto" means for a structure of this size."""
        if self.trace != "auto":
            return self.trace
        config = self.flow.config
        dimensions = n_atoms * (config.dimension + config.flow_features)
        closed = self.flow.dynamics.has_closed_form and (n_atoms * config.hidden) ** 2 <= CLOSED_FORM_BLOCKS
        return "exact" if dimensions <= (CLOSED_FORM_DIMENSIONS if closed else AUTOGRAD_DIMENSIONS) else "hutchinson"

    def kind_of(self, n_atoms: int) -> str:
        """Returns what the score of a structure of this size is: "exact", a "bound", or an "estimate" of a bound."""
        if self.flow.config.mode.exact:
            return "exact"
        # The logarithm of a mean over draws is not linear in the trace, whose noise lifts it.
        return "estimate" if self.draws > 1 and self.trace_of(n_atoms) == "hutchinson" else "bound"

    def run(self, atoms: list[Atoms], seeds: list[int], progress: bool) -> list[Estimate]:
        """Returns one estimate a structure, in order."""
        rows = [
            Row(index, item, self._rank(item), seed)
            for index, (item, seed) in enumerate(zip(atoms, seeds, strict=True))
        ]
        results: dict[int, Estimate] = {}
        with tqdm(total=len(rows), disable=not progress, unit="structure", dynamic_ncols=True) as bar:
            for group in self._groups(rows):
                for row, estimate in zip(group, self._within_memory(group), strict=True):
                    results[row.index] = estimate
                bar.update(len(group))
        return [results[index] for index in range(len(rows))]

    def _within_memory(self, rows: list[Row]) -> list[Estimate]:
        """Scores a batch, in parts that memory holds."""
        estimates: list[Estimate] = []
        while len(estimates) < len(rows):
            part = rows[len(estimates) :][: self.together]
            try:
                estimates += self._estimate(part)
            except Exception as error:
                if len(part) == 1 or not out_of_memory(error):
                    raise
                self.together = (len(part) + 1) // 2
                words = f"memory is not enough for {len(part)} structures together; goes on with {self.together}"
                warnings.warn(words, stacklevel=2)
        return estimates

    def _rank(self, atoms: Atoms) -> np.ndarray:
        """Returns the order in which noise is attached; any where there is none."""
        noisy = not self.flow.config.mode.exact or self.trace_of(len(atoms)) == "hutchinson"
        return canonical_order(atoms) if noisy else np.arange(len(atoms))

    def _groups(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Yields batches of one size, of fewer rows where those are large: memory is that of pairs."""
        for size in sorted({len(row.atoms) for row in rows}):
            together = max(1, min(self.batch_size, PAIRS_TOGETHER // size**2) // self.draws)
            members = [row for row in rows if len(row.atoms) == size]
            for k in range(0, len(members), together):
                yield members[k : k + together]

    def _estimate(self, rows: list[Row]) -> list[Estimate]:
        """Scores one batch, with twice the nodes and a finer solver for the rows whose integration error is too large.

        Each row decides for itself, so that it does not depend on its batch mates.
        """
        answers: dict[int, Estimate] = {}
        evaluations = np.zeros(len(rows), dtype=int)
        work = [(np.arange(len(rows)), INTERVALS, self.solver)]
        while work:
            places, intervals, solver = work.pop()
            chosen = [rows[place] for place in places]
            out = self.log_prob(chosen, intervals, solver)
            weights = (out.log_prob - out.ladj + out.samples).double().unflatten(-1, (len(chosen), self.draws))
            error = out.error.double().view(len(chosen), self.draws).amax(dim=1).cpu().numpy()
            evaluations[places] += out.nfe * self.draws
            for number, place in enumerate(places):
                row = weights[:, number].cpu().numpy()  # (P, K)
                answers[place] = self._answer(rows[place], row, error[number], evaluations[place])
            rough = ~(error <= self.tolerance)  # also where it is not finite, which it may be on a finer path
            if rough.any() and intervals < INTERVALS * 2**DOUBLINGS:
                work.append((places[rough], 2 * intervals, solver.finer(self.flow.dtype)))
        return [answers[place] for place in range(len(rows))]

    def log_prob(self, rows: list[Row], intervals: int, solver: Solver) -> LogProb:
        """Returns the terms of every row and draw, draws of a row side by side."""
        flow, config = self.flow, self.flow.config
        batch = conditioned_batch(flow, [row.atoms for row in rows], self.properties)
        noise = None if config.mode.exact else self.noise(rows, config.flow_features)
        method = self._trace_method(rows)
        return flow.log_prob(batch.repeat(self.draws), noise, method, solver, intervals)

    def _answer(self, row: Row, weights: np.ndarray, error: float, evaluations: int) -> Estimate:
        value, stderr = combine(weights, float(error))
        # One draw of a bound, or one probe, says nothing of their spread.
        unknown = not self.flow.config.mode.exact and self.draws == 1
        unknown |= self.probes == 1 and self.trace_of(len(row.atoms)) == "hutchinson"
        return Estimate(value, math.nan if unknown else stderr, error, int(evaluations))

    def noise(self, rows: list[Row], width: int) -> Tensor:
        """Returns ε of q for every row and draw, shape (R K, M, width)."""
        stacked = np.concatenate(self.normals(NOISE_OF_Q, rows, (self.draws, width)))
        return torch.from_numpy(stacked).to(device=self.flow.device, dtype=self.flow.dtype)

    def _trace_method(self, rows: list[Row]) -> TraceMethod:
        if self.trace_of(len(rows[0].atoms)) == "exact":
            return divergence.exact
        n, width = self.flow.config.dimension, self.flow.config.flow_features
        gaussian = np.stack(self.normals(PROBES, rows, (self.probes, n + width)), axis=1)  # (P, R, M, n + F)
        by_row = np.where(gaussian >= 0, 1.0, -1.0)
        v = torch.from_numpy(by_row.repeat(self.draws, axis=1)).to(device=self.flow.device, dtype=self.flow.dtype)

        def estimate(field: Field, x: Tensor, h: Tensor) -> Divergence:
            return divergence.hutchinson(field, x, h, (v[..., :n], v[..., n:]))

        return estimate

    @staticmethod
    def normals(stream: tuple[int, ...], rows: list[Row], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Returns the noise of every row, (shape[0], M, shape[1]) each; more draws or atoms only add to it.

        Args:
            stream: `NOISE_OF_Q` or `PROBES`: what it is for, so that the two are independent.
            rows: Structures of one size.
            shape: Draws and numbers an atom.
        """

        def draw(seed: int, place: int) -> np.ndarray:
            sequence = np.random.SeedSequence(seed, spawn_key=(*stream, place))
            return np.random.default_rng(sequence).standard_normal(shape)

        places = range(len(rows[0].atoms))
        by_seed = {seed: np.stack([draw(seed, place) for place in places]) for seed in {row.seed for row in rows}}
        return [by_seed[row.seed][row.rank].transpose(1, 0, 2) for row in rows]


def combine(weights: np.ndarray, integration_error: float) -> tuple[float, float]:
    """Joins log weights to an importance-weighted log-likelihood and its error.

    log p̂ = log 1/K Σ_k w_k with w_k the mean over probes in the logarithm; its error over draws, by the spread over
    probes, and by the integration, added in squares. That over draws is the larger of the delta method's, which is
    right for many draws but never exceeds one nat, and the standard error of the mean of log w, which is right where
    one draw outweighs the others; for many draws of a wide spread, both are too small.

    Args:
        weights: Log weights by probe and draw, shape (P, K).
        integration_error: Nats.

    Returns:
        Log-likelihood and standard error, nats.

    Example:
        >>> round(combine(np.log([[1.0, 3.0]]), 0.0)[0], 6)  # log 2
        0.693147
    """
    probes, draws = weights.shape
    log_w = weights.mean(axis=0)
    peak = log_w.max()
    ratio = np.exp(log_w - peak)
    value = peak + math.log(ratio.mean())
    variance = integration_error**2
    if draws > 1:
        by_ratio = float(ratio.var(ddof=1) / draws / ratio.mean() ** 2)
        variance += max(by_ratio, float(log_w.var(ddof=1) / draws))
    if probes > 1:
        share = ratio / ratio.sum()
        variance += float((weights @ share).var(ddof=1) / probes)
    return float(value), math.sqrt(variance)


def check_request(
    flow: ENF,
    atoms: Sequence[Atoms],
    trace: str,
    probes: int,
    draws: int,
    seeds: Sequence[int],
    batch_size: int,
    tolerance: float,
    properties: Mapping[str, float] | None = None,
) -> None:
    """Raises the ``ValueError`` that :func:`score` would raise, given a seed for each structure; computes nothing."""
    if not atoms:
        raise ValueError("no structures to score; the input is empty")
    if len(seeds) != len(atoms):
        raise ValueError(f"{len(seeds)} seeds for {len(atoms)} structures: give one for all or one for each")
    if trace not in TRACES:
        raise ValueError(f"trace {trace!r} is unknown; choose one of {', '.join(TRACES)}")
    for name, value in (("probes", probes), ("draws", draws), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: must be a positive number of nats")
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
