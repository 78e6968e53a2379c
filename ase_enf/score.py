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
from ase_enf.flow import Panel, Solver, TraceMethod, equal_panels, resolve_solver
from ase_enf.model import ENF, resolve_device
from ase_enf.molecules import COINCIDENT, canonical_order, check_atoms, one_or_many, to_batch

COLUMNS = ("log_likelihood", "stderr", "kind", "trace", "probes", "draws", "nfe", "n_atoms", "formula")
TRACES = ("auto", "exact", "hutchinson")
# A fixed grid, so that a row does not depend on its batch mates.
DEFAULT_SOLVER = Solver("rk4", steps=16, warp=2.0)
# "auto" takes the exact trace up to this many dimensions M (n + F): all of DW4, LJ13 and QM9 with given types.
EXACT_DIMENSIONS = 96
FIRST_PANELS, NARROWEST_PANEL = 2, 1 / 32
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
            in it, its noise can lift a bound), or "auto": exact up to 96 dimensions M (n + F).
        probes: Rademacher probes of "hutchinson".
        draws: K, for "joint".
        seed: Of the noise.
        solver: A ``Solver`` or the name of a method; rk4 on a fixed grid by default, refined by the quadrature nodes.
        steps: Number of fixed steps, when ``solver`` is a name or None.
        tolerance: Quadrature panels are halved until the estimated integration error is below this many nats, or they
            are 1/32 wide. The estimate is that of the lower of two orders; the error of the higher, which is
            reported, is smaller by orders of magnitude when the path is smooth.
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


class _Integral:
    """The integral of the trace for one row: what its panels give, and which are to be evaluated next."""

    def __init__(self) -> None:
        self.pending: list[Panel] = equal_panels(FIRST_PANELS)
        self.parts: dict[Panel, tuple[np.ndarray, float]] = {}  # by probe and draw (P, K), and its error
        self.constant = np.zeros(1)  # (K,), everything but the integral
        self.evaluations = 0

    @property
    def error(self) -> float:
        """Estimated integration error, nats."""
        return sum(error for _, error in self.parts.values())

    def refine(self, tolerance: float) -> None:
        """Halves the panels whose share of the error is too large, unless they are as narrow as allowed."""
        self.pending = []
        if self.error <= tolerance:
            return
        for (low, high), (_, error) in list(self.parts.items()):
            if error > tolerance / len(self.parts) and high - low > NARROWEST_PANEL:
                del self.parts[low, high]
                middle = (low + high) / 2
                self.pending += [(low, middle), (middle, high)]
        self.pending.sort()  # the path is solved in the order of time


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
        return "exact" if dimensions <= EXACT_DIMENSIONS else "hutchinson"

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
        """Scores one batch, halving panels of the quadrature where a row's integration error is too large.

        Each row has panels of its own, so that it does not depend on its batch mates.
        """
        integrals = [_Integral() for _ in rows]
        while pending := {tuple(item.pending) for item in integrals if item.pending}:
            for panels in pending:
                members = [k for k, item in enumerate(integrals) if tuple(item.pending) == panels]
                self._integrate([rows[k] for k in members], [integrals[k] for k in members], panels)
                for k in members:
                    integrals[k].refine(self.tolerance)
        return [self._result(row, integral) for row, integral in zip(rows, integrals, strict=True)]

    def _integrate(self, rows: list[_Row], integrals: list[_Integral], panels: tuple[Panel, ...]) -> None:
        """Adds these panels to the integrals of these rows."""
        flow, config, k = self.flow, self.flow.config, self.draws
        batch = to_batch([row.atoms for row in rows], flow.species, config.dimension, dtype=flow.dtype).to(flow.device)
        ranks = [row.rank for row in rows]
        noise = self._noise(ranks, config.flow_features) if flow.features == "joint" else None
        out = flow.log_prob(batch.repeat(k), noise, self._trace_method(ranks), self.solver, panels)
        constant = out.log_prob.double() - out.by_panel.double().sum(dim=0).mean(dim=0)
        by_panel = out.by_panel.double().unflatten(-1, (len(rows), k)).cpu().numpy()  # (N, P, R, K)
        error = out.panel_error.double().unflatten(-1, (len(rows), k)).cpu().numpy()  # (N, R, K)
        for place, integral in enumerate(integrals):
            integral.constant = constant.view(len(rows), k)[place].cpu().numpy()
            integral.evaluations += out.nfe * k
            for panel, value, wrong in zip(panels, by_panel[:, :, place], error[:, place], strict=True):
                integral.parts[panel] = (value, float(wrong.max()))

    def _result(self, row: _Row, integral: _Integral) -> _Estimate:
        weights = integral.constant + sum(value for value, _ in integral.parts.values())
        value, stderr = combine(weights, integral.error)
        # One draw of a bound, or one probe, says nothing of their spread.
        unknown = self.flow.features == "joint" and self.draws == 1
        unknown |= self.probes == 1 and self.trace_of(len(row.atoms)) == "hutchinson"
        return _Estimate(value, math.nan if unknown else stderr, integral.evaluations)

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
