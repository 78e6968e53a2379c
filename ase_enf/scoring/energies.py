"""Energies of many structures by any ASE calculator, which may fail on some of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ase import Atoms

from ase_enf.bars import Bar, Progress

# Structures given at once to a calculator that takes many.
ENERGY_BATCH = 1024
# A calculator that fails on each of this many first structures is taken to fail on all.
HOPELESS = 10


class ReweightingError(RuntimeError):
    """The calculator gave no energy for any sample, so that there are no weights."""


@runtime_checkable
class BatchCalculator(Protocol):
    """A calculator that takes many structures of one composition at once; ``reweight`` makes use of it.

    Example:
        >>> from ase_enf.data import particles
        >>> isinstance(particles.DW4(), BatchCalculator)
        True
    """

    def batch_energies(self, positions: np.ndarray) -> np.ndarray:
        """Returns the energies (B,), eV, of structures with positions (B, M, n), Å; n is the flow's dimension."""


class Energies:
    """U of the structures added so far, eV; NaN where the calculator failed.

    Args:
        calculator: An ASE calculator of energies; a :class:`BatchCalculator` is given many structures at once.
        dimension: Number n of coordinates of an atom that a :class:`BatchCalculator` sees.

    Raises:
        TypeError: If it is no calculator.

    Example:
        >>> from ase.calculators.lj import LennardJones
        >>> energies = Energies(LennardJones(rc=50), dimension=3)
        >>> energies.add([Atoms("Ar2", [[0, 0, 0], [0, 0, 2 ** (1 / 6)]])], progress=False)
        >>> [round(value, 3) for value in energies.values]
        [-1.0]
    """

    def __init__(self, calculator: Any, dimension: int) -> None:
        if not isinstance(calculator, BatchCalculator) and not hasattr(calculator, "get_potential_energy"):
            raise TypeError(f"expected an ASE calculator, got {type(calculator).__name__}")
        self.calculator, self.dimension = calculator, dimension
        self.many = calculator.batch_energies if isinstance(calculator, BatchCalculator) else None
        self.values: list[float] = []
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the first missing energy is missing."""
        return self._reason or "its energies are not finite"

    def add(self, samples: list[Atoms], progress: Progress) -> None:
        """Computes the energies of further structures.

        Args:
            samples: Structures of one composition.
            progress: See ``bars.Progress``.

        Raises:
            ReweightingError: If the calculator gives none at all for the structures that are added first.
        """
        first = not self.values
        size = ENERGY_BATCH if self.many else 1
        with Bar(len(samples), progress, "energy") as bar:
            for k in range(0, len(samples), size):
                self.values += self._chunk(samples[k : k + size])
                bar.update(len(samples[k : k + size]))
                if first and size == 1 and k + 1 == HOPELESS and not np.isfinite(self.values).any():
                    break
        if first and not np.isfinite(self.values).any():
            raise ReweightingError(
                f"{type(self.calculator).__name__} gave no finite energy ({self.reason}); check symbols and units"
            )

    def _chunk(self, samples: list[Atoms]) -> list[float]:
        try:
            if self.many:
                return _energies_together(self.many, samples, self.dimension)
            return [_energy(self.calculator, samples[0])]
        except ReweightingError:
            raise
        except Exception as error:  # each calculator has errors of its own
            where = f"batch_energies() of {len(samples)} structures: " if self.many else ""
            self._reason = self._reason or where + f"{type(error).__name__}: {error}".splitlines()[0]
            return [math.nan] * len(samples)


def _energy(calculator: Any, atoms: Atoms) -> float:
    atoms = atoms.copy()  # the calculator keeps what it was given
    atoms.calc = calculator
    return float(atoms.get_potential_energy())


def _energies_together(many: Callable[[np.ndarray], Any], samples: list[Atoms], dimension: int) -> list[float]:
    values = np.asarray(many(np.stack([atoms.positions[:, :dimension] for atoms in samples])), dtype=float)
    if values.shape != (len(samples),):
        raise ReweightingError(
            f"batch_energies() gave shape {values.shape} for {len(samples)} structures; need one for each"
        )
    return values.tolist()
