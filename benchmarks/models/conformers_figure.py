"""The figure of the conformer benchmark: differences by kind, and -log p against energy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from benchmarks.models.conformers_geometries import CONFORMERS, OTHERS, XTB, pairs_of
from benchmarks.models.conformers_tables import FLOW, rank_correlations

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(pairs: list[list[Atoms]], ranked: dict[str, list[list[Atoms]]], path: Path) -> None:
    """Draws the differences by kind, and -log p against energy for the molecules of the median correlation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, *others = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    _draw_differences(left, pairs)
    for axes, kind in zip(others, ("noise 0.01-0.1 Å", CONFORMERS), strict=True):
        _draw_ranks(axes, ranked[kind], kind)
    figure.savefig(path, dpi=110)


def _draw_differences(axes: Axes, groups: list[list[Atoms]]) -> None:
    rng = np.random.default_rng(0)
    for place, kind in enumerate(OTHERS):
        found = [dft.info[FLOW] - other.info[FLOW] for dft, other in pairs_of(groups, kind)]
        height = place + rng.uniform(-0.28, 0.28, len(found))
        colour = ["#15803d" if value > 0 else "#b91c1c" for value in found]
        axes.scatter(found, height, s=9, c=colour, alpha=0.6, linewidths=0)
        if found:
            axes.plot([np.median(found)] * 2, [place - 0.38, place + 0.38], color="black", lw=1.6)
            share = f"{np.mean(np.array(found) > 0):.0%} "
            axes.annotate(share, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=9)
    axes.set_xscale("symlog", linthresh=10)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(OTHERS)), labels=OTHERS)
    axes.invert_yaxis()
    axes.set(
        xlabel="log p(DFT) - log p(other), nats",
        title="DFT geometry against another of the same molecule\n(right: share whose DFT geometry scores higher)",
    )
    axes.set_xlim(right=4 * axes.get_xlim()[1])  # room for the shares


def _draw_ranks(axes: Axes, groups: list[list[Atoms]], kind: str) -> None:
    results = [(found[0], place) for place, group in enumerate(groups) if (found := rank_correlations(group, FLOW))]
    if not results:
        axes.set_title(f"{kind}: none")
        return
    correlation, place = sorted(results)[len(results) // 2]
    energy = np.array([item.info[XTB] for item in groups[place]])
    surprise = np.array([-item.info[FLOW] for item in groups[place]])
    axes.scatter(energy - energy.min(), surprise - surprise.min(), s=22, color="#1d4ed8", alpha=0.8)
    formula = groups[place][0].get_chemical_formula(mode="hill")
    axes.set(
        xlabel="GFN2-xTB energy above the lowest, eV",
        ylabel="-log p above the lowest, nats",
        title=f"{formula}, {kind}\n(median Spearman, {correlation:.2f})",
    )
