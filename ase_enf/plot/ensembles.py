"""Histograms of a reweighted ensemble: its weights, and torsions of the walkers, the flow and the weighted draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ase_enf.plot.files import check_picture, save_figure

_COLOURS = ("#c9d3e0", "#94a3b8", "#c2410c")
_BINS = 36


def torsion_histogram(
    angles: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], title: str, path: str | Path, dpi: int = 220
) -> Path:
    """Draws histograms of the absolute value of a torsion, from 0° to 180°, so that mirror images coincide.

    Args:
        angles: Name → angles in degrees and their weights, shape (n,) each; the first histogram is filled.
        title: Name of the torsion.
        path: File to write; its ending sets the format (.png, .pdf, .svg).
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the ending of the file is not that of a picture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torsion_histogram({"MD": (np.array([60.0, 300.0]), np.ones(2))}, "C-C-O-H", folder + "/t.png", 40).name
        't.png'
    """
    target = check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    edges = np.linspace(0, 180, _BINS + 1)
    for number, (name, (values, weights)) in enumerate(angles.items()):
        folded = np.abs((np.asarray(values) + 180.0) % 360.0 - 180.0)
        counts, _ = np.histogram(folded, edges, weights=weights)
        density = counts / max(counts.sum(), 1e-300) / np.diff(edges)
        axes.stairs(density, edges, fill=number == 0, color=_COLOURS[number % len(_COLOURS)], label=name)
    axes.set_xlim(0, 180)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"|torsion {title}| / °")
    axes.set_ylabel("density / 1/°")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, target, dpi)


def weight_histogram(log_weights: NDArray[np.float64], path: str | Path, dpi: int = 220) -> Path:
    """Draws a histogram of log w relative to its largest value; the title gives the number of zero weights.

    Args:
        log_weights: Log-weights, nats, shape (n,); −inf for a weight of zero.
        path: File to write; its ending sets the format (.png, .pdf, .svg).
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the ending of the file is not that of a picture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weight_histogram(np.array([0.0, -1.0, -np.inf]), folder + "/w.png", 40).name
        'w.png'
    """
    target = check_picture(path)
    from matplotlib.figure import Figure

    finite = log_weights[np.isfinite(log_weights)]
    figure = Figure(figsize=(5.6, 3.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    if len(finite):
        axes.hist(finite - finite.max(), bins=_BINS, color=_COLOURS[1])
    axes.set_xlabel("log w − its largest value / nats")
    axes.set_ylabel("samples")
    axes.set_title(f"{len(log_weights) - len(finite)} of {len(log_weights)} have no weight", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, target, dpi)
