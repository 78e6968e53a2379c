"""Compositions: those drawn for a flow of given types, and one requested from a flow that draws types itself."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

from ase_enf.atoms.formula import formula_numbers
from ase_enf.flow.weights import read_header, shipped, shipped_path
from ase_enf.sampling.requirements import open_shell

if TYPE_CHECKING:
    from ase_enf.flow.model import ENF

# A formula is accepted if ``max_attempts`` draws are expected to have it at least this often.
EXPECTED = 5


def drawn_compositions(
    flow: ENF, n_atoms: int | None, formula: str | None, closed_shell: bool
) -> tuple[list[str], np.ndarray] | None:
    """Returns the formulas to draw from and their weights; None for a flow of other than given types."""
    if not flow.config.types_given:
        return None
    if formula is not None:
        numbers = check_formula(formula, flow.species, n_atoms, closed_shell)
        if len(numbers) > (largest := max(flow.size_prior.counts)):
            warnings.warn(
                f"formula={formula!r} has {len(numbers)} atoms; this model saw at most {largest}", stacklevel=2
            )
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


def awaited_composition(
    flow: ENF, n_atoms: int | None, formula: str | None, closed_shell: bool, max_attempts: int
) -> np.ndarray | None:
    """Returns the atomic numbers of a formula that is asked of a flow which draws types itself; None without one.

    Such a flow meets the formula by rejection, if P(formula | M) in its training set lets ``max_attempts`` suffice.

    Raises:
        ValueError: For a formula that the flow cannot draw, draws too rarely, or whose probability is not known.
    """
    if formula is None or flow.config.types_given:
        return None
    if flow.config.types_flow:
        numbers = check_formula(formula, flow.species, n_atoms, closed_shell)
    else:
        numbers = formula_numbers(formula)
    remedy = f"use a model with features='given'{_given_model(numbers)}"
    does = "draws types itself" if flow.config.types_flow else "knows no types"
    about = f"formula={formula!r}: this model has features={flow.features!r} and {does}"
    seen = _training_compositions(flow)
    if not seen:
        raise ValueError(f"{about}; {remedy}")
    wanted, size = Counter(numbers.tolist()), len(numbers)
    same_size = {f: n for f, n in seen.items() if len(formula_numbers(f)) == size}
    total = sum(same_size.values())
    count = sum(n for f, n in same_size.items() if Counter(formula_numbers(f).tolist()) == wanted)
    if count * max_attempts < EXPECTED * total or not count:
        more = f", or raise max_attempts to {math.ceil(EXPECTED * total / count):,}" if count else ""
        share = f"{count:,} of {total:,} training molecules of {size} atoms had this composition, too few to wait for"
        raise ValueError(f"{about}; {share}: {remedy}{more}")
    return numbers


def check_formula(formula: str, species: Sequence[str], n_atoms: int | None, closed_shell: bool) -> np.ndarray:
    """Returns the atomic numbers of a formula, checked against what a flow of these elements can draw.

    Raises:
        ValueError: If it is no formula, has other elements, one atom or another number than ``n_atoms``, or, with
            ``closed_shell``, an odd number of electrons.

    Example:
        >>> check_formula("CH3OH", ("H", "C", "O"), None, closed_shell=True).tolist()
        [6, 1, 1, 1, 1, 8]
    """
    numbers = formula_numbers(formula)
    unknown = sorted({chemical_symbols[z] for z in numbers} - set(species))
    if unknown:
        raise ValueError(
            f"formula={formula!r}: element(s) {', '.join(unknown)} unknown to this model, "
            f"which knows {', '.join(species)}"
        )
    if n_atoms is not None and n_atoms != len(numbers):
        raise ValueError(f"formula={formula!r} has {len(numbers)} atoms, but n_atoms={n_atoms}; leave one of them out")
    if len(numbers) < 2:
        raise ValueError(f"formula={formula!r}: has one atom; a density on centred positions needs at least 2")
    if closed_shell and open_shell(numbers):
        raise ValueError(f"formula={formula!r} has an odd number of electrons; leave closed_shell out")
    return numbers


def _training_compositions(flow: ENF) -> dict[str, int]:
    """Returns how often each formula occurs in the training set of a flow that draws types; empty if unknown.

    Such a flow does not store compositions. They are those of a shipped flow of given types whose counts of every size
    are the same, and which therefore saw the same set.
    """
    if not flow.config.types_flow:
        return {}
    for config in _shipped_given():
        if {int(size): count for size, count in config["sizes"].items()} == dict(flow.config.sizes):
            return dict(config["compositions"])
    return {}


def _given_model(numbers: np.ndarray) -> str:
    """Returns ", such as NAME" of a shipped flow of given types that knows these elements, "" where there is none."""
    symbols = {chemical_symbols[z] for z in numbers}
    names = [config["name"] for config in _shipped_given() if symbols <= set(config["species"])]
    return f", such as {names[0]}" if names else ""


def _shipped_given() -> list[dict]:
    """Returns the configurations, with names, of the shipped flows of given types that need no graph."""
    configs = [read_header(shipped_path(name))["config"] | {"name": name} for name in shipped()]
    return [config for config in configs if config["features"] == "given" and not config.get("graph")]
