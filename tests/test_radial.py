"""The scalars of a pair."""

from __future__ import annotations

import math

import pytest
import torch

from ase_enf.nn.radial import pair_scalar_slopes, pair_scalars


def test_formula() -> None:
    scalars = pair_scalars(torch.tensor([1.44], dtype=torch.float64), radial=4)[0]
    beta = (2 * 4 / 3) ** 2
    expected = [1.44, *(math.exp(-beta * (math.exp(-1.2) - k / 3) ** 2) for k in range(4))]
    assert scalars.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("radial", [0, 1, 8])
def test_slopes_are_the_derivatives(radial: int) -> None:
    squared = torch.linspace(0.05, 30.0, 50, dtype=torch.float64)
    found = torch.func.vmap(torch.func.jacrev(lambda s: pair_scalars(s, radial)))(squared)
    torch.testing.assert_close(pair_scalar_slopes(squared, radial), found, rtol=1e-10, atol=1e-14)


def test_coinciding_atoms_are_finite() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    assert pair_scalars(zero, 8).isfinite().all() and pair_scalar_slopes(zero, 8).isfinite().all()
