"""Connectedness: is a structure one molecule?"""

from __future__ import annotations

from ase_enf.metrics.metric import Metric, fraction
from ase_enf.metrics.surveys import Structures, survey


def connected(atoms: Structures) -> Metric:
    """Fraction of structures whose bond graph is connected.

    Args:
        atoms: Structures, or their survey.

    Returns:
        The metric; its denominator is the number of structures, its standard error binomial.

    Example:
        >>> from ase.build import molecule
        >>> connected([molecule("CH4"), molecule("LiF")]).value  # Li is not in the table: two fragments
        0.5
    """
    return fraction("connected", survey(atoms).fragments == 1, "structures of one fragment / all structures")
