"""Pictures on disk: there when they are complete, and not at all when something fails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ase_enf.atoms.files import atomic_write, require_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(path: str | Path) -> Path:
    """Returns the path if a picture can be written there, before anything is drawn for it.

    Args:
        path: File to write; its ending names the format.

    Raises:
        FileNotFoundError: The folder of the file does not exist.
        OSError: Nothing can be written there.
        ValueError: Matplotlib knows no format of that ending.

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
    """Writes a figure under its name when all of it is there.

    Args:
        figure: What to write.
        path: File to write or to replace; of a symbolic link, the file it points to. Its ending names the format.
        dpi: Pixels an inch.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written; an older picture stays as it was.

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
        if error.strerror is None:  # it names the file already
            raise
        reason = f"{type(error).__name__}: {error.strerror}"
        raise OSError(f"{path}: cannot be written ({reason}); make room there, or name another folder") from error
    return path
