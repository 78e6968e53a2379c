"""The published weights: names and shapes with a file made here, numbers if the published file is available."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ase_enf.cli import main
from ase_enf.flow.en_flows import convert_en_flows
from ase_enf.flow.loading import load

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
WEIGHTS, VECTORS = REFERENCE / "en_flows_qm9_weights.npz", REFERENCE / "en_flows_qm9_vectors.npz"
LAYERS, HIDDEN = 2, 64


def linear(rng, outputs, inputs, bias=True):
    weights = {"weight": rng.normal(size=(outputs, inputs)) * 0.1}
    return weights | ({"bias": rng.normal(size=outputs)} if bias else {})


def published_arrays(rng) -> dict[str, np.ndarray]:
    """Returns random weights under the published names, HIDDEN wide and LAYERS deep."""
    modules = {}
    for prefix, inputs, outputs, edges, layers, gate in (
        ("flow.transformations.1.odefunc.dynamics.egnn.", 7, 7, 2, LAYERS, True),
        ("dequantizer.net_fn.egnn.", 6, 12, 1, 4, False),
    ):
        modules[prefix + "embedding"] = linear(rng, HIDDEN, inputs)
        modules[prefix + "embedding_out"] = linear(rng, outputs, HIDDEN)
        for k in range(layers):
            layer = f"{prefix}gcl_{k}."
            modules[layer + "edge_mlp.0"] = linear(rng, HIDDEN, 2 * HIDDEN + edges)
            modules[layer + "edge_mlp.2"] = linear(rng, HIDDEN, HIDDEN)
            modules[layer + "node_mlp.0"] = linear(rng, HIDDEN, 2 * HIDDEN)
            modules[layer + "node_mlp.2"] = linear(rng, HIDDEN, HIDDEN)
            modules[layer + "coord_mlp.0"] = linear(rng, HIDDEN, HIDDEN)
            modules[layer + "coord_mlp.2"] = linear(rng, 1, HIDDEN, bias=False)
            if gate:
                modules[layer + "att_mlp.0"] = linear(rng, 1, HIDDEN)
    arrays = {f"{name}.{kind}": value for name, kinds in modules.items() for kind, value in kinds.items()}
    scaling = {"x_log_s": np.full((1, 1), 0.8), "h_t": rng.normal(size=(1, 6)), "h_log_s": rng.normal(size=(1, 6))}
    return arrays | {f"flow.transformations.0.{name}": value for name, value in scaling.items()}


@pytest.fixture
def arrays():
    return {name: value.astype(np.float32) for name, value in published_arrays(np.random.default_rng(0)).items()}


def test_names_and_scales(arrays, tmp_path):
    np.savez(tmp_path / "w.npz", **arrays)
    flow = convert_en_flows(tmp_path / "w.npz")
    assert (flow.config.layers, flow.config.hidden, flow.config.dequantizer) == (LAYERS, HIDDEN, "learned")
    assert flow.config.position_scale == pytest.approx(np.exp(0.8))
    theirs = arrays["flow.transformations.1.odefunc.dynamics.egnn.gcl_1.coord_mlp.0.weight"]
    assert torch.equal(flow.dynamics.network.layers[1].position_in.weight, torch.from_numpy(theirs))
    assert flow.dynamics.network.out.weight.shape == (6, HIDDEN)  # the output for the time is left out


def test_torch_checkpoint_is_the_same(arrays, tmp_path):
    np.savez(tmp_path / "w.npz", **arrays)
    torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, tmp_path / "w.pt")
    first, second = (convert_en_flows(tmp_path / name).state_dict() for name in ("w.npz", "w.pt"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("parallel", ["", "module."])
def test_the_two_files_of_a_run_are_taken_as_published(arrays, tmp_path, parallel, capsys):
    np.savez(tmp_path / "w.npz", **arrays)
    folder = tmp_path / "en_flows_pretrained"
    folder.mkdir()
    for part in ("flow", "dequantizer"):
        own = {name.removeprefix(f"{part}."): torch.from_numpy(value) for name, value in arrays.items() if part in name}
        own = {name: value for name, value in own.items() if not name.startswith(("flow.", "dequantizer."))}
        torch.save({parallel + name: value for name, value in own.items()}, folder / f"{part}.npy")
    merged = convert_en_flows(tmp_path / "w.npz").state_dict()
    for path in (folder, folder / "flow.npy", folder / "dequantizer.npy"):
        converted = convert_en_flows(path).state_dict()
        assert merged.keys() == converted.keys() and all(torch.equal(merged[name], converted[name]) for name in merged)
    (folder / "dequantizer.npy").unlink()
    for path in (folder, folder / "flow.npy"):
        assert main(["convert-en-flows", str(path), "-o", str(tmp_path / "w.safetensors")]) == 2
        said = capsys.readouterr().err
        assert "dequantizer.npy: no such checkpoint; the published weights are flow.npy and dequantizer.npy in" in said


def test_converting_leaves_the_global_generator_alone(arrays, tmp_path):
    np.savez(tmp_path / "w.npz", **arrays)
    before = torch.get_rng_state()
    convert_en_flows(tmp_path / "w.npz")
    assert torch.equal(torch.get_rng_state(), before)


def test_command_line(arrays, tmp_path, capsys):
    np.savez(tmp_path / "w.npz", **arrays)
    assert main(["convert-en-flows", str(tmp_path / "w.npz"), "-o", str(tmp_path / "w.safetensors")]) == 0
    assert load(tmp_path / "w.safetensors").config.layers == LAYERS
    capsys.readouterr()
    (tmp_path / "bad.npz").write_bytes(b"PK")
    del arrays["dequantizer.net_fn.egnn.embedding.weight"]
    np.savez(tmp_path / "part.npz", **arrays)
    for name in ("bad.npz", "part.npz", "none.npz"):
        assert main(["convert-en-flows", str(tmp_path / name), "-o", str(tmp_path / "x.safetensors")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said


@pytest.mark.skipif(not VECTORS.exists(), reason="needs the vectors of the published implementation")
def test_parity_with_the_published_implementation():
    released = pytest.importorskip("benchmarks.accuracy.released_weights")
    deviations = list(released.compare(convert_en_flows(WEIGHTS).double(), VECTORS))
    exact = [item for item in deviations if item.quantity not in ("latent", "ode_ladj")]
    assert len(exact) == 25 and max(item.deviation for item in exact) < 1e-13
    assert max(item.deviation for item in deviations) < 1e-3
