"""Bonds from the published distance table, and the stability they imply.

The table, its margins and its valences are those of the E-NF paper (appendix A.3; H, C, N, O, F), extended by Hoogeboom
et al. 2022 (EDM, arXiv:2203.17003) to B, Si, P, S, Cl, As, Br and I. The bond order of a pair at distance d is

    1 if d < single + 10 pm,  2 if also d < double + 5 pm,  3 if also d < triple + 3 pm,  otherwise 0.

There are neither aromatic bonds nor charges: the metric is kept as it was published.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

# Bond lengths in pm, {order: {pair: length}}: the table of the paper, for H, C, N, O and F.
QM9_LENGTHS: dict[int, dict[str, int]] = {
    1: {
        "H-H": 74, "H-C": 109, "H-N": 101, "H-O": 96, "H-F": 92,
        "C-C": 154, "C-N": 147, "C-O": 143, "C-F": 135,
        "N-N": 145, "N-O": 140, "N-F": 136,
        "O-O": 148, "O-F": 142,
        "F-F": 142,
    },
    2: {"C-C": 134, "C-N": 129, "C-O": 120, "N-N": 125, "N-O": 121, "O-O": 121},
    3: {"C-C": 120, "C-N": 116, "C-O": 113, "N-N": 110},
}  # fmt: skip

# The pairs that EDM adds: none of them is in the table above, so results for QM9 do not change.
WIDER_LENGTHS: dict[int, dict[str, int]] = {
    1: {
        "H-B": 119, "H-Si": 148, "H-P": 144, "H-As": 152, "H-S": 134, "H-Cl": 127, "H-Br": 141, "H-I": 161,
        "C-Si": 185, "C-P": 184, "C-S": 182, "C-Cl": 177, "C-Br": 194, "C-I": 214,
        "N-Cl": 175, "N-Br": 214, "N-S": 168, "N-I": 222, "N-P": 177,
        "O-Br": 172, "O-S": 151, "O-P": 163, "O-Si": 163, "O-Cl": 164, "O-I": 194,
        "F-S": 158, "F-Si": 160, "F-Cl": 166, "F-Br": 178, "F-P": 156, "F-I": 187,
        "B-Cl": 175,
        "Si-Si": 233, "Si-S": 200, "Si-Cl": 202, "Si-Br": 215, "Si-I": 243,
        "Cl-Cl": 199, "Cl-P": 203, "Cl-S": 207, "Cl-Br": 214,
        "S-S": 204, "S-Br": 225, "S-P": 210, "S-I": 234,
        "Br-Br": 228, "Br-P": 222,
        "P-P": 221,
        "I-I": 266,
    },
    2: {"C-S": 160, "O-P": 150, "P-S": 186},
    3: {},
}  # fmt: skip

MARGINS: dict[int, int] = {1: 10, 2: 5, 3: 3}  # pm, added to the lengths of each order

VALENCES: dict[str, tuple[int, ...]] = {
    "H": (1,), "C": (4,), "N": (3,), "O": (2,), "F": (1,), "B": (3,), "Al": (3,), "Si": (4,), "P": (3, 5), "S": (4,),
    "Cl": (1,), "As": (3,), "Br": (1,), "I": (1,),
}  # fmt: skip

_ELEMENTS = len(chemical_symbols)  # atomic numbers 0 (padding, or ASE's dummy "X") to 118
_MOST_BONDS = 15  # larger sums of bond orders are counted as this one, which satisfies no element
_PAIRS_AT_ONCE = 2**16  # pairs of atoms in one vectorised step, so that temporaries stay in the processor's cache


def _reach() -> NDArray[np.float64]:
    """Distance below which a pair of elements has order 1, 2, 3, shape (3, 119, 119), Å; 0 where it never has it.

    A pair has an order only if it has the lower ones, hence the running minimum. Lengths are divided by 100, rather
    than distances multiplied, so that the limit of C-C is exactly the float 1.64.
    """
    reach = np.zeros((3, _ELEMENTS, _ELEMENTS))
    for lengths in (QM9_LENGTHS, WIDER_LENGTHS):
        for order, pairs in lengths.items():
            for pair, length in pairs.items():
                a, b = (atomic_numbers[symbol] for symbol in pair.split("-"))
                reach[order - 1, [a, b], [b, a]] = (length + MARGINS[order]) / 100
    return np.minimum.accumulate(reach, axis=0)


def _satisfied() -> NDArray[np.bool_]:
    """Whether a sum of bond orders is a valence of an element, shape (119, 16)."""
    satisfied = np.zeros((_ELEMENTS, _MOST_BONDS + 1), dtype=bool)
    for symbol, valences in VALENCES.items():
        satisfied[atomic_numbers[symbol], list(valences)] = True
    return satisfied


_REACH = _reach()
_SATISFIED = _satisfied()


class Stability(NamedTuple):
    """Number of atoms of each structure that have exactly their valence.

    A structure is stable if all its atoms are; one without atoms is not.

    Attributes:
        stable_atoms: Number of atoms whose bond orders sum to a valence of their element, shape (N,).
        n_atoms: Number of atoms, shape (N,).
        stable: Whether all atoms of the structure are stable, shape (N,).
    """

    stable_atoms: NDArray[np.int64]
    n_atoms: NDArray[np.int64]
    stable: NDArray[np.bool_]


class SizeGroup(NamedTuple):
    """Structures of one size as arrays, without padding.

    Attributes:
        index: Indices of the structures in the list they came from, shape (B,).
        numbers: Atomic numbers, shape (B, M).
        positions: Positions, shape (B, M, 3), Å.
    """

    index: NDArray[np.int64]
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]


def structures(atoms: Atoms | Iterable[Atoms]) -> list[Atoms]:
    """Returns one or several ``Atoms`` as a list, after checking that they are non-periodic and of known elements.

    Args:
        atoms: One structure or an iterable of structures.

    Returns:
        A list of the same objects, in order.

    Raises:
        TypeError: If an item is not an ``Atoms``; the message gives its index.
        ValueError: If a structure is periodic or has an atomic number below 0 or above 118; the message gives its
            index.

    Example:
        >>> from ase.build import molecule
        >>> len(structures(molecule("CH4")))
        1
    """
    if isinstance(atoms, str | os.PathLike) or not isinstance(atoms, Iterable):
        raise TypeError(
            f"expected ase.Atoms or several, got {type(atoms).__name__} {atoms!r}; read files with ase.io.read"
        )
    listed = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    for place, item in enumerate(listed):
        if not isinstance(item, Atoms):
            raise TypeError(f"structure {place} is a {type(item).__name__}, not an ase.Atoms")
        unknown = item.numbers[(item.numbers < 0) | (item.numbers >= _ELEMENTS)]
        if len(unknown):
            raise ValueError(
                f"structure {place} has the atomic number {unknown[0]}: elements are 1 to {_ELEMENTS - 1}, and 0 is "
                "ASE's X; correct it"
            )
        if item.pbc.any():
            raise ValueError(
                f"structure {place} ({item.get_chemical_formula()}) is periodic: bonds are defined for molecules only; "
                "set `atoms.pbc = False` if its cell means nothing"
            )
    return listed


def size_groups(atoms: Atoms | Iterable[Atoms]) -> Iterator[SizeGroup]:
    """Yields structures as arrays, grouped by number of atoms and split into pieces of bounded memory.

    Args:
        atoms: One structure or an iterable of structures.

    Yields:
        Groups in ascending order of size, which together hold every structure once.

    Raises:
        TypeError: If an item is not an ``Atoms``.
        ValueError: If a structure is periodic or has a position that is not finite; the message gives its index.

    Example:
        >>> from ase.build import molecule
        >>> [group.numbers.shape for group in size_groups([molecule("CH4"), molecule("H2O"), molecule("SiH4")])]
        [(1, 3), (2, 5)]
    """
    listed = structures(atoms)
    sizes = np.array([len(item) for item in listed], dtype=np.int64)
    for size in np.unique(sizes):
        places = np.flatnonzero(sizes == size)
        step = max(1, _PAIRS_AT_ONCE // max(1, int(size) ** 2))
        for start in range(0, len(places), step):
            index = places[start : start + step]
            numbers = np.array([listed[place].numbers for place in index], dtype=np.int64)
            positions = np.array([listed[place].positions for place in index], dtype=np.float64)
            _require_finite(positions, index)
            yield SizeGroup(index, numbers, positions)


def pair_distances(
    positions: NDArray[np.floating],  # (B, M, 3), Å
) -> NDArray[np.float64]:  # (B, M, M), Å
    """Distances between all atoms of each structure, d_ij = |x_i − x_j|.

    Args:
        positions: Positions, shape (B, M, 3), Å.

    Returns:
        Distances, shape (B, M, M), Å, symmetric with a zero diagonal.

    Example:
        >>> pair_distances(np.array([[[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]]])).tolist()
        [[[0.0, 5.0], [5.0, 0.0]]]
    """
    positions = np.asarray(positions, dtype=np.float64)
    squared = np.zeros(positions.shape[:2] + positions.shape[1:2])
    for axis in range(positions.shape[2]):  # one axis at a time needs no temporary of shape (B, M, M, 3)
        along = positions[:, :, axis]
        squared += np.square(along[:, :, None] - along[:, None, :])
    return np.sqrt(squared)


def bond_orders(
    numbers: NDArray[np.integer],  # (B, M), 0 = padding
    positions: NDArray[np.floating],  # (B, M, 3), Å
) -> NDArray[np.int8]:  # (B, M, M)
    """Bond orders of a padded batch from the published distance table.

    order = [d < single + 10 pm] + [d < double + 5 pm] + [d < triple + 3 pm], where each term requires the one before.
    A pair that is not in the table never bonds, and neither does an element that the table lacks.

    Args:
        numbers: Atomic numbers, shape (B, M); 0 is padding, which bonds with nothing.
        positions: Positions, shape (B, M, 3), Å; ignored at padding.

    Returns:
        Orders 0 to 3, shape (B, M, M), symmetric with a zero diagonal.

    Raises:
        ValueError: If the shapes do not fit, or a position is not finite; the message gives the structure.

    Reference:
        Satorras et al. 2021 (E-NF), appendix A.3; Hoogeboom et al. 2022 (EDM) for the elements beyond F.

    Example:
        >>> bond_orders(np.array([[6, 8, 0]]), np.array([[[0.0, 0, 0], [1.13, 0, 0], [0.0, 0, 0]]])).tolist()
        [[[0, 3, 0], [3, 0, 0], [0, 0, 0]]]
    """
    numbers, positions = np.asarray(numbers), np.asarray(positions)
    if numbers.ndim != 2 or positions.shape != (*numbers.shape, 3):
        raise ValueError(
            f"expected numbers (B, M) and positions (B, M, 3), got {numbers.shape} and {positions.shape}; "
            "a single structure is a batch of one: numbers[None], positions[None]"
        )
    _require_finite(np.where(numbers[:, :, None] == 0, 0.0, positions), np.arange(len(numbers)))
    distance = pair_distances(positions)
    pair = numbers[:, :, None].astype(np.intp) * _ELEMENTS + numbers[:, None, :]
    orders = np.zeros(distance.shape, dtype=np.int8)
    for reach in _REACH.reshape(len(_REACH), -1):
        orders += distance < reach[pair]
    diagonal = np.arange(numbers.shape[1])
    orders[:, diagonal, diagonal] = 0
    return orders


def stable_atoms(
    numbers: NDArray[np.integer],  # (B, M), 0 = padding
    orders: NDArray[np.integer],  # (B, M, M)
) -> NDArray[np.bool_]:  # (B, M)
    """Whether the bond orders of each atom sum exactly to a valence of its element, Σ_j order_ij ∈ valences(i).

    Args:
        numbers: Atomic numbers, shape (B, M); 0 is padding.
        orders: Bond orders as returned by ``bond_orders``, shape (B, M, M).

    Returns:
        Verdicts, shape (B, M); False at padding and for elements without a valence in the table.

    Example:
        >>> numbers = np.array([[1, 1]])
        >>> stable_atoms(numbers, bond_orders(numbers, np.array([[[0.0, 0, 0], [0.74, 0, 0]]]))).tolist()
        [[True, True]]
    """
    valence = orders.sum(axis=2, dtype=np.int64)
    return _SATISFIED[numbers, np.minimum(valence, _MOST_BONDS)]


def n_fragments(
    orders: NDArray[np.integer],  # (B, M, M)
) -> NDArray[np.int64]:  # (B,)
    """Number of connected components of each bond graph.

    Every atom takes the smallest label among itself and its neighbours until nothing changes; the atoms of a component
    then share one label.

    Args:
        orders: Bond orders, shape (B, M, M), without padding, which would count as fragments.

    Returns:
        Numbers of fragments, shape (B,).

    Example:
        >>> n_fragments(np.array([[[0, 1, 0], [1, 0, 0], [0, 0, 0]]])).tolist()
        [2]
    """
    batch, size = orders.shape[:2]
    apart = np.where(orders > 0, 0, size)  # added to a label, it exceeds all labels: such an atom is ignored
    apart[:, np.arange(size), np.arange(size)] = 0  # an atom counts its own label
    labels = np.tile(np.arange(size), (batch, 1))
    while size:
        spread = np.min(labels[:, None, :] + apart, axis=2)
        if np.array_equal(spread, labels):
            break
        labels = spread
    return np.sum(labels == np.arange(size), axis=1)


def stability(atoms: Atoms | Iterable[Atoms]) -> Stability:
    """Atom and molecule stability of structures, as published.

    An atom is stable if the orders of its bonds (``bond_orders``) sum exactly to a valence of its element
    (``VALENCES``); a molecule is stable if all its atoms are. An element without entries in the table never bonds and
    counts as unstable: for such a molecule the verdict means that the table does not cover it, and says nothing about
    its chemistry. The result for a structure does not depend on the others.

    Args:
        atoms: One structure or an iterable of structures.

    Returns:
        Counts and verdicts, one for each structure, in order.

    Raises:
        TypeError: If an item is not an ``Atoms``.
        ValueError: If a structure is periodic or has a position that is not finite; the message gives its index.

    Reference:
        Satorras et al. 2021 (E-NF), appendix A.3.

    Example:
        >>> from ase.build import molecule
        >>> stability([molecule("CH4"), molecule("CH3")]).stable.tolist()
        [True, False]
    """
    listed = structures(atoms)
    counts = np.zeros(len(listed), dtype=np.int64)
    for group in size_groups(listed):
        orders = bond_orders(group.numbers, group.positions)
        counts[group.index] = stable_atoms(group.numbers, orders).sum(axis=1)
    sizes = np.array([len(item) for item in listed], dtype=np.int64)
    return Stability(counts, sizes, (counts == sizes) & (sizes > 0))


def _require_finite(
    positions: NDArray[np.floating],  # (B, M, 3)
    places: Sequence[int] | NDArray[np.int64],  # (B,)
) -> None:
    """Raises a ``ValueError`` that gives the indices of structures whose positions are not finite."""
    broken = ~np.isfinite(positions).all(axis=(1, 2))
    if broken.any():
        named = ", ".join(str(place) for place in np.asarray(places)[broken][:5])
        raise ValueError(
            f"structure {named} has positions that are NaN or infinite ({int(broken.sum())} such in this batch): "
            "remove them, and count them as failures, before measuring the rest"
        )
