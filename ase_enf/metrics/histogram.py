"""Histograms of interatomic distances, and the divergence of two of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ase_enf.chem.bonds import pair_distances
from ase_enf.metrics.metric import ratio_stderr

N_BINS = 100
MAX_DISTANCE = 13.0  # Å
_TINY = 1e-10  # added to every bin of both histograms, as published


def distance_counts(
    positions: NDArray[np.floating],  # (B, M, 3), Å
) -> NDArray[np.int64]:  # (B, 100)
    """Histogram of the distances between different atoms of each structure, over ordered pairs.

    Args:
        positions: Positions, shape (B, M, 3), Å, without padding.

    Returns:
        Counts in equal bins on [0, 13] Å, shape (B, 100); the last bin includes longer distances.

    Example:
        >>> distance_counts(np.array([[[0.0, 0, 0], [1.0, 0, 0]]]))[0, :9].tolist()
        [0, 0, 0, 0, 0, 0, 0, 2, 0]
    """
    batch, size = positions.shape[:2]
    i, j = np.triu_indices(size, 1)
    scaled = pair_distances(positions)[:, i, j] / MAX_DISTANCE * N_BINS
    bins = np.minimum(scaled, N_BINS - 1).astype(np.int64) + N_BINS * np.arange(batch)[:, None]
    return 2 * np.bincount(bins.ravel(), minlength=N_BINS * batch).reshape(batch, N_BINS)


def js_divergence(counts: NDArray[np.number], others: NDArray[np.number]) -> float:
    """Jensen-Shannon divergence of two histograms, ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), in nats.

    Args:
        counts: A histogram, not normalised, shape (K,).
        others: The other histogram, not normalised, shape (K,).

    Returns:
        The divergence in nats, in [0, log 2] up to 1e-8; NaN if a histogram is empty.

    Example:
        >>> round(js_divergence(np.array([1, 0]), np.array([0, 1])), 6)  # log 2
        0.693147
    """
    if not (counts.sum() and others.sum()):
        return np.nan
    p, q = counts / counts.sum() + _TINY, others / others.sum() + _TINY
    m = (p + q) / 2
    return float(p @ np.log(p / m) + q @ np.log(q / m)) / 2


def js_stderr(counts: NDArray[np.integer], others: NDArray[np.integer]) -> float:
    """Standard error of JS by the delta method, with ∂JS/∂p_k = ½ log(p_k / m_k).

    Args:
        counts: Histogram of each structure, shape (N, K).
        others: Histogram of the reference, taken as exact, shape (K,).

    Returns:
        The standard error over structures, nats; NaN for fewer than two structures or an empty histogram.
    """
    total = counts.sum()
    if not (total and others.sum()):
        return np.nan
    p, q = counts.sum(axis=0) / total + _TINY, others / others.sum() + _TINY
    gradient = np.log(2 * p / (p + q)) / 2
    return ratio_stderr(counts @ gradient, counts.sum(axis=1))
