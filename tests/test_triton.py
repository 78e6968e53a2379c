"""The Triton kernels agree with the plain layer, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch
from torch import Tensor

from ase_enf.geometry import pair_differences, pair_mask
from ase_enf.nn.backends.choice import choose_backend
from ase_enf.nn.egnn import EGCL, EGNN
from ase_enf.nn.radial import pair_scalars

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where the interpreter sees masked numbers


@pytest.fixture(scope="module")
def kernels():
    """Returns the module of the kernels, interpreted if there is no GPU."""
    pytest.importorskip("triton")
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start: torch may have imported triton before")
    return importlib.import_module("ase_enf.nn.backends.triton_pairs")


def build(
    gate: bool, moves: bool, dimension: int, radial: int, atoms: int, width: int, given: int, extra: bool
) -> tuple[EGCL, dict[str, Tensor | None]]:
    """Returns a layer that moves positions, and molecules of three sizes."""
    torch.manual_seed(0)
    edges = (1 + radial if extra else 0) + given
    layer = EGCL(width, edge_features=edges, radial=radial, gate=gate, bound=5.0, update_positions=moves)
    if moves:
        torch.nn.init.xavier_uniform_(layer.position_out.weight)
    mask = torch.arange(atoms) < torch.tensor([atoms, max(2, atoms - 2), 2])[:, None]
    x = torch.randn(3, atoms, dimension) * 1.5 * mask.unsqueeze(-1)
    return layer.to(DEVICE), {
        "h": torch.randn(3, atoms, width).to(DEVICE).requires_grad_(),
        "x": x.to(DEVICE).requires_grad_(),
        "squared": pair_differences(torch.randn(3, atoms, dimension))[1].to(DEVICE) if extra else None,
        "mask": pair_mask(mask).float().to(DEVICE),
        "context": torch.randn(3, atoms, atoms, given).to(DEVICE) if given else None,
    }


def differentiate(layer: EGCL, inputs: dict[str, Tensor | None], on_gpu: bool, radial: int) -> dict[str, Tensor]:
    """Returns the output of a layer, and every gradient of a random function of it."""
    a = inputs["squared"]
    if a is not None:
        a = a.unsqueeze(-1) if on_gpu else pair_scalars(a, radial)
    h, x = layer(inputs["h"], inputs["x"], a, inputs["mask"], inputs["context"], on_gpu)
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(t.shape, generator=generator).to(t) for t in (h, x)]
    names = {"h": inputs["h"], "x": inputs["x"]} | dict(layer.named_parameters())
    total = (h * weigh[0]).sum() + (x * weigh[1]).sum()
    slopes = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    return {"new h": h, "new x": x} | {name: g for name, g in zip(names, slopes, strict=True) if g is not None}


CASES = {
    "as trained": (True, True, 3, 16, 5, 32, 0, True),
    "no gate, two dimensions, no radial functions": (False, True, 2, 0, 4, 16, 0, True),
    "a molecular graph, positions stay": (True, False, 3, 4, 6, 16, 2, True),
    "a width between powers of two, one distance": (True, True, 3, 8, 5, 24, 3, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_plain_layer(kernels, case):
    layer, inputs = build(*case)
    plain, mine = (differentiate(layer, inputs, on_gpu, case[3]) for on_gpu in (False, True))
    assert plain.keys() == mine.keys()
    for name, expected in plain.items():
        error = (mine[name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < (1e-3 if CUDA else 1e-5), name


def test_rounded_products_err_no_more_than_those_of_the_plain_layer(kernels):
    layer, inputs = build(*CASES["as trained"])
    exact = differentiate(layer, inputs, False, 16)
    layer.messages.products = torch.bfloat16
    plain, mine = (differentiate(layer, inputs, on_gpu, 16) for on_gpu in (False, True))
    for name, expected in exact.items():
        theirs, own = (float((found[name] - expected).detach().norm() / expected.norm()) for found in (plain, mine))
        assert own < max(3.0 * theirs, 0.01), name


def test_without_a_graph_nothing_is_kept_and_the_values_are_the_same(kernels):
    layer, inputs = build(*CASES["as trained"])
    a = inputs["squared"].unsqueeze(-1)
    kept = layer(inputs["h"], inputs["x"], a, inputs["mask"], None, True)
    with torch.no_grad():
        alone = layer(inputs["h"], inputs["x"], a, inputs["mask"], None, True)
    for one, other in zip(kept, alone, strict=True):
        assert other.grad_fn is None
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=0)


def test_no_gradient_flows_to_the_second_distance(kernels):
    layer, inputs = build(*CASES["as trained"])
    a = inputs["squared"].unsqueeze(-1).requires_grad_()
    h, _ = layer(inputs["h"], inputs["x"], a, inputs["mask"], None, True)
    with pytest.raises(RuntimeError, match="no gradient with respect to the second distance"):
        h.sum().backward()


@pytest.mark.parametrize(
    ("atoms", "width", "radial", "reason"),
    [(3, 512, 0, "width 512 is above 256"), (200, 16, 0, "200 is above 128"), (3, 16, 40, "82 is above 64")],
)
def test_what_does_not_fit_is_refused_with_the_reason(kernels, atoms, width, radial, reason):
    layer, inputs = build(True, True, 3, radial, atoms, width, 0, True)
    with pytest.raises(ValueError, match=reason):
        layer(inputs["h"], inputs["x"], inputs["squared"].unsqueeze(-1), inputs["mask"], None, True)


def test_a_cpu_does_not_take_the_kernels():
    with pytest.raises(ValueError, match="it runs on CUDA devices, not on cpu"):
        choose_backend("triton", 32, torch.float32, torch.device("cpu"))
    network = EGNN(in_features=2, out_features=1, hidden=16, layers=1)
    network.use_triton()
    h, x, pairs = torch.randn(1, 3, 2), torch.randn(1, 3, 3), torch.ones(1, 3, 3) - torch.eye(3)
    loaded = set(sys.modules)
    assert network(h, x, pairs)[0].shape == (1, 3, 1)
    assert not any(name.startswith("triton") for name in set(sys.modules) - loaded)
