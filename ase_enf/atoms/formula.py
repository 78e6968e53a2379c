"""Chemical formulas as atomic numbers, and atomic numbers that are those of an element."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.formula import Formula

# Most atoms in a formula; more are taken for a typing error.
LARGEST = 10_000


def formula_numbers(formula: str) -> np.ndarray:
    """Returns the atomic numbers of a chemical formula such as ``"C7H10O2"``, elements in the order it names them.

    Args:
        formula: Text, or an object of ASE that prints as a formula: ``atoms.symbols``, a ``Formula``.

    Raises:
        ValueError: If ``formula`` is not a formula, is empty, has a charge or more than ten thousand atoms, or looks
            like a SMILES.

    Example:
        >>> formula_numbers("CH4").tolist()
        [6, 1, 1, 1, 1]
    """
    stripped = str(formula).strip()
    if isinstance(formula, str) and _is_smiles(stripped):
        raise ValueError(
            f"formula {formula!r}: is a SMILES, and a formula counts every atom, hydrogens too; write C2H6O for CCO"
        )
    if set(stripped) & set("+-"):
        raise ValueError(f"formula {formula!r}: flows know no charges; write the atoms alone, like C7H10O2")
    try:
        counts = {atomic_numbers[symbol]: count for symbol, count in Formula(stripped).count().items()}
    except (ValueError, KeyError):
        raise ValueError(f"formula {formula!r}: not a chemical formula; write it like C7H10O2") from None
    if sum(counts.values()) > LARGEST:
        raise ValueError(f"formula {stripped!r}: has {sum(counts.values())} atoms, too many for any flow")
    numbers = [number for number, count in counts.items() for _ in range(count)]
    if not numbers or not all(counts.values()):
        raise ValueError(f"formula {formula!r}: has no atoms of an element, or none at all; write it like C7H10O2")
    return np.array(numbers)


def check_elements(atoms: Atoms, index: int) -> None:
    """Raises ``ValueError`` for atomic numbers that ASE accepts although they are not those of an element.

    Args:
        atoms: The structure; 0, ASE's X, is accepted.
        index: Its index in the caller's list, for the message.

    Example:
        >>> check_elements(Atoms(numbers=[1, 119]), 0)
        Traceback (most recent call last):
        ValueError: structure 0: has the atomic number 119; elements are 1 to 118, correct it
    """
    unknown = atoms.numbers[(atoms.numbers < 0) | (atoms.numbers >= len(chemical_symbols))]
    if len(unknown):
        raise ValueError(
            f"structure {index}: has the atomic number {unknown[0]}; elements are 1 to {len(chemical_symbols) - 1}, "
            "correct it"
        )


def of_elements(atoms: Iterable[Atoms]) -> Iterator[Atoms]:
    """Yields structures, each checked by :func:`check_elements`."""
    for index, item in enumerate(atoms):
        check_elements(item, index)
        yield item


def _is_smiles(text: str) -> bool:
    """Whether a text of symbols is a SMILES rather than a formula: no hydrogen, closed rings, a repeated element.

    A formula names each element once (C2O), and its digits do not come in pairs.
    """
    symbols = re.findall(r"Cl|Br|[BCNOPSFI]", text)
    rings = re.findall(r"%\d\d|\d", text)
    rest = re.sub(r"Cl|Br|[BCNOPSFI]|%\d\d|\d|[()=#]", "", text)
    return not rest and len(set(symbols)) < len(symbols) and all(rings.count(ring) % 2 == 0 for ring in rings)
