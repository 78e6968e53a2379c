"""The compiled kernel agrees with the plain layer, which is the definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from ase_enf.atoms.batch import to_batch
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.nn.backends import choice, fused
from ase_enf.nn.egnn import EGNN
from ase_enf.training.config import TrainConfig
from ase_enf.training.objectives import FlowMatching

REASON = fused.unavailable(16, torch.float64, torch.device("cpu"))
needs_kernel = pytest.mark.skipif(REASON is not None, reason=f"no kernel here: {REASON}")


def network_and_inputs(
    dtype: torch.dtype,
    gate: bool,
    start: bool,
    reach: float | None,
    out: int,
    sizes: tuple[int, ...],
    n: int = 3,
    radial: int = 0,
) -> tuple[EGNN, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    network = EGNN(
        3, out, hidden=48, layers=3, gate=gate, reach=reach, input_distance=start, radial=radial, positions_out=out != 1
    ).to(dtype)
    for layer in network.layers:
        if layer.position_out is not None:
            torch.nn.init.normal_(layer.position_out.weight, std=0.3)
    atoms = max(sizes)
    mask = torch.arange(atoms) < torch.tensor(sizes)[:, None]
    pairs = (mask[:, :, None] & mask[:, None] & ~torch.eye(atoms, dtype=torch.bool)).to(dtype)
    h = torch.randn(len(sizes), atoms, 3, dtype=dtype) * mask.unsqueeze(-1)
    x = torch.randn(len(sizes), atoms, n, dtype=dtype) * mask.unsqueeze(-1)
    return network, h.requires_grad_(), x.requires_grad_(), pairs


def outputs_and_gradients(network: EGNN, h: Tensor, x: Tensor, pairs: Tensor) -> list[Tensor]:
    outputs = network(h, x, pairs)
    weights = [torch.linspace(-1.0, 1.3, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
    total = sum((w * t).sum() for w, t in zip(weights, outputs, strict=True))
    wanted = [h, x, *network.parameters()]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True))]


@needs_kernel
@pytest.mark.parametrize(
    ("gate", "start", "reach", "out"),
    [
        *itertools.product((True, False), (True, False), (15.0, None), (2,)),
        (True, True, 15.0, 0),
        (True, True, 15.0, 1),
    ],
)
def test_kernel_is_the_plain_layer(gate: bool, start: bool, reach: float | None, out: int) -> None:
    network, *inputs = network_and_inputs(torch.float64, gate, start, reach, out, sizes=(13, 2, 7))
    plain = outputs_and_gradients(network, *inputs)
    network.fuse()
    for expected, got in zip(plain, outputs_and_gradients(network, *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@needs_kernel
@pytest.mark.parametrize(("n", "radial"), [(1, 0), (2, 3), (3, 16)])
def test_float32(n: int, radial: int) -> None:
    network, *inputs = network_and_inputs(torch.float32, True, True, 15.0, 2, sizes=(19, 4), n=n, radial=radial)
    plain = outputs_and_gradients(network, *inputs)
    network.fuse()
    for expected, got in zip(plain, outputs_and_gradients(network, *inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5 * float(expected.detach().abs().max()))


@needs_kernel
@pytest.mark.parametrize(("start", "radial"), [(True, 3), (False, 0)])
def test_context_of_pairs(start: bool, radial: int) -> None:
    torch.manual_seed(0)
    network = EGNN(3, 2, hidden=48, layers=3, input_distance=start, radial=radial, pair_features=5).double()
    for layer in network.layers:
        torch.nn.init.normal_(layer.position_out.weight, std=0.3)
    _, h, x, pairs = network_and_inputs(torch.float64, True, start, 15.0, 2, sizes=(13, 2, 7), radial=radial)
    context = torch.nn.functional.one_hot(torch.randint(0, 6, (3, 13, 13)), 6)[..., 1:].double()
    bound = Bound(network, context)
    plain = outputs_and_gradients(bound, h, x, pairs)
    network.fuse()
    for expected, got in zip(plain, outputs_and_gradients(bound, h, x, pairs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    weight = network.layers[0].messages.edge_in.weight
    (gradient,) = torch.autograd.grad(network(h, x, pairs, context)[1].sin().sum(), [weight])
    assert (gradient[:, -5:].abs().amax(dim=0) > 1e-6).all()  # every kind of pair is learned from


class Bound(torch.nn.Module):
    """A network with its context bound."""

    def __init__(self, network: EGNN, context: Tensor) -> None:
        super().__init__()
        self.network, self.context = network, context

    def forward(self, h: Tensor, x: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(h, x, pairs, self.context)


@needs_kernel
def test_saturated_gates_and_activations() -> None:
    """If e underflows to zero and SiLUs and tanh saturate, the kernel still agrees, and all is finite."""
    network, h, x, pairs = network_and_inputs(torch.float32, True, True, 15.0, 2, sizes=(6,))
    for layer in network.layers:
        torch.nn.init.constant_(layer.messages.gate.bias, -120.0)
    big = [h, (x.detach() * 300.0).requires_grad_(), pairs]
    plain = outputs_and_gradients(network, *big)
    network.fuse()
    for expected, got in zip(plain, outputs_and_gradients(network, *big), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()) + 1e-30)


@needs_kernel
def test_not_a_number_stays_visible() -> None:
    network, h, x, pairs = network_and_inputs(torch.float32, True, True, 15.0, 2, sizes=(5, 5))
    network.fuse()
    with torch.no_grad():
        x = x.clone()
        x[0, 0, 0] = torch.nan
        h_out, x_out = network(h, x, pairs)
    assert h_out[0].isnan().any() and x_out[0].isnan().any()
    assert h_out[1].isfinite().all() and x_out[1].isfinite().all()


@needs_kernel
def test_threads_and_batches_change_nothing() -> None:
    network, h, x, pairs = network_and_inputs(torch.float64, True, True, 15.0, 2, sizes=(9, 5, 7, 9, 3))
    network.fuse()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients(network, h, x, pairs)
        torch.set_num_threads(3)
        three = outputs_and_gradients(network, h, x, pairs)
    finally:
        torch.set_num_threads(before)
    for expected, got in zip(one, three, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    alone = network(h[2:3], x[2:3], pairs[2:3])
    torch.testing.assert_close(alone[0], one[0][2:3], rtol=1e-12, atol=1e-12)


@needs_kernel
def test_frozen_weights_still_give_the_gradient_of_the_inputs() -> None:
    network, h, x, pairs = network_and_inputs(torch.float64, True, True, 15.0, 2, sizes=(6, 4))
    network.requires_grad_(False)
    found = []
    for use in (False, True):
        network.fuse(use)
        found.append(torch.autograd.grad(network(h, x, pairs)[1].sin().sum(), [h, x]))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@needs_kernel
def test_second_derivatives_are_refused() -> None:
    network, h, x, pairs = network_and_inputs(torch.float64, True, True, 15.0, 2, sizes=(4,))
    network.fuse()
    (first,) = torch.autograd.grad(network(h, x, pairs)[1].sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@needs_kernel
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("wanted", ["h", "x"])
def test_second_derivatives_with_respect_to_one_input_are_refused(wanted: str, frozen: bool) -> None:
    network, h, x, pairs = network_and_inputs(torch.float64, True, True, 15.0, 2, sizes=(4,))
    network.requires_grad_(not frozen)
    network.fuse()
    leaf = {"h": h, "x": x}[wanted]
    (first,) = torch.autograd.grad(network(h, x, pairs)[1].sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(first.square().sum(), leaf)


@needs_kernel
def test_training_loss_of_a_flow() -> None:
    torch.manual_seed(0)
    flow = ENF(ENFConfig(hidden=32, layers=2))
    batch = to_batch([molecule("CH3CH2OH"), molecule("H2O"), molecule("CH4")], flow.species)
    losses = []
    for backend in ("torch", "compiled"):
        assert flow.use_backend(backend) == backend
        losses.append(FlowMatching()(flow, batch, torch.Generator().manual_seed(0)).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_where_the_kernel_cannot_serve() -> None:
    flow = ENF(ENFConfig(hidden=8, layers=1))
    assert flow.use_backend("auto") == "torch"
    with pytest.raises(ValueError, match="width 8 is not a multiple of 16"):
        flow.use_backend("compiled")
    with pytest.raises(ValueError, match="of an EGNN only, not of GNN"):
        ENF(ENFConfig(network="gnn", hidden=16, layers=1)).use_backend("compiled")
    with pytest.raises(ValueError, match="backend 'fast' is unknown; choose one of auto, compiled, triton, torch"):
        flow.use_backend("fast")
    with pytest.raises(TypeError, match="use_kernel is now called use_backend"):
        flow.use_kernel(kernel="fused")
    with pytest.raises(ValueError, match="second derivatives"):
        TrainConfig(backend="compiled", objective="nll")


@pytest.mark.parametrize(
    ("variable", "name", "message"),
    [
        ("CXX", "no-such-compiler", "no-such-compiler failed"),
        ("XDG_CACHE_HOME", "file", r"no folder to keep the kernel in|no C\+\+ compiler"),
    ],
)
def test_without_a_compiler_or_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, name: str, message: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, str(tmp_path / name))
    fused.library.cache_clear()
    try:
        flow = ENF(ENFConfig(hidden=16, layers=1))
        assert flow.use_backend("auto") == "torch"
        with pytest.raises(ValueError, match=message):
            flow.use_backend("compiled")
    finally:
        fused.library.cache_clear()


def test_a_loaded_flow_computes_by_the_kernel_where_it_can(tmp_path: Path) -> None:
    made = ENF(ENFConfig(features="none", sizes={4: 1}, hidden=16, layers=2)).eval()
    made.save(tmp_path / "flow.safetensors")
    loaded = load(tmp_path / "flow.safetensors", device="cpu")
    possible = fused.unavailable(16, torch.float32, torch.device("cpu")) is None
    assert [layer.fused for layer in loaded.dynamics.network.layers] == [possible] * 2
    x = torch.randn(2, 4, 3)
    x -= x.mean(dim=1, keepdim=True)
    mask = torch.ones(2, 4, dtype=torch.bool)
    for one, other in zip(
        *(flow.velocity(mask)(torch.zeros(2), x, x[..., :0]) for flow in (made, loaded)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)


def test_loading_for_torch_looks_for_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_):
        raise AssertionError("nobody asked for the kernel")

    ENF(ENFConfig(features="none", sizes={4: 1}, hidden=16, layers=1)).save(tmp_path / "flow.safetensors")
    monkeypatch.setitem(choice.OBSTACLES, "compiled", built)
    loaded = load(tmp_path / "flow.safetensors", device="cpu", backend="torch")
    assert not loaded.dynamics.network.layers[0].fused
    with pytest.raises(ValueError, match="backend 'fast' is unknown; choose one of auto, compiled, triton, torch"):
        load(tmp_path / "flow.safetensors", backend="fast")


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.bfloat16])
def test_a_kernel_chosen_for_another_dtype_steps_back(to):
    """A width of 8 fills a register in float64 only; in float32 the kernel would write beyond its rows."""
    flow = ENF(ENFConfig(features="none", sizes={4: 1}, hidden=8, layers=2)).double()
    assert flow.use_backend("auto") in ("compiled", "torch")
    x, mask = torch.randn(2, 4, 3, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    x -= x.mean(dim=1, keepdim=True)
    flow, x = flow.to(to), x.to(to)
    t, h = torch.zeros(2, dtype=to), x[..., :0]
    with torch.no_grad():
        dx = flow.dynamics(t, x, h, mask)[0]
        flow.use_backend("torch")
        assert torch.allclose(dx, flow.dynamics(t, x, h, mask)[0], atol=1e-2 if to == torch.bfloat16 else 1e-5)


def test_autocast_and_the_kernel():
    flow = ENF(ENFConfig(features="none", sizes={4: 1}, hidden=16, layers=1))
    flow.use_backend("auto")
    x, mask = torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(flow.dynamics(torch.zeros(2), x - x.mean(dim=1, keepdim=True), x[..., :0], mask)[0]).all()
