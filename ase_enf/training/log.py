"""The log of a run: a CSV file, TensorBoard where it is installed, and a progress bar on a terminal."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ase_enf.atoms.files import atomic_write
from ase_enf.bars import Bar, Progress

LOG_FILE = "log.csv"
LOG_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "value",
    "valid_loss",
    "valid_nll",
    "lr",
    "grad_norm",
    "skipped",
    "examples_per_s",
    "elapsed_s",
)
BOARD_FOLDER = "tensorboard"


class Log:
    """Writes the rows of a run to its CSV file, to TensorBoard and to the progress bar.

    Args:
        folder: The folder of the run; None writes no files.
        step: The step at which the run starts or is resumed.
        total: Steps in all, None for no end.
        progress: See ``bars.Progress``.
    """

    def __init__(self, folder: Path | None, step: int, total: int | None, progress: Progress) -> None:
        self.path = None if folder is None else folder / LOG_FILE
        self.board = _board(folder, step + 1 if step else 0)
        self.bar = Bar(total, progress, "step", initial=step)

    def write(self, row: Sequence[Any]) -> None:
        """Appends a row; empty values stay empty."""
        named = dict(zip(LOG_COLUMNS, row, strict=True))
        nll = {} if named["valid_nll"] == "" else {"nll": f"{named['valid_nll']:.2f}"}
        self.bar.set_postfix(loss=f"{named['loss']:.4f}", **nll)
        if self.path:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([f"{v:.8g}" if isinstance(v, float) else v for v in row])
        if self.board is not None:
            for name in LOG_COLUMNS[1:]:
                if named[name] != "":
                    self.board.add_scalar(name, named[name], named["step"])

    def close(self) -> None:
        """Closes the progress bar and TensorBoard."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """Returns the columns of a run's log, NaN for empty values.

    An unfinished last row, which a killed process may leave, is ignored.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     truncate_log(Path(folder, "log.csv"), 0)
        ...     read_log(Path(folder, "log.csv"))["step"].shape
        (0,)
    """
    rows = np.array([[float(value or "nan") for value in row] for row in _rows(path)]).reshape(-1, len(LOG_COLUMNS))
    return dict(zip(LOG_COLUMNS, rows.T, strict=True))


def _rows(path: Path) -> list[list[str]]:
    """Returns the complete rows of a log below its header, none for a missing file."""
    rows = list(csv.reader(path.read_text().splitlines())) if path.is_file() else []
    return [row for row in rows[1:] if len(row) == len(LOG_COLUMNS) and row[0].isdigit()]


def truncate_log(path: Path, step: int) -> None:
    """Drops the rows after ``step``, so that a resumed log has every step once; starts a missing log."""
    kept = [LOG_COLUMNS, *(row for row in _rows(path) if int(row[0]) <= step)]
    with atomic_write(path) as handle:
        text = io.TextIOWrapper(handle, newline="", write_through=True)
        csv.writer(text).writerows(kept)
        text.detach()


def _board(folder: Path | None, step: int) -> Any:
    """Returns a TensorBoard writer that forgets rows from ``step`` on, None where TensorBoard is not installed."""
    if folder is None or importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / BOARD_FOLDER, purge_step=step)
