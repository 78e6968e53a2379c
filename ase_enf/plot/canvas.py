"""Shaded and outlined orthographic pictures of spheres and cylinders, without any chemistry."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LIGHT = np.array([-0.42, 0.55, 0.72], dtype=np.float32) / np.float32(np.linalg.norm([-0.42, 0.55, 0.72]))
_EYE = np.array([0, 0, 1], dtype=np.float32)
_HALF_WAY = (_LIGHT + _EYE) / np.linalg.norm(_LIGHT + _EYE)
_SUPERSAMPLE = 3


class Canvas(NamedTuple):
    """An orthographic picture under construction, viewed along −z, with a depth buffer.

    Attributes:
        x: Positions of the pixel columns, shape (W,), Å.
        y: Positions of the pixel rows, from top to bottom, shape (H,), Å.
        depth: z of the visible surface, −∞ for the background, shape (H, W), Å.
        normal: Outward unit normal of the surface, shape (H, W, 3).
        colour: Colour of the surface, 0 to 1, shape (H, W, 3).
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    depth: NDArray[np.float32]
    normal: NDArray[np.float32]
    colour: NDArray[np.float32]


def blank(width: float, height: float, columns: int, rows: int) -> Canvas:
    """Returns an empty canvas of ``width`` by ``height`` Å about the origin, for ``columns`` by ``rows`` pixels."""
    fine = (rows * _SUPERSAMPLE, columns * _SUPERSAMPLE)
    x = (np.arange(fine[1]) + 0.5) / fine[1] * width - width / 2
    y = height / 2 - (np.arange(fine[0]) + 0.5) / fine[0] * height
    depth = np.full(fine, -np.inf, dtype=np.float32)
    return Canvas(x, y, depth, np.zeros((*fine, 3), dtype=np.float32), np.ones((*fine, 3), dtype=np.float32))


def add_sphere(canvas: Canvas, centre: NDArray[np.float64], radius: float, colour: tuple[float, ...]) -> None:
    """Adds a sphere: for x² + y² < r² the line of sight meets it at z = √(r² − x² − y²), with normal (x, y, z)/r.

    Args:
        canvas: The picture, changed in place.
        centre: Centre of the sphere, shape (3,), Å.
        radius: Its radius r, Å.
        colour: Red, green and blue, 0 to 1.
    """
    rows, columns = _window(canvas, centre - radius, centre + radius)
    x, y = np.meshgrid(canvas.x[columns] - centre[0], canvas.y[rows] - centre[1])
    z = np.sqrt(np.maximum(radius**2 - x**2 - y**2, 0))
    _put(canvas, rows, columns, z + centre[2], np.stack([x, y, z], axis=-1) / radius, x**2 + y**2 < radius**2, colour)


def add_cylinder(
    canvas: Canvas,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    radius: float,
    colour: tuple[float, ...],
) -> None:
    """Adds a cylinder: the line of sight meets it at the nearer root s of |d + s ẑ − ((d + s ẑ)·u) u|² = r².

    Here u is the unit vector of the axis, and d leads from the start of the axis to the line of sight.

    Args:
        canvas: The picture, changed in place.
        start: One end of the axis, shape (3,), Å.
        end: The other end, shape (3,), Å.
        radius: Radius r of the cylinder, Å.
        colour: Red, green and blue, 0 to 1.
    """
    length = np.linalg.norm(end - start)
    axis = (end - start) / max(length, 1e-9)
    slant = 1 - axis[2] ** 2
    if slant < 1e-6:  # seen end-on, hidden behind its atom
        return
    rows, columns = _window(canvas, np.minimum(start, end) - radius, np.maximum(start, end) + radius)
    x, y = np.meshgrid(canvas.x[columns] - start[0], canvas.y[rows] - start[1])
    along = x * axis[0] + y * axis[1]
    root = (along * axis[2]) ** 2 - slant * (x**2 + y**2 - along**2 - radius**2)
    s = (along * axis[2] + np.sqrt(np.maximum(root, 0))) / slant
    t = along + s * axis[2]
    normal = (np.stack([x, y, s], axis=-1) - t[..., None] * axis) / radius
    _put(canvas, rows, columns, s + start[2], normal, (root > 0) & (t >= 0) & (t <= length), colour)


def _window(canvas: Canvas, low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[slice, slice]:
    """Returns the rows and columns of the pixels inside a box, Å."""
    top, bottom = np.searchsorted(-canvas.y, [-high[1], -low[1]])
    left, right = np.searchsorted(canvas.x, [low[0], high[0]])
    return slice(top, bottom), slice(left, right)


def _put(
    canvas: Canvas,
    rows: slice,
    columns: slice,
    depth: NDArray[np.float64],
    normal: NDArray[np.float64],
    inside: NDArray[np.bool_],
    colour: tuple[float, ...],
) -> None:
    """Fills the pixels of a window where a body is hit and nearer than the surface drawn so far."""
    seen = inside & (depth > canvas.depth[rows, columns])
    canvas.depth[rows, columns][seen] = depth[seen]
    canvas.normal[rows, columns][seen] = normal[seen]
    canvas.colour[rows, columns][seen] = colour


def shade(canvas: Canvas) -> NDArray[np.float32]:
    """Lights a picture, fades it with depth, outlines it where the depth jumps, and averages the fine pixels.

    Returns:
        Colours 0 to 1 on white, shape (H, W, 3) in final pixels.
    """
    picture = np.ones_like(canvas.colour)
    filled = np.isfinite(canvas.depth)  # half of a picture is background, which needs no lighting
    if filled.any():
        depth, normal = canvas.depth[filled], canvas.normal[filled]
        diffuse = np.clip(normal @ _LIGHT, 0, None)[:, None]
        gloss = np.clip(normal @ _HALF_WAY, 0, None)[:, None] ** 45
        rim = 1 - 0.35 * (1 - np.clip(normal[:, 2:], 0, 1)) ** 2  # darker where a surface turns away: looks rounder
        lit = np.clip(canvas.colour[filled] * (0.46 + 0.62 * diffuse) * rim + 0.33 * gloss, 0, 1)
        lit *= 1 - 0.72 * _outline(canvas.depth)[filled][:, None]
        fade = 0.34 * (depth.max() - depth)[:, None] / max(np.ptp(depth), 4.0)  # so that flat molecules hardly fade
        picture[filled] = lit * (1 - fade) + fade
    rows, columns = (length // _SUPERSAMPLE for length in canvas.depth.shape)
    return picture.reshape(rows, _SUPERSAMPLE, columns, _SUPERSAMPLE, 3).mean(axis=(1, 3))


def _outline(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns how much each pixel is an edge, 0 to 1, shape (H, W).

    It rises from 0 to 1 as the deepest surface within 2 fine pixels lies 0.15 to 0.35 Å deeper.
    """
    floor = np.where(np.isfinite(depth), depth, np.float32(-1e3))
    padded = np.pad(floor, 2, constant_values=-1e3)
    deepest = floor.copy()
    rows, columns = depth.shape
    for i, j in [(0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3)]:
        deepest = np.minimum(deepest, padded[i : i + rows, j : j + columns])
    return np.clip((floor - deepest - 0.15) / 0.2, 0, 1)
