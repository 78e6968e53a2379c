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

    As in the paper (415 novel of 491 stable), structures are counted, not distinct molecules.

    Args:
        atoms: Structures, or their survey.
        reference: Name of a shipped reference ("qm9"), SMILES strings, or structures.
        definition: Definition of valid: "stable", "largest_fragment" or "strict".
        over: Denominator: "valid" or "all" structures.

    Returns:
        The metric, named ``novelty_<definition>``, followed by ``_of_all`` for that denominator; its standard error is
        binomial.

    Raises:
        ValueError: If the definition, the denominator or the reference is unknown.

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
