"""What a molecule must pass to be kept: electron parity, connectedness, stability, validity, a composition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase import Atoms

from ase_enf.chem.bonds import bond_orders, n_fragments, stable_atoms

if TYPE_CHECKING:
    from ase_enf.flow.model import ENF

# Requirement → what is said of a molecule that does not meet it. The cheapest tests come first.
REASONS = {
    "closed_shell": "had an odd number of electrons",
    "connected": "was not one connected molecule",
    "stable": "had an atom that is not stable",
    "valid": "was not valid",
}
# The name that a requested formula has among them; users do not require it by this name.
FORMULA = "formula"


class Requirements(NamedTuple):
    """The tests that a molecule must pass to be kept, in the order in which they are made.

    * "closed_shell": an even number of electrons in the neutral molecule. This is **electron parity**, which a closed
      shell needs; orbitals are not looked at.
    * "connected": the bond graph of the distance table is in one piece.
    * "stable": the bond orders of every atom sum to its valence.
    * "valid": RDKit sanitises the bond graph, which is in one piece, and no atom lacks a bond ("strict" validity).

    The names mean what they mean in the metrics.
    """

    names: tuple[str, ...] = ()
    composition: tuple[int, ...] | None = None  # atomic numbers in ascending order, where "formula" is a name

    @classmethod
    def of(cls, flow: ENF, require: str | Iterable[str], composition: np.ndarray | None = None) -> Requirements:
        """Returns the requirements of a user, checked.

        Args:
            flow: A flow.
            require: Names, or one string of names separated by commas.
            composition: Atomic numbers that a molecule must have, in any order.

        Raises:
            ValueError: For an unknown name, or any requirement for a flow that knows no elements.

        Example:
            >>> from ase_enf.flow.config import ENFConfig
            >>> from ase_enf.flow.model import ENF
            >>> Requirements.of(ENF(ENFConfig(hidden=8, layers=1)), "valid,stable").names
            ('stable', 'valid')
        """
        asked = requirement_names(require)
        if asked and not flow.config.knows_types:
            raise ValueError(f"require={', '.join(sorted(asked))}: this model knows no elements; leave it out")
        names = tuple(name for name in REASONS if name in asked)
        if composition is None:
            return cls(names)
        return cls((FORMULA, *names), tuple(sorted(composition.tolist())))

    def __str__(self) -> str:
        return ", ".join(self.names)

    def unmet(self, molecules: Sequence[Atoms]) -> list[str | None]:
        """Returns the first requirement that each molecule does not meet, None where it meets all.

        Example:
            >>> from ase.build import molecule
            >>> Requirements(("closed_shell", "stable")).unmet([molecule("CH4"), molecule("CH3")])
            [None, 'closed_shell']
        """
        return [next((name for name in self.names if not self._meets(name, atoms)), None) for atoms in molecules]

    def reason(self, name: str) -> str:
        """Returns the words for a molecule that does not meet this requirement."""
        return "had another composition" if name == FORMULA else REASONS[name]

    def _meets(self, name: str, atoms: Atoms) -> bool:
        if name == FORMULA:
            return tuple(sorted(atoms.numbers.tolist())) == self.composition
        return CHECKS[name](atoms)


def requirement_names(require: str | Iterable[str]) -> set[str]:
    """Returns the names of requirements; raises ``ValueError`` for an unknown one.

    Args:
        require: Names, or one string of names separated by commas.

    Example:
        >>> sorted(requirement_names("valid, stable"))
        ['stable', 'valid']
    """
    words = require.split(",") if isinstance(require, str) else list(require)
    asked = {str(word).strip() for word in words} - {""}
    for name in sorted(asked - REASONS.keys()):
        raise ValueError(f"require={name!r}: is unknown; choose among {', '.join(REASONS)}")
    return asked


def open_shell(numbers: np.ndarray) -> bool:
    """Whether neutral atoms of these atomic numbers have an odd number of electrons in all.

    Example:
        >>> open_shell(np.array([6, 1, 1, 1]))
        True
    """
    return bool(numbers.sum() % 2)


def strict_smiles(atoms: Atoms) -> str | None:
    """Returns the SMILES of a molecule that is valid under the "strict" definition of the metrics, None otherwise.

    Example:
        >>> from ase.build import molecule
        >>> strict_smiles(molecule("CH3OH")), strict_smiles(molecule("CH3"))
        ('CO', None)
    """
    from ase_enf.metrics.valid import valid_smiles  # it imports pandas, and RDKit when it is called

    return valid_smiles(atoms, "strict")[0]


def _closed_shell(atoms: Atoms) -> bool:
    return not open_shell(atoms.numbers)


def _connected(atoms: Atoms) -> bool:
    return n_fragments(bond_orders(atoms.numbers[None], atoms.positions[None]))[0] == 1


def _stable(atoms: Atoms) -> bool:
    numbers = atoms.numbers[None]
    return bool(stable_atoms(numbers, bond_orders(numbers, atoms.positions[None])).all())


def _valid(atoms: Atoms) -> bool:
    return strict_smiles(atoms) is not None


CHECKS = {"closed_shell": _closed_shell, "connected": _connected, "stable": _stable, "valid": _valid}
