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


@np.errstate(under="ignore")  # drawing may underflow to zero
def distance_histogram(
    atoms: Structures,
    reference: str | Reference | Iterable[Atoms],
    path: str | Path,
    dpi: int = 220,
) -> Path:
    """Histogram of interatomic distances beside that of a reference, with their Jensen-Shannon divergence (figure 4).

    Args:
        atoms: Structures, or their ``metrics.survey``.
        reference: Name of a shipped reference ("qm9"), or structures.
        path: File to write; its ending sets the format (.png, .pdf, .svg).
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written, for instance because its folder does not exist.
        ValueError: If there are no structures, or the reference has no distances.

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
    """Draws the histogram of distances, over that of a reference if one is given.

    Args:
        axes: Axes to draw on.
        seen: Survey of the structures.
        known: A reference with distances, or None.
    """
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
    """Returns counts as a density, 1/Å; zeros if there are no distances."""
    return counts / max(counts.sum(), 1) / (MAX_DISTANCE / N_BINS)


def _last_filled(edges: NDArray[np.float64], counts: NDArray[np.integer]) -> float:
    """Returns the upper edge of the bin after the last one with more than a ten-thousandth of the distances, Å."""
    filled = np.flatnonzero(counts > 1e-4 * counts.sum())
    return float(edges[min(filled[-1] + 2, N_BINS)]) if len(filled) else MAX_DISTANCE
