"""An evaluation at a glance: distances compared with a reference, and stability by element."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from ase_enf.metrics import (
    Reference,
    Structures,
    Survey,
    as_reference,
    atom_stability,
    molecule_stability,
    stability_by_element,
    survey,
)
from ase_enf.plot.distances import draw_distances
from ase_enf.plot.files import check_picture, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE, _ACCENT = "#222222", "#6b7280", "#c2410c"


@np.errstate(under="ignore")  # drawing may underflow to zero
def evaluation(
    atoms: Structures,
    path: str | Path,
    reference: str | Reference | Iterable[str] | Iterable[Atoms] | None = None,
    dpi: int = 220,
) -> Path:
    """Draws the histogram of interatomic distances and the stability of atoms by element, side by side.

    Args:
        atoms: Structures, or their ``metrics.survey``.
        path: File to write; its ending sets the format (.png, .pdf, .svg).
        reference: Reference for the distances: a shipped name ("qm9") or structures. SMILES have no distances; with
            them, or without a reference, only the distances of ``atoms`` are drawn.
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written, for instance because its folder does not exist.
        ValueError: If there are no structures, or the reference is unknown, empty or unreadable.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     evaluation([molecule("CH4"), molecule("CH3")], folder + "/e.png", dpi=50).name
        'e.png'
    """
    target = check_picture(path)
    from matplotlib.figure import Figure

    seen = survey(atoms)
    known = None if reference is None else as_reference(reference)
    height = max(3.2, 1.5 + 0.27 * len(seen.elements))  # inches; one line for each element
    figure = Figure(figsize=(9.2, height), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_distances(left, seen, known if known is not None and known.distances is not None else None)
    draw_elements(right, seen)
    return save_figure(figure, target, dpi)


def draw_elements(axes: Axes, seen: Survey) -> None:
    """Draws the percentage of stable atoms of each element ± 2 standard errors, and that of all atoms as a line."""
    found = stability_by_element(seen)
    values = 100 * np.array([metric.value for metric in found.values()])
    errors = 200 * np.nan_to_num([metric.stderr for metric in found.values()])
    places = np.arange(len(found))
    everything = 100 * atom_stability(seen).value
    low = max(0.0, float((values - errors).min(initial=90.0)))  # the axis spans at least 10 %
    margin = 0.08 * (100 - low)
    axes.set_xlim(low - margin, 100 + margin)
    if np.isfinite(everything):
        axes.axvline(everything, color=_ACCENT, linewidth=1, alpha=0.55, zorder=0)
        side = "left" if everything < (low + 100) / 2 else "right"
        shift = 4 if side == "left" else -4
        axes.annotate(
            "all atoms", (everything, len(found) - 0.25), xytext=(shift, 0), textcoords="offset points", ha=side,
            va="center", fontsize=7.5, color=_ACCENT,
        )  # fmt: skip
    axes.errorbar(
        values, places, xerr=[np.minimum(errors, values), np.minimum(errors, 100 - values)],
        fmt="o", color=_INK, ecolor=_PALE, elinewidth=1.2, markersize=5,
    )  # fmt: skip
    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
    for place, (value, metric) in enumerate(zip(values, found.values(), strict=True)):
        axes.annotate(f"{value:.1f} %", (1.16, place), ha="right", fontsize=8, color=_INK, **beside)
        axes.annotate(f"of {metric.denominator:,}", (1.19, place), ha="left", fontsize=8, color=_PALE, **beside)
    axes.set_yticks(places, list(found))
    axes.set_ylim(len(found), -0.6)  # hydrogen on top
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("stable atoms / %, ± 2 standard errors")
    whole = 100 * molecule_stability(seen).value
    title = f"{everything:.1f} % of atoms, {whole:.1f} % of molecules are stable" if len(found) else "no atoms"
    axes.set_title(title, fontsize=9, color=_INK)
