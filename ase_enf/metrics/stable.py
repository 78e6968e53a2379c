"""Stability: do the bond orders of every atom sum to its valence?"""

from __future__ import annotations

from ase.data import chemical_symbols

from ase_enf.metrics.metric import Metric, fraction, ratio, ratio_stderr
from ase_enf.metrics.surveys import Structures, survey


def atom_stability(atoms: Structures) -> Metric:
    """Fraction of atoms whose bond orders sum exactly to their valence, R = Σ_i s_i / Σ_i n_i over structures i.

    Atoms of one structure are not independent, so the standard error is that of a ratio of sums over structures
    (Cochran 1977, Sampling Techniques, section 6.3), √(N/(N−1) Σ_i (s_i − R n_i)²) / Σ_i n_i.

    Args:
        atoms: Structures, or their survey.

    Returns:
        The metric; its denominator is the number of atoms.

    Example:
        >>> from ase.build import molecule
        >>> atom_stability([molecule("CH4"), molecule("CH3")]).value  # 5 of 5 and 3 of 4 atoms
        0.8888888888888888
    """
    stable, sizes, _ = survey(atoms).stability
    return Metric(
        "atom_stability",
        ratio(stable.sum(), sizes.sum()),
        ratio_stderr(stable, sizes),
        int(sizes.sum()),
        "atoms whose bond orders sum to their valence / atoms; stderr of a ratio, structures independent",
    )


def stability_by_element(atoms: Structures) -> dict[str, Metric]:
    """Fraction of the atoms of each element whose bond orders sum to their valence.

    Args:
        atoms: Structures, or their survey.

    Returns:
        A metric ``atom_stability_<symbol>`` for the symbol of each element that occurs, in the order of atomic numbers.
        Its standard error is computed as in ``atom_stability``; its denominator is the number of atoms of the element.

    Example:
        >>> from ase.build import molecule
        >>> found = stability_by_element([molecule("CH4"), molecule("CH3")])
        >>> {symbol: metric.value for symbol, metric in found.items()}
        {'H': 1.0, 'C': 0.5}
    """
    seen = survey(atoms)
    return {
        chemical_symbols[number]: Metric(
            f"atom_stability_{chemical_symbols[number]}",
            ratio(stable.sum(), n_atoms.sum()),
            ratio_stderr(stable, n_atoms),
            int(n_atoms.sum()),
            f"{chemical_symbols[number]} atoms whose bond orders sum to their valence / {chemical_symbols[number]} "
            "atoms; stderr of a ratio, structures independent",
        )
        for number, stable, n_atoms in zip(
            seen.elements, seen.stable_by_element.T, seen.atoms_by_element.T, strict=True
        )
    }


def molecule_stability(atoms: Structures) -> Metric:
    """Fraction of structures all of whose atoms are stable.

    Args:
        atoms: Structures, or their survey.

    Returns:
        The metric; its denominator is the number of structures, its standard error binomial.

    Example:
        >>> from ase.build import molecule
        >>> molecule_stability([molecule("CH4"), molecule("CH3")]).value
        0.5
    """
    definition = "structures all of whose atoms are stable / all structures"
    return fraction("molecule_stability", survey(atoms).stability.stable, definition)
