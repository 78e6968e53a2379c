"""Tables of the conformer benchmark: areas under the ROC curve, rank correlations, and where scores do not help."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from ase import Atoms
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata, spearmanr

from benchmarks.models.conformers_geometries import DISTORTED, FEWEST, FMAX, MMFF, MOST, OTHERS, XTB, pairs_of

BOOTSTRAPS = 1000
FLOW, HISTOGRAM = "flow", "distance histograms"
LIKELIHOODS = (FLOW, HISTOGRAM)
UNITS = {FLOW: "nats", HISTOGRAM: "nats", XTB: "eV", MMFF: "eV"}
FIGURES = ("accuracy", "paired AUC", "pooled AUC", "median difference")
GEOMETRY_NOTES = (
    "Each row asks one score about pairs of the DFT geometry and another of the same molecule. `flow`: exact log p(x | "
    "types); `distance histograms`: Σ over pairs of atoms of log p(d | elements), densities of the train split; the "
    "energies prefer the lower (MMFF94 on the bonds of the DFT geometry).\n\n"
    "* accuracy: share of molecules whose DFT geometry scores strictly higher; binomial standard error, with the "
    "share taken as (k + 1) / (n + 2), so that it does not vanish for k = n.\n"
    "* paired AUC: P(DFT > other) + ½ P(equal) within one molecule; bootstrap over molecules. Without ties it is the "
    "accuracy. It is the area under the ROC curve that means something: log p of different molecules differ by "
    "dimension and composition. (A bootstrap of equal answers has no spread: take the error of the accuracy.)\n"
    "* pooled AUC: the same over all DFT geometries against all others, whichever the molecule, of log p / (3(M - 1)) "
    "for the flow and of the mean over pairs of atoms for the histograms; bootstrap over molecules. What one threshold "
    "would do for a single structure.\n"
    "* median difference: DFT minus other, in nats (likelihoods) or eV (minus energy).\n\n"
    "MMFF94 and GFN2-xTB start from the DFT geometry; each energy prefers its own relaxed geometry by construction."
)
ENERGY_NOTES = (
    "Correlation of -log p (of the energy for MMFF94) with the GFN2-xTB energy among structures of one molecule: mean "
    f"over molecules ± standard error. Conformers: ETKDG, MMFF94, GFN2-xTB to {FMAX:g} eV/Å, mirror images and "
    f"repetitions removed, {FEWEST} to {MOST} a molecule. Noise on the DFT geometry: {DISTORTED} a molecule. Picked: "
    "GFN2-xTB energy of the structure that a score likes best above the lowest; random: the mean of all above it. With "
    "noise of many levels the level decides the rank, so it is the easy case; noise of one level is the hard one."
)


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Returns the area under the ROC curve, P(positive > negative) + ½ P(equal) over all pairs of one of each.

    Example:
        >>> auc(np.array([2.0, 1.0]), np.array([1.0, 0.0]))
        0.875
    """
    n, m = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def paired_auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Returns P(positive > negative) + ½ P(equal) within the pairs.

    Example:
        >>> paired_auc(np.array([2.0, 1.0]), np.array([1.0, 1.0]))
        0.75
    """
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def bootstrap(
    statistic: Callable[..., float], *columns: NDArray[np.float64], seed: int = 0, resamples: int = BOOTSTRAPS
) -> float:
    """Returns the standard error of a statistic over molecules, drawing both members of a pair together."""
    draws = np.random.default_rng(seed).integers(len(columns[0]), size=(resamples, len(columns[0])))
    return float(np.std([statistic(*(column[draw] for column in columns)) for draw in draws], ddof=1))


def value_of(item: Atoms, score: str) -> float:
    """Returns a score that is higher for the preferred structure: a log-likelihood, nats, or minus an energy, eV."""
    return item.info[score] if score in LIKELIHOODS else -item.info[score]


def geometry_table(groups: list[list[Atoms]], seed: int = 0) -> pd.DataFrame:
    """Returns the table of the first question; ``value`` and ``error`` are those of the paired AUC."""
    rows = []
    for kind in OTHERS:
        pairs = pairs_of(groups, kind)
        for score in (FLOW, HISTOGRAM, XTB, MMFF):
            values = np.array([[value_of(item, score) for item in pair] for pair in pairs]).reshape(-1, 2)
            usable = np.isfinite(values).all(axis=1)
            row = {"against": kind, "score": score, "molecules": usable.sum(), "left out": len(groups) - usable.sum()}
            row |= dict.fromkeys(FIGURES, "") | {"value": np.nan, "error": np.nan}
            if usable.any():
                size = np.array([len(pair[0]) for pair in pairs])[usable]
                row |= _compare(*values[usable].T, size, score, seed)
            rows.append(row)
    return pd.DataFrame(rows)


def _compare(
    dft: NDArray[np.float64], other: NDArray[np.float64], size: NDArray[np.int64], score: str, seed: int
) -> dict[str, str | float]:
    """Returns the values of one row; ``size`` is the number of atoms."""
    count, accuracy, value = len(dft), float((dft > other).mean()), paired_auc(dft, other)
    likely = (count * accuracy + 1) / (count + 2)  # or 20 of 20 would be without error
    error, pooled = bootstrap(paired_auc, dft, other, seed=seed), "not comparable"
    if score in LIKELIHOODS:
        terms = 3 * (size - 1) if score == FLOW else size * (size - 1) / 2
        pooled = _figure(auc(dft / terms, other / terms), bootstrap(auc, dft / terms, other / terms, seed=seed))
    median = f"{np.median(dft - other):.3g} {UNITS[score]}"
    accuracy_figure = _figure(accuracy, np.sqrt(likely * (1 - likely) / count))
    figures = (accuracy_figure, _figure(value, error), pooled, median)
    return dict(zip(FIGURES, figures, strict=True)) | {"value": value, "error": error}


def energy_table(ranked: dict[str, list[list[Atoms]]]) -> pd.DataFrame:
    """Returns the table of the second question; ``value`` and ``error`` are those of Spearman's correlation."""
    rows = []
    for kind, groups in ranked.items():
        for score in (FLOW, HISTOGRAM, MMFF):
            results = [found for group in groups if (found := rank_correlations(group, score))]
            row = {
                "structures": kind,
                "score": score,
                "molecules": len(results),
                "left out": len(groups) - len(results),
            }
            columns = np.array(results).reshape(-1, 4).T
            means = [float(column.mean()) if len(results) else np.nan for column in columns]
            errors = [float(c.std(ddof=1) / np.sqrt(len(c))) if len(c) > 1 else np.nan for c in columns]
            row |= {name: _figure(means[k], errors[k]) for k, name in enumerate(("Spearman", "Kendall"))}
            row |= {f"{name}, meV": f"{1e3 * means[k]:.0f}" for k, name in ((2, "picked"), (3, "random"))}
            rows.append(row | {"value": means[0], "error": errors[0]})
    return pd.DataFrame(rows)


def rank_correlations(group: list[Atoms], score: str) -> tuple[float, float, float, float] | None:
    """Returns both correlations with the GFN2-xTB energy, and the energies of the chosen and the mean structure, eV."""
    energy = np.array([item.info[XTB] for item in group])
    mine = np.array([-value_of(item, score) for item in group])
    if len(group) < 3 or not np.isfinite(mine).all() or not np.ptp(mine):
        return None
    above = energy - energy.min()
    return (
        float(spearmanr(mine, energy).statistic),
        float(kendalltau(mine, energy).statistic),
        float(above[mine.argmin()]),
        float(above.mean()),
    )


def _figure(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def geometry_verdict(table: pd.DataFrame) -> str:
    """Returns as text where the flow's score does not help: by chance as good, wrong, or matched by a cheaper one."""
    return _verdict(table, "against", 0.5, "paired AUC", "it prefers the other geometry")


def energy_verdict(table: pd.DataFrame) -> str:
    """Returns as text where −log p ranks no better than chance, or a cheaper score ranks as well."""
    return _verdict(table, "structures", 0.0, "Spearman", "it ranks the wrong way round")


def _verdict(table: pd.DataFrame, column: str, chance: float, figure: str, wrong: str) -> str:
    findings: dict[str, list[str]] = {}
    for kind, part in table.groupby(column, sort=False):
        rows = part.set_index("score")
        flow = rows.loc[FLOW]
        if not flow.molecules:
            continue
        if not abs(flow.value - chance) > 2 * flow.error:
            words = "it cannot be told from chance (2 standard errors)"
            findings.setdefault(words, []).append(f"{kind} ({flow[figure]})")
        elif flow.value < chance:
            findings.setdefault(wrong, []).append(f"{kind} ({flow[figure]})")
        for name, other in rows.drop(FLOW).iterrows():
            if other.value >= flow.value:
                findings.setdefault(f"{name}: as good or better", []).append(f"{kind} ({other[figure]})")
    lines = [f"* {words}: {', '.join(kinds)}" for words, kinds in findings.items()]
    return "Where the flow's score does not help:\n\n" + ("\n".join(lines) or "* nowhere among these structures")
