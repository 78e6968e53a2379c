"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def require_folder(path: str | os.PathLike[str]) -> Path:
    """Returns ``path`` if a file can be written there: its folder exists and takes files.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder itself.
        PermissionError: If nothing can be written to the folder.

    Example:
        >>> require_folder("nowhere/m.extxyz")
        Traceback (most recent call last):
        FileNotFoundError: nowhere/m.extxyz: the folder nowhere does not exist; create it first
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file, in it or elsewhere")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: the folder {path.parent} is not writable; allow it, or name another one")
    return path


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Returns ``path`` as a folder, made with those above it where it is not there.

    Raises:
        ValueError: If it is a file.

    Example:
        >>> make_folder("README.md")
        Traceback (most recent call last):
        ValueError: README.md: is a file; name the folder of the run
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: is a file; name the folder of the run")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name only when it was written to the end (write, fsync, rename).

    Args:
        path: The file to write or to replace; missing folders are made.

    Yields:
        A binary handle on a temporary file in the same folder, which is removed if anything fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/a") as handle:
        ...         _ = handle.write(b"whole")
        ...     Path(folder, "a").read_bytes()
        b'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def brief(error: Exception) -> str:
    """Returns the kind of an error with the first line of what it says, for messages of one line.

    Args:
        error: Any error.

    Returns:
        ``"Kind: message"``.

    Example:
        >>> brief(EOFError("cut"))
        'EOFError: cut'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
