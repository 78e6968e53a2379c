"""The exact trace is that of the Jacobian; Hutchinson's estimate agrees within its error."""

from __future__ import annotations

import functools

import pytest
import torch

from ase_enf.flow.divergence import draw_probes, exact, hutchinson
from ase_enf.geometry import center, random_rotations

SIZES = (3, 2)


@pytest.fixture
def point(flow, device, dtype):
    """A field of each feature mode at one time, and a padded point."""
    mask = torch.arange(max(SIZES), device=device) < torch.tensor(SIZES, device=device)[:, None]
    real = mask.unsqueeze(-1)
    generator = torch.Generator().manual_seed(3)
    width = flow.config.flow_features

    def draw(k: int) -> torch.Tensor:
        return torch.randn(2, 3, k, generator=generator, dtype=torch.float64).to(device, dtype) * real

    x, h, context = center(draw(3), mask), draw(width), draw(flow.config.context_features)
    velocity = flow.velocity(mask, context if flow.features == "given" else None)
    t = torch.tensor(0.4, device=device, dtype=dtype)
    return functools.partial(velocity, t), x, h


def jacobian(field, x, h):
    """Returns the full (D, D) Jacobian of each molecule, D = M (n + F), by autograd."""
    width, n = x.shape[1], x.shape[2]

    def joint(y):
        dx, dh = field(y[..., :n], y[..., n:])
        return torch.cat([dx, dh], dim=-1)

    y = torch.cat([x, h], dim=-1)
    full = torch.autograd.functional.jacobian(joint, y)
    size = width * y.shape[-1]
    return torch.stack([full[b, :, :, b].reshape(size, size) for b in range(len(x))])


def test_exact_trace_is_that_of_the_jacobian(point, tolerance):
    field, x, h = point
    result = exact(field, x, h)
    expected = jacobian(field, x, h).diagonal(dim1=1, dim2=2).sum(dim=1)
    assert expected.abs().min() > 0.05
    assert torch.allclose(result.trace, expected, **tolerance)
    assert torch.equal(result.samples, result.trace.unsqueeze(0))
    dx, dh = field(x, h)
    assert torch.allclose(result.dx, dx) and torch.allclose(result.dh, dh)


def test_exact_trace_is_invariant_to_rotation_and_order(point, flow, tolerance):
    field, x, h = point
    q = random_rotations(1, 3, torch.Generator().manual_seed(0), torch.float64)[0].to(x)
    assert torch.allclose(exact(field, x @ q.T, h).trace, exact(field, x, h).trace, **tolerance)


def test_one_probe_is_the_quadratic_form_of_the_jacobian(point, tolerance):
    field, x, h = point
    probes = draw_probes(x, h, 2, torch.Generator().manual_seed(0))
    v = torch.cat(probes, dim=-1).flatten(2)
    expected = torch.einsum("pbi,bij,pbj->pb", v, jacobian(field, x, h), v)
    result = hutchinson(field, x, h, probes)
    assert torch.allclose(result.samples, expected, **tolerance)
    assert torch.allclose(result.trace, expected.mean(dim=0), **tolerance)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_mean_is_the_exact_trace_within_its_standard_error(point, kind):
    field, x, h = point
    count = 300
    probes = draw_probes(x, h, count, torch.Generator().manual_seed(0), kind)
    result = hutchinson(field, x, h, probes)
    stderr = result.samples.std(dim=0) / count**0.5
    deviation = (result.trace - exact(field, x, h).trace).abs()
    assert (stderr > 0).all() and (deviation < 4 * stderr).all()


def test_probes_summed_over_a_basis_give_the_exact_trace(point, tolerance):
    field, x, h = point
    size, n = x.shape[1] * (x.shape[2] + h.shape[2]), x.shape[2]
    basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, x.shape[1], -1).expand(-1, 2, -1, -1)
    result = hutchinson(field, x, h, (basis[..., :n], basis[..., n:]))
    assert torch.allclose(result.samples.sum(dim=0), exact(field, x, h).trace, **tolerance)


def test_probes_have_identity_covariance_and_their_kind():
    x, h = torch.zeros(2, 3, 2), torch.zeros(2, 3, 1)
    for kind, fourth in (("rademacher", 1.0), ("gaussian", 3.0)):
        v_x, v_h = draw_probes(x, h, 4000, torch.Generator().manual_seed(0), kind)
        assert v_x.shape == (4000, 2, 3, 2) and v_h.shape == (4000, 2, 3, 1) and v_x.dtype == x.dtype
        v = torch.cat([v_x, v_h], dim=-1).flatten(1)
        assert (v.T @ v / 4000 - torch.eye(18)).abs().max() < 0.1
        assert abs(v.pow(4).mean() - fourth) < 0.15
        if kind == "rademacher":
            assert (v.abs() == 1).all()


def test_probes_repeat_with_their_generator_and_differ_between_seeds():
    x, h = torch.zeros(1, 3, 2), torch.zeros(1, 3, 0)
    draws = [draw_probes(x, h, 1, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_unknown_probe_is_named():
    with pytest.raises(ValueError, match=r"probe 'sphere' is unknown; choose one of rademacher, gaussian"):
        draw_probes(torch.zeros(1, 2, 3), torch.zeros(1, 2, 0), 1, kind="sphere")


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_create_graph_gives_the_gradient_of_finite_differences(point, flow, method):
    """With respect to a weight and to a position."""
    field, x, h = point
    if x.dtype != torch.float64:
        pytest.skip("finite differences need float64")
    probes = draw_probes(x, h, 2, torch.Generator().manual_seed(0))

    def total(where, create_graph=False):
        call = exact if method == "exact" else functools.partial(hutchinson, probes=probes)
        return call(field, where, h, create_graph=create_graph).trace.sum()

    leaf = x.clone().requires_grad_(True)
    weight = flow.dynamics.network.layers[1].position_in.weight
    by_weight, by_position = torch.autograd.grad(total(leaf, create_graph=True), [weight, leaf])
    step = 1e-5
    with torch.no_grad():
        shifted = []
        for sign in (1, -1):
            weight[0, 1] += sign * step
            shifted.append(total(x))
            weight[0, 1] -= sign * step
    assert torch.isclose((shifted[0] - shifted[1]) / (2 * step), by_weight[0, 1], rtol=1e-5, atol=1e-7)
    push = torch.zeros_like(x)
    push[0, 1, 2] = step
    assert torch.isclose((total(x + push) - total(x - push)) / (2 * step), by_position[0, 1, 2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("create_graph", [True, False])
def test_inputs_are_left_alone_and_results_carry_a_graph_only_on_request(point, create_graph):
    field, x, h = point
    probes = draw_probes(x, h, 1)
    for result in (exact(field, x, h, create_graph), hutchinson(field, x, h, probes, create_graph)):
        assert not x.requires_grad and not h.requires_grad
        assert result.trace.requires_grad == result.dx.requires_grad == create_graph


def test_a_constant_field_has_no_divergence():
    x, h = torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    constant = torch.ones_like(x), torch.zeros_like(h)
    assert exact(lambda x, h: constant, x, h).trace.tolist() == [0.0, 0.0]
    assert hutchinson(lambda x, h: constant, x, h, draw_probes(x, h, 2)).trace.tolist() == [0.0, 0.0]
