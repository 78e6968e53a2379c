"""The zero-mean subspace, pairs and rotations."""

from __future__ import annotations

import pytest
import torch

from ase_enf.geometry import (
    center,
    masked_mean,
    pair_differences,
    pair_mask,
    random_rotations,
    subspace_dim,
)


@pytest.fixture
def mask(device):
    return torch.tensor([[True, True, True, False], [True, True, False, False]], device=device)


@pytest.mark.parametrize("n", [2, 3])
def test_subspace_dim_is_the_rank_of_the_projector(mask, n, dtype):
    size = mask.shape[1] * n
    basis = torch.eye(size, dtype=dtype, device=mask.device).reshape(size, mask.shape[1], n)
    for row, dimension in zip(mask, subspace_dim(mask, n), strict=True):
        projector = center(basis, row.expand(size, -1)).reshape(size, size)
        assert torch.allclose(projector, projector.T) and torch.allclose(projector @ projector, projector)
        assert torch.linalg.matrix_rank(projector) == dimension
        assert dimension == (row.sum() - 1) * n


def test_center_has_no_mean_zero_padding_and_is_idempotent(mask, dtype, tolerance):
    x = torch.randn(2, 4, 3, dtype=dtype).to(mask.device)
    before = x.clone()
    y = center(x, mask)
    assert torch.allclose(masked_mean(y, mask), torch.zeros_like(y[:, :1]), **tolerance)
    assert (y[~mask] == 0).all()
    assert torch.allclose(center(y, mask), y, **tolerance)
    assert torch.equal(x, before)


def test_center_ignores_padding_and_translation(mask, dtype, tolerance):
    x = torch.randn(2, 4, 3, dtype=dtype).to(mask.device)
    moved = x + torch.randn(2, 1, 3, dtype=dtype).to(mask.device)
    moved[~mask] = 99.0
    assert torch.allclose(center(moved, mask), center(x, mask), **tolerance)


def test_pair_mask_counts_the_ordered_pairs(mask):
    pairs = pair_mask(mask)
    assert pairs.sum(dim=(1, 2)).tolist() == [6, 2]
    assert not pairs.diagonal(dim1=1, dim2=2).any()
    assert torch.equal(pairs, pairs.mT)


@pytest.mark.parametrize("n", [2, 3])
def test_pair_differences_are_those_of_a_double_loop(n, dtype):
    x = torch.randn(1, 3, n, dtype=dtype)
    difference, squared = pair_differences(x)
    for i in range(3):
        for j in range(3):
            assert torch.equal(difference[0, i, j], x[0, i] - x[0, j])
            assert torch.isclose(squared[0, i, j], (x[0, i] - x[0, j]).norm() ** 2, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_rotations_are_proper_and_orthogonal(n):
    rotation = random_rotations(50, n, torch.Generator().manual_seed(0), torch.float64)
    identity = torch.eye(n, dtype=torch.float64).expand(50, n, n)
    assert torch.allclose(rotation @ rotation.mT, identity, atol=1e-12)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 3])
def test_rotations_are_haar_distributed(n):
    """Moments of Haar measure: E[R] = 0, E[R_ij²] = 1/n, and E[(tr R)²] = 2 for SO(2), 1 for SO(3)."""
    count = 20_000
    rotation = random_rotations(count, n, torch.Generator().manual_seed(0), torch.float64)
    assert rotation.mean(dim=0).abs().max() < 5 / count**0.5
    assert torch.allclose(rotation.square().mean(dim=0), torch.full((n, n), 1 / n, dtype=torch.float64), atol=0.015)
    trace = rotation.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert abs(trace.square().mean() - {2: 2.0, 3: 1.0}[n]) < 0.06


def test_rotations_repeat_with_their_generator():
    draws = [random_rotations(2, 3, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
