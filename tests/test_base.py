"""Base distributions: normalised on their own spaces; samples agree with the density."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from ase_enf.flow.base import SizePrior, feature_log_prob, position_log_prob, sample_latent


def test_two_particles_on_a_line_integrate_to_one(dtype):
    """M = 2, n = 1: the subspace is the line (s, −s)/√2, whose length element is ds."""
    s = torch.linspace(-9, 9, 4001, dtype=dtype)
    z = torch.stack([s, -s], dim=1).unsqueeze(-1) / math.sqrt(2)
    density = position_log_prob(z, torch.ones(len(s), 2, dtype=torch.bool)).exp()
    assert torch.trapezoid(density, s).item() == pytest.approx(1.0, abs=1e-5)


def test_position_log_prob_is_the_gaussian_in_an_orthonormal_basis(dtype, tolerance):
    """M = 4, n = 2 with padding: coordinates in any orthonormal basis of the subspace are standard normal."""
    rng = np.random.default_rng(0)
    basis = np.linalg.svd(np.eye(4) - 0.25)[0][:, :3]
    coordinates = rng.standard_normal((5, 3, 2))
    z = np.zeros((5, 6, 2))
    z[:, :4] = np.einsum("ik,bkn->bin", basis, coordinates)
    mask = torch.tensor([[True] * 4 + [False] * 2]).expand(5, -1)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(coordinates)).sum(dim=(1, 2))
    assert torch.allclose(position_log_prob(torch.tensor(z, dtype=dtype), mask), expected.to(dtype), **tolerance)


def test_feature_log_prob_is_the_gaussian_of_the_real_atoms(dtype, tolerance):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    z = torch.randn(2, 3, 4, dtype=dtype) * mask.unsqueeze(-1)
    each = torch.distributions.Normal(0.0, 1.0).log_prob(z) * mask.unsqueeze(-1)
    assert torch.allclose(feature_log_prob(z, mask), each.sum(dim=(1, 2)), **tolerance)
    assert (feature_log_prob(z[..., :0], mask) == 0).all()


def test_latent_positions_have_the_projector_as_covariance():
    rng = np.random.default_rng(0)
    x, h = (np.stack(part) for part in zip(*(sample_latent(rng, 3, 2, 2) for _ in range(8000)), strict=True))
    assert np.abs(x.mean(axis=1)).max() < 1e-14
    covariance = np.einsum("bin,bjm->injm", x, x) / len(x)
    projector = np.einsum("ij,nm->injm", np.eye(3) - 1 / 3, np.eye(2))
    assert np.abs(covariance - projector).max() < 0.05  # 3 to 4 standard errors
    flat = h.reshape(len(h), -1)
    assert np.abs(np.cov(flat.T) - np.eye(6)).max() < 0.06


def test_latent_molecule_is_a_function_of_its_generator():
    first, second, third = (sample_latent(np.random.default_rng(seed), 4, 3, 2) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], third[0])


def test_size_prior_sums_to_one_and_knows_its_sizes():
    prior = SizePrior({9: 6, 5: 3, 3: 1, 4: 0})
    assert prior.log_prob([3, 5, 9]).exp().sum().item() == pytest.approx(1.0)
    assert prior.log_prob(torch.tensor([9])).exp().item() == pytest.approx(0.6)
    assert prior.log_prob([4, 100]).tolist() == [-math.inf, -math.inf]
    assert 9 in prior and 4 not in prior


def test_size_prior_samples_at_its_frequencies():
    counts = {3: 1, 5: 3, 9: 6}
    rng = np.random.default_rng(0)
    drawn = Counter(SizePrior(counts).sample(rng) for _ in range(4000))
    assert set(drawn) == set(counts)
    for size, count in counts.items():
        expected = 400 * count
        assert abs(drawn[size] - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("counts", [{}, {3: 0}, {3: -1, 4: 2}])
def test_size_prior_without_a_molecule_is_refused(counts):
    with pytest.raises(ValueError, match="hold no molecule"):
        SizePrior(counts)
