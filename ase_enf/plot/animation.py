"""Animations of molecules on the way from noise to data, as GIFs in the style of the gallery."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.atoms.files import atomic_write, require_folder
from ase_enf.chem.bonds import structures
from ase_enf.plot.molecules import broadside, draw

_MARGIN = 0.55  # Å of white around the outermost nuclei
_HOLD = 1500  # milliseconds for which the last frame is shown


@np.errstate(under="ignore")  # shading may underflow to zero
def animate(paths: Sequence[Sequence[Atoms]], path: str | Path, pixels: int = 240, milliseconds: int = 60) -> Path:
    """Draws sequences of frames side by side as one animation, which repeats after a pause at the last frames.

    All frames of a molecule are shown from one direction, in which its last frame shows its broad side, and all
    molecules on one scale.

    Args:
        paths: Frames of each molecule, positions in Å; a shorter sequence stops at its last frame.
        path: The .gif file to write.
        pixels: Width of the picture of one molecule.
        milliseconds: Duration of a frame.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If there are no frames, one is periodic or has a position that is not finite, or the file does not
            end in .gif.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> near, far = molecule("H2O"), molecule("H2O")
        >>> far.positions *= 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     animate([[far, near]], folder + "/water.gif", pixels=40).name
        'water.gif'
    """
    target = check_animation(path)
    listed = [structures(frames) for frames in paths]
    if not listed or not all(listed):
        raise ValueError("there are no frames to draw: the list is empty")
    turned = [seen_broadside(frames) for frames in listed]
    reach = np.max([np.abs(positions).max(axis=0)[:2] for frames in turned for positions in frames], axis=0)
    width, height = 2 * (reach + _MARGIN)
    extent = float(width), float(np.clip(height, 0.7 * width, 1.2 * width))
    molecules = list(zip(listed, turned, strict=True))
    pictures = [
        np.concatenate([_picture(*molecule, k, extent, pixels) for molecule in molecules], axis=1)
        for k in range(max(map(len, listed)))
    ]
    with atomic_write(target) as handle:
        handle.write(_gif(pictures, milliseconds))
    return target


def check_animation(path: str | Path) -> Path:
    """Checks, before anything is drawn, that an animation can be written to a path.

    Args:
        path: File to write.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If it does not end in .gif.

    Example:
        >>> check_animation("way.png")
        Traceback (most recent call last):
        ValueError: way.png: an animation is written as .gif; choose that ending
    """
    path = require_folder(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{path}: an animation is written as .gif; choose that ending")
    return path


def seen_broadside(frames: Sequence[Atoms]) -> list[NDArray[np.float64]]:
    """Returns the positions of all frames, rotated together so that the last one shows its broad side.

    Args:
        frames: Frames of one molecule, positions in Å.

    Returns:
        Positions of each frame, shape (M, 3), Å.
    """
    last = frames[-1].positions
    seen = broadside(last)
    shift, centred = seen.mean(axis=0), last - last.mean(axis=0)
    u, _, v = np.linalg.svd(centred.T @ (seen - shift))
    turn = u @ np.diag([1.0, 1.0, np.linalg.det(u @ v)]) @ v  # the rotation from one to the other (Kabsch 1976)
    return [(frame.positions - frame.positions.mean(axis=0)) @ turn + shift for frame in frames]


def _picture(
    frames: Sequence[Atoms], turned: Sequence[NDArray[np.float64]], k: int, extent: tuple[float, float], pixels: int
) -> NDArray[np.float32]:
    k = min(k, len(frames) - 1)
    return draw(frames[k].numbers, turned[k], extent, pixels)


def _gif(pictures: Sequence[NDArray[np.float32]], milliseconds: int) -> bytes:
    """Returns the content of a GIF whose pictures share one palette."""
    from PIL import Image

    images = [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pictures]
    several = pictures[:: max(1, len(pictures) // 8)] + pictures[-1:]  # an element may occur in some frames only
    palette = Image.fromarray((np.concatenate(several) * 255).round().astype(np.uint8)).quantize(255)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    content = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [_HOLD]
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, disposal=1)
    return content.getvalue()
