"""Aligned noise is nearer to its data, and in the same orbit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tables.alignment import AlignedFlowMatching, aligned, renumbered, turned


def configurations(seed: int, size: int = 16, atoms: int = 5, dimension: int = 3) -> torch.Tensor:
    x = torch.randn(size, atoms, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x - x.mean(dim=1, keepdim=True)


def squared(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x - z).square().sum(dim=(1, 2))


@pytest.mark.parametrize("dimension", [2, 3])
def test_every_round_brings_noise_nearer_to_its_data(dimension):
    x, z = configurations(0, dimension=dimension), configurations(1, dimension=dimension)
    before = squared(x, z)
    for rounds in range(1, 5):
        after = squared(x, aligned(x, z, rounds))
        assert (after <= before + 1e-12).all()
        before = after
    assert (before < squared(x, z) - 1e-3).all()


def test_aligned_noise_is_of_the_same_orbit():
    """Sorted pair distances identify an orbit."""
    x, z = configurations(2), configurations(3)
    distances = [torch.cdist(y, y).flatten(1).sort(dim=1).values for y in (z, aligned(x, z))]
    assert torch.allclose(*distances, atol=1e-10)
    assert torch.allclose(aligned(x, z).mean(dim=1), torch.zeros(16, 3, dtype=torch.float64), atol=1e-12)


def test_what_only_was_turned_or_renumbered_comes_back():
    x = configurations(4)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    assert torch.allclose(turned(x, x @ q), x, atol=1e-10)
    assert torch.allclose(renumbered(x, x[:, torch.tensor([3, 1, 4, 0, 2])]), x)


def test_different_sizes_are_refused():
    x, mask = configurations(6), torch.ones(16, 5, dtype=torch.bool)
    mask[0, 4] = False
    with pytest.raises(ValueError, match="one size"):
        AlignedFlowMatching().coupled(x, x, mask)
