"""Raw QM9 files, from a folder, an archive or one joined file, as a table of molecules."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ase_enf.atoms.files import brief
from ase_enf.data import DataError, DataNotFoundError, gdb9
from ase_enf.data.compact import MoleculeTable
from ase_enf.data.fetch import REMOTES, hide
from ase_enf.data.properties import UNITS

N_MOLECULES = 133_885
"""Number of molecules in QM9."""

_EMPTY = "holds no raw QM9 files (dsgdb9nsd_*.xyz); give the folder or archive that has them, or an .npz"


class _Molecule(NamedTuple):
    """What the table keeps of a raw molecule, which takes a tenth of the memory of the whole record."""

    index: int
    numbers: NDArray[np.uint8]  # (M,)
    positions: NDArray[np.float32]  # (M, 3), Å
    smiles: str
    properties: tuple[float, ...]  # those of ``properties.UNITS``, as published


def is_raw(source: Path) -> bool:
    """Says whether a source consists of raw QM9 files.

    Args:
        source: An existing file or folder.

    Returns:
        True for a folder, for a tar archive (by its name), and for a file that begins like a raw file.

    Example:
        >>> is_raw(Path("tests/data/raw")), is_raw(Path("tests/data/qm9_sample.npz"))
        (True, False)
    """
    if source.is_dir() or _is_archive(source):
        return True
    with source.open("rb") as handle:
        return re.match(gdb9.format.magic_regex, handle.read(200)) is not None


def read_raw(source: Path, progress: bool | None = None) -> MoleculeTable:
    """Reads raw files into a table, in the order of their index.

    Args:
        source: A folder or an archive of raw files, or one raw file.
        progress: Whether to show a progress bar; by default on a terminal.

    Returns:
        The table, with ``gdb_index``, ``smiles`` and properties, without ``split``.

    Raises:
        DataNotFoundError: If the source holds no raw files.
        DataError: If the archive or one of the files is cut short or damaged, or a molecule occurs twice.

    Example:
        >>> read_raw(Path("tests/data/raw")).gdb_index
        array([   1,    3,   11,  212, 7235], dtype=int32)
    """
    if source.is_dir():
        files = raw_files(source)
        texts, total = ((str(file), file.read_bytes()) for file in files), len(files)
    elif _is_archive(source):
        texts, total = _archive_texts(source), N_MOLECULES if source.name == REMOTES["archive"].name else None
    else:
        texts, total = iter([(str(source), source.read_bytes())]), None
    bar = tqdm(texts, desc=f"reading {source.name}", total=total, unit=" files", disable=hide(progress))
    try:
        molecules = [_kept(record) for name, text in bar for record in gdb9.parse(text.decode("ascii"), name)]
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: damaged ({brief(error)}); unpack or download it again") from error
    if not molecules:
        raise DataNotFoundError(f"{source}: {_EMPTY}")
    return _pack(molecules, source)


def _kept(record: gdb9.Record) -> _Molecule:
    """Returns what the table keeps of a raw molecule."""
    return _Molecule(
        record.index,
        record.numbers.astype(np.uint8),
        record.positions.astype(np.float32),
        record.smiles[1],
        tuple(record.properties[name] for name in UNITS),
    )


def raw_files(folder: Path) -> list[Path]:
    """Returns the raw files of a folder.

    Args:
        folder: A folder.

    Returns:
        Its files ``dsgdb9nsd_*.xyz``, sorted by name.

    Raises:
        DataNotFoundError: If there is none.

    Example:
        >>> raw_files(Path("tests/data/raw"))[0].name
        'dsgdb9nsd_000001.xyz'
    """
    files = sorted(folder.glob("dsgdb9nsd_*.xyz"))
    if not files:
        raise DataNotFoundError(f"{folder}: {_EMPTY}")
    return files


def _is_archive(source: Path) -> bool:
    """Says whether a name is that of a tar archive; figshare's server calls the published one 3195389."""
    return re.search(r"\.(tar(\.(bz2|gz|xz))?|tbz2?|tgz|txz)$|^3195389$", source.name) is not None


def _archive_texts(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yields name and text of the raw files in an archive, in one pass; raises if it is incomplete."""
    try:
        # Decompressed here, because the streams of tarfile take the end of a truncated file for the end of the archive.
        with _open_decompressed(source) as stream, tarfile.open(fileobj=(tail := _Tail(stream)), mode="r|") as archive:
            for member in archive:
                if member.isfile() and re.search(r"(^|/)dsgdb9nsd_\d+\.xyz$", member.name):
                    yield f"{source}:{member.name}", archive.extractfile(member).read()
            while tail.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{source}: truncated or damaged ({brief(error)}); download it again") from error
    if tail.last != bytes(len(tail.last)):
        raise DataError(f"{source}: truncated (it lacks the mark that ends a tar archive); download it again")


def _open_decompressed(source: Path) -> BinaryIO:
    """Opens a file for reading, decompressed according to its first bytes, whatever its name."""
    with source.open("rb") as handle:
        magic = handle.read(6)
    if magic.startswith(b"BZh"):
        return bz2.open(source)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(source)
    if magic.startswith(b"\xfd7zXZ"):
        return lzma.open(source)
    return source.open("rb")


class _Tail:
    """A stream that remembers its last 1024 bytes: a complete tar archive ends with as many zeros."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        data = self.stream.read(size)
        self.last = (self.last + data[-1024:])[-1024:]
        return data


def _pack(molecules: list[_Molecule], source: Path) -> MoleculeTable:
    """Packs molecules into a table in the order of their indices, each of which may occur only once."""
    molecules = sorted(molecules, key=lambda molecule: molecule.index)
    indices = np.array([molecule.index for molecule in molecules], dtype=np.int32)
    twice = indices[1:][np.diff(indices) == 0]
    if len(twice):
        raise DataError(f"{source}: holds molecule {twice[0]} more than once; remove the copies")
    properties = np.array([molecule.properties for molecule in molecules], dtype=np.float32)
    return MoleculeTable(
        numbers=np.concatenate([molecule.numbers for molecule in molecules]),
        positions=np.concatenate([molecule.positions for molecule in molecules]),
        n_atoms=np.array([len(molecule.numbers) for molecule in molecules], dtype=np.int16),
        gdb_index=indices,
        smiles=np.array([molecule.smiles for molecule in molecules]),
        **dict(zip(UNITS, properties.T, strict=True)),
    )
