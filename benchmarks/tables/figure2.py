"""Figure 2 of the paper: molecules on the way from noise to data.

python -m benchmarks.tables.figure2 qm9 --indices 0 1 2

Rows are molecules of a seed and columns are times of the flow itself (``churn=0``); elements are decoded at each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

import ase_enf
from ase_enf.atoms.files import atomic_write
from ase_enf.plot import draw
from ase_enf.plot.animation import seen_broadside
from ase_enf.sampling.path import paths
from benchmarks.report import RESULTS

TIMES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0)  # 1 is noise
MARGIN = 1.2  # Å beyond the outermost centre
FRAMES = 1000  # more than any sampler has steps: all of them


def main() -> None:
    """Draws ``results/figure2_NAME.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or path")
    parser.add_argument("--indices", type=int, nargs="+", default=[0, 1, 2], help="of molecules (default: 0 1 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    options = parser.parse_args()
    flow = ase_enf.load(options.model, "cpu")
    flow.use_backend("auto")
    drawn = [
        next(iter(paths(flow, 1, frames=FRAMES, seed=options.seed, start=index, churn=0))) for index in options.indices
    ]
    panels([nearest(path.frames) for path in drawn], RESULTS / f"figure2_{Path(options.model).stem}.png")


def nearest(frames: Sequence[Atoms], times: Sequence[float] = TIMES) -> list[Atoms]:
    """Returns, for each of some times, the frame nearest to it.

    Example:
        >>> frames = [Atoms("H", info={"enf_time": t}) for t in (1.0, 0.45, 0.0)]
        >>> [frame.info["enf_time"] for frame in nearest(frames, (1.0, 0.5, 0.1))]
        [1.0, 0.45, 0.0]
    """
    known = np.array([frame.info["enf_time"] for frame in frames])
    return [frames[int(np.abs(known - time).argmin())] for time in times]


def panels(rows: Sequence[Sequence[Atoms]], path: Path, size: float = 1.5, dpi: int = 200) -> None:
    """Draws sequences of frames as the rows of one picture, on one scale, with their times above.

    Args:
        rows: Frames of one molecule for each row, equal in number.
        path: The picture to write.
        size: Width of a panel, inches.
        dpi: Pixels per inch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    placed = [seen_broadside(frames) for frames in rows]
    reach = np.max([np.abs(positions).max(axis=0)[:2] for frames in placed for positions in frames], axis=0)
    width, height = (2 * (reach + MARGIN)).tolist()
    shape = size * len(rows[0]), size * height / width * len(rows) + 0.25
    figure = Figure(figsize=shape, facecolor="white")
    figure.subplots_adjust(0, 0, 1, 1 - 0.25 / shape[1], 0, 0)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for k, (frames, positions) in enumerate(zip(rows, placed, strict=True)):
        for axes, frame, seen in zip(grid[k], frames, positions, strict=True):
            axes.imshow(draw(frame.numbers, seen, (width, height), round(size * dpi)), interpolation="antialiased")
            axes.axis("off")
            if k == 0:
                axes.set_title(f"t = {frame.info['enf_time']:.1f}", fontsize=9)
    with atomic_write(path) as handle:
        figure.savefig(handle, dpi=dpi, format="png")


if __name__ == "__main__":
    main()
