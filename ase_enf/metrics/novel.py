"""Novelty: is a molecule missing from the reference?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from ase import Atoms

from ase_enf.metrics.metric import Metric, fraction
from ase_enf.metrics.reference import Reference, as_reference
from ase_enf.metrics.surveys import Structures
from ase_enf.metrics.valid import VALIDITY, of_all, valid_smiles


def novelty(
    atoms: Structures,
    reference: str | Reference | Iterable[str] | Iterable[Atoms],
    definition: str = "strict",
    over: str = "valid",
) -> Metric:
    """Valid structures whose molecule is not in the reference, as a fraction of the valid structures or of all.

    Structures are counted, not different molecules: this is the paper's figure (415 novel of 491 stable).

    Args:
        atoms: Structures, or their survey.
        reference: A shipped name ("qm9"), SMILES strings, or structures.
        definition: What is valid: "stable", "largest_fragment" or "strict".
        over: "valid" or "all": the denominator.

    Returns:
        The metric, named ``novelty_<definition>``, with ``_of_all`` when that is the denominator; standard error
        binomial.

    Raises:
        ValueError: The definition or the denominator is unknown, or the reference is.

    Example:
        >>> from ase.build import molecule
        >>> novelty([molecule("CH4"), molecule("H2O")], reference=["C"]).value
        0.5
    """
    known = as_reference(reference).smiles
    smiles = valid_smiles(atoms, definition)
    counted = smiles if of_all(over) else [text for text in smiles if text is not None]
    return fraction(
        f"novelty_{definition}" + "_of_all" * of_all(over),
        np.array([text is not None and text not in known for text in counted], dtype=bool),
        f"valid structures whose SMILES is not in the reference / {over} structures; valid: {VALIDITY[definition]}",
    )
