"""The baseline network, which is not rotation equivariant, and the message block that both networks share."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ase_enf.geometry import pair_mask, random_rotations
from ase_enf.nn.gnn import GNN, Messages, NodeUpdate


@pytest.fixture
def network(stir, dtype):
    return stir(GNN(3, 2, dimension=3, hidden=8, layers=2)).to(dtype)


@pytest.fixture
def graph(dtype):
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return torch.randn(2, 5, 3, dtype=dtype), torch.randn(2, 5, 3, dtype=dtype), mask


def test_rotation_equivariance_fails(network, graph, dtype):
    h, x, mask = graph
    rotation = random_rotations(1, 3, torch.Generator().manual_seed(0), dtype)[0]
    h_out, x_out = network(h, x, pair_mask(mask).to(dtype))
    h_turned, x_turned = network(h, x @ rotation.T, pair_mask(mask).to(dtype))
    assert (x_turned - x_out @ rotation.T)[mask].abs().max() > 0.1
    assert (h_turned - h_out)[mask].abs().max() > 0.1


def test_permutation_is_passed_on(network, graph, dtype, tolerance):
    h, x, mask = graph
    order = torch.tensor([3, 0, 4, 1, 2])
    h_out, x_out = network(h, x, pair_mask(mask).to(dtype))
    h_shuffled, x_shuffled = network(h[:, order], x[:, order], pair_mask(mask[:, order]).to(dtype))
    assert torch.allclose(x_shuffled, x_out[:, order], **tolerance)
    assert torch.allclose(h_shuffled, h_out[:, order], **tolerance)


def test_padding_and_batch_mates_change_nothing(network, graph, dtype, tolerance):
    h, x, mask = graph
    h_out, x_out = network(h, x, pair_mask(mask).to(dtype))
    h_alone, x_alone = network(h[1:, :3], x[1:, :3], pair_mask(mask[1:, :3]).to(dtype))
    assert torch.allclose(h_alone[0], h_out[1, :3], **tolerance)
    assert torch.allclose(x_alone[0], x_out[1, :3], **tolerance)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("widths", [(3, 2), (1, 0)])
def test_every_parameter_gets_a_gradient(stir, dtype, gate, widths):
    network = stir(GNN(*widths, dimension=2, hidden=8, layers=2, gate=gate)).to(dtype)
    x = torch.randn(1, 4, 2, dtype=dtype)
    h = torch.randn(1, 4, widths[0], dtype=dtype)
    h_out, x_out = network(h, x, pair_mask(torch.ones(1, 4, dtype=torch.bool)).to(dtype))
    assert h_out.shape == (1, 4, widths[1]) and x_out.shape == x.shape
    (h_out.square().sum() + x_out.square().sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert any("gate" in name for name, _ in network.named_parameters()) == gate


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("edge_features", [0, 1, 2])
def test_factored_first_layer_is_the_linear_map_of_the_concatenation(stir, dtype, tolerance, gate, edge_features):
    block = stir(Messages(4, edge_features, gate)).to(dtype)
    mask = torch.tensor([[True, True, True, False]])
    h = torch.randn(1, 4, 4, dtype=dtype)
    a = torch.randn(1, 4, 4, edge_features, dtype=dtype) if edge_features else None
    copy = None if a is None else a.clone()
    messages = block(h, a, pair_mask(mask).to(dtype))
    targets, sources = h.unsqueeze(2).expand(-1, -1, 4, -1), h.unsqueeze(1).expand(-1, 4, -1, -1)
    plain = block.edge_in(torch.cat([targets, sources, *([] if a is None else [a])], dim=-1))
    plain = F.silu(block.edge_out(F.silu(plain)))
    plain = plain * torch.sigmoid(block.gate(plain)) if gate else plain
    assert torch.allclose(messages, plain * pair_mask(mask).unsqueeze(-1), **tolerance)
    assert (messages[~pair_mask(mask)] == 0).all()
    assert copy is None or torch.equal(a, copy)  # "in place" is on its own product, not on the input


def test_node_update_is_residual(stir, dtype):
    block = stir(NodeUpdate(4)).to(dtype)
    h, m = torch.randn(1, 3, 4, dtype=dtype), torch.randn(1, 3, 4, dtype=dtype)
    update = block(h, m) - h
    assert update.abs().max() > 1e-3
    torch.nn.init.zeros_(block.node_out.weight)
    torch.nn.init.zeros_(block.node_out.bias)
    assert torch.equal(block(h, m), h)
