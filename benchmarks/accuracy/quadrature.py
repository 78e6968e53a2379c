"""True errors of quadratures of the trace: a table of ``benchmarks.accuracy.likelihood``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from numpy.polynomial import chebyshev, legendre

from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS
from ase_enf.flow.model import ENF
from ase_enf.flow.quadrature import Integral, clenshaw_curtis, integrate
from benchmarks.accuracy.reference import AGREEMENT, FIRST, LAST, REFERENCE, RULES, sizes
from benchmarks.accuracy.traces import encoded
from benchmarks.report import write_results


def quadrature(flow: ENF, molecules: list[Atoms]) -> None:
    """Measures the true integration error against the number of nodes, along accurate paths."""
    double = copy.deepcopy(flow).double()
    double.use_backend("auto")
    paths = [_trace_of_path(double, item) for item in molecules]
    interpolants = [path.trace for path in paths]
    truths, gap = (np.array([getattr(path, name) for path in paths]) for name in ("integral", "gap"))
    rows = []
    for warp in (1, 2):
        for intervals in (16, 24, 32, 48, 64, 96):
            answers = [_clenshaw_curtis(f, warp, intervals) for f in interpolants]
            error = np.array([float(a.value) for a in answers]) - truths
            name = "Clenshaw-Curtis in t" if warp == 1 else f"Clenshaw-Curtis in u, t = u^{warp}"
            rows.append(_quadrature_row(name, intervals + 1, error, [float(a.error) for a in answers], gap))
    for panels in (1, 2, 3, 4, 6):
        error, estimate = [], []
        for f, truth in zip(interpolants, truths, strict=True):
            gauss, kronrod = _gauss_kronrod(f, panels)
            error.append(kronrod - truth)
            estimate.append(abs(kronrod - gauss))
        rows.append(
            _quadrature_row(f"Gauss-Kronrod 7-15, {panels} panels", 15 * panels, np.array(error), estimate, gap)
        )
    columns = ["rule", "nodes", "rms error, nats", "largest", "mean estimate", "rms of error / estimate", "covered"]
    notes = (
        f"`{flow.name}`, {len(molecules)} molecules of the test split drawn at random, of {sizes(molecules)} atoms, "
        f"each with one draw of q. {REFERENCE} (that of "
        "the rule in use, or its estimate where that is larger); the gap that was left is "
        f"{np.sqrt((gap**2).mean()):.1e} nats rms, and rms errors below ten times that are not resolved (<). Traces "
        "are those of the path in u with t = u^2, as a Chebyshev interpolant in u. Estimates: of the nested rules for "
        "Clenshaw-Curtis, |K15 - G7| for the others. Covered: the share of molecules whose error is below the estimate."
    )
    name = f"likelihood_quadrature_{flow.name}"
    write_results(pd.DataFrame(rows, columns=columns), name, f"Quadrature of the trace, {flow.name}", notes)


def _clenshaw_curtis(trace: Callable[[np.ndarray], np.ndarray], warp: float, intervals: int) -> Integral:
    u = clenshaw_curtis(intervals)[0].numpy()
    return integrate(torch.from_numpy(trace(u**warp) * warp * u ** (warp - 1)))


def _quadrature_row(
    name: str, nodes: int, error: np.ndarray, estimate: Sequence[float], gap: np.ndarray
) -> tuple[str, ...]:
    bars = np.array(estimate)
    ratio = np.sqrt(((error / bars) ** 2).mean())
    covered = (np.abs(error) <= bars).mean()
    rms, largest = np.sqrt((error**2).mean()), np.abs(error).max()
    least = np.sqrt((gap**2).mean()) / AGREEMENT
    if rms < least:
        return (name, str(nodes), f"< {least:.4f}", "", f"{bars.mean():.4f}", "", "")
    return (name, str(nodes), f"{rms:.4f}", f"{largest:.4f}", f"{bars.mean():.4f}", f"{ratio:.2f}", f"{covered:.2f}")


class PathTrace(NamedTuple):
    """Tr J along a converged path."""

    trace: Callable[[np.ndarray], np.ndarray]  # of t
    integral: float  # nats, the mean of two rules
    gap: float  # between them


def _trace_of_path(double: ENF, item: Atoms) -> PathTrace:
    """Returns Tr J as a function of t along the path of one molecule."""
    data, warp, intervals = encoded(double, [item]), double.likelihood_solver.warp, FIRST
    while True:
        with torch.no_grad():
            one, other = (
                double.flow(data.mask, data.context, rule).forward(
                    data.x, data.h, divergence.exact, intervals=intervals
                )
                for rule in RULES
            )
        integral, gap = float(one.ladj + other.ladj) / 2, abs(float(one.ladj - other.ladj))
        points = 2 * clenshaw_curtis(intervals)[0].numpy() - 1
        coefficients = np.linalg.solve(chebyshev.chebvander(points, intervals), one.traces[:, 0, 0].numpy())
        path = PathTrace(functools.partial(_interpolated, coefficients), integral, gap)
        used = _clenshaw_curtis(path.trace, warp, INTERVALS)
        if gap <= AGREEMENT * max(abs(float(used.value) - integral), float(used.error)):
            return path
        if intervals == LAST:
            raise ArithmeticError(f"{item.get_chemical_formula()}: two rules still differ by {gap:.2g} nats")
        intervals *= 2


def _interpolated(coefficients: np.ndarray, t: np.ndarray) -> np.ndarray:
    return chebyshev.chebval(2 * np.sqrt(t) - 1, coefficients)


def _gauss_kronrod(f: Callable[[np.ndarray], np.ndarray], panels: int) -> tuple[float, float]:
    """Returns the composite 7-point Gauss and 15-point Kronrod values on equal panels."""
    points, weights = legendre.leggauss(7)
    gauss = kronrod = 0.0
    for k in range(panels):
        low, high = k / panels, (k + 1) / panels
        gauss += float(weights @ f((low + high) / 2 + (high - low) / 2 * points)) * (high - low) / 2
        kronrod += _kronrod(f, low, high)
    return gauss, kronrod


def _kronrod(f: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    half = np.array([0.991455371120812639, 0.949107912342758525, 0.864864423359769073, 0.741531185599394440,
                     0.586087235467691130, 0.405845151377397167, 0.207784955007898468])  # fmt: skip
    weights = np.array([0.022935322010529225, 0.063092092629978553, 0.104790010322250184, 0.140653259715525919,
                        0.169004726639267903, 0.190350578064785410, 0.204432940075298892])  # fmt: skip
    centre, radius = (low + high) / 2, (high - low) / 2
    inner = weights @ (f(centre - radius * half) + f(centre + radius * half))
    return float(radius * (inner + 0.209482141084727828 * f(np.array(centre))))
