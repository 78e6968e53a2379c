"""The network (eq. 4, 5, 9): E(n) symmetry, and every part has an effect."""

from __future__ import annotations

import pytest
import torch

from ase_enf.geometry import pair_mask, random_rotations
from ase_enf.nn.egnn import EGCL, EGNN

MODES = {"joint": (4, 3), "given": (4, 0), "none": (1, 0)}  # node features in and out


@pytest.fixture(params=MODES)
def widths(request):
    return MODES[request.param]


@pytest.fixture
def graph(dtype, device):
    def build(n: int, width: int, sizes=(5, 3)):
        generator = torch.Generator().manual_seed(2)
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        h = torch.randn(len(sizes), max(sizes), width, generator=generator, dtype=torch.float64)
        x = 1.5 * torch.randn(len(sizes), max(sizes), n, generator=generator, dtype=torch.float64)
        return h.to(device, dtype), x.to(device, dtype), mask.to(device)

    return build


@pytest.fixture
def network(widths, stir, dtype, device):
    return stir(EGNN(*widths, hidden=8, layers=2), scale=1.5).to(device, dtype)


def reflection(n: int) -> torch.Tensor:
    return torch.diag(torch.tensor([-1.0] + [1.0] * (n - 1)))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", ["rotation", "reflection"])
def test_orthogonal_maps_turn_positions_and_leave_features(network, widths, graph, tolerance, n, kind):
    h, x, mask = graph(n, widths[0])
    q = reflection(n) if kind == "reflection" else random_rotations(1, n, torch.Generator().manual_seed(0))[0]
    q = torch.linalg.qr(q.double())[0].to(x)
    pairs = pair_mask(mask).to(x)
    h_out, x_out = network(h, x, pairs)
    h_turned, x_turned = network(h, x @ q.T, pairs)
    assert (x_out - x).abs().max() > 0.05  # the network does move the atoms
    assert torch.allclose(x_turned, x_out @ q.T, **tolerance)
    assert torch.allclose(h_turned, h_out, **tolerance)


@pytest.mark.parametrize("n", [2, 3])
def test_translation_is_passed_on(network, widths, graph, tolerance, n):
    h, x, mask = graph(n, widths[0])
    pairs = pair_mask(mask).to(x)
    shift = torch.linspace(1.0, 2.0, n).to(x)
    h_out, x_out = network(h, x, pairs)
    h_moved, x_moved = network(h, x + shift, pairs)
    assert torch.allclose(x_moved, x_out + shift, **tolerance)
    assert torch.allclose(h_moved, h_out, **tolerance)


def test_permutation_is_passed_on(network, widths, graph, tolerance):
    h, x, mask = graph(3, widths[0])
    order = torch.tensor([3, 0, 4, 1, 2])
    h_out, x_out = network(h, x, pair_mask(mask).to(x))
    h_shuffled, x_shuffled = network(h[:, order], x[:, order], pair_mask(mask[:, order]).to(x))
    assert torch.allclose(x_shuffled, x_out[:, order], **tolerance)
    assert torch.allclose(h_shuffled, h_out[:, order], **tolerance)


def test_padding_and_batch_mates_change_nothing(network, widths, graph, tolerance):
    h, x, mask = graph(3, widths[0])
    h_out, x_out = network(h, x, pair_mask(mask).to(x))
    spoiled_h, spoiled_x = h.clone(), x.clone()
    spoiled_h[~mask], spoiled_x[~mask] = 7.0, 8.0
    h_spoiled, x_spoiled = network(spoiled_h, spoiled_x, pair_mask(mask).to(x))
    h_alone, x_alone = network(h[1:, :3], x[1:, :3], pair_mask(mask[1:, :3]).to(x))
    for after in (x_spoiled[1, :3], x_alone[0]):
        assert torch.allclose(after, x_out[1, :3], **tolerance)
    for after in (h_spoiled[1, :3], h_alone[0]):
        assert torch.allclose(after, h_out[1, :3], **tolerance)


@pytest.mark.parametrize("options", [{}, {"gate": False, "reach": None, "input_distance": False}])
def test_every_parameter_gets_a_gradient(widths, graph, stir, dtype, options):
    network = stir(EGNN(*widths, hidden=8, layers=2, **options)).to(dtype)
    h, x, mask = graph(3, widths[0])
    h_out, x_out = network(h.cpu(), x.cpu(), pair_mask(mask.cpu()).to(dtype))
    (x_out.square().sum() + h_out.square().sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_every_parameter_gets_a_gradient_where_only_features_are_read(graph, stir, dtype):
    network = stir(EGNN(4, 2, hidden=8, layers=2, positions_out=False)).to(dtype)
    h, x, mask = graph(3, 4)
    network(h.cpu(), x.cpu(), pair_mask(mask.cpu()).to(dtype))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_one_layer_is_the_equations_of_the_paper(graph, stir, dtype, tolerance):
    """Compared with eq. 4, 5 and 9 written as a double loop over atoms."""
    layer = stir(EGCL(8, gate=True, bound=7.5), scale=1.5).to(dtype)
    h, x, _ = (t.cpu() for t in graph(3, 8, sizes=(4,)))
    h_out, x_out = layer(h, x, None, pair_mask(torch.ones(1, 4, dtype=torch.bool)).to(dtype))
    silu = torch.nn.functional.silu
    block = layer.messages
    for i in range(4):
        moved, received = x[0, i].clone(), torch.zeros(8, dtype=dtype)
        for j in range(4):
            if i == j:
                continue
            difference = x[0, i] - x[0, j]
            squared = difference.square().sum()
            m = silu(block.edge_out(silu(block.edge_in(torch.cat([h[0, i], h[0, j], squared[None]])))))
            m = torch.sigmoid(block.gate(m)) * m
            phi = 7.5 * torch.tanh(layer.position_out(silu(layer.position_in(m))))
            moved += difference / (torch.sqrt(squared + 1e-8) + 1.0) * phi
            received += m
        node = layer.node
        update = node.node_out(silu(node.node_in(torch.cat([h[0, i], received]))))
        assert torch.allclose(x_out[0, i], moved, **tolerance)
        assert torch.allclose(h_out[0, i], h[0, i] + update, **tolerance)


def test_reach_bounds_how_far_a_pair_can_push(graph, stir, dtype):
    """For two atoms, |x^L − x| < reach, however large the weights."""
    h, x, mask = (t.cpu() for t in graph(3, 1, sizes=(2,)))
    push = {}
    for reach in (3.0, None):
        network = stir(EGNN(1, 0, hidden=8, layers=2, reach=reach), scale=100.0).to(dtype)
        _, x_out = network(h, x, pair_mask(mask).to(dtype))
        push[reach] = (x_out - x).norm(dim=-1).max()
    assert 0.1 < push[3.0] < 3.0 < push[None]


def test_gradients_stay_finite_where_atoms_coincide(network, widths, graph):
    h, x, mask = graph(3, widths[0])
    x = torch.zeros_like(x).requires_grad_(True)
    h_out, x_out = network(h, x, pair_mask(mask).to(x))
    (first,) = torch.autograd.grad(x_out.sum() + h_out.sum(), x, create_graph=True)
    assert torch.isfinite(first).all()
    assert all(
        torch.isfinite(g).all()
        for g in torch.autograd.grad(first.square().sum(), [*network.parameters()], allow_unused=True)
        if g is not None
    )


def test_the_first_flow_is_close_to_the_identity():
    """The last layer of φ_x has a small initial gain, so an untrained network hardly moves an atom."""
    network = EGNN(1, 0, hidden=8, layers=2)
    x = torch.randn(1, 5, 3)
    _, x_out = network(torch.zeros(1, 5, 1), x, pair_mask(torch.ones(1, 5, dtype=torch.bool)).float())
    assert 0 < (x_out - x).abs().max() < 0.1


def test_context_of_pairs_turns_and_permutes_with_the_atoms(graph, stir, dtype, device, tolerance):
    network = stir(EGNN(4, 3, hidden=8, layers=2, pair_features=2), scale=1.5).to(device, dtype)
    h, x, mask = graph(3, 4)
    pairs = pair_mask(mask).to(x)
    place = torch.arange(5, device=device)
    context = torch.nn.functional.one_hot(place[:, None] * place % 3, 3)[..., 1:].to(x).expand(2, -1, -1, -1)
    h_out, x_out = network(h, x, pairs, context)
    q = torch.linalg.qr(random_rotations(1, 3, torch.Generator().manual_seed(0))[0].double())[0].to(x)
    h_turned, x_turned = network(h, x @ q.T, pairs, context)
    assert torch.allclose(x_turned, x_out @ q.T, **tolerance) and torch.allclose(h_turned, h_out, **tolerance)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    along = context[:, order][:, :, order]
    h_shuffled, x_shuffled = network(h[:, order], x[:, order], pair_mask(mask[:, order]).to(x), along)
    assert torch.allclose(x_shuffled, x_out[:, order], **tolerance)
    assert torch.allclose(h_shuffled, h_out[:, order], **tolerance)
    left = network(h[:, order], x[:, order], pair_mask(mask[:, order]).to(x), context)[1]
    assert (left - x_out[:, order]).abs().max() > 1e-3  # pairs that stay behind are other pairs
