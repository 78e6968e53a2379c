"""The effect of more training: ``python -m benchmarks.models.learning_curve``.

Collects the results of all weights that have been shipped, and draws stability and NLL against the number of molecules
seen in training. Writes ``results/learning_curve_qm9`` (.md, .csv, .png). A row is added to this file when weights are
replaced; it names the results that its values come from.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import RESULTS, write_results

NAN = math.nan


class Point(NamedTuple):
    """One set of weights; percentages of 1,000 molecules of seed 0, NLL in nats."""

    model: str
    network: str
    seen: float  # molecules, in millions
    stable: float  # by the default sampler of today, %
    flow: float  # by the flow itself, %
    nll: float
    nll_error: float
    source: str  # the result and the commit that holds it


POINTS = (
    Point("qm9-small", "6 x 64", 2.30, 68.3, 24.6, -87.6, 3.4, "model_qm9-small.md, e47ee2b"),
    Point("qm9-small", "6 x 64", 4.25, 71.1, 25.3, -93.9, 3.4, "model_qm9-small.md, a3229c1"),
    Point("qm9", "9 x 192", 7.11, 77.8, 30.5, -115.1, 2.9, "model_qm9.md, e47ee2b"),
    Point("qm9", "9 x 192", 9.94, 78.1, 34.7, -121.7, 3.0, "model_qm9.md, a3229c1"),
    Point("qm9", "9 x 192", 15.07, 82.6, 39.3, -129.7, 3.1, "model_qm9.md, 4a19b8b"),
    Point("qm9-conditional", "6 x 128", 4.85, 85.7, 53.5, NAN, NAN, "model_qm9-conditional.md, e47ee2b"),
    Point("qm9-conditional", "6 x 128", 6.92, 88.8, 55.4, NAN, NAN, "model_qm9-conditional.md, a3229c1"),
)
# Published, of joint models of QM9; NLL on the test split.
STABLE = {"QM9": 95.3, "VEDA-E": 93.7, "EquiFM": 88.3, "EDM": 82.0, "E-NF": 4.9}
NLL = {"EDM": -110.7, "E-NF": -59.7}
COLOURS = {"qm9": "#c2410c", "qm9-small": "#2563a8", "qm9-conditional": "#3f7d3f"}
PALE = "#9aa8ba"
TITLE = "Learning curves of the models of QM9"
NOTES = (
    "Each row is a set of weights that was shipped: percent of 1,000 molecules of seed 0 whose atoms are all stable, "
    "by the default sampler and by the flow itself (`churn=0`; binomial standard errors are 0.8 to 1.6), and the NLL, "
    "a bound by one draw of q with a Hutchinson trace: of `qm9` on the same 128 test molecules, of `qm9-small` on the "
    "same 64 validation molecules. `qm9-conditional` is given the elements, so that its percentages are not those of "
    "a joint model. Two or three points of a network are no law; the runs of a network differ in their rates, too (see "
    "the cards)."
    "\n\n![Stability and NLL against molecules seen](learning_curve_qm9.png)"
)


def main() -> None:
    """Writes table and picture."""
    rows = [
        {
            "model": point.model,
            "network": point.network,
            "molecules seen, millions": f"{point.seen:.2f}",
            "stable, %": point.stable,
            "stable, flow itself, %": point.flow,
            "NLL, nats": "" if math.isnan(point.nll) else f"{point.nll} ± {point.nll_error}",
            "source": point.source,
        }
        for point in POINTS
    ]
    write_results(pd.DataFrame(rows), "learning_curve_qm9", TITLE, NOTES)
    figure = Figure(figsize=(8.6, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    draw(left, "stable", STABLE, "molecules stable, %")
    draw(left, "flow", {}, "molecules stable, %")
    draw(right, "nll", NLL, "NLL, nats")
    left.set_ylim(0, 100)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(RESULTS / "learning_curve_qm9.png", dpi=160)


def draw(axes: Axes, what: str, published: dict[str, float], label: str) -> None:
    """Draws one quantity for all models, and the published values as lines."""
    dashed = what == "flow"
    for model, colour in COLOURS.items():
        points = [point for point in POINTS if point.model == model and not math.isnan(getattr(point, what))]
        if not points:
            continue
        x, y = [point.seen for point in points], [getattr(point, what) for point in points]
        name = f"{model}, {points[0].network}" + (", flow itself" if dashed else "")
        axes.plot(
            x, y, "o--" if dashed else "o-", color=colour, markersize=4, label=name, mfc="white" if dashed else None
        )
        if what == "nll":
            errors = [point.nll_error for point in points]
            axes.errorbar(x, y, errors, fmt="none", ecolor=colour, capsize=2)
    for name, value in published.items():
        axes.axhline(value, color=PALE, linewidth=0.8, zorder=0)
        side = "top" if name in ("VEDA-E", "EquiFM") else "bottom"  # above these is no room
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": side}
        axes.annotate(name, (1.0, value), fontsize=7, color=PALE, **where)
    axes.set_xscale("log")
    axes.set_xlim(1.8, 20)
    axes.set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("molecules seen in training, millions")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
