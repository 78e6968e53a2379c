"""The batch of molecules, and the only two functions that convert between ``ase.Atoms`` and tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from ase_enf.atoms.formula import check_elements
from ase_enf.atoms.formula import formula_numbers as formula_numbers

# Two atoms closer than this (Å) are taken to be at one point, which no flow of finite density can give.
COINCIDENT = 1e-3
# Distances (Å) that agree to this many decimals are equal for the order of atoms.
ORDER_DECIMALS = 6
# Names in ``info`` under which programs state the charge of a whole structure, and its spin. The latter is either the
# number of unpaired electrons 2 S or the multiplicity 2 S + 1; only what the lowest spin cannot be is refused.
CHARGE_NAMES = ("charge", "total_charge")
MULTIPLICITY_NAMES, SPIN_NAMES = ("multiplicity", "spin_multiplicity"), ("spin", "total_spin")
# A total charge or moment below this (e, µ_B) is a rounding error of partial ones.
STATED = 0.1


class Batch(NamedTuple):
    """Molecules of up to M atoms, padded; every field is immutable by convention (operations return new ones).

    ========== ============ ============ =================================================
    field      shape        unit         meaning
    ========== ============ ============ =================================================
    positions  (B, M, n)    Å            centred on the centroid, zero at padding
    types      (B, M, K)    –            one-hot over the model's species, zero at padding
    charges    (B, M, 1)    e            nuclear charges Z, zero at padding
    mask       (B, M)       –            True for real atoms
    conditions (B, C)       their own    numbers of each molecule, NaN where unknown; or None
    bonds      (B, M, M)    –            0 none, 1, 2, 3, or 4 for an aromatic bond; or None
    ========== ============ ============ =================================================
    """

    positions: Tensor
    types: Tensor
    charges: Tensor
    mask: Tensor
    conditions: Tensor | None = None
    bonds: Tensor | None = None

    @property
    def n_atoms(self) -> Tensor:
        """Number of real atoms, shape (B,)."""
        return self.mask.sum(dim=-1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Moves every field; ``dtype`` applies to the floating ones."""
        floating = {"positions", "types", "charges", "conditions"}
        return Batch(
            *(
                None if t is None else t.to(device=device, dtype=dtype if name in floating else None)
                for name, t in zip(self._fields, self, strict=True)
            )
        )

    def select(self, index: Tensor) -> Batch:
        """Returns the molecules ``index`` (integers or booleans, shape (B',))."""
        return Batch(*(None if t is None else t[index] for t in self))

    def repeat(self, times: int) -> Batch:
        """Returns every molecule ``times`` times, copies side by side."""
        return Batch(*(None if t is None else t.repeat_interleave(times, dim=0) for t in self))


def one_or_many(atoms: Atoms | Iterable[Atoms]) -> list[Atoms]:
    """Returns one or several ``Atoms`` as a list.

    Raises:
        TypeError: If it is neither ``Atoms`` nor an iterable of them.
        ValueError: If an item has an unknown atomic number.

    Example:
        >>> len(one_or_many(Atoms("H2O", positions=[[0, 0, 0], [0, 0, 1], [0, 1, 0]])))
        1
    """
    if isinstance(atoms, str | os.PathLike) or not isinstance(atoms, Iterable):
        raise TypeError(
            f"expected ase.Atoms or several, got {type(atoms).__name__} {atoms!r}; read files with ase.io.read"
        )
    many = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    for index, item in enumerate(many):
        if not isinstance(item, Atoms):
            raise TypeError(
                f"structure {index}: expected ase.Atoms, got {type(item).__name__}; read files with ase.io.read"
            )
        check_elements(item, index)
    return many


def species_of(atoms: Iterable[Atoms]) -> tuple[str, ...]:
    """Returns the elements present, sorted by atomic number.

    Example:
        >>> from ase.build import molecule
        >>> species_of([molecule("CH3OH"), molecule("HF")])
        ('H', 'C', 'O', 'F')
    """
    present = sorted({int(z) for a in atoms for z in np.unique(a.numbers)})
    return tuple(chemical_symbols[z] for z in present)


def check_atoms(atoms: Atoms, species: Sequence[str], index: int = 0, dimension: int = 3) -> None:
    """Checks that a structure can be an input of a flow over ``species``.

    Args:
        atoms: The structure.
        species: Elements the flow knows; empty for a flow of positions only, which accepts any.
        index: Index in the caller's list, for the message.
        dimension: 3, or 2 for a flow in the xy plane.

    Raises:
        ValueError: If there is an unknown atomic number, a periodic cell, fewer than two atoms, non-finite coordinates,
            two atoms at one point, an atom off the xy plane of a two-dimensional flow, or an element that the flow does
            not know; for a flow that knows elements also if a net charge or a spin above the lowest is stated, which
            elements and positions do not determine.

    Example:
        >>> ion = Atoms("OH", [(0, 0, 0), (0, 0, 0.97)], info={"charge": -1})
        >>> check_atoms(ion, ["H", "O"])
        Traceback (most recent call last):
        ValueError: structure 0 (HO): states a net charge of -1 (info['charge']), of which the flow knows nothing; ...
    """
    check_elements(atoms, index)
    name = f"structure {index} ({atoms.get_chemical_formula() or 'empty'})"
    if atoms.pbc.any():
        raise ValueError(
            f"{name}: has periodic boundaries {atoms.pbc.tolist()}; the flow has no cells, "
            "set atoms.pbc = False for a molecule"
        )
    if len(atoms) < 2:
        raise ValueError(f"{name}: has {len(atoms)} atom(s); a density on centred positions needs at least 2")
    if not np.isfinite(atoms.positions).all():
        bad = int(np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))[0])
        raise ValueError(
            f"{name}: atom {bad} has non-finite coordinates {atoms.positions[bad].tolist()}; repair the input file"
        )
    unknown = sorted(set(atoms.symbols) - set(species)) if species else []
    if unknown:
        raise ValueError(
            f"{name}: element(s) {', '.join(unknown)} unknown to this model, which knows {', '.join(species)}; "
            "train one on your elements"
        )
    if species and (state := _stated_state(atoms)):
        raise ValueError(
            f"{name}: states {state}, of which the flow knows nothing; remove that to have the structure taken for a "
            "neutral one of lowest spin"
        )
    height = np.ptp(atoms.positions[:, 2])
    if dimension == 2 and height > COINCIDENT:
        raise ValueError(f"{name}: leaves the xy plane by {height:.3g} Å, but the model is two-dimensional; set z to 0")
    distance, i, j = closest_pair(atoms.positions)
    if distance < COINCIDENT:
        raise ValueError(f"{name}: atoms {i} and {j} lie on one point; remove the duplicate")


def _stated_state(atoms: Atoms) -> str | None:
    """Returns, as text, a net charge or a spin above the lowest that a structure states, or None."""
    for key in CHARGE_NAMES:
        if (value := _total(atoms.info.get(key))) and abs(value) > STATED:
            return f"a net charge of {value:g} (info[{key!r}])"
    if abs(value := float(atoms.get_initial_charges().sum())) > STATED:
        return f"a net charge of {value:g} (initial charges)"
    lowest = int(atoms.numbers.sum()) % 2  # unpaired electrons of the neutral structure
    for keys, allowed in ((MULTIPLICITY_NAMES, (0, lowest + 1)), (SPIN_NAMES, (0, lowest / 2, lowest, lowest + 1))):
        for key in keys:
            value = _total(atoms.info.get(key))
            if value is not None and min(abs(value - known) for known in allowed) > STATED:
                return f"a spin of {value:g} (info[{key!r}])"
    if abs(value := float(np.sum(atoms.get_initial_magnetic_moments()))) > lowest + STATED:
        return f"a magnetic moment of {value:g} (initial magnetic moments)"
    return None


def _total(value: Any) -> float | None:
    """Returns a stated number, or the sum of one for each atom; None for anything else."""
    try:
        return float(np.sum(np.asarray(value, dtype=float))) if value is not None else None
    except (TypeError, ValueError):
        return None


def to_batch(
    atoms: Sequence[Atoms],
    species: Sequence[str],
    dimension: int = 3,
    max_atoms: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Converts ``Atoms`` to a padded batch of centred positions.

    Args:
        atoms: Structures; checked, never modified.
        species: Elements in the order of the one-hot columns; empty for positions only.
        dimension: 3, or 2 for structures in the xy plane.
        max_atoms: Padded size M, the largest structure when None.
        dtype: Floating type.

    Returns:
        A batch on the CPU.

    Raises:
        ValueError: See :func:`check_atoms`.

    Example:
        >>> from ase.build import molecule
        >>> to_batch([molecule("H2O")], ["H", "O"]).types[0].tolist()
        [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    """
    for index, item in enumerate(atoms):
        check_atoms(item, species, index, dimension)
    if not atoms:
        raise ValueError("no structures to convert; the list is empty")
    largest = max(len(item) for item in atoms)
    width = max_atoms or largest
    if width < largest:
        raise ValueError(f"max_atoms={max_atoms}: a structure has {largest} atoms; leave it out or raise it")
    column = {atomic_numbers[symbol]: k for k, symbol in enumerate(species)}
    positions = np.zeros((len(atoms), width, dimension))
    types = np.zeros((len(atoms), width, len(species)))
    charges = np.zeros((len(atoms), width, 1))
    mask = np.zeros((len(atoms), width), dtype=bool)
    for row, item in enumerate(atoms):
        size = len(item)
        xyz = item.positions[:, :dimension]
        positions[row, :size] = xyz - xyz.mean(axis=0)  # in float64, before any rounding to dtype
        charges[row, :size, 0] = item.numbers
        mask[row, :size] = True
        if species:
            types[row, np.arange(size), [column[z] for z in item.numbers.tolist()]] = 1.0
    return Batch(
        torch.from_numpy(positions).to(dtype),
        torch.from_numpy(types).to(dtype),
        torch.from_numpy(charges).to(dtype),
        torch.from_numpy(mask),
    )


def to_atoms(batch: Batch, species: Sequence[str]) -> list[Atoms]:
    """Converts a batch to ``Atoms`` without cell; the inverse of :func:`to_batch` up to centring.

    Args:
        batch: Molecules; ``types`` decide the elements ("X" for a model of positions only).
        species: Elements in the order of the one-hot columns.

    Returns:
        One ``Atoms`` for each molecule, positions in Å (z = 0 for two dimensions).
    """
    numbers_of = np.array([atomic_numbers[symbol] for symbol in species] or [0])
    positions = batch.positions.detach().cpu().double().numpy()
    columns = batch.types.detach().cpu().numpy().argmax(axis=-1) if species else np.zeros(batch.mask.shape, dtype=int)
    result = []
    for xyz, column, real in zip(positions, columns, batch.mask.cpu().numpy(), strict=True):
        padded = np.zeros((int(real.sum()), 3))
        padded[:, : xyz.shape[-1]] = xyz[real]
        result.append(Atoms(numbers=numbers_of[column[real]], positions=padded))
    return result


def canonical_order(atoms: Atoms) -> np.ndarray:
    """Returns the order (element, then distance to the centroid) in which noise is attached to atoms.

    Noise attached in this order makes a score independent of the order of atoms in the file. Ties, as in symmetric
    molecules, are broken by the distances to all atoms and to those already placed. If several choices are equal, all
    are followed, and those with the first table of distances in lexicographic order are kept; they give the same
    structure up to a rotation or reflection.

    Args:
        atoms: One structure.

    Returns:
        ``rank``, where ``rank[i]`` is the position of atom i in the order, shape (M,).

    Example:
        >>> canonical_order(Atoms("OHH", positions=[[0, 0, 0], [0, 0, 1.2], [0, 1, 0]])).tolist()
        [2, 1, 0]
    """
    centered = atoms.positions - atoms.positions.mean(axis=0)
    # Rounding keeps symmetry-equivalent atoms, which differ by rounding errors alone, from being told apart.
    radius = np.round(np.linalg.norm(centered, axis=1), ORDER_DECIMALS)
    distances = np.round(np.linalg.norm(centered[:, None] - centered[None], axis=-1), ORDER_DECIMALS)
    keys = [(int(z), r, *sorted(d)) for z, r, d in zip(atoms.numbers, radius, distances.tolist(), strict=True)]
    place_of_key = {key: place for place, key in enumerate(sorted(set(keys)))}
    classes = [place_of_key[key] for key in keys]
    rows = distances.tolist()
    orders: list[tuple[int, ...]] = [()]
    for _ in atoms:
        extended = {
            (*order, atom): (classes[atom], *(rows[atom][placed] for placed in order))
            for order in orders
            for atom in range(len(atoms))
            if atom not in order
        }
        first = min(extended.values())
        orders = [order for order, key in extended.items() if key == first]
    rank = np.empty(len(atoms), dtype=int)
    rank[list(orders[0])] = np.arange(len(atoms))
    return rank


def closest_pair(positions: np.ndarray) -> tuple[float, int, int]:
    """Returns the smallest distance between two of at least two atoms, Å, and their indices i < j."""
    difference = positions[:, None] - positions[None]
    squared = np.einsum("ijk,ijk->ij", difference, difference)
    squared[np.diag_indices(len(positions))] = np.inf
    i, j = sorted(int(k) for k in np.unravel_index(squared.argmin(), squared.shape))
    return float(np.sqrt(squared[i, j])), i, j
