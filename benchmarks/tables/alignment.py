"""Flow matching of identical particles with noise that is rotated and permuted towards the data.

The noise z of a configuration may be replaced by g z, where g is a rotation, reflection or permutation that may depend
on the data: with an equivariant network only orbits matter, and the orbit of g z is that of z. The nearest g z makes
the paths of flow matching shorter and straighter (equivariant optimal transport of Klein et al. 2023, without their
assignment of noise to data across the batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ase_enf.training.objectives import FlowMatching

ROUNDS = 2  # of a rotation and a permutation each


@dataclass(frozen=True)
class AlignedFlowMatching(FlowMatching):
    """Flow matching between data and aligned noise, for identical particles in constant number."""

    def coupled(self, x: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """Returns aligned noise.

        Raises:
            ValueError: If configurations have different sizes.
        """
        if not bool(mask.all()):
            raise ValueError("alignment takes configurations of one size; sort them by size or leave it out")
        return aligned(x, z)


def aligned(x: Tensor, z: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Returns noise rotated and permuted so that Σ_i |x_i − z_i|² is small.

    Alternates between the best orthogonal matrix for a permutation (Schönemann 1966) and the best permutation for a
    matrix, which leads to a local minimum.

    Args:
        x: Data, centred, shape (B, M, n).
        z: Noise, centred, shape (B, M, n).
        rounds: Number of alternations.

    Returns:
        Aligned noise, shape (B, M, n).

    Example:
        >>> x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> turned = x[:, torch.tensor([1, 0, 2, 3, 4])] * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        >>> bool((aligned(x, turned, 20) - x).square().sum() <= (turned - x).square().sum())
        True
    """
    for _ in range(rounds):
        z = turned(x, renumbered(x, z))
    return z


def turned(x: Tensor, z: Tensor) -> Tensor:
    """Returns z Q for the orthogonal Q, reflections included, that minimises ‖x − z Q‖²."""
    u, _, vh = torch.linalg.svd(z.transpose(1, 2) @ x)
    return z @ (u @ vh)


def renumbered(x: Tensor, z: Tensor) -> Tensor:
    """Returns z with its particles in the order that minimises ‖x − z‖²."""
    gain = (x @ z.transpose(1, 2)).cpu().numpy()
    order = [linear_sum_assignment(one, maximize=True)[1] for one in gain]
    return z.gather(1, torch.tensor(np.array(order), device=z.device)[..., None].expand_as(z))
