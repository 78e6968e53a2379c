"""The closed form of the trace agrees with the Jacobian by automatic differentiation, and so does its gradient."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS
from ase_enf.flow.divergence import Moment
from ase_enf.geometry import pair_mask
from ase_enf.nn import jacobian
from ase_enf.nn.backends import fused
from ase_enf.nn.egnn import EGNN
from ase_enf.nn.jacobian import egnn_trace

SIZES = (4, 3, 1)


@pytest.fixture
def mask(device):
    return torch.arange(max(SIZES), device=device) < torch.tensor(SIZES, device=device)[:, None]


@pytest.fixture
def build(stir, device, dtype):
    def make(layers: int = 3, features: int = 2, **options) -> EGNN:
        network = EGNN(features + 2, features, 8, layers, **options)
        return stir(network, 0.9).to(device, dtype)

    return make


def point(mask, features, dtype, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    real = mask.unsqueeze(-1)
    x, h = (
        torch.randn(*mask.shape, k, generator=generator, dtype=torch.float64).to(real.device, dtype) * real
        for k in (n, features + 2)
    )
    return h, x, pair_mask(mask).to(dtype)


def by_autograd(network, h, x, pairs, mask):
    """Returns output and trace over real atoms, from the whole Jacobian."""
    width = h.shape[-1] - 2

    def joint(y):
        out = network(torch.cat([y[..., :width], h[..., width:]], dim=-1), y[..., width:], pairs)
        return torch.cat(out, dim=-1) * mask.unsqueeze(-1)

    y = torch.cat([h[..., :width], x], dim=-1)
    full = torch.autograd.functional.jacobian(joint, y)
    trace = torch.stack([full[b, :, :, b].flatten(2).flatten(0, 1).trace() for b in range(len(y))])
    out = joint(y)
    return out[..., :width], out[..., width:], trace


def traced(*arguments):
    """Returns h^L, x^L and the trace over both."""
    out = egnn_trace(*arguments)
    return out.h, out.x, out.by_x + out.by_h


VARIANTS = list(itertools.product((1, 2, 3, 5), (True, False), (0, 2), (15.0, None), (True, False)))


@pytest.mark.parametrize(("layers", "gate", "features", "reach", "input_distance"), VARIANTS)
def test_closed_form_is_the_trace_of_the_jacobian(
    build, mask, dtype, tolerance, layers, gate, features, reach, input_distance
):
    network = build(layers, features, gate=gate, reach=reach, input_distance=input_distance)
    h, x, pairs = point(mask, features, dtype)
    expected = by_autograd(network, h, x, pairs, mask)
    real = mask.unsqueeze(-1)
    for recording in (True, False):  # without a graph, everything is computed in place
        with torch.set_grad_enabled(recording):
            h_out, x_out, trace = traced(network, h, x, pairs, mask)
        assert trace.requires_grad == recording
        assert torch.allclose(h_out * real, expected[0], **tolerance)
        assert torch.allclose(x_out * real, expected[1], **tolerance)
        assert torch.allclose(trace, expected[2], **tolerance)
    assert (trace[:2] - (features + 3) * torch.tensor(SIZES[:2], device=trace.device)).abs().min() > 0.01


@pytest.mark.parametrize(
    ("layers", "gate", "input_distance", "radial"), [(1, True, True, 3), (2, False, True, 1), (4, True, False, 5)]
)
def test_radial_functions(build, mask, dtype, tolerance, layers, gate, input_distance, radial):
    network = build(layers, 2, gate=gate, input_distance=input_distance, radial=radial)
    h, x, pairs = point(mask, 2, dtype)
    expected = by_autograd(network, h, x, pairs, mask)
    h_out, x_out, trace = traced(network, h, x, pairs, mask)
    assert torch.allclose(x_out * mask.unsqueeze(-1), expected[1], **tolerance)
    assert torch.allclose(trace, expected[2], **tolerance)
    for layer in network.layers:  # and it is not the trace without them
        torch.nn.init.zeros_(layer.messages.edge_in.weight[:, 17 : 17 + radial].detach())
    assert (trace - traced(network, h, x, pairs, mask)[2])[:2].abs().min() > 1e-3


@pytest.mark.parametrize("n", [1, 2])
def test_other_dimensions_of_space(build, mask, dtype, tolerance, n):
    network = build(3, 2)
    h, x, pairs = point(mask, 2, dtype, n=n)
    expected = by_autograd(network, h, x, pairs, mask)[2]
    assert torch.allclose(traced(network, h, x, pairs, mask)[2], expected, **tolerance)


def test_a_network_that_leaves_positions_alone(build, mask, dtype, tolerance):
    network = build(2, 2, positions_out=False)
    h, x, pairs = point(mask, 2, dtype)
    expected = by_autograd(network, h, x, pairs, mask)[2]
    assert torch.allclose(traced(network, h, x, pairs, mask)[2], expected, **tolerance)


@pytest.mark.parametrize("gate", [True, False])
def test_chunks_do_not_matter(build, mask, dtype, tolerance, monkeypatch, gate):
    network = build(4, 2, gate=gate)
    h, x, pairs = point(mask, 2, dtype)
    expected = egnn_trace(network, h, x, pairs, mask)
    with torch.no_grad():
        for tangents, blocks in ((1, 2**20), (2**20, 1), (1, 1)):
            monkeypatch.setattr(jacobian, "TANGENT_ELEMENTS", {"cpu": tangents, "cuda": tangents})
            monkeypatch.setattr(jacobian, "BLOCK_ELEMENTS", {"cpu": blocks, "cuda": blocks})
            for value, other in zip(expected, egnn_trace(network, h, x, pairs, mask), strict=True):
                assert torch.allclose(value, other, **tolerance)


def test_gradients_are_those_of_automatic_differentiation(make_flow, features, device):
    """Gradients of trace and velocity, with respect to the state and to the weights."""
    flow = make_flow(features, layers=3).double()
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]], device=device)
    generator = torch.Generator().manual_seed(2)
    x, h, context = (
        torch.randn(2, 4, k, generator=generator, dtype=torch.float64).to(device) * mask.unsqueeze(-1)
        for k in (3, flow.config.flow_features, flow.config.context_features)
    )
    velocity = flow.velocity(mask, context if features == "given" else None)
    t = torch.tensor(0.3, dtype=torch.float64, device=device)
    x.requires_grad_(True)
    weights = [p for p in flow.dynamics.parameters()]
    answers = []
    for field in (Moment(velocity, t), lambda x, h: velocity(t, x, h)):  # a plain function has no closed form
        result = divergence.exact(field, x, h, create_graph=True)
        total = result.trace[0] - 2.0 * result.trace[1] + result.dx.square().sum()
        answers.append((total, *torch.autograd.grad(total, [x, *weights], allow_unused=True)))
    for ours, theirs in zip(*answers, strict=True):
        if theirs is None:  # the bias of the last layer moves every feature alike
            assert ours is None or not ours.any()
        else:
            assert torch.allclose(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-9, atol=1e-10)


def test_flows_use_it_and_networks_without_it_do_not(make_flow, monkeypatch, device):
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return egnn_trace(*arguments)

    monkeypatch.setattr("ase_enf.flow.dynamics.egnn_trace", spy)
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    x = torch.randn(1, 3, 3, dtype=torch.float64, device=device)
    x = x - x.mean(dim=1, keepdim=True)
    for network, expected in (("egnn", INTERVALS + 1), ("gnn", 0)):
        calls.clear()
        flow = make_flow("none", network=network).double()
        z = flow.flow(mask).forward(x, x[..., :0], divergence.exact)
        assert len(calls) == expected and z.ladj.abs() > 0.01


def test_single_precision_agrees_to_its_rounding(make_flow, features, device):
    """The error of a float32 trace is below 1e-5 of the size of its terms."""
    flow = make_flow(features, hidden=32, layers=4)
    mask = torch.ones(4, 9, dtype=torch.bool, device=device)
    generator = torch.Generator().manual_seed(0)
    x, h, context = (
        torch.randn(4, 9, k, generator=generator, dtype=torch.float64).to(device)
        for k in (3, flow.config.flow_features, flow.config.context_features)
    )
    traces = []
    for kind in (torch.float64, torch.float32):
        flow = flow.to(kind)
        velocity = flow.velocity(mask, context.to(kind) if features == "given" else None)
        moment = Moment(velocity, torch.tensor(0.4, dtype=kind, device=device))
        traces.append(divergence.exact(moment, x.to(kind), h.to(kind)).trace.double())
    dimensions = 9 * (3 + flow.config.flow_features)
    assert ((traces[0] - traces[1]).abs() < 1e-5 * dimensions).all()


@pytest.mark.parametrize(
    ("gate", "input_distance", "radial", "reach"), [(True, True, 0, 15.0), (False, False, 3, None)]
)
def test_the_compiled_kernel_gives_the_same_trace(dtype, stir, mask, tolerance, gate, input_distance, radial, reach):
    reason = fused.unavailable(16, dtype, mask.device)
    if reason:
        pytest.skip(f"no kernel here: {reason}")
    options = {"gate": gate, "input_distance": input_distance, "radial": radial, "reach": reach}
    network = stir(EGNN(4, 2, 16, 4, **options), 0.9).to(mask.device, dtype)
    h, x, pairs = point(mask, 2, dtype)
    with torch.no_grad():
        expected = egnn_trace(network, h, x, pairs, mask)
        network.fuse()
        found = egnn_trace(network, h, x, pairs, mask)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, **tolerance)
    assert ((expected.by_x + expected.by_h)[:2] - 5 * torch.tensor(SIZES[:2])).abs().min() > 0.01


def kinds_of_pairs(mask, dtype, kinds=3, seed=3):
    """Returns symmetric one-hot features of the pairs, zero on the diagonal and at padding."""
    generator = torch.Generator().manual_seed(seed)
    size, atoms = mask.shape
    kind = torch.randint(0, kinds + 1, (size, atoms, atoms), generator=generator).triu(1)
    kind = (kind + kind.mT).to(mask.device) * pair_mask(mask)
    return torch.nn.functional.one_hot(kind, kinds + 1)[..., 1:].to(dtype)


@pytest.mark.parametrize(
    ("layers", "gate", "features", "input_distance", "radial"),
    [*itertools.product((1, 2, 4), (True, False), (0, 2), (True, False), (0,)), (3, True, 2, True, 4)],
)
def test_context_of_pairs(build, mask, dtype, tolerance, layers, gate, features, input_distance, radial):
    network = build(layers, features, gate=gate, input_distance=input_distance, radial=radial, pair_features=3)
    h, x, pairs = point(mask, features, dtype)
    context = kinds_of_pairs(mask, dtype)
    expected = by_autograd(functools.partial(network, pairs=context), h, x, pairs, mask)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            h_out, x_out, trace = traced(network, h, x, pairs, mask, context)
        assert torch.allclose(h_out * mask.unsqueeze(-1), expected[0], **tolerance)
        assert torch.allclose(x_out * mask.unsqueeze(-1), expected[1], **tolerance)
        assert torch.allclose(trace, expected[2], **tolerance)
    other = traced(network, h, x, pairs, mask, context.flip(-1))[2]
    assert (trace - other)[:2].abs().max() > 1e-3  # it has an effect


def test_the_compiled_kernel_traces_with_context(dtype, stir, mask, tolerance):
    reason = fused.unavailable(16, dtype, mask.device)
    if reason:
        pytest.skip(f"no kernel here: {reason}")
    network = stir(EGNN(4, 2, 16, 4, radial=3, pair_features=3), 0.9).to(mask.device, dtype)
    h, x, pairs = point(mask, 2, dtype)
    context = kinds_of_pairs(mask, dtype)
    with torch.no_grad():
        expected = egnn_trace(network, h, x, pairs, mask, context)
        network.fuse()
        found = egnn_trace(network, h, x, pairs, mask, context)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, **tolerance)
