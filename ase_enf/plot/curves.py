"""Learning curves: loss and validation NLL against the number of molecules seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ase_enf.plot.files import check_picture, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE, _ACCENT = "#222222", "#9aa8ba", "#c2410c"
_BINS = 12  # points of the averaged loss in a decade of molecules
_SETTLING = 0.1  # initial fraction of a run whose NLL, far higher, may lie outside the panel


def learning_curve(log: Mapping[str, ArrayLike], path: str | Path, per_step: int = 1, dpi: int = 160) -> Path:
    """Draws the loss of training and validation, and the validation NLL, against the molecules seen.

    The axis of the molecules is logarithmic, and so is that of the loss if it is always positive, as for flow matching:
    a power law is then a straight line. The NLL in nats may be negative and has a linear axis; its lowest value is
    marked.

    Args:
        log: Columns of the log of a run (``ase_enf.training.log.read_log``): ``step``, ``loss``, ``valid_loss`` and
            ``valid_nll``, of equal length, NaN where a row has no value.
        path: File to write; its ending sets the format (.png, .pdf, .svg).
        per_step: Number of molecules in a training step, over all processes.
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written, for instance because its folder does not exist.
        ValueError: If the log has no rows.

    Example:
        >>> import tempfile
        >>> nan = float("nan")
        >>> log = {"step": [1, 2], "loss": [2.0, 1.0], "valid_loss": [nan, 1.5], "valid_nll": [nan, -3.0]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     learning_curve(log, folder + "/learning_curve.png", per_step=64, dpi=50).name
        'learning_curve.png'
    """
    target = check_picture(path)
    columns = {name: np.asarray(log[name], dtype=np.float64) for name in ("step", "loss", "valid_loss", "valid_nll")}
    seen = columns["step"] * per_step
    if not len(seen):
        raise ValueError("the log has no rows: nothing can be drawn")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    draw_losses(left, seen, columns["loss"], columns["valid_loss"])
    draw_nll(right, seen, columns["valid_nll"])
    margin = 1.05 if seen.max() > 2 * seen.min() else 2.0
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(seen.min() / margin, seen.max() * margin)
        _label_counts(axes)
        axes.grid(which="major", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, target, dpi)


def _label_counts(axes: Axes) -> None:
    """Labels the axis of the molecules with short numbers, such as 500 or 20k; at 1, 2 and 5 if decades are few."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.set_xlabel("molecules seen")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_losses(
    axes: Axes,
    seen: NDArray[np.float64],  # (R,)
    loss: NDArray[np.float64],  # (R,), NaN where there is none
    validation: NDArray[np.float64],  # (R,), NaN where there is none
) -> None:
    """Draws the training and validation losses, on a logarithmic axis if all are positive."""
    axes.set_ylabel("loss")
    _plotted(axes, seen, loss, color=_PALE, linewidth=0.8, alpha=0.6)
    _plotted(axes, *_averaged(seen, loss), color="#3b6ea8", linewidth=1.4, label="training")
    _plotted(axes, seen, validation, color=_INK, marker="o", markersize=3, linewidth=1, label="validation")
    known = np.concatenate([loss[np.isfinite(loss)], validation[np.isfinite(validation)]])
    if len(known):
        axes.legend(frameon=False, fontsize=8)
    if len(known) and (known > 0).all():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if known.max() < 10 * known.min() else "")


def draw_nll(
    axes: Axes,
    seen: NDArray[np.float64],  # (R,)
    nll: NDArray[np.float64],  # (R,), nats a molecule, NaN where there is none
) -> None:
    """Draws the validation NLL and marks its lowest value."""
    axes.set_ylabel("validation NLL / nats a molecule")
    if not _plotted(axes, seen, nll, color=_INK, marker="o", markersize=3, linewidth=1):
        axes.set_title("no validation yet", fontsize=9, color=_INK)
        return
    known = np.isfinite(nll)
    best = int(np.nanargmin(np.where(known, nll, np.nan)))
    axes.plot(seen[best], nll[best], "o", color=_ACCENT, markersize=5)
    axes.set_title(f"lowest: {nll[best]:.2f} nats after {seen[best]:,.0f} molecules", fontsize=9, color=_ACCENT)
    settled = nll[known & (seen >= _SETTLING * seen.max())]
    if len(settled) > 1 and (spread := settled.max() - settled.min()) > 0:
        margin = 0.08 * spread
        axes.set_ylim(min(settled.min(), nll[best]) - margin, settled.max() + margin)


def _averaged(seen: NDArray[np.float64], loss: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns means over bins of equal width on the logarithmic axis, which hold ever more rows."""
    known = np.isfinite(loss)
    place = np.floor(_BINS * np.log10(seen[known])).astype(int)
    place -= place.min(initial=0)
    counts = np.bincount(place)
    filled = counts > 0
    means = [np.bincount(place, column[known])[filled] / counts[filled] for column in (seen, loss)]
    return means[0], means[1]


def _plotted(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], **style: object) -> bool:
    """Draws the finite points as one line, and returns whether there are any."""
    known = np.isfinite(y)
    if known.any():
        axes.plot(x[known], y[known], **style)
    return bool(known.any())
