"""The training set: molecules as flat arrays, batches of one size, and what the model takes from the data."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.symbols import Symbols
from torch import Tensor, nn

from ase_enf.atoms.batch import Batch, check_atoms


class MoleculeSet:
    """Molecules as flat arrays, from which padded batches are gathered.

    Args:
        atoms: Structures, checked one by one; never modified.
        species: Elements of the one-hot columns; empty for positions only.
        dimension: Dimension of space.
        conditions: Properties that condition the flow, shape (molecules, C); None for none.
        bonds: Bonds of each structure, (M, M) arrays; None for a flow without graphs.

    Raises:
        ValueError: See ``atoms.batch.check_atoms``; also if the set is empty.
    """

    def __init__(
        self,
        atoms: Sequence[Atoms],
        species: Sequence[str],
        dimension: int,
        conditions: np.ndarray | None = None,
        bonds: Sequence[np.ndarray] | None = None,
    ) -> None:
        if not atoms:
            raise ValueError("no structures to train on; the data set is empty")
        for index, item in enumerate(atoms):
            check_atoms(item, species, index, dimension)
        sizes = np.array([len(item) for item in atoms])
        numbers = np.concatenate([item.numbers for item in atoms])
        positions = np.concatenate([item.positions[:, :dimension] for item in atoms])
        self._fill(sizes, numbers, positions, species)
        self.conditions = None if conditions is None else torch.from_numpy(conditions).float()
        self._keep_bonds(bonds)

    @classmethod
    def from_arrays(
        cls, sizes: np.ndarray, numbers: np.ndarray, positions: np.ndarray, species: Sequence[str]
    ) -> MoleculeSet:
        """Builds a set from the arrays of a table of molecules, without checking them.

        Args:
            sizes: Number of atoms of each molecule, shape (B,).
            numbers: Atomic numbers of all molecules, concatenated, shape (N,).
            positions: Their positions, Å, shape (N, n).
            species: Elements of the one-hot columns; empty for positions only.
        """
        table = cls.__new__(cls)
        table._fill(sizes.astype(np.int64), numbers.astype(np.int64), positions.astype(np.float64), species)
        return table

    def _fill(self, sizes: np.ndarray, numbers: np.ndarray, positions: np.ndarray, species: Sequence[str]) -> None:
        self.conditions: Tensor | None = None  # (B, C)
        self.bonds: Tensor | None = None  # (Σ M²,), the matrices of all molecules, concatenated
        first = np.cumsum(sizes) - sizes
        centroids = np.add.reduceat(positions, first, axis=0) / sizes[:, None]
        centered = positions - np.repeat(centroids, sizes, axis=0)
        column = np.zeros(len(chemical_symbols), dtype=np.int64)
        for k, symbol in enumerate(species):
            column[atomic_numbers[symbol]] = k
        self.sizes = torch.from_numpy(sizes)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.positions = torch.from_numpy(centered).float()
        self.charges = torch.from_numpy(numbers).float().unsqueeze(-1)
        self.types = nn.functional.one_hot(torch.from_numpy(column[numbers]), max(len(species), 1)).float()[
            :, : len(species)
        ]

    def _keep_bonds(self, bonds: Sequence[np.ndarray] | None) -> None:
        if bonds is not None:
            self.bonds = torch.from_numpy(np.concatenate([matrix.astype(np.uint8).ravel() for matrix in bonds]))
            self.bond_starts = self.sizes.square().cumsum(0) - self.sizes.square()

    def __len__(self) -> int:
        return len(self.sizes)

    @functools.cached_property
    def compositions(self) -> Counter[str]:
        """Counts of formulas (Hill order), which only a flow of given types needs."""
        molecules = np.split(self.charges[:, 0].int().numpy(), self.starts[1:].numpy())
        return Counter(Symbols(numbers).formula.format("hill") for numbers in molecules)

    def common(self, other: MoleculeSet) -> int:
        """Returns how many molecules of this set are in another: the same elements at the same positions, to 1e-3 Å."""
        theirs = set(other._fingerprints())
        return sum(found in theirs for found in self._fingerprints())

    def _fingerprints(self) -> Iterator[bytes]:
        """Yields bytes that identify each molecule: its atomic numbers and rounded centred positions, in order."""
        positions = np.round(self.positions.numpy(), 3) + 0.0  # turns −0 into 0
        rows = np.concatenate([self.charges.numpy(), positions], axis=1)
        for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True):
            yield rows[start : start + size].tobytes()

    def batch(self, index: np.ndarray | Tensor) -> Batch:
        """Gathers the molecules ``index`` into one padded batch."""
        index = torch.as_tensor(index)
        sizes, starts = self.sizes[index], self.starts[index]
        slots = torch.arange(int(sizes.max()))
        mask = slots < sizes[:, None]
        atom = torch.where(mask, starts[:, None] + slots, starts[:, None])
        real = mask.unsqueeze(-1).float()
        conditions = None if self.conditions is None else self.conditions[index]
        bonds = None if self.bonds is None else self._bonds(index, mask)
        atoms = (self.positions[atom] * real, self.types[atom] * real, self.charges[atom] * real)
        return Batch(*atoms, mask, conditions, bonds)

    def _bonds(self, index: Tensor, mask: Tensor) -> Tensor:
        """Returns the bonds of some molecules, padded to (B, M, M)."""
        slots = torch.arange(mask.shape[1])
        inside = mask.unsqueeze(2) & mask.unsqueeze(1)
        place = self.bond_starts[index, None, None] + slots[:, None] * self.sizes[index, None, None] + slots
        return torch.where(inside, self.bonds[torch.where(inside, place, 0)], 0)

    def epoch_plan(self, batch_size: int, seed: Sequence[int]) -> list[np.ndarray]:
        """Returns the batches of one epoch as index arrays: each of one size, then the rest, sorted by size."""
        rng = np.random.default_rng(seed)
        plan, rest = [], []
        sizes = self.sizes.numpy()
        for size in np.unique(sizes):
            members = rng.permutation(np.flatnonzero(sizes == size))
            full = len(members) // batch_size * batch_size
            plan += np.split(members[:full], full // batch_size) if full else []
            rest.append(members[full:])
        left = np.concatenate(rest)
        plan += [left[k : k + batch_size] for k in range(0, len(left), batch_size)]
        return [plan[k] for k in rng.permutation(len(plan))]

    def position_scale(self) -> float:
        """Returns the root mean square of a coordinate on the subspace, ``√(Σ‖x‖² / Σ (M − 1) n)``, Å."""
        dimensions = int(((self.sizes - 1) * self.positions.shape[-1]).sum())
        return math.sqrt(float(np.square(_doubles(self.positions)).sum()) / dimensions)

    def feature_standardisation(self, spread: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns shift and scale of (types, charge): zero mean, one-hot types ``spread`` apart, charges as wide."""
        types, charges = _doubles(self.types), _doubles(self.charges)
        width = float(charges.std(ddof=1)) or 1.0
        shift = (*types.mean(axis=0).tolist(), float(charges.mean()) + 0.5)
        return shift, (spread,) * types.shape[-1] + (spread / width,)

    def feature_std(self, scale: Sequence[float]) -> float:
        """Returns the root mean square, over types and charge, of their deviations from the mean, times ``scale``."""
        values = np.concatenate([_doubles(self.types), _doubles(self.charges)], axis=1) * np.asarray(scale)
        return float(np.sqrt(values.var(axis=0).mean()))


def _doubles(values: Tensor) -> np.ndarray:
    """Returns float64 arrays of NumPy, whose sums, unlike those of torch, do not depend on the number of threads."""
    return values.numpy().astype(np.float64)
