"""Base distributions: centred Gaussian of positions, Gaussian of features, and the size prior (eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ase_enf.geometry import subspace_dim

LOG_2PI = math.log(2.0 * math.pi)
MOST_MOLECULES = 10**15


def position_log_prob(z: Tensor, mask: Tensor) -> Tensor:
    """Log-density of the standard Gaussian on the zero-mean subspace (eq. 11).

    log p(z_x) = −½ ‖z_x‖² − ½ (M − 1) n log 2π

    Args:
        z: Centred positions, shape (B, M, n), zero at padding.
        mask: True for real atoms, shape (B, M).

    Returns:
        Nats, shape (B,).

    Example:
        >>> z = torch.tensor([[[1.0], [-1.0]]])
        >>> position_log_prob(z, torch.ones(1, 2, dtype=torch.bool))
        tensor([-1.9189])
    """
    dimension = subspace_dim(mask, z.shape[-1]).to(z.dtype)
    return -0.5 * z.square().sum(dim=(1, 2)) - 0.5 * dimension * LOG_2PI


def feature_log_prob(z: Tensor, mask: Tensor) -> Tensor:
    """Log-density of the standard Gaussian of features, ``Σ_i log N(z_i; 0, I)`` (eq. 11).

    Args:
        z: Features, shape (B, M, F), zero at padding.
        mask: True for real atoms, shape (B, M).

    Returns:
        Nats, shape (B,); zero when F is 0.
    """
    count = (mask.sum(dim=-1) * z.shape[-1]).to(z.dtype)
    return -0.5 * z.square().sum(dim=(1, 2)) - 0.5 * count * LOG_2PI


def sample_latent(
    rng: np.random.Generator, n_atoms: int, dimension: int, features: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one latent molecule: a Gaussian projected on the zero-mean subspace, and Gaussian features.

    Args:
        rng: Source of randomness; with one of its own, a molecule does not depend on the rest of its batch.
        n_atoms: Number M of atoms.
        dimension: Dimension n of space.
        features: Number F of features of an atom.

    Returns:
        z_x, shape (M, n), with zero mean, and z_h, shape (M, F), both float64.
    """
    z = rng.standard_normal((n_atoms, dimension + features))
    x = z[:, :dimension]
    return x - x.mean(axis=0), z[:, dimension:]


def check_counts(name: str, counts: Mapping[Any, int]) -> None:
    """Checks counts of molecules.

    Args:
        name: Name of the counts in the message.
        counts: What is counted → count.

    Raises:
        ValueError: If a count is negative or larger than any data set.

    Example:
        >>> check_counts("sizes", {3: 10**400})
        Traceback (most recent call last):
        ValueError: sizes: the count of 3 is not between 0 and 10^15
    """
    for key, count in counts.items():
        if not 0 <= count <= MOST_MOLECULES:
            raise ValueError(f"{name}: the count of {key} is not between 0 and 10^15")


class SizePrior:
    """Categorical distribution p_M of the number of atoms: counts of the training set divided by their sum.

    Args:
        counts: Number of atoms → number of molecules.

    Raises:
        ValueError: If there is no molecule, or a count is negative or larger than any data set.

    Example:
        >>> prior = SizePrior({3: 1, 5: 3})
        >>> round(prior.log_prob([5]).exp().item(), 6)
        0.75
    """

    def __init__(self, counts: Mapping[int, int]) -> None:
        if not counts or min(counts.values()) < 0 or sum(counts.values()) == 0:
            raise ValueError(f"size prior: counts {dict(counts)} hold no molecule")
        check_counts("sizes", counts)
        self.counts = {int(size): int(count) for size, count in sorted(counts.items()) if count}
        self._sizes = np.array(list(self.counts), dtype=np.int64)
        self._probabilities = np.array(list(self.counts.values()), dtype=float) / sum(self.counts.values())
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __contains__(self, size: int) -> bool:
        return int(size) in self.counts

    def log_prob(self, sizes: Iterable[int] | Tensor) -> Tensor:
        """Returns log p_M(M), nats, float64; −inf for an unseen size.

        Args:
            sizes: Numbers of atoms, shape (B,); the host does not wait for a tensor on a GPU.
        """
        sizes = sizes if isinstance(sizes, Tensor) else torch.tensor(list(sizes))
        if sizes.device not in self._tables:  # cached: copying it to a GPU would make the host wait
            known, log_p = torch.from_numpy(self._sizes), torch.from_numpy(np.log(self._probabilities))
            self._tables[sizes.device] = known.to(sizes.device), log_p.to(sizes.device)
        known, log_p = self._tables[sizes.device]
        return torch.where(sizes.unsqueeze(-1) == known, log_p, -math.inf).amax(dim=-1)

    def sample(self, rng: np.random.Generator, weights: Mapping[int, float] | None = None) -> int:
        """Draws one size.

        Args:
            rng: Source of randomness.
            weights: Weight of each size that p_M has, to draw by instead of p_M.

        Returns:
            Number M of atoms.
        """
        if weights is None:
            return int(rng.choice(self._sizes, p=self._probabilities))
        shares = np.array([weights[size] for size in self.counts])
        return int(rng.choice(self._sizes, p=shares / shares.sum()))
