"""Validity, by the three definitions of ``ase_enf.metrics``."""

from __future__ import annotations

import numpy as np

from ase_enf.metrics.metric import Metric, fraction
from ase_enf.metrics.surveys import Structures, survey

VALIDITY = {
    "stable": "stable by the distance table and sanitised by RDKit",
    "largest_fragment": "sanitised by RDKit, represented by its largest fragment",
    "strict": "sanitised by RDKit, one fragment, no implicit hydrogens",
}
_AMONG = {"stable": "stable structures", "largest_fragment": "all structures", "strict": "all structures"}


def validity(atoms: Structures, definition: str = "strict") -> Metric:
    """Fraction of valid structures, by one of the three definitions of ``ase_enf.metrics``.

    Args:
        atoms: Structures, or their survey.
        definition: "stable" (E-NF paper), "largest_fragment" (EDM) or "strict".

    Returns:
        The metric; its denominator is the number of stable structures for "stable", otherwise that of all structures.
        Its standard error is binomial.

    Raises:
        ValueError: If the definition is unknown.

    Example:
        >>> from ase.build import molecule
        >>> [validity([molecule("CH4"), molecule("CH3")], name).value for name in VALIDITY]
        [1.0, 1.0, 0.5]
    """
    seen = survey(atoms)
    valid = np.array([smiles is not None for smiles in valid_smiles(seen, definition)])
    if definition == "stable":
        valid = valid[seen.stability.stable]
    return fraction(f"validity_{definition}", valid, f"{VALIDITY[definition]} / {_AMONG[definition]}")


def valid_smiles(atoms: Structures, definition: str = "strict") -> list[str | None]:
    """Returns the SMILES that represents each structure, or None if it is not valid.

    Args:
        atoms: Structures, or their survey.
        definition: "stable", "largest_fragment" or "strict".

    Returns:
        One entry for each structure, in order.

    Raises:
        ValueError: If the definition is unknown.

    Example:
        >>> from ase.build import molecule
        >>> valid_smiles([molecule("CH3OH"), molecule("CH3")])
        ['CO', None]
    """
    if definition not in VALIDITY:
        raise ValueError(f"unknown definition {definition!r}: choose one of {', '.join(map(repr, VALIDITY))}")
    seen = survey(atoms)
    if definition == "largest_fragment":
        return [reading.largest for reading in seen.readings]
    if definition == "stable":
        counts = seen.stability.stable
    else:
        counts = (seen.fragments == 1) & np.array([reading.complete for reading in seen.readings])
    return [reading.smiles if count else None for reading, count in zip(seen.readings, counts, strict=True)]


def of_all(over: str) -> bool:
    """Whether a denominator is the number of all structures ("all") rather than that of the valid ones ("valid").

    Raises:
        ValueError: If it is neither.
    """
    if over not in ("valid", "all"):
        raise ValueError(f"unknown denominator {over!r}: choose 'valid' or 'all'")
    return over == "all"
