"""Ball-and-stick pictures of molecules, single or as a gallery."""

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
_STICK_RADII = {1: 0.105, 2: 0.075, 3: 0.055}  # Å, by bond order
_STICK_GAP = {1: 0.0, 2: 0.135, 3: 0.17}  # Å, distance of the outer sticks of a multiple bond from its axis
_TILT = np.deg2rad((-14.0, 10.0))  # about x and y, so that atoms behind one another become visible
_MARGIN = 0.55  # Å of white around the outermost nuclei


@np.errstate(under="ignore")  # shading may underflow to zero
def gallery(
    atoms: Atoms | Iterable[Atoms],
    path: str | Path,
    columns: int = 6,
    size: float = 1.7,
    dpi: int = 220,
) -> Path:
    """Draws molecules as balls and sticks on a grid, with formula and stability below each (figure 5 of the paper).

    Every molecule is shown from its broad side. All share one scale, except the few that are much larger than the rest,
    which are drawn smaller. Bonds and their orders are those of the distance table.

    Args:
        atoms: One or several molecules, positions in Å; they are not modified.
        path: File to write; its ending sets the format (.png, .pdf, .svg).
        columns: Number of pictures in a row.
        size: Width of a picture, inches.
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written, for instance because its folder does not exist.
        ValueError: If there are no molecules, one is periodic or has a position that is not finite, or ``columns`` is
            below 1.

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
    """Returns positions rotated so that a molecule shows its broad side along z, and centred on their extent.

    The principal axes of Σ_i (x_i − x̄)(x_i − x̄)ᵀ become x (longest), y and z (towards the viewer), followed by a small
    tilt. The rotation is proper, so a molecule is never shown as its mirror image.

    Args:
        positions: Positions, shape (M, 3), Å.

    Returns:
        Rotated positions, shape (M, 3), Å.

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
    axes = axes * np.where(skew < 0, -1, 1)[:, None]  # the signs from SVD are arbitrary: the longer tail goes right, up
    axes[2] *= np.sign(np.linalg.det(axes))
    turned = centred @ axes.T @ _tilt().T
    return turned - (turned.max(axis=0) + turned.min(axis=0)) / 2


@np.errstate(under="ignore")  # shading may underflow to zero
def draw(
    numbers: NDArray[np.integer],  # (M,)
    positions: NDArray[np.floating],  # (M, 3), Å
    extent: tuple[float, float],
    pixels: int,
) -> NDArray[np.float32]:  # (H, W, 3)
    """Draws a shaded ball-and-stick picture, viewed along −z.

    The parallel lines of sight are intersected exactly with spheres and cylinders; deeper parts fade to white.

    Args:
        numbers: Atomic numbers, shape (M,).
        positions: Positions, shape (M, 3), Å.
        extent: Width and height of the picture, Å; a larger molecule is scaled down to fit.
        pixels: Width of the picture in pixels.

    Returns:
        Colours 0 to 1 on white, shape (H, W, 3).

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
    """Yields the cylinders of a bond as (start, end, radius), side by side in the picture plane."""
    sideways = np.cross(b - a, [0.0, 0.0, 1.0])
    norm = np.linalg.norm(sideways)
    sideways = sideways / norm if norm > 1e-6 else np.array([1.0, 0.0, 0.0])
    for step in {1: (0,), 2: (-1, 1), 3: (-1, 0, 1)}[order]:
        shift = step * _STICK_GAP[order] * sideways
        yield a + shift, b + shift, _STICK_RADII[order]


def _frame(turned: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Returns width and height of the pictures, Å, which hold all molecules but the largest 5 %."""
    reach = np.array([np.abs(positions).max(axis=0, initial=0)[:2] for positions in turned]) + _MARGIN
    width, height = 2 * np.quantile(reach, 0.95, axis=0, method="higher")
    return float(width), float(np.clip(height, 0.7 * width, 1.2 * width))


def _axes_of_few(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns principal axes of one or two atoms, padded with zeros so that SVD gives a complete basis."""
    padded = np.zeros((3, 3))
    padded[: len(centred)] = centred
    return np.linalg.svd(padded)[2]


def _tilt() -> NDArray[np.float64]:
    """Returns the rotation by ``_TILT`` about x, then y."""
    (cx, cy), (sx, sy) = np.cos(_TILT), np.sin(_TILT)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return about_y @ about_x


def _radius(number: int) -> float:
    """Returns the radius of a ball, Å: small for hydrogen, otherwise from the covalent radius."""
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
