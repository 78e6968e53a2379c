"""Trace estimators of the likelihood benchmark: unbiased, and exact where they should be."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.trace_estimators import ESTIMATORS

SIZE = 12


def matrices(rank: int = SIZE) -> torch.Tensor:
    """Returns two nonsymmetric matrices of a given rank."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 2, SIZE, rank, generator=generator)
    return left @ right.mT


@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased(name):
    a, generator = matrices(), torch.Generator().manual_seed(1)
    draws = torch.stack([ESTIMATORS[name](a, 6, generator) for _ in range(2000)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert draws.shape == (2000, 2) and (error > 0).all()
    assert ((draws.mean(dim=0) - a.diagonal(dim1=1, dim2=2).sum(1)).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("name", "products", "rank"), [("orthogonal", SIZE, SIZE), ("Hutch++", 9, 3), ("XTrace", 8, 3)]
)
def test_exact_where_the_sketch_holds_the_range(name, products, rank):
    a = matrices(rank)
    estimate = ESTIMATORS[name](a, products, torch.Generator().manual_seed(2))
    assert torch.allclose(estimate, a.diagonal(dim1=1, dim2=2).sum(1), atol=1e-3)
