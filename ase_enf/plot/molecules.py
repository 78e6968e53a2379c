"""Molecules as balls and sticks, one or a gallery of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from numpy.typing import NDArray

from ase_enf.chem.bonds import bond_orders, stability, structures
from ase_enf.plot.canvas import add_cylinder, add_sphere, blank, shade
from ase_enf.plot.files import check_picture, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {1: (0.95, 0.95, 0.95), 6: (0.33, 0.34, 0.36), 7: (0.20, 0.36, 0.88), 8: (0.87, 0.12, 0.10),
            9: (0.36, 0.74, 0.28)}  # fmt: skip
_STICK = (0.70, 0.71, 0.73)  # colour of bonds
_STICK_RADII = {1: 0.105, 2: 0.075, 3: 0.055}  # Å, by order
_STICK_GAP = {1: 0.0, 2: 0.135, 3: 0.17}  # Å, of the outer sticks of a double or triple bond from the axis
_TILT = np.deg2rad((-14.0, 10.0))  # about x and y: atoms that mirror each other in the picture plane come apart
_MARGIN = 0.55  # Å of white around the outermost nuclei


@np.errstate(under="ignore")  # gloss that fades to nothing is no error, whatever numpy.seterr says
def gallery(
    atoms: Atoms | Iterable[Atoms],
    path: str | Path,
    columns: int = 6,
    size: float = 1.7,
    dpi: int = 220,
) -> Path:
    """Ball-and-stick pictures of molecules on a grid, formula and stability beneath each (figure 5 of the paper).

    Every molecule is turned broadside, along its principal axes. All share one scale; the few that are much larger
    than the rest are drawn smaller. Bonds are those of the distance table and are drawn by their order.

    Args:
        atoms: One molecule or several, positions in Å. They are not modified.
        path: File to write; its ending names the format (.png, .pdf, .svg).
        columns: Pictures in a row.
        size: Width of a picture in inches.
        dpi: Pixels an inch.

    Returns:
        The path.

    Raises:
        OSError: Nothing can be written there: the folder of the file does not exist, for instance.
        ValueError: There are no molecules, one is periodic or has a position that is not finite, or ``columns`` < 1.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gallery([molecule("CH3CHO"), molecule("CH3")], folder + "/two.png", dpi=50).name
        'two.png'
    """
    target = check_picture(path)
    listed = structures(atoms)
    if not listed:
        raise ValueError("there are no molecules to draw: the list is empty")
    if columns < 1:
        raise ValueError(f"columns is {columns}: it takes at least one")
    from matplotlib.figure import Figure

    verdicts = stability(listed)
    turned = [broadside(item.positions) for item in listed]
    width, height = _frame(turned)
    columns = min(columns, len(listed))
    rows = -(-len(listed) // columns)
    picture, caption = size * height / width, 0.36  # inches
    figure = Figure(figsize=(size * columns, (picture + caption) * rows), facecolor="white")
    for place, (item, positions) in enumerate(zip(listed, turned, strict=True)):
        left, top = place % columns / columns, 1 - place // columns / rows
        axes = figure.add_axes((left, top - picture / (picture + caption) / rows, 1 / columns,
                                picture / (picture + caption) / rows))  # fmt: skip
        axes.imshow(draw(item.numbers, positions, (width, height), round(size * dpi)), interpolation="antialiased")
        axes.axis("off")
        _caption(axes, item, int(verdicts.stable_atoms[place]), bool(verdicts.stable[place]))
    return save_figure(figure, target, dpi)


def broadside(
    positions: NDArray[np.floating],  # (M, 3), Å
) -> NDArray[np.float64]:  # (M, 3), Å
    """Positions turned so that a molecule is seen from its broad side, centred on its extent.

    The principal axes of Σ_i (x_i − x̄)(x_i − x̄)ᵀ become x (longest), y and z (towards the eye), followed by a small
    tilt. It is a proper rotation: a molecule is never shown as its mirror image.

    Args:
        positions: shape (M, 3), Å.

    Returns:
        shape (M, 3), Å.

    Example:
        >>> rod = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
        >>> np.abs(broadside(rod)).argmax(axis=1).tolist()  # along x
        [0, 0]
    """
    if not len(positions):
        return np.zeros((0, 3))
    centred = np.asarray(positions, dtype=np.float64) - np.mean(positions, axis=0)
    axes = np.linalg.svd(centred, full_matrices=True)[2] if len(centred) > 2 else _axes_of_few(centred)
    skew = np.sum((centred @ axes.T) ** 3, axis=0)
    axes = axes * np.where(skew < 0, -1, 1)[:, None]  # the heavier tail to the right and up, whatever SVD's signs
    axes[2] *= np.sign(np.linalg.det(axes))
    turned = centred @ axes.T @ _tilt().T
    return turned - (turned.max(axis=0) + turned.min(axis=0)) / 2


@np.errstate(under="ignore")  # gloss that fades to nothing is no error, whatever numpy.seterr says
def draw(
    numbers: NDArray[np.integer],  # (M,)
    positions: NDArray[np.floating],  # (M, 3), Å
    extent: tuple[float, float],
    pixels: int,
) -> NDArray[np.float32]:  # (H, W, 3)
    """A shaded ball-and-stick picture, seen along −z.

    Spheres and cylinders are intersected with the parallel lines of sight exactly; what lies deeper fades into the
    white of the paper.

    Args:
        numbers: shape (M,), atomic numbers.
        positions: shape (M, 3), Å.
        extent: Width and height of the picture in Å; what is larger is scaled down to fit.
        pixels: Width of the picture in pixels.

    Returns:
        shape (H, W, 3), colours 0 to 1 on white.

    Example:
        >>> draw(np.array([1]), np.zeros((1, 3)), (2.0, 1.0), 40).shape
        (20, 40, 3)
    """
    width, height = extent
    reach = np.abs(positions).max(axis=0, initial=0) + _MARGIN
    zoom = max(1.0, 2 * reach[0] / width, 2 * reach[1] / height)
    canvas = blank(width * zoom, height * zoom, pixels, round(pixels * height / width))
    orders = bond_orders(numbers[None], positions[None])[0]
    for centre, number in zip(positions, numbers, strict=True):
        add_sphere(canvas, centre, _radius(int(number)), _colour(int(number)))
    for i, j in zip(*np.nonzero(np.triu(orders)), strict=True):
        for start, end, radius in _sticks(positions[i], positions[j], int(orders[i, j])):
            add_cylinder(canvas, start, end, radius, _STICK)
    return shade(canvas)


def _sticks(
    a: NDArray[np.float64], b: NDArray[np.float64], order: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], float]]:
    """The cylinders of a bond (start, end, radius): side by side in the picture, so that the order can be counted."""
    sideways = np.cross(b - a, [0.0, 0.0, 1.0])
    norm = np.linalg.norm(sideways)
    sideways = sideways / norm if norm > 1e-6 else np.array([1.0, 0.0, 0.0])
    for step in {1: (0,), 2: (-1, 1), 3: (-1, 0, 1)}[order]:
        shift = step * _STICK_GAP[order] * sideways
        yield a + shift, b + shift, _STICK_RADII[order]


def _frame(turned: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Width and height of the pictures, Å: they hold all molecules but the largest twentieth."""
    reach = np.array([np.abs(positions).max(axis=0, initial=0)[:2] for positions in turned]) + _MARGIN
    width, height = 2 * np.quantile(reach, 0.95, axis=0, method="higher")
    return float(width), float(np.clip(height, 0.7 * width, 1.2 * width))


def _axes_of_few(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Principal axes of one or two atoms: SVD of so few rows already gives a whole basis when padded with zeros."""
    padded = np.zeros((3, 3))
    padded[: len(centred)] = centred
    return np.linalg.svd(padded)[2]


def _tilt() -> NDArray[np.float64]:
    """Rotation by ``_TILT`` about x, then y."""
    (cx, cy), (sx, sy) = np.cos(_TILT), np.sin(_TILT)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return about_y @ about_x


def _radius(number: int) -> float:
    """Radius of a ball, Å: hydrogens small, the rest by their covalent radius."""
    return 0.24 if number == 1 else 0.16 + 0.30 * float(covalent_radii[number])


def _colour(number: int) -> tuple[float, ...]:
    return _COLOURS.get(number, tuple(jmol_colors[number]))


def _caption(axes: Axes, atoms: Atoms, stable_atoms: int, stable: bool) -> None:
    formula = re.sub(r"(\d+)", r"$_{\1}$", atoms.get_chemical_formula(mode="hill")) or "no atoms"
    verdict = "✓ stable" if stable else f"✗ {stable_atoms} of {len(atoms)} atoms stable"
    style = {"ha": "center", "va": "top", "transform": axes.transAxes, "family": "DejaVu Sans"}
    axes.text(0.5, 0.0, formula, fontsize=7.5, color="#222222", **style)
    axes.annotate(
        verdict, (0.5, 0), xytext=(0, -11), textcoords="offset points", xycoords="axes fraction", ha="center", va="top",
        fontsize=6.2, color="#15803d" if stable else "#b91c1c", family="DejaVu Sans",
    )  # fmt: skip
