"""Learning curves: they plot the values of the log, on suitable axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ase_enf.plot import learning_curve
from ase_enf.plot.curves import draw_losses, draw_nll
from ase_enf.training.log import LOG_COLUMNS, read_log

pytest.importorskip("matplotlib")


def axes():
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def test_a_power_law_is_a_straight_line_of_its_slope():
    seen = 64.0 * np.arange(1, 2001)
    panel = axes()
    draw_losses(panel, seen, 3 * seen**-0.25, np.full(len(seen), np.nan))
    assert panel.get_yscale() == "log"
    x, y = panel.lines[1].get_data()
    assert np.allclose(np.diff(np.log(y)) / np.diff(np.log(x)), -0.25, atol=0.02) and len(x) > 20


def test_a_loss_that_is_negative_somewhere_has_a_linear_axis():
    panel = axes()
    draw_losses(panel, np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, -1.0]), np.array([np.nan, 0.5, np.nan]))
    assert panel.get_yscale() == "linear" and panel.lines[-1].get_xdata().tolist() == [2.0]


def test_the_lowest_nll_is_marked_and_seen():
    nll = np.array([900.0, np.nan, -3.0, -7.0, np.nan, -5.0])
    panel = axes()
    draw_nll(panel, np.array([1.0, 10, 20, 30, 40, 50]), nll)
    assert panel.lines[1].get_data()[1].tolist() == [-7.0] and "-7.00 nats after 30" in panel.get_title()
    low, high = panel.get_ylim()
    assert low < -7 and -3 < high < 900  # the first value is far higher and outside the panel


def test_a_log_without_rows_cannot_be_drawn(tmp_path: Path):
    with pytest.raises(ValueError, match="no rows"):
        learning_curve({name: [] for name in LOG_COLUMNS}, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_a_log_is_read_but_for_an_unfinished_row(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text(f"{','.join(LOG_COLUMNS)}\n1,0,2.5,2.5,,,0.1,1,0,9,1\n2,0,1.5,1.5,1.25,-3,0.1,1,0,9,2\n3,0,1.")
    log = read_log(path)
    assert log["step"].tolist() == [1, 2] and log["valid_nll"][1] == -3 and np.isnan(log["valid_nll"][0])
    assert learning_curve(log, tmp_path / "c.png", dpi=40).read_bytes().startswith(b"\x89PNG")
