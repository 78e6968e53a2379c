"""The published files of QM9: where they are downloaded from, and where they are kept."""

from __future__ import annotations

import hashlib
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from ase_enf.atoms.files import atomic_write, brief
from ase_enf.data import DataError
from ase_enf.folders import cache_folder


class Remote(NamedTuple):
    """A published file."""

    url: str
    name: str
    size: int  # bytes
    md5: str


REMOTES = {
    "archive": Remote(
        "https://ndownloader.figshare.com/files/3195389",
        "dsgdb9nsd.xyz.tar.bz2",
        86_144_227,
        "ad1ebd51ee7f5b3a6e32e974e5d54012",
    ),
    "excluded": Remote(
        "https://ndownloader.figshare.com/files/3195404",
        "uncharacterized.txt",
        486_752,
        "a361887bacb427b8a0ce7903d92a53b4",
    ),
}
"""The files of figshare collection 978904 that ``download`` gets, with their published sizes and checksums."""

_REMEDY = "try again later, or fetch it with a browser: a local file always works"


def download(
    what: str = "archive",
    folder: str | Path | None = None,
    timeout: float = 60.0,
    progress: bool | None = None,
) -> Path:
    """Downloads a published file from figshare, unless it is present, and checks its size and checksum.

    Args:
        what: ``"archive"`` (raw files, 86 MB) or ``"excluded"`` (``uncharacterized.txt``, 0.5 MB).
        folder: Where to keep it; by default ``cache_folder``, where ``load`` looks.
        timeout: Seconds without an answer before it gives up.
        progress: Whether to show a progress bar; by default on a terminal.

    Returns:
        The file.

    Raises:
        DataError: If the name is unknown, the server does not answer, or what it sent is not the published file.

    Example:
        >>> atoms = load(download(), split="train")  # doctest: +SKIP
    """
    if what not in REMOTES:
        raise DataError(f"{what!r} is none of the published files {', '.join(REMOTES)}")
    remote = REMOTES[what]
    target = (cache_folder() if folder is None else Path(folder)) / remote.name
    if target.is_file() and hashlib.md5(target.read_bytes(), usedforsecurity=False).hexdigest() == remote.md5:
        return target
    try:
        with urllib.request.urlopen(remote.url, timeout=timeout) as response, atomic_write(target) as handle:
            size, md5 = _copy(response, handle, remote, progress)
            if (size, md5) != (remote.size, remote.md5):
                raise DataError(
                    f"{remote.url}: got {size:,} bytes with md5 {md5}, expected {remote.size:,} with {remote.md5}; "
                    f"{_REMEDY}"
                )
    except (OSError, HTTPException) as error:
        raise DataError(f"{remote.url}: download to {target} failed ({brief(error)}); {_REMEDY}") from error
    return target


def hide(progress: bool | None) -> bool | None:
    """Returns tqdm's ``disable`` for a ``progress`` argument; None means a bar on a terminal only.

    Args:
        progress: Whether to show a bar; None for a bar on a terminal only.

    Returns:
        The value for tqdm.

    Example:
        >>> hide(True), hide(False), hide(None)
        (False, True, None)
    """
    return None if progress is None else not progress


def _copy(response: BinaryIO, handle: BinaryIO, remote: Remote, progress: bool | None) -> tuple[int, str]:
    """Copies a response into a file; returns its size and checksum."""
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with tqdm(total=remote.size, desc=remote.name, unit="B", unit_scale=True, disable=hide(progress)) as bar:
        while chunk := response.read(1 << 20):
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    return size, digest.hexdigest()
