"""Pictures: they are written, they show their data, and no global state changes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.collections import g2

from ase_enf.metrics import survey
from ase_enf.plot import broadside, distance_histogram, draw, evaluation, gallery
from ase_enf.plot.overview import draw_elements

if TYPE_CHECKING:
    from matplotlib.axes import Axes

pytest.importorskip("matplotlib")


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_a_gallery_has_the_size_of_its_grid(tmp_path: Path) -> None:
    written = gallery([molecule(name) for name in g2.names[:7]], tmp_path / "g.png", columns=3, size=1.0, dpi=60)
    height, width, _ = pixels(written).shape
    assert width == 180
    assert height % 3 in (0, 1, 2) and height > 180
    assert pixels(written).min() < 0.3 < pixels(written).mean()


def test_one_molecule_one_atom_and_none(tmp_path: Path) -> None:
    gallery(molecule("CH4"), tmp_path / "one.png", dpi=50)
    gallery([Atoms("H"), Atoms(), Atoms("Xe2", [(0, 0, 0), (0, 0, 4)])], tmp_path / "odd.png", dpi=50)
    with pytest.raises(ValueError, match="no molecules to draw"):
        gallery([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="columns is 0"):
        gallery(molecule("CH4"), tmp_path / "none.png", columns=0)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_ending_names_the_format(tmp_path: Path, ending: str) -> None:
    assert gallery(molecule("H2O"), tmp_path / f"g.{ending}", dpi=50).stat().st_size > 1000


def test_the_same_molecules_give_the_same_picture(tmp_path: Path) -> None:
    one, two = (gallery(molecule("CH3CHO"), tmp_path / name, dpi=60) for name in ("1.png", "2.png"))
    assert one.read_bytes() == two.read_bytes()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for call in (
        lambda path: gallery(molecule("CH4"), path),
        lambda path: distance_histogram(molecule("CH4"), [molecule("CH4")], path),
    ):
        with pytest.raises(FileNotFoundError, match="the folder .*nowhere does not exist"):
            call(tmp_path / "nowhere" / "g.png")


def test_broadside_is_a_proper_rotation() -> None:
    for name in g2.names:
        atoms = molecule(name)
        turned = atoms.copy()
        turned.positions = broadside(atoms.positions)
        assert np.allclose(turned.get_all_distances(), atoms.get_all_distances(), atol=1e-9)
    corner = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
    volume = np.linalg.det(np.diff(broadside(corner), axis=0)) / np.linalg.det(np.diff(corner, axis=0))
    assert volume == pytest.approx(1)


def test_broadside_shows_the_long_side() -> None:
    turned = np.ptp(broadside(molecule("C6H6").positions), axis=0)
    assert turned[0] > turned[2] and turned[1] > turned[2]


def test_nearer_atoms_hide_farther_ones() -> None:
    positions = np.array([[0.0, 0, 2.5], [0.0, 0, -2.5]])
    red_first = draw(np.array([8, 7]), positions, (2.0, 2.0), 60)[30, 30]
    blue_first = draw(np.array([7, 8]), positions, (2.0, 2.0), 60)[30, 30]
    assert red_first[0] > red_first[2] and blue_first[2] > blue_first[0]


def test_bonds_join_atoms_and_their_order_shows() -> None:
    def ink(symbols: str, distance: float) -> float:
        atoms = Atoms(symbols, [(-distance / 2, 0, 0), (distance / 2, 0, 0)])
        return float((draw(atoms.numbers, atoms.positions, (3.0, 2.0), 150)[:, 75].min(axis=-1) < 0.95).sum())

    assert ink("C2", 1.7) == 0 < ink("C2", 1.54) < ink("C2", 1.34) < ink("C2", 1.20)


def test_what_is_larger_than_the_frame_is_scaled_to_fit() -> None:
    far = np.array([[-20.0, 0, 0], [20.0, 0, 0]])
    image = draw(np.array([6, 6]), far, (4.0, 4.0), 400)
    assert np.allclose(image[:, 0], 1) and np.allclose(image[:, -1], 1)
    assert image.min() < 0.9


def test_a_histogram_is_drawn(tmp_path: Path) -> None:
    written = distance_histogram([molecule(name) for name in g2.names], [molecule("CH4")], tmp_path / "d.png", dpi=60)
    assert pixels(written).min() < 0.5
    with pytest.raises(ValueError, match="has no distances"):
        distance_histogram(molecule("CH4"), ["C"], tmp_path / "d.png")


@pytest.mark.parametrize("reference", [None, ["C"], [molecule("CH4")], "qm9"], ids=str)
def test_an_evaluation_is_drawn_against_any_reference_or_none(tmp_path: Path, reference: object) -> None:
    atoms = [molecule("CH3"), molecule("CH4"), Atoms("X"), Atoms(), Atoms("HF", [(0, 0, 0), (np.nan, 0, 0)])]
    pytest.importorskip("rdkit")
    assert pixels(evaluation(atoms, tmp_path / "e.png", reference, dpi=40)).min() < 0.5
    assert evaluation([Atoms()], tmp_path / "nothing.svg", reference).stat().st_size > 1000


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_elements_are_drawn_with_their_shares_and_numbers() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_elements(axes, survey([molecule("CH3"), molecule("CH4"), molecule("H2O")]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["H", "C", "O"]
    assert texts(axes) == ["all atoms", "100.0 %", "of 9", "50.0 %", "of 2", "100.0 %", "of 1"]
    assert axes.get_title() == "91.7 % of atoms, 66.7 % of molecules are stable"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # hydrogen on top
    low, high = axes.get_xlim()
    drawn = axes.containers[0].lines[0].get_xdata()
    assert drawn.tolist() == [100, 50, 100] and low < drawn.min() and high > 100


def test_the_input_is_not_modified(tmp_path: Path) -> None:
    atoms = molecule("CH3CHO")
    gallery(atoms, tmp_path / "g.png", dpi=50)
    assert atoms == molecule("CH3CHO")


def test_pyplot_is_never_imported_and_matplotlib_only_when_drawing(tmp_path: Path) -> None:
    code = (
        "import sys, ase_enf.plot as plot; assert 'matplotlib' not in sys.modules\n"
        "from ase.build import molecule\n"
        f"plot.gallery(molecule('CH4'), {str(tmp_path / 'g.png')!r}, dpi=50)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_do_not_depend_on_how_numpy_treats_underflow(tmp_path: Path) -> None:
    atoms = [molecule(name) for name in ("CH3CHO", "C6H6", "CH3", "H2", "SiH4")] + [Atoms("H")]
    with np.errstate(all="raise"):
        careful = gallery(atoms, tmp_path / "a.png", dpi=40).read_bytes()
        distance_histogram(atoms, atoms[:1], tmp_path / "h.png", dpi=40)
        evaluation(atoms, tmp_path / "e.png", atoms[:1], dpi=40)
    assert careful == gallery(atoms, tmp_path / "b.png", dpi=40).read_bytes()


PICTURES = {
    "gallery": lambda path: gallery(molecule("CH4"), path, dpi=40),
    "distances": lambda path: distance_histogram(molecule("CH4"), [molecule("CH4")], path, dpi=40),
    "evaluation": lambda path: evaluation(molecule("CH4"), path, dpi=40),
}


@pytest.mark.parametrize("draw_to", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("step", ["matplotlib.figure.Figure.savefig", "os.fsync", "os.replace"])
def test_a_picture_that_fails_leaves_what_was_there(tmp_path, monkeypatch, draw_to, old, step) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if old is not None:
        (tmp_path / "g.png").write_bytes(old)
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        draw_to(tmp_path / "g.png")
    assert ".part" not in str(caught.value)
    assert os.listdir(tmp_path) == ([] if old is None else ["g.png"])
    assert old is None or (tmp_path / "g.png").read_bytes() == old


@pytest.mark.parametrize("draw_to", PICTURES.values(), ids=PICTURES)
def test_the_target_of_a_link_becomes_the_picture(tmp_path, draw_to) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "g.svg").symlink_to("real/picture")
    assert draw_to(tmp_path / "g.svg") == tmp_path / "g.svg"
    assert (tmp_path / "g.svg").is_symlink() and "<svg" in (tmp_path / "real" / "picture").read_text()
    assert os.listdir(tmp_path / "real") == ["picture"]


@pytest.mark.parametrize("draw_to", PICTURES.values(), ids=PICTURES)
def test_places_for_no_picture_are_named_before_it_is_drawn(tmp_path, monkeypatch, draw_to) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: pytest.fail("drawn"))
    for name in ("g.xyz", "g"):
        with pytest.raises(ValueError, match=f"{name}: no picture has that ending; use .png, .pdf or .svg$"):
            draw_to(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        draw_to(tmp_path)
