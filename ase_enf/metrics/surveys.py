"""Everything the metrics need to know of structures, found in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.chem.bonds import Stability, bond_orders, n_fragments, size_groups, stable_atoms, structures
from ase_enf.chem.convert import Reading, read_graph
from ase_enf.metrics.histogram import N_BINS, distance_counts


class Survey(NamedTuple):
    """Everything the metrics need to know of N structures, found in one pass.

    Attributes:
        stability: counts of stable atoms and verdicts, arrays of shape (N,).
        fragments: shape (N,), number of connected fragments of the bond graph.
        readings: N readings of the bond graphs by RDKit.
        distances: shape (N, 100), distances between different atoms, counted over ordered pairs, in bins on [0, 13] Å;
            what is longer is in the last bin.
    """

    stability: Stability
    fragments: NDArray[np.int64]
    readings: tuple[Reading, ...]
    distances: NDArray[np.int64]


Structures = Survey | Atoms | Iterable[Atoms]


def survey(atoms: Structures) -> Survey:
    """Bonds, stability, fragments, SMILES and distances of structures, in one pass.

    Every metric takes a survey in place of the structures: several metrics of one set then share the work.

    Args:
        atoms: One structure or several; a survey is returned as it is.

    Returns:
        The survey; what it says of a structure does not depend on the others. One with a position that is not finite
        has no stable atom, no fragment, no SMILES and no distances.

    Raises:
        ValueError: There are no structures, or one is periodic or has an atomic number of no element.
        TypeError: An item is not an `Atoms`.

    >>> from ase.build import molecule
    >>> seen = survey(molecule("CH3CHO"))
    >>> seen.readings[0].smiles, int(seen.fragments[0])
    ('CC=O', 1)
    """
    if isinstance(atoms, Survey):
        return atoms
    listed = structures(atoms)
    if not listed:
        raise ValueError("there are no structures to evaluate: the list is empty")
    fragments = np.zeros(len(listed), dtype=np.int64)
    distances = np.zeros((len(listed), N_BINS), dtype=np.int64)
    readings: list[Reading] = [Reading(None, None, False)] * len(listed)
    stable = np.zeros(len(listed), dtype=np.int64)
    finite = np.array([place for place, item in enumerate(listed) if np.isfinite(item.positions).all()], dtype=np.int64)
    for group, numbers, positions in size_groups([listed[place] for place in finite]):
        index = finite[group]
        orders = bond_orders(numbers, positions)
        stable[index] = stable_atoms(numbers, orders).sum(axis=1)
        fragments[index] = n_fragments(orders)
        distances[index] = distance_counts(positions)
        for place, elements, matrix in zip(index, numbers, orders, strict=True):
            readings[place] = read_graph(elements, matrix)
    sizes = np.array([len(item) for item in listed], dtype=np.int64)
    verdicts = Stability(stable, sizes, (stable == sizes) & (sizes > 0))
    return Survey(verdicts, fragments, tuple(readings), distances)
