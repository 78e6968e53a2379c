"""The baseline of the conformer benchmark: the likelihood of distances by histograms of other molecules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ase_enf.chem.bonds import pair_distances, size_groups


class DistanceHistogram(NamedTuple):
    """The baseline: a density of distances for each pair of elements, Σ_{i<j} log p(d_ij | elements of i and j).

    The densities are linear between the centres of bins and mixed with a little of the uniform density. As distances
    depend on each other, the sum is not the logarithm of a normalised density of geometries.

    Attributes:
        centres: Densities at the centres of the bins by atomic numbers, 1/Å, shape (Z, Z, N).
        width: Width of a bin, Å.
    """

    centres: NDArray[np.float64]
    width: float

    @staticmethod
    def fit(
        molecules: Iterable[Atoms], width: float = 0.0025, smoothing: float = 0.5, reach: float = 15.0
    ) -> DistanceHistogram:
        """Counts distances; the defaults maximise the likelihood of unseen molecules (validation split).

        Args:
            molecules: Molecules whose distances are counted.
            width: Width of a bin, Å.
            smoothing: Standard deviation of the Gaussian that smooths the counts, in bins.
            reach: Largest distance, Å, which also stands for longer ones.
        """
        molecules = list(molecules)
        bins, top = round(reach / width), max(int(item.numbers.max()) for item in molecules) + 1
        counts = np.zeros(top * top * bins)
        for group in size_groups(molecules):
            i, j = np.triu_indices(group.numbers.shape[1], 1)
            place = np.minimum(pair_distances(group.positions)[:, i, j] / width, bins - 1).astype(np.int64)
            pair = group.numbers[:, i] * top + group.numbers[:, j]
            counts += np.bincount((pair * bins + place).ravel(), minlength=len(counts))
        counts = counts.reshape(top, top, bins)
        counts = counts + counts.transpose(1, 0, 2)
        smooth = gaussian_filter1d(counts, smoothing, axis=-1, mode="reflect") if smoothing else counts
        total = smooth.sum(axis=-1, keepdims=True)
        # An unseen pair of elements is uniform, as is 1 in 10,000 parts of all others, so that logarithms are finite.
        floor = np.where(total > 0, 1e-4, 1.0)
        return DistanceHistogram(((1 - floor) * smooth / np.maximum(total, 1) + floor / bins) / width, width)

    def density(self, first: int, second: int, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns p(d | elements) in 1/Å for two atomic numbers."""
        places = np.asarray(distances) / self.width - 0.5
        return np.interp(places, np.arange(self.centres.shape[-1]), self.centres[first, second])

    def log_likelihood(self, atoms: Atoms) -> float:
        """Returns the sum over all pairs of atoms, nats."""
        i, j = np.triu_indices(len(atoms), 1)
        distances = pair_distances(atoms.positions[None])[0, i, j]
        pairs = np.sort(atoms.numbers[np.stack([i, j], axis=1)], axis=1)
        return float(
            sum(
                np.log(self.density(first, second, distances[(pairs == (first, second)).all(axis=1)])).sum()
                for first, second in np.unique(pairs, axis=0).tolist()
            )
        )
