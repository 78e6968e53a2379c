"""Histograms of interatomic distances."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.metrics import MAX_DISTANCE, N_BINS, Reference, Structures, Survey, as_reference, distance_js, survey
from ase_enf.plot.files import check_picture, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@np.errstate(under="ignore")  # gloss that fades to nothing is no error, whatever numpy.seterr says
def distance_histogram(
    atoms: Structures,
    reference: str | Reference | Iterable[Atoms],
    path: str | Path,
    dpi: int = 220,
) -> Path:
    """Histogram of interatomic distances beside that of a reference, with their Jensen-Shannon divergence (figure 4).

    Args:
        atoms: Structures, or their ``metrics.survey``.
        reference: A shipped name ("qm9") or structures.
        path: File to write; its ending names the format (.png, .pdf, .svg).
        dpi: Pixels an inch.

    Returns:
        The path.

    Raises:
        OSError: Nothing can be written there: the folder of the file does not exist, for instance.
        ValueError: There are no structures, or the reference has no distances.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     distance_histogram(molecule("CH3CHO"), [molecule("CH3CH2OH")], folder + "/d.png", dpi=50).name
        'd.png'
    """
    target = check_picture(path)
    from matplotlib.figure import Figure

    known = as_reference(reference)
    if known.distances is None:
        raise ValueError(f"the reference ({known.name}) has no distances: give structures, or the name 'qm9'")
    figure = Figure(figsize=(5.6, 3.2), layout="constrained", facecolor="white")
    draw_distances(figure.add_subplot(), survey(atoms), known)
    return save_figure(figure, target, dpi)


def draw_distances(axes: Axes, seen: Survey, known: Reference | None) -> None:
    """Draws the distances of structures over those of a reference that has some, or alone where there is none."""
    counts = seen.distances.sum(axis=0)
    both, title = counts, None
    edges = np.linspace(0, MAX_DISTANCE, N_BINS + 1)
    if known is not None:
        both = counts + known.distances
        label = f"{known.name} ({known.n_structures:,})"
        axes.stairs(_density(known.distances), edges, fill=True, color="#c9d3e0", label=label)
        js = distance_js(seen, known)
        title = f"JS divergence {js.value:.4f}" + ("" if np.isnan(js.stderr) else f" ± {js.stderr:.1g}") + " nats"
    label = f"these structures ({len(seen.readings):,})"
    axes.stairs(_density(counts), edges, color="#c2410c", linewidth=1.3, label=label)
    axes.set_xlim(0, _last_filled(edges, both))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("interatomic distance / Å")
    axes.set_ylabel("density / Å$^{-1}$")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8)


def _density(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Counts as a density over Å; zeros where there are no distances."""
    return counts / max(counts.sum(), 1) / (MAX_DISTANCE / N_BINS)


def _last_filled(edges: NDArray[np.float64], counts: NDArray[np.integer]) -> float:
    """Upper edge of the bin after the last one that holds more than a ten-thousandth of the distances, Å."""
    filled = np.flatnonzero(counts > 1e-4 * counts.sum())
    return float(edges[min(filled[-1] + 2, N_BINS)]) if len(filled) else MAX_DISTANCE
