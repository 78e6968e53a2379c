"""Simple and kernel dynamics: their closed-form trace is the exact one, and they keep every symmetry."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from ase import Atoms
from torch.func import jacrev

from ase_enf.flow import divergence
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.divergence import Moment
from ase_enf.flow.dynamics import BoundDynamics, Dynamics, build_network
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.geometry import center, pair_mask, random_rotations
from ase_enf.nn.koehler import Gaussians, KernelDynamics, RadialField
from ase_enf.sampling.generate import generate
from ase_enf.scoring.score import score
from ase_enf.training.config import TrainConfig
from ase_enf.training.loop import train

KINDS = ("simple", "kernel")


@pytest.fixture(autouse=True)
def _float64_only(dtype):
    if dtype != torch.float64:
        pytest.skip("closed forms and symmetries are compared in float64")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def field(kind, device) -> Dynamics:
    """Returns dynamics with spread centres and weights far from zero."""
    dynamics = Dynamics(build_network(kind, 1, 0, 3, hidden=8, layers=3, attention=True)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return dynamics.to(device)


@pytest.fixture
def state(device):
    def build(n: int = 3):
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        x = center(1.5 * torch.randn(2, 5, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64), mask)
        t = torch.tensor([0.2, 0.9], dtype=torch.float64)
        return tuple(part.to(device) for part in (t, x, x[..., :0], mask))

    return build


# The trace


@pytest.mark.parametrize("n", [2, 3])
def test_closed_form_is_the_exact_trace(field, state, n):
    t, x, h, mask = state(n)
    bound = BoundDynamics(field, mask)
    closed = divergence.exact(Moment(bound, t), x, h)
    loop = divergence.exact(lambda x, h: bound(t, x, h), x, h)  # a plain function has no closed form
    assert field.has_closed_form and closed.trace.abs().min() > 0.1
    assert torch.allclose(closed.trace, loop.trace, atol=1e-10, rtol=0)
    assert torch.equal(closed.dx, loop.dx) and closed.dh.shape == h.shape


def test_closed_form_is_the_trace_of_the_whole_jacobian(field, state):
    """Compared with another differentiation, molecule by molecule, without padding."""
    t, x, h, mask = state()
    trace = field.trace(t, x, h, mask)[2]
    for b, size in enumerate((5, 3)):
        alone = functools.partial(field, t[b], h=h[b : b + 1, :size], mask=mask[b : b + 1, :size])
        jacobian = jacrev(lambda y, f=alone: f(y)[0])(x[b : b + 1, :size])
        assert torch.einsum("bicbic->", jacobian).item() == pytest.approx(trace[b].item(), abs=1e-10)


def test_coinciding_particles_have_a_finite_trace(field, state):
    t, x, h, mask = state()
    x = x.clone()
    x[:, 1] = x[:, 0]
    closed, loop = field.trace(t, x, h, mask)[2], divergence.exact(lambda x, h: field(t, x, h, mask), x, h).trace
    assert torch.isfinite(closed).all() and torch.allclose(closed, loop, atol=1e-10)


def test_training_through_the_trace_is_that_through_the_loop(field, state):
    t, x, h, mask = state()
    bound, gradients = BoundDynamics(field, mask), []
    for at in (Moment(bound, t), lambda x, h: bound(t, x, h)):
        field.zero_grad()
        divergence.exact(at, x, h, create_graph=True).trace.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in field.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-9), name


def test_gaussians_sum_to_one_and_know_their_slope():
    basis = Gaussians(7, 5.0).double()
    with torch.no_grad():
        basis.centres.add_(0.2 * torch.randn(7))
        basis.log_widths.add_(0.4 * torch.randn(7))
    s = torch.linspace(-1.0, 30.0, 50, dtype=torch.float64, requires_grad=True)
    values, slopes = basis.with_slope(s)
    assert torch.equal(values, basis(s)) and torch.allclose(values.sum(-1), torch.ones_like(s))
    for k in range(7):
        (expected,) = torch.autograd.grad(values[:, k].sum(), s, retain_graph=True)
        assert torch.allclose(slopes[:, k], expected, atol=1e-12)


def test_kernel_dynamics_is_its_formula():
    """Compared with dx_i = Σ_j (x_i − x_j) Σ_kl W_kl b_k(d_ij) b_l(t), term by term."""
    network = KernelDynamics(hidden=3, layers=2).double()
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)

    def gaussians(basis, s):
        e = torch.exp(-(((s - basis.centres) / basis.log_widths.exp()) ** 2))
        return e / e.sum()

    expected = torch.zeros(3, 2, dtype=torch.float64)
    for i in range(3):
        for j in set(range(3)) - {i}:
            r = x[0, i] - x[0, j]
            b_d, b_t = gaussians(network.basis, r.norm()), gaussians(network.time_basis, torch.tensor(0.3).double())
            expected[i] += r * (b_d @ network.weight @ b_t)
    time = torch.full((1, 3, 1), 0.3, dtype=torch.float64)
    _, out = network(time, x, pair_mask(torch.ones(1, 3, dtype=torch.bool)).double())
    assert torch.allclose((out - x)[0], expected, atol=1e-10) and expected.abs().max() > 1e-5


# Symmetries


@pytest.mark.parametrize("n", [2, 3])
def test_rotation_reflection_translation_permutation(field, state, n):
    t, x, h, mask = state(n)
    dx, _, trace = field.trace(t, x, h, mask)
    assert dx[mask].abs().max() > 0.05
    turn = random_rotations(1, n, torch.Generator().manual_seed(0), torch.float64)[0].to(x)
    mirror = turn.clone()
    mirror[0] *= -1
    order = torch.tensor([3, 0, 4, 1, 2])
    for image, expected, moved in (
        (x @ turn.T, dx @ turn.T, mask),
        (x @ mirror.T, dx @ mirror.T, mask),
        (x + 0.7, dx, mask),
        (x[:, order], dx[:, order], mask[:, order]),
    ):
        dx_image, _, trace_image = field.trace(t, image, h, moved)
        assert torch.allclose(dx_image, expected, atol=1e-10)
        assert torch.allclose(trace_image, trace, atol=1e-10)
        assert torch.allclose(field(t, image, h, moved)[0], expected, atol=1e-10)


def test_padding_and_batch_mates_change_nothing(field, state):
    t, x, h, mask = state()
    garbage = torch.where(mask.unsqueeze(-1), x, 7.0 + torch.arange(5.0).double()[:, None])
    dx, _, trace = field.trace(t, garbage, h, mask)
    alone = field.trace(t[1:], x[1:, :3], h[1:, :3], mask[1:, :3])
    assert torch.allclose(alone[0][0], dx[1, :3], atol=1e-12) and (dx[~mask] == 0).all()
    assert torch.allclose(alone[2][0], trace[1], atol=1e-12)


def test_time_matters(field, state):
    t, x, h, mask = state()
    assert (field(t, x, h, mask)[0] - field(1 - t, x, h, mask)[0]).abs().max() > 1e-2


# Everything else of the package takes them


def dimers(count: int, seed: int) -> list[Atoms]:
    """Returns three particles in the plane, two of them close to each other."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        positions = np.zeros((3, 3))
        positions[:, :2] = [[0, 0], [1.0, 0], [0.5, 2.0]] + 0.2 * rng.standard_normal((3, 2))
        result.append(Atoms("X3", positions=positions))
    return result


@pytest.mark.parametrize(("objective", "steps"), [("flow_matching", 150), ("nll", 15)])
def test_train_score_generate_save_load(kind, tmp_path, objective, steps):
    config = TrainConfig(
        features="none", dimension=2, network=kind, hidden=16, layers=2, steps=steps, batch_size=16, device="cpu",
        learning_rate=2e-2, warmup=2, ema_decay=0.5, validate_every=steps, validation_size=8, objective=objective,
        ode_tolerance=1e-2,
    )  # fmt: skip
    data, valid = dimers(64, 0), dimers(8, 1)
    flow = train(config, data, valid)
    untrained = ENF(ENFConfig(**{**vars(flow.config), "sizes": {3: 1}}))
    table = score(flow, valid)
    assert (table["trace"] == "exact").all() and (table["kind"] == "exact").all()
    assert table["log_likelihood"].mean() > score(untrained, valid)["log_likelihood"].mean() + 0.1
    flow.save(tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors", device="cpu")
    assert np.array_equal(score(again, valid)["log_likelihood"], table["log_likelihood"])
    assert all(len(atoms) == 3 and np.ptp(atoms.positions[:, 2]) == 0 for atoms in generate(again, 3))


def test_untrained_flow_is_nearly_the_identity(kind):
    flow = ENF(ENFConfig(features="none", sizes={5: 1}, network=kind)).double()
    atoms = Atoms("X5", positions=np.random.default_rng(0).standard_normal((5, 3)))
    log_p = score(flow, atoms)["log_likelihood"][0]
    x = atoms.positions - atoms.positions.mean(axis=0)
    assert log_p == pytest.approx(-0.5 * (x**2).sum() - 6 * np.log(2 * np.pi), abs=0.3)


# Wrong uses


@pytest.mark.parametrize("features", ["joint", "given"])
def test_features_are_refused(kind, features):
    with pytest.raises(ValueError, match=f"network '{kind}' moves positions only, but features='{features}'; use"):
        ENFConfig(features=features, network=kind)
    with pytest.raises(ValueError, match=f"network '{kind}' moves positions only and knows no features"):
        build_network(kind, 4, 0, 3, 8, 1, True)


def test_radial_functions_and_the_compiled_kernel_are_refused(kind):
    with pytest.raises(ValueError, match="radial=4"):
        ENFConfig(features="none", network=kind, radial=4)
    flow = ENF(ENFConfig(features="none", network=kind))
    assert flow.use_backend("auto") == "torch"
    with pytest.raises(ValueError, match="computes the pairs of an EGNN only, not of (Simple|Kernel)Dynamics"):
        flow.use_backend("compiled")


def test_a_field_of_ones_own_has_no_closed_form_until_it_is_known():
    class Mine(RadialField):
        def profile(self, distance, time, slope):
            return -distance, -torch.ones_like(distance) if slope else None

    dynamics = Dynamics(Mine())
    assert not dynamics.has_closed_form
    x, pairs = torch.randn(1, 4, 3, dtype=torch.float64), (1 - torch.eye(4, dtype=torch.float64)).unsqueeze(0)
    trace = Mine().with_trace(x[..., :1] * 0, x, pairs)[2]
    distances = torch.cdist(x, x)
    assert trace.item() == pytest.approx(-4 * distances.sum().item(), rel=1e-6)  # n φ + φ' d = −(3 + 1) d
    with pytest.raises(NotImplementedError):
        RadialField()(x[..., :1], x, pairs)
