"""Uniqueness: how many structures are distinct molecules?"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ase_enf.metrics.metric import Metric, ratio
from ase_enf.metrics.surveys import Structures
from ase_enf.metrics.valid import VALIDITY, of_all, valid_smiles


def uniqueness(atoms: Structures, definition: str = "strict", over: str = "valid") -> Metric:
    """Number of distinct molecules among the valid ones, as a fraction of the valid structures or of all.

    Molecules are the same if their canonical SMILES are, without hydrogens and stereochemistry. The fraction decreases
    with the number of structures: compare sets of equal size only. Its standard error is that of the jackknife, which
    here has the closed form √(f (1 − f) / (n − 1)), where f is the fraction of the n structures whose molecule occurs
    once.

    Args:
        atoms: Structures, or their survey.
        definition: Definition of valid: "stable", "largest_fragment" or "strict".
        over: Denominator: "valid" or "all" structures.

    Returns:
        The metric, named ``uniqueness_<definition>``, followed by ``_of_all`` for that denominator.

    Raises:
        ValueError: If the definition or the denominator is unknown.

    Example:
        >>> from ase.build import molecule
        >>> uniqueness([molecule("CH4"), molecule("CH4"), molecule("H2O")]).value
        0.6666666666666666
    """
    smiles = valid_smiles(atoms, definition)
    valid = [text for text in smiles if text is not None]
    occurrences = Counter(valid)
    n = len(smiles) if of_all(over) else len(valid)
    once = ratio(sum(count == 1 for count in occurrences.values()), n)
    return Metric(
        f"uniqueness_{definition}" + "_of_all" * of_all(over),
        ratio(len(occurrences), n),
        float(np.sqrt(once * (1 - once) / (n - 1))) if n > 1 else np.nan,
        n,
        f"different SMILES among the valid / {over} structures; valid: {VALIDITY[definition]}; jackknife stderr",
    )
