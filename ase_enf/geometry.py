"""Masked centring, the dimension of the zero-mean subspace, pair geometry and random rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def subspace_dim(mask: Tensor, n: int) -> Tensor:
    """Returns the dimension of the zero-centre-of-mass subspace, ``(M − 1) n``.

    Normalisers of densities and volumes of scalings use this number (eq. 10-11).

    Args:
        mask: True for real atoms, shape (B, M).
        n: Dimension of space.

    Returns:
        Dimensions, shape (B,), dtype int64.

    Example:
        >>> subspace_dim(torch.tensor([[True, True, True, False]]), n=3)
        tensor([6])
    """
    return (mask.sum(dim=-1) - 1) * n


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the real atoms, ``x̄ = Σ_i mask_i x_i / M``.

    Args:
        x: Vectors, shape (B, M, n).
        mask: True for real atoms, shape (B, M).

    Returns:
        Means, shape (B, 1, n).
    """
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)


def center(x: Tensor, mask: Tensor) -> Tensor:
    """Projects onto the zero-centre-of-mass subspace, ``x_i ← mask_i (x_i − x̄)``.

    Args:
        x: Vectors, shape (B, M, n).
        mask: True for real atoms, shape (B, M).

    Returns:
        Centred vectors with exact zeros at padding, shape (B, M, n).

    Example:
        >>> center(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[[-1.],
                 [ 1.],
                 [ 0.]]])
    """
    return (x - masked_mean(x, mask)) * mask.unsqueeze(-1).to(x.dtype)


def pair_mask(mask: Tensor) -> Tensor:
    """Returns which ordered pairs (i, j) are two different real atoms.

    Args:
        mask: True for real atoms, shape (B, M).

    Returns:
        Pair mask, shape (B, M, M), dtype bool, False on the diagonal.
    """
    different = ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & different


def pair_differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``x_i − x_j`` and ``‖x_i − x_j‖²`` of all ordered pairs.

    Args:
        x: Positions, shape (B, M, n).

    Returns:
        Differences, shape (B, M, M, n), and squared distances, shape (B, M, M).
    """
    difference = x.unsqueeze(2) - x.unsqueeze(1)
    return difference, difference.square().sum(dim=-1)


def random_rotations(
    count: int, n: int, generator: torch.Generator | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Draws Haar-distributed rotations by the QR decomposition of Gaussian matrices.

    The signs of the diagonal of R are moved into Q, which is not Haar-distributed otherwise (Mezzadri 2007,
    math-ph/0609050).

    Args:
        count: Number of rotations.
        n: Dimension of space.
        generator: Source of randomness, on the CPU.
        dtype: Floating type, torch's default when None.

    Returns:
        Matrices with determinant +1, shape (count, n, n), on the CPU.
    """
    q, r = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=dtype))
    q = q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2)
    # Changing the sign of one column turns a reflection into a rotation.
    return torch.cat([q[..., :1] * torch.linalg.det(q).sign()[:, None, None], q[..., 1:]], dim=-1)
