"""Optimizers: the parameters of Muon, its step, and one schedule for all."""

from __future__ import annotations

import pytest
import torch

from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from ase_enf.training.optimizers import build_optimizers, hidden_matrices, resolve_optimizer

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def model(network: str = "egnn") -> ENF:
    torch.manual_seed(0)
    return ENF(ENFConfig(network=network, hidden=8, layers=2))


@pytest.mark.parametrize("network", ["egnn", "gnn"])
def test_hidden_matrices_are_neither_vectors_nor_the_outer_maps(network):
    flow = model(network).dynamics.network
    names = {id(parameter): name for name, parameter in flow.named_parameters()}
    chosen = {names[id(matrix)] for matrix in hidden_matrices(flow)}
    assert not any(name.startswith(("embed", "out")) or name.endswith("bias") for name in chosen)
    assert {name.split(".")[-2] for name in chosen} >= {"edge_in", "edge_out", "node_in", "node_out"}
    assert not any("gate" in name or "position_out" in name for name in chosen)  # one row only


def test_kernel_dynamics_is_one_outer_map():
    assert hidden_matrices(ENF(ENFConfig(features="none", network="kernel", hidden=8)).dynamics.network) == []


@muon
def test_every_parameter_has_exactly_one_optimizer():
    flow = model()
    parameters = list(flow.parameters())
    optimizers = build_optimizers(flow.dynamics.network, parameters, "muon", rate=1e-3, matrix_rate=4e-3)
    taken = [id(p) for member in optimizers.members for group in member.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(map(id, parameters))


@muon
def test_a_state_brings_everything_but_the_weight_decay():
    flow = model()
    build = [flow.dynamics.network, list(flow.parameters()), "muon", 1e-3, 4e-3]
    first, again = build_optimizers(*build, matrix_decay=0.1), build_optimizers(*build, matrix_decay=0.2)
    for parameter in flow.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    again.load_state_dict(first.state_dict())
    for old, new in zip(first.members, again.members, strict=True):
        assert [len(member.state) for member in (old, new)] == [len(old.param_groups[0]["params"])] * 2
    assert again.members[-1].param_groups[0]["weight_decay"] == 0.2


@muon
def test_a_step_of_muon_moves_all_directions_alike():
    """For any gradient, the singular values of a step are one, up to the spread of the Newton-Schulz iteration."""
    flow = model()
    matrix = flow.dynamics.network.layers[0].messages.edge_out.weight
    before = matrix.detach().clone()
    optimizers = build_optimizers(flow.dynamics.network, list(flow.parameters()), "muon", rate=1e-3, matrix_rate=4e-3)
    left, _, right = torch.linalg.svd(torch.randn(8, 8))
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix.grad = left @ torch.diag(torch.linspace(0.2, 1.0, 8)) @ right
    optimizers.step()
    step = (before - matrix.detach()) / (4e-3 * 0.2 * 8**0.5)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.trace(left.T @ step @ right.T) / 8 > 0.6  # along U Vᵀ, downhill


@muon
def test_one_schedule_for_all_rates():
    flow = model()
    optimizers = build_optimizers(flow.dynamics.network, list(flow.parameters()), "muon", rate=1e-3, matrix_rate=4e-3)
    optimizers.set_rate(0.5)
    optimizers.set_rate(0.25)
    rates = [group["lr"] for member in optimizers.members for group in member.param_groups]
    assert rates == pytest.approx([0.25e-3, 1e-3])


def test_auto_is_the_papers_optimizer_for_maximum_likelihood():
    assert resolve_optimizer("auto", "nll") == "adamw"
    assert resolve_optimizer("auto", "flow_matching") == ("muon" if hasattr(torch.optim, "Muon") else "adamw")


def test_muon_without_torchs_is_refused(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="torch 2.9"):
        resolve_optimizer("muon", "flow_matching")
    assert resolve_optimizer("auto", "flow_matching") == "adamw"
