"""Input of the commands: structures, and references to compare them with."""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase import Atoms

SMILES = (".smi", ".smiles", ".txt")
_PIPED = (".extxyz", ".xyz", "")  # accepted endings of pipes; the shell's <(...) has none


def read_structures(path: str, split: str | None = None, n_atoms: int | None = None) -> list[Atoms]:
    """Reads structures from any file that ASE or the QM9 reader knows, or from a pipe of (extended) xyz.

    Args:
        path: The file or pipe.
        split: Published split of QM9, such as "train"; all structures when None.
        n_atoms: Keep only structures of this many atoms; all when None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds no such structure.
    """
    from ase_enf.data import qm9

    check_present(path)
    with _seekable(Path(path).expanduser()) as source:
        atoms = qm9.load(source, split=split, n_atoms=n_atoms)
    if not atoms:
        raise ValueError(f"{path}: holds no structure" + (f" of {n_atoms} atoms" if n_atoms else ""))
    return atoms


def check_present(path: str) -> None:
    """Raises ``FileNotFoundError`` if there is no file, or pipe, of structures at a path."""
    if path and Path(path).expanduser().exists():
        return
    if _is_model(path):
        raise FileNotFoundError(f"{path}: is a model, not a file; name a file that holds structures")
    raise FileNotFoundError(f"{path or repr(path)}: no such file; name one that holds structures")


def _is_model(name: str) -> bool:
    """Whether a word is the name of a shipped model."""
    from ase_enf.flow.weights import shipped_path

    return bool(name) and shipped_path(name) is not None


def _readable_pipe(path: Path) -> bool:
    """Whether a path is a pipe from which structures can be read."""
    return path.suffix in _PIPED and stat.S_ISFIFO(path.stat().st_mode)


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[Path]:
    """Yields a path that can be read more than once: for a pipe, that of a temporary copy.

    Errors name the original path.
    """
    if not _readable_pipe(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "piped" + path.suffix)
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        if not path.suffix and _opens_like_xyz(copy):
            copy = copy.rename(copy.with_suffix(".extxyz"))
        try:
            yield copy
        except (ValueError, OSError) as error:
            named = re.sub(rf"{re.escape(folder)}/piped(\.\w+)?", lambda _: str(path), str(error))
            raise ValueError(named) from error


def _opens_like_xyz(path: Path) -> bool:
    """Whether the first line of a file is a number of atoms."""
    with path.open("rb") as file:
        return file.readline(100).strip().isdigit()


def read_reference(name: str) -> Any:
    """Returns a reference for ``metrics.evaluate``: a shipped name, SMILES, or structures.

    Args:
        name: Name of a shipped reference, or path of a file of SMILES or structures.

    Raises:
        FileNotFoundError: If there is neither such a reference nor such a file.
        ValueError: If the file cannot be read.
    """
    from ase_enf.atoms.files import check_source

    if check_reference(name):
        return name
    path = Path(name).expanduser()
    if not _readable_pipe(path):
        check_source(path)
    return _read_smiles(path) if path.suffix in SMILES else read_structures(name)


def check_reference(name: str) -> bool:
    """Returns whether a reference is a shipped one.

    Raises:
        FileNotFoundError: If it is not, and there is no such file either.
    """
    from ase_enf.metrics import REFERENCES

    if name in REFERENCES or Path(name).expanduser().exists():
        return name in REFERENCES
    shipped = [known for known in REFERENCES if known == name.lower()]
    other = f"name {', '.join(REFERENCES)}, a file of SMILES ({', '.join(SMILES)}) or one of structures"
    raise FileNotFoundError(
        f"--reference {name!r}: no such file; {f'write {shipped[0]} for the shipped one' if shipped else other}"
    )


def _read_smiles(path: Path) -> list[str]:
    """Reads a file of SMILES, the first word of every line."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file of SMILES or of structures")
    try:
        smiles = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not smiles:
        raise ValueError(f"{path}: holds no SMILES; write one at the start of each line")
    return smiles
