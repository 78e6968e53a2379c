"""Properties of molecules, one number each: their keys in ``info``, and the units of those of QM9.

============  ==========  ===============================================
``info`` key  unit        meaning (QM9: B3LYP/6-31G(2df,p))
============  ==========  ===============================================
``mu``        D           dipole moment
``alpha``     Bohr³       isotropic polarisability
``homo``      eV          energy of the highest occupied orbital
``lumo``      eV          energy of the lowest unoccupied orbital
``gap``       eV          lumo − homo
``Cv``        cal/mol/K   heat capacity at 298.15 K
============  ==========  ===============================================

``ase_enf.data.qm9`` gives every molecule the keys that its source has. Raw files opened by ``ase.io.read`` have the
published values under ``qm9_gap`` and so on, with orbital energies in Hartree; they are found as well, and converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

UNITS = {"mu": "D", "alpha": "Bohr³", "homo": "eV", "lumo": "eV", "gap": "eV", "Cv": "cal/mol/K"}
"""Properties of QM9 that condition flows in the literature, and their units here."""

DECIMALS = 5
"""More than any published value has."""

HARTREE = ("homo", "lumo", "gap")
"""The properties that QM9 publishes in Hartree."""


def from_published(name: str, value: float) -> float:
    """Returns a property of QM9 in the unit of ``UNITS``, from its published value.

    Example:
        >>> round(from_published("gap", 0.25), 3)
        6.803
    """
    exact = round(float(value), DECIMALS)  # the published digits, if it was stored in single precision
    return exact * units.Hartree if name in HARTREE else exact


def to_published(name: str, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns properties in the units in which QM9 is published; the inverse of ``from_published``.

    Example:
        >>> round(float(to_published("gap", np.array(6.803))), 3)
        0.25
    """
    return np.asarray(values, dtype=np.float64) / (units.Hartree if name in HARTREE else 1.0)


def property_of(atoms: Atoms, name: str) -> float | None:
    """Returns a property of a molecule, None if it does not have it.

    Args:
        atoms: A molecule. Its property is ``info[name]``, or a key of that name of the ASE database it came from, or
            the published value under ``info["qm9_" + name]``.
        name: Name of the property.

    Raises:
        ValueError: If the entry is not a finite number.

    Example:
        >>> property_of(Atoms("He", info={"gap": 20.0}), "gap"), property_of(Atoms("He"), "gap")
        (20.0, None)
    """
    pairs = atoms.info.get("key_value_pairs")
    found = atoms.info.get(name, pairs.get(name) if isinstance(pairs, dict) else None)
    if found is None and (found := atoms.info.get(f"qm9_{name}")) is not None and name in UNITS:
        found = from_published(name, found)
    if found is None:
        return None
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"info[{name!r}] of {atoms.get_chemical_formula()} is {found!r}, no finite number; correct or remove it"
        )
    return value


def property_table(atoms: Iterable[Atoms], names: Sequence[str], required: bool = False) -> NDArray[np.float64]:
    """Returns properties of many molecules, NaN for those that are missing.

    Args:
        atoms: B molecules.
        names: C properties.
        required: Whether every molecule must have all of them.

    Returns:
        Shape (B, C).

    Raises:
        ValueError: If a required property is missing; the message names those that are present.

    Example:
        >>> property_table([Atoms("He", info={"gap": 20.0}), Atoms("Ne")], ["gap"])
        array([[20.],
               [nan]])
    """
    rows = []
    for index, item in enumerate(atoms):
        row = [property_of(item, name) for name in names]
        if required and None in row:
            missing = names[row.index(None)]
            raise ValueError(
                f"structure {index} ({item.get_chemical_formula()}): has no property {missing!r} in its info"
                f"{_known(item)}; {_remedy(item, missing)}"
            )
        rows.append([math.nan if value is None else value for value in row])
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def _remedy(atoms: Atoms, missing: str) -> str:
    """Says what to do about a property that is not in ``info``; ASE reads energies of files into a calculator."""
    if missing in getattr(atoms.calc, "results", {}):
        return f"it is a result of its calculator: copy it to info under another name, such as my_{missing}"
    return "name one that all structures have"


def _known(atoms: Atoms) -> str:
    """Says which numbers a molecule has."""
    pairs = atoms.info.get("key_value_pairs")
    every = {**(pairs if isinstance(pairs, dict) else {}), **atoms.info}
    there = sorted(key for key, value in every.items() if isinstance(value, float | int | np.number))
    return f", which has {', '.join(there[:12])}" if there else ""
