"""Lifting discrete features: always invertible, and q is normalised (eq. 12)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ase_enf.flow.dequantize import FixedQ, LearnedQ, build_q, lift, lift_charges, lift_types, quantize
from ase_enf.geometry import random_rotations

KINDS = ("fixed", "learned")
NUMBERS = torch.tensor([1.0, 6.0, 9.0])  # charges of the three types


@pytest.fixture
def q_of(stir, dtype):
    def build(kind: str, n_types: int = 3):
        learned = stir(LearnedQ(n_types, hidden=8, layers=2), 0.3)
        return (learned if kind == "learned" else build_q(kind, n_types)).to(dtype)

    return build


@pytest.fixture
def molecules(dtype):
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    real = mask.unsqueeze(-1)
    classes = torch.randint(3, (2, 5))
    x = torch.randn(2, 5, 3, dtype=dtype) * real
    return x, F.one_hot(classes, 3).to(dtype) * real, NUMBERS[classes].unsqueeze(-1).to(dtype) * real, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1.0, 6.0])
def test_quantize_inverts_lift_for_any_noise(q_of, molecules, dtype, kind, size):
    if size > 1 and dtype == torch.float32:
        pytest.skip("float32 rounds Z + sigmoid(u) up to Z + 1 where u is above about 15")
    x, types, charges, mask = molecules
    noise = size * torch.randn(2, 5, 4, dtype=dtype).clamp(-3, 3)
    lifted = lift(q_of(kind), x, types, charges, mask, noise)
    types_back, charges_back = quantize(lifted.features)
    assert torch.equal(types_back[mask], types[mask])
    assert torch.equal(charges_back[mask], charges[mask])
    assert (lifted.features[~mask] == 0).all()


def test_the_true_class_alone_keeps_its_score(dtype):
    u = torch.randn(50, 1, 4, dtype=dtype)
    types = F.one_hot(torch.randint(4, (50, 1)), 4).to(dtype)
    lifted, _ = lift_types(u, types)
    threshold = (u * types).sum(dim=-1)
    assert torch.equal((lifted * types).sum(dim=-1), threshold)
    assert ((lifted < threshold.unsqueeze(-1)) | types.bool()).all()


def test_jacobian_of_the_type_lift_is_that_of_autograd():
    for true in range(3):
        types = F.one_hot(torch.tensor([[true]]), 3).double()
        u = torch.randn(1, 1, 3, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda v, t=types: lift_types(v, t)[0].flatten(), u).reshape(3, 3)
        assert torch.isclose(torch.linalg.slogdet(jacobian).logabsdet, lift_types(u, types)[1].sum())


def test_jacobian_of_the_charge_lift_is_that_of_autograd():
    charges = torch.tensor([[[1.0], [8.0]]], dtype=torch.float64)
    u = torch.randn(1, 2, 1, dtype=torch.float64, requires_grad=True)
    lifted, ladj = lift_charges(u, charges)
    (slope,) = torch.autograd.grad(lifted.sum(), u)
    assert torch.allclose(slope.log(), ladj)
    assert torch.equal(lifted.floor(), charges)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("true", [0, 1])
def test_q_of_two_types_integrates_to_one_over_the_argmax_half_plane(q_of, kind, true):
    """∫ q(h̃|h) dh̃ = 1 over h̃ whose argmax is the true type; inverting the lift gives u and so the density."""
    q = q_of(kind, 2).double()
    types = F.one_hot(torch.tensor([[true]]), 2).double()
    charges = torch.tensor([[[6.0]]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    x = torch.zeros(1, 1, 3, dtype=torch.float64)
    mean, log_std = (part[0, 0] for part in q(x, types, charges, mask))
    spread = log_std.exp()
    # A grid on (T, log gap): the gap to the other class is e^g, so the half plane is the whole of this plane.
    score = mean[true] + spread[true] * torch.linspace(-8, 8, 161, dtype=torch.float64)
    log_gap = torch.linspace(-20, 4, 1601, dtype=torch.float64)
    grid_t, grid_g = torch.meshgrid(score, log_gap, indexing="ij")
    gap = grid_g.exp()  # h̃_other = T − gap, gap = softplus(T − u_other)
    other = grid_t - (gap + torch.log(-torch.expm1(-gap)))
    u = torch.zeros(*grid_t.shape, 3, dtype=torch.float64)
    u[..., true], u[..., 1 - true], u[..., 2] = grid_t, other, mean[2]
    noise = ((u - mean) / spread).reshape(-1, 1, 3)
    count = len(noise)
    lifted = lift(
        lambda *_: (mean.expand(count, 1, 3), log_std.expand(count, 1, 3)),
        x.expand(count, -1, -1),
        types.expand(count, -1, -1),
        charges.expand(count, -1, -1),
        mask.expand(count, -1),
        noise,
    )
    assert torch.allclose((lifted.features[:, 0, true] - lifted.features[:, 0, 1 - true]).reshape(gap.shape), gap)
    # The charge stays at its mode; its own factor is the density of a logit-normal there.
    charge = -0.5 * math.log(2 * math.pi) - log_std[2] - (F.logsigmoid(mean[2]) + F.logsigmoid(-mean[2]))
    density = (lifted.log_q - charge).exp().reshape(gap.shape) * gap  # dh̃ = gap d(log gap)
    total = torch.trapezoid(torch.trapezoid(density, log_gap, dim=1), score)
    assert total.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_q_of_a_charge_integrates_to_one_over_its_interval(q_of, kind):
    """One type, so that the scores cannot matter: ∫_Z^{Z+1} q dh̃ = 1 after the score's own Gaussian."""
    q = q_of(kind, 1).double()
    mask = torch.ones(1, 1, dtype=torch.bool)
    x, types = torch.zeros(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    charges = torch.tensor([[[8.0]]], dtype=torch.float64)
    mean, log_std = (part[0, 0] for part in q(x, types, charges, mask))
    inside = torch.linspace(0, 1, 4003, dtype=torch.float64)[1:-1]
    noise = torch.zeros(len(inside), 1, 2, dtype=torch.float64)
    noise[:, 0, 1] = (torch.logit(inside) - mean[1]) / log_std[1].exp()
    log_q = torch.cat([lift(q, x, types, charges, mask, e[None]).log_q for e in noise[::10]])
    lifted = torch.cat([lift(q, x, types, charges, mask, e[None]).features[:, 0, 1] for e in noise[::10]])
    assert torch.allclose(lifted, 8.0 + inside[::10])
    score = -0.5 * math.log(2 * math.pi) - log_std[0]
    assert torch.trapezoid((log_q - score).exp(), lifted).item() == pytest.approx(1.0, abs=2e-3)


def test_one_draw_bounds_the_exact_likelihood_from_below_on_a_toy_of_two_classes():
    """p(h̃) standard normal in the plane: each class has probability ½, and E_q[log p − log q] ≤ log ½, E_q[p/q] = ½."""
    q = FixedQ(type_noise=0.7)
    count = 20_000
    types = F.one_hot(torch.zeros(count, 1, dtype=torch.long), 2).double()
    mask = torch.ones(count, 1, dtype=torch.bool)
    charges = torch.ones(count, 1, 1, dtype=torch.float64)
    noise = torch.randn(count, 1, 3, dtype=torch.float64)
    lifted = lift(q, torch.zeros(count, 1, 3, dtype=torch.float64), types, charges, mask, noise)
    u = q.charge_noise * noise[..., -1]
    interval = torch.distributions.Normal(0.0, q.charge_noise).log_prob(u) - F.logsigmoid(u) - F.logsigmoid(-u)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(lifted.features[..., :2]).sum(dim=(1, 2))
    weight = log_p - (lifted.log_q - interval[:, 0])
    assert weight.mean() < math.log(0.5) - 0.02
    error = weight.exp().std() / count**0.5
    assert abs(weight.exp().mean() - 0.5) < 4 * error + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_log_q_ignores_padding_rotation_and_translation(q_of, molecules, dtype, tolerance, kind):
    x, types, charges, mask = molecules
    q = q_of(kind)
    noise = torch.randn(2, 5, 4, dtype=dtype)
    before = lift(q, x, types, charges, mask, noise)
    rotation = random_rotations(1, 3, torch.Generator().manual_seed(0), torch.float64)[0].to(dtype)
    spoiled = torch.where(mask.unsqueeze(-1), noise, torch.full_like(noise, 9.0))
    after = lift(q, x @ rotation.T + 1.0, types, charges, mask, spoiled)
    assert torch.allclose(before.log_q, after.log_q, **tolerance)
    assert torch.allclose(before.features, after.features, **tolerance)
    alone = lift(q, x[1:, :3], types[1:, :3], charges[1:, :3], mask[1:, :3], noise[1:, :3])
    assert torch.allclose(alone.log_q[0], before.log_q[1], **tolerance)


def test_learned_q_trains_all_of_itself(q_of, molecules, dtype):
    x, types, charges, mask = molecules
    q = q_of("learned")
    lifted = lift(q, x, types, charges, mask, torch.randn(2, 5, 4, dtype=dtype))
    (lifted.log_q.sum() + lifted.features.square().sum()).backward()
    for name, parameter in q.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not list(build_q("fixed", 3).parameters())


def test_unknown_dequantizer_is_named():
    with pytest.raises(ValueError, match=r"dequantizer 'uniform' is unknown; choose one of fixed, learned"):
        build_q("uniform", 5)
