"""Figure 2: frames at the requested times, rotated so that the last one shows its broad side."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule

from ase_enf.plot.animation import seen_broadside
from benchmarks.tables.figure2 import nearest, panels


def way(times: tuple[float, ...]) -> list:
    frames = [molecule("CH3OH") for _ in times]
    for frame, time in zip(frames, times, strict=True):
        frame.positions += time * np.random.default_rng(0).normal(size=frame.positions.shape)
        frame.info["enf_time"] = time
    return frames


def test_frames_are_those_nearest_to_the_times():
    frames = nearest(way((1.0, 0.8, 0.45, 0.0)), (1.0, 0.5, 0.1))
    assert [frame.info["enf_time"] for frame in frames] == [1.0, 0.45, 0.0]


def test_all_frames_are_turned_alike():
    """A common rotation keeps distances, also between frames."""
    frames = way((1.0, 0.0))
    seen = seen_broadside(frames)
    centred = [frame.positions - frame.positions.mean(axis=0) for frame in frames]
    assert np.linalg.norm(seen[0] - seen[1], axis=1) == pytest.approx(np.linalg.norm(centred[0] - centred[1], axis=1))
    assert np.ptp(seen[1][:, 0]) >= np.ptp(seen[1][:, 2])


def test_panels_are_drawn(tmp_path):
    import matplotlib.image

    panels([way((1.0, 0.5, 0.0))] * 2, tmp_path / "two.png", size=0.5, dpi=60)
    picture = matplotlib.image.imread(tmp_path / "two.png")
    assert picture.shape[1] == 90 and picture[..., :3].min() < 0.5
