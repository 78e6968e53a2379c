"""The systems as ASE calculators."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, CalculatorSetupError, all_changes

from ase_enf.data import DataError
from ase_enf.data.particles.system import System
from ase_enf.data.particles.systems import SYSTEMS, lennard_jones


class _ParticleCalculator(Calculator):
    """Calls ``System.evaluate`` for one ``Atoms``."""

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 (ASE's own declaration)
    discard_results_on_any_change = True

    def _system(self) -> System:
        raise NotImplementedError

    def energies(self, positions: np.ndarray) -> np.ndarray:
        """Returns the energies (B,) of many configurations (B, M, n) at once."""
        try:
            return self._system().evaluate(positions).energy
        except DataError as error:
            raise CalculatorSetupError(str(error)) from None

    batch_energies = energies  # the method that ase_enf.reweight calls

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Fills ``results``; called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        system, positions = self._system(), self.atoms.positions
        if len(self.atoms) != system.n_atoms:
            raise CalculatorSetupError(f"{system.name} has {system.n_atoms} particles; {self.atoms.symbols} differs")
        if self.atoms.pbc.any():
            raise CalculatorSetupError(f"{system.name} is not periodic; set pbc=False")
        if not np.isfinite(positions).all():
            raise CalculatorSetupError(f"{system.name}: positions are not finite")
        energy, plane = system.evaluate(positions[None, :, : system.dimension])
        if not (np.isfinite(energy).all() and np.isfinite(plane).all()):
            raise CalculatorSetupError(f"{system.name}: two particles coincide or nearly do; move them apart")
        forces = np.zeros_like(positions)
        forces[:, : system.dimension] = plane[0]
        self.results = {"energy": float(energy[0]), "free_energy": float(energy[0]), "forces": forces}


class DW4(_ParticleCalculator):
    """The double-well system of four particles in the xy plane, for ``Atoms("X4")``; it does not depend on z.

    Energies in kT = 1, which ASE takes for eV: simulate at 1 / ase.units.kB = 11604.5 K.

    Raises:
        CalculatorSetupError: For any parameter, as it has none (``System`` and ``DoubleWell`` make other wells); on
            calculation, for another number of atoms, periodic cells or coinciding atoms.

    Example:
        >>> atoms = Atoms("X4", [(0, 0, 0), (4, 0, 0), (4, 4, 0), (0, 4, 0)], calculator=DW4())
        >>> round(atoms.get_potential_energy(), 3)  # four sides of d0, two diagonals
        -8.397
    """

    def set(self, **settings: Any) -> dict[str, Any]:
        """Refuses any parameter."""
        if settings:
            raise CalculatorSetupError(
                f"DW4 has no parameter {min(settings)!r}; System(..., DoubleWell(b, c, d0)) does"
            )
        return super().set()

    def _system(self) -> System:
        return SYSTEMS["dw4"]


class _LennardJones(_ParticleCalculator):
    """Lennard-Jones particles with a factor on the pair energy."""

    n_atoms: int

    def set(self, **settings: Any) -> dict[str, Any]:
        """Changes the factor."""
        if unknown := set(settings) - {"factor"}:
            raise CalculatorSetupError(f"{type(self).__name__} has no parameter {min(unknown)!r}, only factor")
        try:
            settings = {key: float(value) for key, value in settings.items()}
            lennard_jones(settings.get("factor", 1.0))
        except (DataError, TypeError, ValueError) as error:
            raise CalculatorSetupError(str(error)) from None
        return super().set(**settings)

    def _system(self) -> System:
        return lennard_jones(self.parameters["factor"], self.n_atoms)


class LJ13(_LennardJones):
    """Thirteen Lennard-Jones particles in a harmonic trap, for ``Atoms("X13")``.

    Energies in kT = 1, which ASE takes for eV: simulate at 1 / ase.units.kB = 11604.5 K.

    Args:
        factor: Factor of the pair energy; 1 is the convention of Köhler et al. 2020 and of the paper, 2 that of Klein
            and Noé.

    Raises:
        CalculatorSetupError: For a factor that is not positive; on calculation, for another number of atoms, periodic
            cells or coinciding atoms.

    Example:
        >>> from ase.cluster import Icosahedron
        >>> atoms = Atoms("X13", Icosahedron("Ar", 2, latticeconstant=2**0.5).positions, calculator=LJ13())
        >>> round(atoms.get_potential_energy(), 2)
        -36.58
    """

    n_atoms = 13

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(factor=float(factor))


class LJ55(_LennardJones):
    """Fifty-five Lennard-Jones particles in a harmonic trap, for ``Atoms("X55")``.

    Energies in kT = 1, which ASE takes for eV: simulate at 1 / ase.units.kB = 11604.5 K.

    Args:
        factor: Factor of the pair energy; 2 is the convention of Klein and Noé 2023, who introduced the system.

    Raises:
        CalculatorSetupError: As ``LJ13``.

    Example:
        >>> from ase.cluster import Icosahedron
        >>> atoms = Atoms("X55", Icosahedron("Ar", 3, latticeconstant=2**0.5).positions, calculator=LJ55())
        >>> round(atoms.get_potential_energy(), 2)
        -453.1
    """

    n_atoms = 55

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(factor=float(factor))
