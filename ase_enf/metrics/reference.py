"""References for generated structures: shipped, given as SMILES, or made from structures."""

from __future__ import annotations

import lzma
import warnings
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.chem.convert import normalise_smiles, rdkit_version
from ase_enf.metrics.surveys import Survey, survey

REFERENCES = {"qm9": "qm9_reference.npz"}  # shipped references, in ase_enf/data


class Reference(NamedTuple):
    """Known molecules that generated structures are compared with.

    Attributes:
        name: Name of the reference, in a word or two.
        smiles: Canonical SMILES of the known molecules.
        distances: Histogram of distances as in ``Survey``, shape (100,); None if only SMILES are known.
        n_structures: Number of structures or SMILES it was made from.
    """

    name: str
    smiles: frozenset[str]
    distances: NDArray[np.int64] | None
    n_structures: int


def load_reference(name: str = "qm9") -> Reference:
    """Loads a shipped reference: SMILES and distances of a training set.

    "qm9" is the published training split (100,000 molecules), with bonds by the distance table. Canonical SMILES depend
    on the version of RDKit; if another one wrote the file, they are made canonical again, which takes some ten seconds.

    Args:
        name: Name of the reference, "qm9".

    Returns:
        The reference.

    Raises:
        ValueError: If there is no such reference.

    Example:
        >>> reference = load_reference("qm9")
        >>> reference.n_structures, "CC(C)=O" in reference.smiles
        (100000, True)
    """
    if name not in REFERENCES:
        raise ValueError(
            f"unknown reference {name!r}: shipped are {', '.join(map(repr, REFERENCES))}; "
            "SMILES are given as a list of strings, structures as a list of Atoms"
        )
    return read_reference(resources.files("ase_enf") / "data" / REFERENCES[name])


def read_reference(path: str | Path | Traversable) -> Reference:
    """Reads a reference that ``write_reference`` wrote.

    Args:
        path: The .npz file.

    Returns:
        The reference, with SMILES that are canonical for the installed RDKit.

    Example:
        >>> read_reference(resources.files("ase_enf") / "data" / "qm9_reference.npz").distances.shape
        (100,)
    """
    source = Path(path) if isinstance(path, str) else path
    with source.open("rb") as file, np.load(file, allow_pickle=False) as data:
        smiles = lzma.decompress(data["smiles_xz"].tobytes()).decode("ascii").split("\n")
        written_by = str(data["rdkit_version"])
        name, n_structures, distances = str(data["name"]), int(data["n_structures"]), data["distances"]
    distances.flags.writeable = False
    return Reference(name, frozenset(_with_this_rdkit(smiles, written_by)), distances, n_structures)


def write_reference(reference: Reference, path: str | Path) -> None:
    """Writes a reference as a compact .npz without pickles: xz-compressed SMILES, histogram, RDKit version.

    Args:
        reference: A reference with distances.
        path: The .npz file; the same reference gives the same bytes.

    Raises:
        ValueError: If the reference has no distances.

    Example:
        >>> import tempfile
        >>> from ase.build import molecule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_reference(as_reference([molecule("CH4")]), folder + "/methane.npz")
        ...     sorted(read_reference(folder + "/methane.npz").smiles)
        ['C']
    """
    if reference.distances is None:
        raise ValueError(f"the reference ({reference.name}) has no distances to write")
    text = "\n".join(sorted(reference.smiles)).encode("ascii")
    with Path(path).open("wb") as file:
        np.savez(
            file,
            smiles_xz=np.frombuffer(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME), dtype=np.uint8),
            distances=np.asarray(reference.distances, dtype=np.int64),
            rdkit_version=np.array(rdkit_version()),
            name=np.array(reference.name),
            n_structures=np.array(reference.n_structures),
        )


def as_reference(reference: str | Reference | Survey | Iterable[str] | Atoms | Iterable[Atoms]) -> Reference:
    """Returns a ``Reference`` from any form in which a user may give it.

    Args:
        reference: Name of a shipped reference, SMILES strings, structures or their survey, or a ``Reference``. For
            structures, both the whole molecule and its largest fragment count as known.

    Returns:
        The reference. SMILES that RDKit cannot read are kept unchanged, with a warning that gives their number.

    Raises:
        ValueError: If the name is unknown, or the reference is empty or cannot be read.
        TypeError: If it mixes SMILES and structures, or holds anything else.

    Example:
        >>> sorted(as_reference(["OCC", "C"]).smiles)
        ['C', 'CCO']
    """
    if isinstance(reference, Reference):
        return reference
    if isinstance(reference, str):
        return load_reference(reference)
    if isinstance(reference, Survey):
        return _reference_of_structures(reference)
    items = [reference] if isinstance(reference, Atoms) else list(reference)
    if not items:
        raise ValueError("the reference is empty: give SMILES or structures, or leave it out")
    if all(isinstance(item, str) for item in items):
        return _reference_of_smiles(items)
    if all(isinstance(item, Atoms) for item in items):
        return _reference_of_structures(survey(items))
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise TypeError(f"a reference holds SMILES strings only or Atoms only, this one holds {kinds}")


def _reference_of_structures(seen: Survey) -> Reference:
    smiles = chain.from_iterable((reading.smiles, reading.largest) for reading in seen.readings)
    n = len(seen.readings)
    known = frozenset(text for text in smiles if text is not None)
    return Reference("structures", known, seen.distances.sum(axis=0), n)


def _reference_of_smiles(smiles: list[str]) -> Reference:
    normalised = {text: normalise_smiles(text) for text in set(smiles)}
    unread = [text for text, canonical in normalised.items() if canonical is None]
    if len(unread) == len(normalised):
        raise ValueError(
            f"RDKit cannot read any of the {len(unread)} different SMILES of the reference, such as {min(unread)!r}: "
            "give SMILES, or leave the reference out"
        )
    if unread:
        warnings.warn(
            f"RDKit cannot read {len(unread)} of {len(normalised)} different SMILES of the reference, "
            f"such as {min(unread)!r}: nothing will match them",
            stacklevel=4,
        )
    known = frozenset(canonical or text for text, canonical in normalised.items())
    return Reference("SMILES", known, None, len(smiles))


def _with_this_rdkit(smiles: list[str], written_by: str) -> list[str]:
    """Returns SMILES that are canonical for this RDKit, with a warning if they differ from those written."""
    if written_by == rdkit_version():
        return smiles
    anew = [normalise_smiles(text) for text in smiles]
    changed = sum(text != before for text, before in zip(anew, smiles, strict=True))
    if changed:
        warnings.warn(
            f"the reference was written by RDKit {written_by}, this is {rdkit_version()}: {changed} of {len(smiles)} "
            f"SMILES changed ({anew.count(None)} can no longer be read and are kept unchanged)",
            stacklevel=4,
        )
    return [text or before for text, before in zip(anew, smiles, strict=True)]
