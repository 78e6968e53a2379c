"""Compositions: which a flow of given types draws, and how often."""

from __future__ import annotations

import warnings

import numpy as np
from ase.data import chemical_symbols

from ase_enf.atoms.batch import formula_numbers
from ase_enf.flow.model import ENF
from ase_enf.sampling.requirements import open_shell


def drawn_compositions(
    flow: ENF, n_atoms: int | None, formula: str | None, closed_shell: bool
) -> tuple[list[str], np.ndarray] | None:
    """Returns the formulas to draw from and their weights, None when the types are not given."""
    if not flow.config.types_given:
        if formula is not None:
            does = "generates types itself" if flow.config.types_flow else "knows no types"
            raise ValueError(
                f"formula={formula!r}: this model has features={flow.features!r} and {does}; "
                "use a model with features='given'"
            )
        return None
    if formula is not None:
        numbers = formula_numbers(formula)
        unknown = sorted({chemical_symbols[z] for z in numbers} - set(flow.species))
        if unknown:
            raise ValueError(
                f"formula={formula!r}: element(s) {', '.join(unknown)} unknown to this model, "
                f"which knows {', '.join(flow.species)}"
            )
        if n_atoms is not None and n_atoms != len(numbers):
            raise ValueError(
                f"formula={formula!r} has {len(numbers)} atoms, but n_atoms={n_atoms}; leave one of them out"
            )
        if len(numbers) < 2:
            raise ValueError(f"formula={formula!r}: has one atom; a density on centred positions needs at least 2")
        if len(numbers) > (largest := max(flow.size_prior.counts)):
            warnings.warn(
                f"formula={formula!r} has {len(numbers)} atoms; this model saw at most {largest}", stacklevel=2
            )
        if closed_shell and open_shell(numbers):
            raise ValueError(f"formula={formula!r} has an odd number of electrons; leave closed_shell out")
        return [str(formula)], np.ones(1)
    known = flow.config.compositions
    kept = {f: c for f, c in known.items() if n_atoms is None or len(formula_numbers(f)) == n_atoms}
    if not known:
        raise ValueError("this model knows the composition of no molecule to draw from; give a formula")
    if not kept:
        raise ValueError(f"n_atoms={n_atoms}: this model saw no composition of that size; give a formula")
    if closed_shell and not (kept := {f: c for f, c in kept.items() if not open_shell(formula_numbers(f))}):
        raise ValueError("closed_shell=True: this model saw no such composition with an even number of electrons")
    return list(kept), np.array(list(kept.values())) / sum(kept.values())
