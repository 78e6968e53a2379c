"""Calculators by name, and a calculator that is bound to one molecule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from ase_enf.chem.mmff import MMFF94
from ase_enf.chem.topology import Topology

_XTB = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB"}
NAMES = (*_XTB, "mmff")
# Energy of what is not the molecule, eV: a Boltzmann factor of exactly zero, and yet a number.
OUTSIDE = 1e9


def calculator(name: str, atoms: Atoms) -> Any:
    """Returns a calculator by its name.

    Args:
        name: "gfn2" or "gfn1" (tight binding, by tblite), or "mmff" (MMFF94, by RDKit).
        atoms: The molecule it is for; neutral.

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


class OneMolecule(Calculator):
    """The energies of a calculator for structures that are one molecule in any order of the atoms, and no others.

    A flow is invariant under permutations of equal atoms, and now and then draws another isomer or a broken molecule.
    Those are no part of the ensemble of the molecule: their energy here is 10⁹ eV, so that their weight is zero.

    Args:
        atoms: The molecule.
        calculator: Any ASE calculator of energies, eV; it is given the atoms in the order of ``atoms``.

    Example:
        >>> from ase.build import molecule
        >>> ethanol = molecule("CH3CH2OH")
        >>> other = ethanol[::-1]
        >>> other.calc = OneMolecule(ethanol, calculator("mmff", ethanol))
        >>> round(other.get_potential_energy(), 3)
        -0.048
    """

    implemented_properties = ["energy"]  # noqa: RUF012 (ASE's interface)

    def __init__(self, atoms: Atoms, calculator: Any) -> None:
        super().__init__()
        self.topology, self.calculator = Topology(atoms), calculator
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
        if order is None:
            self.results["energy"] = OUTSIDE
            return
        self.calls += 1
        ordered = self.atoms[order]
        ordered.calc = self.calculator
        self.results["energy"] = float(ordered.get_potential_energy())
