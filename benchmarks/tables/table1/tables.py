"""The tables, their notes, and the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ase_enf.data import mcmc, particles
from benchmarks import report
from benchmarks.tables.table1.cells import (
    BATCH,
    BOTH,
    METHODS,
    MISSING,
    NLL,
    OBJECTIVES,
    PAPER,
    PUBLISHED_BATCH,
    PUBLISHED_RATE,
    PUBLISHED_STEPS,
    RATES,
    REWEIGHTED,
    ROWS,
    SIZES,
    STEPS,
    SWEEPS,
    VALID,
    VALIDATIONS,
    every_cell,
)
from benchmarks.tables.table1.runs import data, finished, ground, settings, so_far
from benchmarks.tables.table1.verdicts import clock, over_seeds, projected, verdicts


def write_tables(work: Path, seeds: int, scale: float) -> None:
    """Writes a table for each system that has finished cells, and the figure."""
    results = pd.DataFrame([found for cell in every_cell(seeds) if (found := finished(cell, work))])
    if results.empty:
        return
    curves = results.curve.map(lambda points: " ".join(f"{seconds:.1f}:{nll:.4f}" for seconds, nll in points))
    folder = report.RESULTS if scale == 1 else work
    report.write_csv(results.assign(curve=curves), "table1_cells", folder)
    truths = {system: ground(system, work, scale) for system in SIZES if system in results.system.unique()}
    # -log p of the same samples is a control variate: the expectation is the same, and the error smaller.
    results["nll"] = results.gap + results.system.map({system: truth["entropy"] for system, truth in truths.items()})
    for system, truth in truths.items():
        mine = results[results.system == system]
        title = f"Table 1: negative log-likelihood on {system.upper()}, nats"
        text = notes(system, mine, truth, base_entropy(work, system), scale)
        unfinished = (so_far(cell, work, scale) for cell in every_cell(seeds) if cell.system == system)
        text = "\n".join([text, *(f"* {line}" for line in [projected(system, mine), *unfinished] if line)])
        report.write_results(table(system, mine, seeds), f"table1_{system}", title, text, folder)
    draw(results, truths, folder / "table1.png")


def table(system: str, results: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """Returns our values, a row for each method and objective, and those of the paper."""
    sizes, most, rows = SIZES[system], max(SIZES[system]), []
    nll, gap, ess = (over_seeds(system, results, key) for key in ("nll", "gap", "ess"))
    seconds = over_seeds(system, results[results.processor == clock(results)], "train_s")
    for method, objective in ROWS:
        row = {"method": method, "trained by": OBJECTIVES[objective]}
        row |= {str(size): figure_of(nll.loc[method, objective, size], seeds) for size in sizes}
        published = PAPER[system].get(method.removesuffix("-as-published"), ())
        printed = [f"{value:.2f}" for value in published] or [MISSING] * len(sizes)
        row |= {f"paper, {size}": value for size, value in zip(sizes, printed, strict=True)}
        row[f"above the entropy, {most}"] = figure_of(gap.loc[method, objective, most], seeds)
        row[f"ESS, {most}, %"] = figure_of(ess.loc[method, objective, most], seeds, 1, 100.0)
        means = [seconds["mean"].loc[method, objective, size] for size in sizes]
        row["training, s"] = " / ".join(f"{mean:.0f}" if math.isfinite(mean) else MISSING for mean in means)
        rows.append(row)
    return pd.DataFrame(rows)


def figure_of(combined: pd.Series, seeds: int, digits: int = 3, unit: float = 1.0) -> str:
    """Returns mean ± error, with the number of runs if some are missing."""
    if not combined["count"]:
        return MISSING
    error = f" ± {unit * combined['sem']:.{digits}f}" if combined["count"] > 1 else ""
    runs = "" if combined["count"] == seeds else f" (runs: {combined['count']:.0f})"
    return f"{unit * combined['mean']:.{digits}f}{error}{runs}"


def base_entropy(work: Path, system: str) -> float:
    """Returns the entropy of a Gaussian as wide as the training samples: what a flow without a network would learn."""
    positions = data(system, work, settings(work)["test"][system])["train"].positions
    dimensions = particles.resolve(system).degrees_of_freedom
    variance = np.square(positions).sum() / (len(positions) * dimensions)
    return 0.5 * dimensions * math.log(2 * math.pi * math.e * variance)


def notes(system: str, results: pd.DataFrame, truth: Mapping[str, float], base: float, scale: float = 1.0) -> str:
    """Returns what a reader must know, with the verdicts."""
    how = "quadrature, to rounding"
    if system != "dw4":
        how = f"replica exchange and BAR, {round(SWEEPS * scale)} sweeps of {mcmc.LADDERS} ladders"
        if ti := truth.get("log_z_ti"):
            how += (
                f"; ln Z {truth['log_z']:.4f} ± {truth['log_z_stderr']:.4f}, by thermodynamic integration {ti:.4f} ± "
                f"{truth['log_z_ti_stderr']:.4f}"
            )
    budgets = "; ".join(
        f"{words} {' / '.join(f'{steps * scale:.0f}' for steps in STEPS[system, key].values())} of {BATCH[system, key]}"
        for key, words in OBJECTIVES.items()
    )
    published = " / ".join(str(steps) for steps in PUBLISHED_STEPS[system].values())
    processors = ", ".join(sorted(results.processor.unique()))
    rates = ", ".join(f"{method} {rate:g}" for method, rate in RATES.items() if method in BOTH)
    text = f"""Floor: the entropy, **{truth["entropy"]:.4f} ± {truth["entropy_stderr"]:.4f}** nats ({how}).
No expected NLL on samples of exp(-U) is below it. A Gaussian as wide as the samples, which a flow starts from, has
{base:.2f}.

NLL with the exact trace: the entropy plus the mean of -U - ln Z - log q over the test samples, which has the
expectation of the mean of -log q and a smaller error, {results.gap_stderr.min():.3f} for the best flow and \
{results.gap_stderr.max():.3f} for the worst instead of {results.nll_stderr.mean():.3f}.
± over training runs, which differ in their seeds and, but for the largest number, in their samples; the same seed draws
other samples on another kind of processor (these cells: {processors}). Integration error of one score: rms
{results.integration_rms.max():.2g} at worst; scores not finite, left out: {results.lost.sum()}.

One rule for all: 3 layers of 32 (Simple 50 Gaussians; Kernel 50 and 10; GNF-att-aug-128, which the paper has not, 3 of
128), averaged weights, the best of {VALIDATIONS} validations on {VALID[system]} samples; steps by samples: {budgets}
(of fewer samples, all of them; flow matching fills the batch with copies, which have other noise).
E-NF has the paper's network; E-NF-16-radial has 16 radial functions of each distance beside its square, which the
paper's has not. E-NF-as-published is E-NF by maximum likelihood with the paper's steps ({published}), batches of
{PUBLISHED_BATCH} and rate, {PUBLISHED_RATE:g}.
Flow matching: Muon and AdamW. Maximum likelihood: as in the paper (dopri5 at 1e-4, regulariser 1e-3, AdamW with
amsgrad), but by back-propagation through the solver, which is faster here than the adjoint, with far fewer steps and
higher rates ({rates}).

Simple and kernel dynamics are restricted fields: they cannot follow the target of flow matching, so that maximum
likelihood is their fair row. ESS: Kish's, of {REWEIGHTED[system]} samples without clipping. Seconds: of one thread by
the wall, by number of samples, validations included, of the runs on {clock(results)} processors.
"""
    if system == "lj13":
        text += """
The paper's 30.4 is far below the entropy of this system at equilibrium, so it cannot be an NLL on equilibrium samples
of exp(-U): its data was a single biased chain that is not to be had. The paper's figures stand here for their order;
the values are not comparable.

A GNF stays on a plateau, the field of the Gaussian, for hundreds of steps: whether it leaves it within the budget is
most of what its rows show.
"""
    return "\n".join([text, *(f"* {line}" for line in verdicts(system, results, base))])


def draw(results: pd.DataFrame, truths: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draws NLL against the number of samples, one panel for each system, with the entropy as the lower limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(truths) + 2.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(truths), squeeze=False)[0]
    for axes, (system, truth) in zip(panels, truths.items(), strict=True):
        combined = over_seeds(system, results, "nll")
        for method, objective in ROWS:
            line = combined.xs((method, objective))
            style = {"color": f"C{[*METHODS].index(method)}", "ls": "-", "label": method}
            if objective == NLL:
                style |= {"ls": "--", "mfc": "white", "label": f"{method}, {OBJECTIVES[NLL]}"}
            axes.errorbar(line.index, line["mean"], line["sem"].fillna(0), marker="o", ms=3.5, capsize=2, **style)
        if system == "dw4":  # the paper's LJ13 is of other samples
            axes.plot(SIZES[system], PAPER[system]["E-NF"], "kx:", ms=4, label="E-NF, paper")
        axes.axhline(truth["entropy"], color="black", lw=1.0, label="entropy")
        axes.set(xscale="log", xlabel="training samples", ylabel="test NLL, nats", title=system.upper())
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
