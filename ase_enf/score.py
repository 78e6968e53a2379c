"""Scoring: ``ase.Atoms`` to log-likelihoods with error bars, one row a structure."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor
from tqdm import tqdm

from ase_enf import divergence
from ase_enf.divergence import Divergence, Field
from ase_enf.flow import INTERVALS, Solver, TraceMethod, resolve_solver
from ase_enf.model import ENF, LogProb, resolve_device
from ase_enf.molecules import COINCIDENT, canonical_order, check_atoms, one_or_many, to_batch

COLUMNS = ("log_likelihood", "stderr", "kind", "trace", "probes", "draws", "nfe", "n_atoms", "formula")
TRACES = ("auto", "exact", "hutchinson")
# A fixed grid, so that a row does not depend on its batch mates; the nodes of the quadrature are its steps.
DEFAULT_SOLVER = Solver("rk4", steps=4, warp=2.0)
# "auto" takes the exact trace up to this many dimensions M (n + F), with and without a closed form of it. Beyond, the
# memory of its blocks (M F)² or the number of its reverse passes is what limits.
EXACT_DIMENSIONS = {True: 512, False: 96}
# The quadrature starts with INTERVALS and doubles them up to this many times.
DOUBLINGS = 2
# Streams of the noise: of q, of the probes.
_Q, _PROBES = 1, 2


class _Row(NamedTuple):
    """What one structure needs besides its positions."""

    index: int
    atoms: Atoms
    rank: np.ndarray  # (M,), canonical order


class _Estimate(NamedTuple):
    """The answer for one structure."""

    log_likelihood: float
    stderr: float
    nfe: int


def score(
    flow: ENF,
    atoms: Atoms | Iterable[Atoms],
    trace: str = "auto",
    probes: int = 4,
    draws: int = 2,
    seed: int = 0,
    solver: str | Solver | None = None,
    steps: int | None = None,
    tolerance: float = 0.2,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Scores structures by their log-likelihood in nats, with an error bar.

    * ``features="none"``: exact log p(x | M); ``features="given"``: exact log p(x | types) (``kind`` "exact").
    * ``features="joint"``: the importance-weighted bound with K = ``draws`` draws of q (``kind`` "bound"),
      log p(x, h, M) ≥ E log 1/K Σ_k p(x, h̃_k, M) / q(h̃_k | h), tighter in K (Burda et al. 2016; K = 1 is eq. 12).

    Positions are in Å and densities live on the zero-centre-of-mass subspace, so values compare within one
    composition only; mirror images score the same. A row depends on its ``Atoms``, the seed and the options alone:
    noise (of q, of the probes) is attached to atoms in a canonical order and is the same for every row, so the order of
    atoms does not matter and conformers share their noise. (An adaptive solver chooses steps for a whole batch:
    with one, a row depends on its batch mates at the level of the tolerance.)

    Args:
        flow: A flow, as of ``ase_enf.load``.
        atoms: One structure or many; never modified.
        trace: "exact" (invariant to rotation), "hutchinson" (an unbiased estimate of ladj; as the bound is not linear
            in it, its noise can lift a bound), or "auto": exact up to 512 dimensions M (n + F) for the EGNN, whose
            trace has a closed form, and up to 96 for other networks.
        probes: Rademacher probes of "hutchinson".
        draws: K, for "joint".
        seed: Of the noise.
        solver: A ``Solver`` or the name of a method; rk4 by default, on a fixed grid that the quadrature nodes refine.
        steps: Number of fixed steps, when ``solver`` is a name or None.
        tolerance: The nodes of the quadrature are doubled, at most twice, where the estimated integration error exceeds
            this many nats.
        batch_size: Structures (times draws) integrated together.
        device: Where to compute; where the flow is when None.
        progress: Show a bar; by default on a terminal only.

    Returns:
        One row a structure, in order. ``stderr`` joins the integration error (quadrature) and the standard errors over
        probes and over draws (delta method; NaN for one probe, or one draw of a bound, whose spread is unknown).
        ``probes`` is 0 for the exact trace, ``draws`` 1 where nothing is drawn, ``nfe`` counts evaluations of the
        dynamics.

    Raises:
        ValueError: For a bad structure (see ``molecules.check_atoms``), a size p_M never saw, no structure at all, or a
            bad option.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.model import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> score(flow, molecule("H2O"))[["kind", "trace", "n_atoms", "formula"]].values.tolist()
        [['exact', 'exact', 3, 'H2O']]
    """
    many = one_or_many(atoms)
    _check(flow, many, trace, probes, draws, seed, batch_size)
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance}: must be a positive number of nats")
    if device is not None and resolve_device(device) != flow.device:
        flow = copy.deepcopy(flow).to(resolve_device(device))
    scorer = _Scorer(flow, trace, probes, draws if flow.features == "joint" else 1, seed, tolerance, batch_size)
    scorer.solver = resolve_solver(solver, steps, DEFAULT_SOLVER)
    estimates = scorer.run(many, sys.stderr.isatty() if progress is None else progress)
    lost = [k for k, estimate in enumerate(estimates) if not math.isfinite(estimate.log_likelihood)]
    if lost:
        names = ", ".join(f"{k} ({many[k].get_chemical_formula()})" for k in lost[:5])
        warnings.warn(
            f"{len(lost)} structure(s) have no finite log-likelihood, structure {names}; use more steps", stacklevel=2
        )
    rows = []
    for item, estimate in zip(many, estimates, strict=True):
        used = scorer.trace_of(len(item))
        rows.append(
            (
                estimate.log_likelihood,
                estimate.stderr,
                "bound" if flow.features == "joint" else "exact",
                used,
                probes if used == "hutchinson" else 0,
                scorer.draws,
                estimate.nfe,
                len(item),
                item.get_chemical_formula(),
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def annotate(flow: ENF, atoms: Atoms | Iterable[Atoms], **options: object) -> list[Atoms]:
    """Returns copies of the structures with their score in ``info``, which every ASE format but plain xyz keeps.

    ``enf_log_likelihood``, ``enf_log_likelihood_stderr`` (nats; left out when unknown), ``enf_log_likelihood_kind``
    ("exact" or "bound"), ``enf_log_likelihood_trace`` and ``enf_model``.

    Args:
        flow: A flow.
        atoms: One structure or many; never modified.
        options: Of :func:`score`.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.model import ENFConfig
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
        if isinstance(original.calc, SinglePointCalculator):  # energies read from a file, which copy leaves behind
            item.calc = SinglePointCalculator(item, **original.calc.results)
        item.info["enf_log_likelihood"] = float(row.log_likelihood)
        if math.isfinite(row.stderr):
            item.info["enf_log_likelihood_stderr"] = float(row.stderr)
        item.info["enf_log_likelihood_kind"] = str(row.kind)
        item.info["enf_log_likelihood_trace"] = str(row.trace)
        item.info["enf_model"] = model
        result.append(item)
    return result


class _Scorer:
    """One request: everything that its structures share."""

    def __init__(
        self, flow: ENF, trace: str, probes: int, draws: int, seed: int, tolerance: float, batch_size: int
    ) -> None:
        self.flow = flow
        self.trace = trace
        self.probes = probes
        self.draws = draws
        self.seed = seed
        self.tolerance = tolerance
        self.batch_size = batch_size
        self.solver = DEFAULT_SOLVER

    def trace_of(self, n_atoms: int) -> str:
        """Returns the trace that "auto" means for a structure of this size."""
        if self.trace != "auto":
            return self.trace
        config = self.flow.config
        dimensions = n_atoms * (config.dimension + config.flow_features)
        return "exact" if dimensions <= EXACT_DIMENSIONS[config.network == "egnn"] else "hutchinson"

    def run(self, atoms: list[Atoms], progress: bool) -> list[_Estimate]:
        """Returns one estimate a structure, in order."""
        rows = [_Row(index, item, canonical_order(item)) for index, item in enumerate(atoms)]
        results: dict[int, _Estimate] = {}
        with tqdm(total=len(rows), disable=not progress, unit="structure", dynamic_ncols=True) as bar:
            for group in self._groups(rows):
                for row, estimate in zip(group, self._estimate(group), strict=True):
                    results[row.index] = estimate
                bar.update(len(group))
        return [results[index] for index in range(len(rows))]

    def _groups(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Yields batches of one size."""
        together = max(1, self.batch_size // self.draws)
        for size in sorted({len(row.atoms) for row in rows}):
            members = [row for row in rows if len(row.atoms) == size]
            for k in range(0, len(members), together):
                yield members[k : k + together]

    def _estimate(self, rows: list[_Row]) -> list[_Estimate]:
        """Scores one batch, with twice the nodes for the rows whose integration error is too large.

        Each row decides for itself, so that it does not depend on its batch mates.
        """
        k = self.draws
        answers: dict[int, _Estimate] = {}
        evaluations, known = np.zeros(len(rows), dtype=int), None
        pending = list(range(len(rows)))
        for doubling in range(DOUBLINGS + 1):
            chosen = [rows[place] for place in pending]
            out = self._log_prob(chosen, INTERVALS * 2**doubling, known)
            constant = (out.log_prob - out.ladj).double()
            by_row = (constant + out.samples.double()).unflatten(-1, (len(chosen), k)).cpu().numpy()  # (P, R, K)
            error = out.error.double().view(len(chosen), k).amax(dim=1).cpu().numpy()
            evaluations[pending] += out.nfe * k
            for number, place in enumerate(pending):
                answers[place] = self._answer(rows[place], by_row[:, number], error[number], evaluations[place])
            rough = np.flatnonzero(error > self.tolerance)
            pending = [pending[number] for number in rough]
            if not pending:
                break
            known = out.traces.unflatten(-1, (len(chosen), k))[:, :, torch.from_numpy(rough)].flatten(2)
        return [answers[place] for place in range(len(rows))]

    def _log_prob(self, rows: list[_Row], intervals: int, known: Tensor | None) -> LogProb:
        """Returns the terms of every row and draw, draws of a row side by side."""
        flow, config = self.flow, self.flow.config
        batch = to_batch([row.atoms for row in rows], flow.species, config.dimension, dtype=flow.dtype).to(flow.device)
        ranks = [row.rank for row in rows]
        noise = self._noise(ranks, config.flow_features) if flow.features == "joint" else None
        method = self._trace_method(ranks)
        return flow.log_prob(batch.repeat(self.draws), noise, method, self.solver, intervals, known)

    def _answer(self, row: _Row, weights: np.ndarray, error: float, evaluations: int) -> _Estimate:
        value, stderr = combine(weights, float(error))
        # One draw of a bound, or one probe, says nothing of their spread.
        unknown = self.flow.features == "joint" and self.draws == 1
        unknown |= self.probes == 1 and self.trace_of(len(row.atoms)) == "hutchinson"
        return _Estimate(value, math.nan if unknown else stderr, int(evaluations))

    def _noise(self, ranks: list[np.ndarray], width: int) -> Tensor:
        """Returns ε of q for every row and draw, shape (R K, M, width)."""
        places = np.stack([self._draw(_Q, place, (self.draws, width)) for place in range(len(ranks[0]))])  # (M, K, F)
        stacked = np.concatenate([places[rank].transpose(1, 0, 2) for rank in ranks])
        return torch.from_numpy(stacked).to(device=self.flow.device, dtype=self.flow.dtype)

    def _trace_method(self, ranks: list[np.ndarray]) -> TraceMethod:
        if self.trace_of(len(ranks[0])) == "exact":
            return divergence.exact
        n, width = self.flow.config.dimension, self.flow.config.flow_features
        places = np.stack([self._draw(_PROBES, place, (self.probes, n + width)) for place in range(len(ranks[0]))])
        signs = np.where(places >= 0, 1.0, -1.0)  # (M, P, n + F)
        by_row = np.stack([signs[rank].transpose(1, 0, 2) for rank in ranks], axis=1)  # (P, R, M, n + F)
        v = torch.from_numpy(by_row.repeat(self.draws, axis=1)).to(device=self.flow.device, dtype=self.flow.dtype)

        def estimate(field: Field, x: Tensor, h: Tensor) -> Divergence:
            return divergence.hutchinson(field, x, h, (v[..., :n], v[..., n:]))

        return estimate

    def _draw(self, stream: int, place: int, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the noise of one place of the canonical order; more draws or atoms only add to it."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(stream, place))
        return np.random.default_rng(sequence).standard_normal(shape)


def combine(weights: np.ndarray, integration_error: float) -> tuple[float, float]:
    """Joins log weights to an importance-weighted log-likelihood and its error.

    log p̂ = log 1/K Σ_k w_k with w_k the mean over probes in the logarithm; its error by the delta method over draws, by
    the spread over probes, and by the integration, added in squares.

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
        variance += float(ratio.var(ddof=1) / draws / ratio.mean() ** 2)
    if probes > 1:
        share = ratio / ratio.sum()
        variance += float((weights @ share).var(ddof=1) / probes)
    return float(value), math.sqrt(variance)


def _check(flow: ENF, atoms: list[Atoms], trace: str, probes: int, draws: int, seed: int, batch_size: int) -> None:
    if not atoms:
        raise ValueError("no structures to score; the input is empty")
    if trace not in TRACES:
        raise ValueError(f"trace {trace!r} is unknown; choose one of {', '.join(TRACES)}")
    for name, value, least in (
        ("probes", probes, 1),
        ("draws", draws, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    for index, item in enumerate(atoms):
        check_atoms(item, flow.species, index)
        if (
            flow.config.dimension == 2 and np.ptp(item.positions[:, 2]) > COINCIDENT
        ):  # as to_batch, which sees one batch
            raise ValueError(f"structure {index}: leaves the xy plane, but the model is two-dimensional; set z to 0")
        if flow.features == "joint" and len(item) not in flow.size_prior:
            seen = list(flow.size_prior.counts)
            raise ValueError(
                f"structure {index} ({item.get_chemical_formula()}): has {len(item)} atoms, a size this model never "
                f"saw (sizes {seen[0]} to {seen[-1]}), so log p_M is minus infinity; "
                "score it with a features='given' model"
            )
