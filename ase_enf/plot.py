"""Pictures of molecules and of what they are measured by.

Figures are made with `matplotlib.figure.Figure` itself, never with pyplot: no window, no global state, any thread.
Matplotlib is imported inside the functions that draw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from numpy.typing import NDArray

from ase_enf.chem.bonds import bond_orders, stability, structures
from ase_enf.metrics import MAX_DISTANCE, N_BINS, Reference, Structures, as_reference, distance_js, survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {1: (0.95, 0.95, 0.95), 6: (0.33, 0.34, 0.36), 7: (0.20, 0.36, 0.88), 8: (0.87, 0.12, 0.10),
            9: (0.36, 0.74, 0.28)}  # fmt: skip
_STICK = (0.70, 0.71, 0.73)  # colour of bonds
_STICK_RADII = {1: 0.105, 2: 0.075, 3: 0.055}  # Å, by order
_STICK_GAP = {1: 0.0, 2: 0.135, 3: 0.17}  # Å, of the outer sticks of a double or triple bond from the axis
_LIGHT = np.array([-0.42, 0.55, 0.72], dtype=np.float32) / np.float32(np.linalg.norm([-0.42, 0.55, 0.72]))
_EYE = np.array([0, 0, 1], dtype=np.float32)
_HALF_WAY = (_LIGHT + _EYE) / np.linalg.norm(_LIGHT + _EYE)
_TILT = np.deg2rad((-14.0, 10.0))  # about x and y: atoms that mirror each other in the picture plane come apart
_SUPERSAMPLE = 3
_MARGIN = 0.55  # Å of white around the outermost nuclei


class _Canvas(NamedTuple):
    """An orthographic picture under construction: the eye looks along −z, pixels are filled where something is nearer.

    Attributes:
        x: shape (W,), Å, pixel columns.
        y: shape (H,), Å, pixel rows, from top to bottom.
        depth: shape (H, W), Å, z of what is visible, −∞ for nothing.
        normal: shape (H, W, 3), outward unit normal of it.
        colour: shape (H, W, 3), its own colour, 0 to 1.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    depth: NDArray[np.float32]
    normal: NDArray[np.float32]
    colour: NDArray[np.float32]


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
        FileNotFoundError: The folder of the file does not exist.
        ValueError: There are no molecules, one is periodic or has a position that is not finite, or `columns` < 1.

    >>> import tempfile
    >>> from ase.build import molecule
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gallery([molecule("CH3CHO"), molecule("CH3")], folder + "/two.png", dpi=50).name
    'two.png'
    """
    target = _writable(path)
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
    figure.savefig(target, dpi=dpi)
    return target


@np.errstate(under="ignore")  # gloss that fades to nothing is no error, whatever numpy.seterr says
def distance_histogram(
    atoms: Structures,
    reference: str | Reference | Iterable[Atoms],
    path: str | Path,
    dpi: int = 220,
) -> Path:
    """Histogram of interatomic distances beside that of a reference, with their Jensen-Shannon divergence (figure 4).

    Args:
        atoms: Structures, or their `metrics.survey`.
        reference: A shipped name ("qm9") or structures.
        path: File to write; its ending names the format (.png, .pdf, .svg).
        dpi: Pixels an inch.

    Returns:
        The path.

    Raises:
        FileNotFoundError: The folder of the file does not exist.
        ValueError: There are no structures, or the reference has no distances.

    >>> import tempfile
    >>> from ase.build import molecule
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     distance_histogram(molecule("CH3CHO"), [molecule("CH3CH2OH")], folder + "/d.png", dpi=50).name
    'd.png'
    """
    target = _writable(path)
    from matplotlib.figure import Figure

    seen, known = survey(atoms), as_reference(reference)
    js = distance_js(seen, known)
    edges = np.linspace(0, MAX_DISTANCE, N_BINS + 1)
    figure = Figure(figsize=(5.6, 3.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    counts = seen.distances.sum(axis=0)
    labels = f"{known.name} ({known.n_structures:,})", f"these structures ({len(seen.readings):,})"
    axes.stairs(_density(known.distances), edges, fill=True, color="#c9d3e0", label=labels[0])
    axes.stairs(_density(counts), edges, color="#c2410c", linewidth=1.3, label=labels[1])
    axes.set_xlim(0, _last_filled(edges, known.distances + counts))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("interatomic distance / Å")
    axes.set_ylabel("density / Å$^{-1}$")
    axes.spines[["top", "right"]].set_visible(False)
    spread = "" if np.isnan(js.stderr) else f" ± {js.stderr:.1g}"
    axes.legend(frameon=False, fontsize=8, title=f"JS divergence {js.value:.4f}{spread} nats", title_fontsize=8)
    figure.savefig(target, dpi=dpi)
    return target


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

    >>> draw(np.array([1]), np.zeros((1, 3)), (2.0, 1.0), 40).shape
    (20, 40, 3)
    """
    width, height = extent
    reach = np.abs(positions).max(axis=0, initial=0) + _MARGIN
    zoom = max(1.0, 2 * reach[0] / width, 2 * reach[1] / height)
    canvas = _blank(width * zoom, height * zoom, pixels, round(pixels * height / width))
    orders = bond_orders(numbers[None], positions[None])[0]
    for centre, number in zip(positions, numbers, strict=True):
        _add_sphere(canvas, centre, _radius(int(number)), _colour(int(number)))
    for i, j in zip(*np.nonzero(np.triu(orders)), strict=True):
        for start, end, radius in _sticks(positions[i], positions[j], int(orders[i, j])):
            _add_cylinder(canvas, start, end, radius, _STICK)
    return _shade(canvas)


def _blank(width: float, height: float, columns: int, rows: int) -> _Canvas:
    fine = (rows * _SUPERSAMPLE, columns * _SUPERSAMPLE)
    x = (np.arange(fine[1]) + 0.5) / fine[1] * width - width / 2
    y = height / 2 - (np.arange(fine[0]) + 0.5) / fine[0] * height
    depth = np.full(fine, -np.inf, dtype=np.float32)
    return _Canvas(x, y, depth, np.zeros((*fine, 3), dtype=np.float32), np.ones((*fine, 3), dtype=np.float32))


def _add_sphere(canvas: _Canvas, centre: NDArray[np.float64], radius: float, colour: tuple[float, ...]) -> None:
    """Where x² + y² ≤ r² the line of sight meets the sphere at z = √(r² − x² − y²), the normal being (x, y, z)/r."""
    rows, columns = _window(canvas, centre - radius, centre + radius)
    x, y = np.meshgrid(canvas.x[columns] - centre[0], canvas.y[rows] - centre[1])
    z = np.sqrt(np.maximum(radius**2 - x**2 - y**2, 0))
    _put(canvas, rows, columns, z + centre[2], np.stack([x, y, z], axis=-1) / radius, x**2 + y**2 < radius**2, colour)


def _add_cylinder(
    canvas: _Canvas,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    radius: float,
    colour: tuple[float, ...],
) -> None:
    """The nearer root s of |d + s ẑ − ((d + s ẑ)·u) u|² = r², d from the start to the line of sight, u the axis."""
    length = np.linalg.norm(end - start)
    axis = (end - start) / max(length, 1e-9)
    slant = 1 - axis[2] ** 2
    if slant < 1e-6:  # seen end on: hidden behind its atom
        return
    rows, columns = _window(canvas, np.minimum(start, end) - radius, np.maximum(start, end) + radius)
    x, y = np.meshgrid(canvas.x[columns] - start[0], canvas.y[rows] - start[1])
    along = x * axis[0] + y * axis[1]
    root = (along * axis[2]) ** 2 - slant * (x**2 + y**2 - along**2 - radius**2)
    s = (along * axis[2] + np.sqrt(np.maximum(root, 0))) / slant
    t = along + s * axis[2]
    normal = (np.stack([x, y, s], axis=-1) - t[..., None] * axis) / radius
    _put(canvas, rows, columns, s + start[2], normal, (root > 0) & (t >= 0) & (t <= length), colour)


def _window(canvas: _Canvas, low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[slice, slice]:
    """Rows and columns of the pixels inside a box, Å."""
    top, bottom = np.searchsorted(-canvas.y, [-high[1], -low[1]])
    left, right = np.searchsorted(canvas.x, [low[0], high[0]])
    return slice(top, bottom), slice(left, right)


def _put(
    canvas: _Canvas,
    rows: slice,
    columns: slice,
    depth: NDArray[np.float64],
    normal: NDArray[np.float64],
    inside: NDArray[np.bool_],
    colour: tuple[float, ...],
) -> None:
    """Fill the pixels of a window where a body is hit and nearer than what is there."""
    seen = inside & (depth > canvas.depth[rows, columns])
    canvas.depth[rows, columns][seen] = depth[seen]
    canvas.normal[rows, columns][seen] = normal[seen]
    canvas.colour[rows, columns][seen] = colour


def _shade(canvas: _Canvas) -> NDArray[np.float32]:
    """Light the picture, fade it with depth, draw outlines where the depth jumps, and average the fine pixels."""
    picture = np.ones_like(canvas.colour)
    filled = np.isfinite(canvas.depth)  # half of the paper stays white: only the rest is worth lighting
    if filled.any():
        depth, normal = canvas.depth[filled], canvas.normal[filled]
        diffuse = np.clip(normal @ _LIGHT, 0, None)[:, None]
        gloss = np.clip(normal @ _HALF_WAY, 0, None)[:, None] ** 45
        rim = 1 - 0.35 * (1 - np.clip(normal[:, 2:], 0, 1)) ** 2  # rounder: edges turn away from the eye
        lit = np.clip(canvas.colour[filled] * (0.46 + 0.62 * diffuse) * rim + 0.33 * gloss, 0, 1)
        lit *= 1 - 0.72 * _outline(canvas.depth)[filled][:, None]
        fade = 0.34 * (depth.max() - depth)[:, None] / max(np.ptp(depth), 4.0)  # flat molecules hardly fade
        picture[filled] = lit * (1 - fade) + fade
    rows, columns = (length // _SUPERSAMPLE for length in canvas.depth.shape)
    return picture.reshape(rows, _SUPERSAMPLE, columns, _SUPERSAMPLE, 3).mean(axis=(1, 3))


def _outline(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much each pixel is an edge, shape (H, W), 0 to 1: what is 2 fine pixels away lies 0.15 to 0.35 Å deeper."""
    floor = np.where(np.isfinite(depth), depth, np.float32(-1e3))
    padded = np.pad(floor, 2, constant_values=-1e3)
    deepest = floor.copy()
    rows, columns = depth.shape
    for i, j in [(0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3)]:
        deepest = np.minimum(deepest, padded[i : i + rows, j : j + columns])
    return np.clip((floor - deepest - 0.15) / 0.2, 0, 1)


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
    """Rotation by `_TILT` about x, then y."""
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


def _density(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Counts as a density over Å; zeros where there are no distances."""
    return counts / max(counts.sum(), 1) / (MAX_DISTANCE / N_BINS)


def _last_filled(edges: NDArray[np.float64], counts: NDArray[np.integer]) -> float:
    """Upper edge of the last bin that holds more than a ten-thousandth of the distances, Å."""
    filled = np.flatnonzero(counts > 1e-4 * counts.sum())
    return float(edges[filled[-1] + 1]) if len(filled) else MAX_DISTANCE


def _writable(path: str | Path) -> Path:
    """The path, when its folder exists."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist, create it first")
    return target
