"""Everything the metrics need to know about structures, found in one pass."""

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
    """Everything the metrics need to know about N structures.

    Attributes:
        stability: Numbers of stable atoms and verdicts, arrays of shape (N,).
        fragments: Number of connected fragments of each bond graph, shape (N,).
        readings: RDKit's readings of the N bond graphs.
        distances: Histograms of the distances between different atoms over ordered pairs, in bins on [0, 13] Å, shape
            (N, 100); the last bin includes longer ones.
        elements: Atomic numbers of the elements that occur, ascending, shape (E,).
        atoms_by_element: Number of atoms of each element, shape (N, E).
        stable_by_element: Number of stable atoms of each element, shape (N, E).
    """

    stability: Stability
    fragments: NDArray[np.int64]
    readings: tuple[Reading, ...]
    distances: NDArray[np.int64]
    elements: NDArray[np.int64]
    atoms_by_element: NDArray[np.int64]
    stable_by_element: NDArray[np.int64]


Structures = Survey | Atoms | Iterable[Atoms]


def survey(atoms: Structures) -> Survey:
    """Finds bonds, stability, fragments, SMILES and distances of structures in one pass.

    Every metric accepts a survey instead of structures, so that several metrics of one set share the work.

    Args:
        atoms: One or several structures; a survey is returned unchanged.

    Returns:
        The survey; its entries for a structure do not depend on the others. A structure with a position that is not
        finite has no stable atom, no fragment, no SMILES and no distances.

    Raises:
        ValueError: If there are no structures, or one is periodic or has an unknown atomic number.
        TypeError: If an item is not an ``Atoms``.

    Example:
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
    sizes = np.array([len(item) for item in listed], dtype=np.int64)
    numbers = np.concatenate([item.numbers for item in listed])
    elements = np.unique(numbers)
    atoms_by_element = _count_by_element(elements, numbers, np.repeat(np.arange(len(listed)), sizes), len(listed))
    stable_by_element = np.zeros_like(atoms_by_element)
    finite = np.array([place for place, item in enumerate(listed) if np.isfinite(item.positions).all()], dtype=np.int64)
    for group, numbers, positions in size_groups([listed[place] for place in finite]):
        index = finite[group]
        orders = bond_orders(numbers, positions)
        rows, columns = np.nonzero(stable_atoms(numbers, orders))
        stable_by_element[index] = _count_by_element(elements, numbers[rows, columns], rows, len(index))
        fragments[index] = n_fragments(orders)
        distances[index] = distance_counts(positions)
        for place, kinds, matrix in zip(index, numbers, orders, strict=True):
            readings[place] = read_graph(kinds, matrix)
    stable = stable_by_element.sum(axis=1)
    verdicts = Stability(stable, sizes, (stable == sizes) & (sizes > 0))
    return Survey(verdicts, fragments, tuple(readings), distances, elements, atoms_by_element, stable_by_element)


def _count_by_element(
    elements: NDArray[np.int64],  # (E,), increasing
    numbers: NDArray[np.int64],  # (A,), atomic numbers, each one of the elements
    owners: NDArray[np.int64],  # (A,), the structure of each atom
    n: int,
) -> NDArray[np.int64]:  # (n, E)
    """Returns the number of atoms of each element in each of n structures."""
    cells = owners * len(elements) + np.searchsorted(elements, numbers)
    return np.bincount(cells, minlength=n * len(elements)).reshape(n, len(elements))
