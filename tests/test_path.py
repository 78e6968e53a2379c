"""Paths from noise to data: they end at the generated molecule and obey the equation of their sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from ase_enf.plot import animate
from ase_enf.plot.molecules import broadside
from ase_enf.sampling.generate import generate
from ase_enf.sampling.path import paths


@pytest.fixture
def matched(stir) -> ENF:
    fields = {"hidden": 8, "layers": 2, "sizes": {3: 1, 5: 1}, "species": ("H", "C", "O"), "position_scale": 1.4}
    return stir(ENF(ENFConfig(features="joint", path="linear", **fields)), 0.5).double()


# An adaptive solver chooses its steps for a batch: molecules agree to its tolerance.
SAMPLERS = [
    ({"steps": 12}, 1e-9),
    ({"steps": 12, "churn": 0}, 1e-9),
    ({"solver": "midpoint", "steps": 7}, 1e-9),
    ({"solver": "dopri5"}, 1e-3),
]


@pytest.mark.parametrize(("sampler", "atol"), SAMPLERS)
def test_a_path_ends_at_the_molecule_that_is_generated(matched, sampler, atol):
    molecules = generate(matched, 5, seed=3, progress=False, **sampler)
    found = list(paths(matched, 5, frames=9, seed=3, batch_size=2, **sampler))
    for molecule, path in zip(molecules, found, strict=True):
        assert path.molecule.info == molecule.info
        assert path.molecule.numbers.tolist() == molecule.numbers.tolist() == path.frames[-1].numbers.tolist()
        for end in (path.molecule, path.frames[-1]):
            assert np.allclose(end.positions, molecule.positions, atol=atol)
        times = [frame.info["enf_time"] for frame in path.frames]
        assert times[0] == 1.0 and times[-1] == 0.0 and times == sorted(times, reverse=True)
        assert 2 < len(times) <= 9 and {len(frame) for frame in path.frames} == {len(molecule)}
        assert {frame.info["enf_index"] for frame in path.frames} == {molecule.info["enf_index"]}


def test_a_path_of_the_flow_obeys_its_equation(matched):
    """dx/dt = φ_x: the velocity at a frame is the slope of the path, to the order of central differences."""
    (path,) = paths(matched, 1, frames=401, seed=0, n_atoms=5, solver="rk4", steps=400)
    before, at, after = path.frames[199:202]
    times = [frame.info["enf_time"] for frame in (before, at, after)]
    assert np.abs(at.positions.mean(axis=0)).max() < 1e-12  # centred all the way
    first = (at.positions - before.positions) / (times[1] - times[0])
    second = (after.positions - at.positions) / (times[2] - times[1])
    assert np.abs(first).max() > 1e-3 and np.allclose(first, second, atol=0.05 * np.abs(first).max())


def test_a_rejected_attempt_leaves_no_frame(matched):
    found = list(paths(matched, 8, frames=4, steps=6, require="closed_shell"))
    assert any(path.molecule.info["enf_attempts"] > 1 for path in found)
    for path in found:
        assert len(path.frames) == 4 and not path.frames[-1].numbers.sum() % 2
        assert np.array_equal(path.frames[-1].positions, path.molecule.positions)


@pytest.mark.parametrize("frames", [1, 0, 2.5])
def test_a_path_has_at_least_two_frames(matched, frames):
    with pytest.raises(ValueError, match="frames"):
        paths(matched, 1, frames=frames)


def test_paths_of_completions_are_refused(matched, water):
    with pytest.raises(ValueError, match="^fragment: paths are those of whole molecules"):
        paths(matched, 1, fragment=water)


def test_positions_of_a_plane_move_too(stir):
    flow = stir(ENF(ENFConfig(features="none", dimension=2, hidden=8, layers=1, sizes={4: 1}, position_scale=1.0)))
    (path,) = paths(flow, 1, frames=3, solver="rk4", steps=4)
    assert all(np.all(frame.positions[:, 2] == 0) for frame in path.frames) and len(path.frames) == 3


def test_an_animation_has_all_frames_and_ends_as_the_gallery_shows_the_molecule(tmp_path: Path, water: Atoms, methane):
    Image = pytest.importorskip("PIL.Image")
    steps = np.linspace(2, 1, 7)
    frames = [[atoms.copy() for _ in steps[:count]] for atoms, count in ((water, 7), (methane, 4))]
    for molecule in frames:
        for atoms, factor in zip(molecule, steps[-len(molecule) :], strict=True):
            atoms.positions = factor * broadside(atoms.positions)
    with Image.open(animate(frames, tmp_path / "a.gif", pixels=60)) as picture:
        assert picture.n_frames == 7 and picture.size[0] == 120
        first = np.asarray(picture.convert("RGB"), dtype=float)
        picture.seek(6)
        last = np.asarray(picture.convert("RGB"), dtype=float)
    assert np.abs(first - last)[:, :60].max() > 100  # water moved
    red = (last[..., 0] > 150) & (last[..., 1] < 90)
    assert red[:, :60].any() and not red[:, 60:].any()  # the oxygen, and none in methane


def test_what_cannot_be_animated(tmp_path: Path, water: Atoms):
    with pytest.raises(ValueError, match="no frames"):
        animate([[]], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"written as \.gif"):
        animate([[water]], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_graph_of_gradients_is_not_kept(matched):
    matched.requires_grad_(True)
    before = torch.is_grad_enabled()
    (path,) = paths(matched, 1, frames=2, steps=4)
    assert torch.is_grad_enabled() == before and np.isfinite(path.molecule.positions).all()
