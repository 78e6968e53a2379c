"""Calculators by name, and a calculator restricted to one molecule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from ase_enf.chem.mmff import MMFF94
from ase_enf.chem.topology import Topology

_XTB = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB"}
NAMES = (*_XTB, "mmff")
# Energy of a structure that is not the molecule, eV: finite, but its Boltzmann factor is exactly zero.
OUTSIDE = 1e9


def calculator(name: str, atoms: Atoms) -> Any:
    """Returns a calculator by its name.

    Args:
        name: "gfn2" or "gfn1" (tight binding, by tblite), or "mmff" (MMFF94, by RDKit).
        atoms: The neutral molecule it is meant for.

    Returns:
        An ASE calculator.

    Raises:
        ValueError: If the name is unknown, or its package is not installed.

    Example:
        >>> from ase.build import molecule
        >>> type(calculator("mmff", molecule("CH3OH"))).__name__
        'MMFF94'
    """
    if name not in NAMES:
        raise ValueError(
            f"calculator {name!r} is unknown; choose one of {', '.join(NAMES)}, or give your own in Python"
        )
    if name == "mmff":
        return MMFF94(atoms)
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise ValueError(f"calculator {name!r} needs tblite; pip install tblite, or choose mmff") from error
    return TBLite(method=_XTB[name], verbosity=0)


def as_calculator(given: Any, atoms: Atoms) -> Any:
    """Returns a calculator that is given itself or by its name.

    Args:
        given: An ASE calculator, or a name for :func:`calculator`.
        atoms: The molecule it is meant for.

    Raises:
        TypeError: If it is neither.
        ValueError: If the name is unknown, or its package is not installed.

    Example:
        >>> from ase.build import molecule
        >>> type(as_calculator("mmff", molecule("CH3OH"))).__name__
        'MMFF94'
    """
    if isinstance(given, str):
        return calculator(given, atoms)
    if isinstance(given, type) or not all(hasattr(given, name) for name in ("get_potential_energy", "get_forces")):
        raise TypeError(f"calculator={given!r}: must be an ASE calculator or one of the names {', '.join(NAMES)}")
    return given


class OneMolecule(Calculator):
    """Restricts a calculator to one molecule: any other structure has an energy of 10⁹ eV and thus no weight.

    A flow of given elements draws equal atoms in any order, and occasionally another isomer or a broken molecule. Atoms
    are reordered before the calculator sees them; isomers and broken molecules do not belong to the ensemble of the
    molecule. A flow of molecular graphs draws its atoms in one order; any other one is then another structure.

    Args:
        atoms: The molecule.
        calculator: Any ASE calculator of energies, eV; it receives the atoms in the order of ``atoms``.
        ordered: Whether atoms in another order of equal atoms are another structure.

    Example:
        >>> from ase.build import molecule
        >>> ethanol = molecule("CH3CH2OH")
        >>> other = ethanol[::-1]
        >>> other.calc = OneMolecule(ethanol, calculator("mmff", ethanol))
        >>> round(other.get_potential_energy(), 3)
        -0.048
    """

    implemented_properties = ["energy"]  # noqa: RUF012 (ASE's interface)

    def __init__(self, atoms: Atoms, calculator: Any, ordered: bool = False) -> None:
        super().__init__()
        self.topology, self.calculator, self.ordered = Topology(atoms), calculator, ordered
        self.calls = 0

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Computes the energy; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        order = self.topology.match(self.atoms)
        if order is None or (self.ordered and (order != np.arange(len(order))).any()):
            self.results["energy"] = OUTSIDE
            return
        self.calls += 1
        ordered = self.atoms[order]
        ordered.calc = self.calculator
        self.results["energy"] = float(ordered.get_potential_energy())
