"""Writing pictures atomically: a file is either complete or not written at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ase_enf.atoms.files import atomic_write, require_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(path: str | Path) -> Path:
    """Checks, before anything is drawn, that a picture can be written to a path.

    Args:
        path: File to write; its ending sets the format.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If the folder of the file does not exist.
        OSError: If the file cannot be written.
        ValueError: If matplotlib has no format with that ending.

    Example:
        >>> check_picture("g.xyz")
        Traceback (most recent call last):
        ValueError: g.xyz: no picture has that ending; use .png, .pdf or .svg
    """
    from matplotlib.backend_bases import FigureCanvasBase

    path = require_folder(path)
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path}: no picture has that ending; use .png, .pdf or .svg")
    return path


def save_figure(figure: Figure, path: str | Path, dpi: int) -> Path:
    """Writes a figure atomically.

    Args:
        figure: The figure.
        path: File to write or replace, or a symbolic link to it; its ending sets the format.
        dpi: Pixels per inch.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written; an existing picture then remains unchanged.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(), f"{folder}/empty.png", dpi=20).name
        'empty.png'
    """
    path = Path(path)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=dpi)
    try:
        with atomic_write(path) as handle:
            handle.write(picture.getbuffer())
    except OSError as error:
        if error.strerror is None:  # the message already names the file
            raise
        reason = f"{type(error).__name__}: {error.strerror}"
        raise OSError(f"{path}: cannot be written ({reason}); make room there, or name another folder") from error
    return path
