"""QM9 in all of its usual forms, and its published split.

QM9 (Ramakrishnan, Dral, Rupp, von Lilienfeld, Sci. Data 1, 140022 (2014)) is 133,885 molecules of H, C, N, O and F
at B3LYP/6-31G(2df,p); 3,054 of them failed its consistency check and are left out of every split.

=============================================  ================================================================
form                                           what it is
=============================================  ================================================================
a folder                                       of raw files ``dsgdb9nsd_*.xyz``
``.tar``, ``.tar.bz2``, ``.tar.gz``, ...       the published archive, or any other of raw files
``.xyz`` that opens with ``gdb``               one raw file, or several joined
``.npz``                                       the compact form of ``ase_enf.data.compact``, see ``save_npz``
``.db``, ``.extxyz``, ``.traj``, ...           whatever ASE reads
=============================================  ================================================================

All but the last give the same ``Atoms`` in the order of their indices: positions in Å, rounded to float32,
``info["qm9_index"]`` (1-based number in GDB-9), ``info["qm9_smiles"]`` (published SMILES of the geometry) and, if the
source has them, the properties of ``ase_enf.data.properties`` (``info["gap"]`` in eV and so on). What ASE reads is
returned unchanged, in its own order. The other published energies and charges are in the raw files, which
``ase.io.read`` opens.

Without a path, the source is what the environment variable ``ASE_ENF_QM9`` names, or else the archive of ``download``.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from tqdm import tqdm

from ase_enf.atoms.files import brief, check_source
from ase_enf.data import DataError, DataNotFoundError, compact
from ase_enf.data.compact import EXCLUDED, SPLITS, MoleculeTable
from ase_enf.data.fetch import REMOTES, download, hide
from ase_enf.data.images import read_images
from ase_enf.data.raw import N_MOLECULES, is_raw, raw_files, read_raw
from ase_enf.folders import cache_folder

__all__ = ["cache_folder", "download", "load", "published_split", "read_excluded", "save_npz"]

N_EXCLUDED = 3_054
"""Number of its molecules that failed the consistency check."""

N_TRAIN, N_VALID, N_TEST = 100_000, 17_748, 13_083
"""Sizes of the published split of the other 130,831."""

ENVIRONMENT = "ASE_ENF_QM9"
"""Environment variable that names the source when no path is given; read at the time of the call."""

CACHE_VERSION = 2
"""Part of the key of a cached file; it is raised when the reader gives other results for the same source."""

AUTO_CACHE_MINIMUM = 2_000
"""Smaller sources are read so fast that a cache would not be worth its place."""


_INDEX_KEYS = ("qm9_index", "gdb_index")
_REMEDY = f"give a path, set {ENVIRONMENT}, or fetch it with ase_enf.data.qm9.download(); a local file always works"


def load(
    path: str | Path | None = None,
    split: str | None = None,
    n_atoms: int | None = None,
    excluded: str | Path | Iterable[int] | None = None,
    cache: str | Path | bool | None = None,
    progress: bool | None = None,
) -> list[Atoms]:
    """Loads QM9, or a part of it, from any form in the table of the module.

    Args:
        path: The source; by default what ``ASE_ENF_QM9`` names, or else the archive of ``download``.
        split: ``"train"``, ``"valid"`` or ``"test"`` of the published split (``published_split``); by default all
            structures of the source, including the excluded ones. A split stored in an ``.npz`` takes precedence.
        n_atoms: Only molecules with this many atoms are loaded; 19 gives QM9 Positional.
        excluded: Indices of the excluded molecules, or a file of them (``read_excluded``), from which the split is
            computed; by default the published ones.
        cache: Whether to keep a compact copy of a slow source (raw files), or the folder to keep it in. By default the
            copy of a source of 2,000 molecules or more is kept in ``cache_folder``; True keeps any copy, False none. A
            copy is used only while name, size and modification time of the source are the same.
        progress: Whether to show a progress bar; by default on a terminal.

    Returns:
        The molecules, positions in Å.

    Raises:
        DataNotFoundError: If there is no such source, or nothing in it.
        DataError: If the source is cut short, damaged or without the indices of a split, or the split is unknown.

    Warns:
        UserWarning: If raw files hold only part of the split.

    Example:
        >>> test = load("tests/data/qm9_sample.npz", split="test")
        >>> len(test), sorted(test[0].info)
        (100, ['qm9_index', 'qm9_smiles'])
        >>> {len(atoms) for atoms in load("tests/data/qm9_sample.npz", n_atoms=19)}
        {19}
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split {split!r} is none of {', '.join(SPLITS)}")
    source = _locate(path)
    if not (is_raw(source) or source.suffix == ".npz"):
        return _load_ase(source, split, n_atoms, excluded, progress)
    table = compact.read_npz(source) if source.suffix == ".npz" else _read_cached(source, cache, progress)
    rows = np.ones(len(table.n_atoms), dtype=bool)
    if split is not None:
        rows &= _in_split(table, split, excluded, source)
    if n_atoms is not None:
        rows &= table.n_atoms == n_atoms
    return table.to_atoms(np.flatnonzero(rows))


def published_split(excluded: str | Path | Iterable[int] | None = None) -> dict[str, NDArray[np.int64]]:
    """Returns the indices of the split of Anderson et al., which papers on generating QM9 share.

    The 130,831 remaining molecules, in the order of their indices, are permuted with ``numpy.random.RandomState(0)``:
    the first 100,000 are train, the next 17,748 valid, the last 13,083 (a tenth) test.

    Reference:
        Anderson, Hy, Kondor, "Cormorant", NeurIPS 2019; used by Satorras et al. 2021, sec. 5.

    Args:
        excluded: The 3,054 excluded indices, or a file of them (``read_excluded``); by default those published.

    Returns:
        Sorted 1-based indices under ``"train"``, ``"valid"`` and ``"test"``, shapes (100000,), (17748,) and (13083,).

    Raises:
        DataError: If the excluded indices are not 3,054 different ones of 1 to 133,885.

    Example:
        >>> {name: len(indices) for name, indices in published_split().items()}
        {'train': 100000, 'valid': 17748, 'test': 13083}
        >>> published_split()["test"][:5]
        array([11, 14, 22, 31, 44])
    """
    kept = np.setdiff1d(np.arange(1, N_MOLECULES + 1), _excluded_indices(excluded))
    order = np.random.RandomState(0).permutation(len(kept))
    parts = np.split(kept[order], [N_TRAIN, N_TRAIN + N_VALID])
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}


def read_excluded(path: str | Path) -> NDArray[np.int64]:
    """Reads the indices of the excluded molecules.

    Args:
        path: The published ``uncharacterized.txt`` (text whose rows open with an index), or a compact ``.npz`` with a
            split, where they have the code 3.

    Returns:
        1-based indices, shape (3054,), sorted.

    Raises:
        DataNotFoundError: If there is no such file.
        DataError: If the file does not hold 3,054 different indices of 1 to 133,885.

    Example:
        >>> from importlib.resources import files
        >>> read_excluded(files("ase_enf.data") / "qm9_excluded.txt")[:4]
        array([ 58,  61,  80, 185])
    """
    source = Path(str(path))
    if not source.is_file():
        raise DataNotFoundError(f"{source}: no such file of excluded indices; excluded=None uses the published ones")
    if source.suffix == ".npz":
        table = compact.read_npz(source)
        if table.split is None or table.gdb_index is None:
            raise DataError(f"{source}: holds no split and gdb_index, so it does not say which molecules are excluded")
        indices = table.gdb_index[table.split == EXCLUDED]
    else:
        text = source.read_text(encoding="utf-8", errors="replace")
        indices = [int(row) for row in re.findall(r"^[ \t]*(\d+)\b", text, re.MULTILINE)]
    return _checked_excluded(indices, str(source))


def save_npz(atoms: Sequence[Atoms], path: str | Path, split: str | Sequence[int] | None = None) -> None:
    """Writes molecules in the compact form, of which ``load`` reads 100,000 in a second or two.

    Args:
        atoms: Non-periodic molecules, of any elements; positions (Å) are rounded to float32.
        path: The ``.npz`` to write, which appears only when it is complete.
        split: The split that all of them belong to, or a code for each (0 train, 1 valid, 2 test, 3 excluded).

    Raises:
        DataError: If a molecule is periodic, or the split is unknown or of another length.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_npz([Atoms("He")], f"{folder}/he.npz", split="test")
        ...     load(f"{folder}/he.npz", split="test")
        [Atoms(symbols='He', pbc=False)]
    """
    compact.write_npz(compact.from_atoms(atoms, split), path)


def _locate(path: str | Path | None) -> Path:
    """Returns the source that a path, the environment or an earlier download names."""
    named = path if path is not None else os.environ.get(ENVIRONMENT)
    if named:
        source = Path(named).expanduser()
        if not source.exists():
            raise DataNotFoundError(f"{source}: no such file or folder of QM9; {_REMEDY}")
        check_source(source)
        return source
    source = cache_folder() / REMOTES["archive"].name
    if not source.exists():
        raise DataNotFoundError(f"QM9 is missing ({source} does not exist); {_REMEDY}")
    return source


def _read_cached(source: Path, cache: str | Path | bool | None, progress: bool | None) -> MoleculeTable:
    """Reads raw files, or their compact copy while the source is unchanged."""
    if cache is False:
        return read_raw(source, progress)
    folder = Path(cache) if isinstance(cache, str | Path) else cache_folder()
    copy = folder / f"qm9-{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]}.npz"
    fingerprint = _fingerprint(source)
    table = _read_copy(copy, fingerprint)
    if table is None:
        table = read_raw(source, progress)
        if cache is not None or len(table.n_atoms) >= AUTO_CACHE_MINIMUM:
            _write_copy(table, copy, fingerprint, required=cache is not None)
    return table


def _fingerprint(source: Path) -> str:
    """Returns a hash of the state of a source: names, sizes, modification times and version of the reader."""
    digest = hashlib.sha256(f"{CACHE_VERSION}".encode())
    for file in raw_files(source) if source.is_dir() else [source]:
        status = file.stat()
        digest.update(f"|{file.name}|{status.st_size}|{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_copy(copy: Path, fingerprint: str) -> MoleculeTable | None:
    """Reads a compact copy; returns None if it is missing, damaged or of another state of the source."""
    try:
        with copy.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            if str(archive["fingerprint"]) != fingerprint:
                return None
        return compact.read_npz(copy)
    except Exception:  # whatever the damage, the source itself can be read
        return None


def _write_copy(table: MoleculeTable, copy: Path, fingerprint: str, required: bool) -> None:
    """Writes a compact copy; a failure is only a warning unless the copy was requested."""
    try:
        compact.write_npz(table, copy, fingerprint=np.array(fingerprint))
    except OSError as error:
        message = f"{copy}: the compact copy could not be kept ({brief(error)}); give another folder as cache"
        if required:
            raise DataError(message) from error
        warnings.warn(message, stacklevel=4)


def _in_split(
    table: MoleculeTable, split: str, excluded: str | Path | Iterable[int] | None, source: Path
) -> NDArray[np.bool_]:
    """Says which molecules of a table belong to a split, by the codes it stores or else by their index."""
    if table.split is not None and excluded is None:
        return table.split == SPLITS.index(split)
    if table.gdb_index is None:
        raise DataError(f"{source}: stores neither split nor gdb_index, so split={split!r} is unknown; leave it out")
    wanted = published_split(excluded)[split]
    rows = np.isin(table.gdb_index, wanted)
    if is_raw(source) and rows.sum() < len(wanted):
        # A half unpacked archive looks like any folder, and would silently give a smaller training set.
        warnings.warn(f"{source}: holds {rows.sum():,} of the {len(wanted):,} {split} molecules", stacklevel=3)
    return rows


def _load_ase(
    source: Path,
    split: str | None,
    n_atoms: int | None,
    excluded: str | Path | Iterable[int] | None,
    progress: bool | None,
) -> list[Atoms]:
    """Loads what ASE reads, without changing the ``Atoms``."""
    wanted = None if split is None else set(published_split(excluded)[split].tolist())
    chosen, found = [], 0
    images = tqdm(read_images(source), desc=f"reading {source.name}", disable=hide(progress))
    for found, atoms in enumerate(images, start=1):
        if n_atoms is not None and len(atoms) != n_atoms:
            continue
        if wanted is None or _index_of(atoms, found, source) in wanted:
            chosen.append(atoms)
    if not found:
        raise DataNotFoundError(f"{source}: holds no structures; give a file that does")
    return chosen


def _index_of(atoms: Atoms, position: int, source: Path) -> int:
    """Returns the GDB-9 index of a structure."""
    for key in _INDEX_KEYS:
        if key in atoms.info:
            return int(atoms.info[key])
    raise DataError(
        f"{source}: structure {position} ({atoms.symbols}) has no info[{_INDEX_KEYS[0]!r}], which a split needs; "
        "leave the split out, or give a form that has the index"
    )


def _excluded_indices(excluded: str | Path | Iterable[int] | None) -> NDArray[np.int64]:
    """Returns the excluded indices from any form of the argument."""
    if excluded is None:
        return read_excluded(Path(__file__).with_name("qm9_excluded.txt"))
    if isinstance(excluded, str | Path):
        return read_excluded(excluded)
    return _checked_excluded(list(excluded), "excluded")


def _checked_excluded(indices: Sequence[int] | NDArray[np.int32], name: str) -> NDArray[np.int64]:
    """Returns the indices, sorted, after checking that they are as many as the published permutation needs."""
    unique = np.unique(np.asarray(indices, dtype=np.int64))
    if len(unique) != N_EXCLUDED or unique[0] < 1 or unique[-1] > N_MOLECULES:
        raise DataError(
            f"{name}: holds {len(unique):,} different indices, but the published split leaves out {N_EXCLUDED:,} of "
            f"1 to {N_MOLECULES:,}; use excluded=None for those published"
        )
    return unique
