"""The model: symmetries, normalisation and changes of variables of the likelihood; and the weights file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import struct
import time

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from safetensors import safe_open
from safetensors.torch import save_file

import ase_enf.flow.model as model_module
from ase_enf.atoms.batch import to_atoms, to_batch
from ase_enf.flow import divergence, weights
from ase_enf.flow.base import sample_latent
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.continuous import Solver
from ase_enf.flow.devices import resolve_device, resolve_dtype
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.flow.weights import FORMAT_VERSION, METADATA_KEY, read_header, shipped
from ase_enf.geometry import random_rotations
from ase_enf.sampling.generate import generate
from ase_enf.sampling.request import Request
from ase_enf.sampling.sampler import Sampler
from ase_enf.scoring.score import score

FIXED = Solver("rk4", steps=8)
FINE = Solver("rk4", steps=24)


def noise_for(model, batch, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.mask.shape, model.config.flow_features)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(batch.positions)


@pytest.fixture
def molecules(flow, batch_of, methane, water):
    return batch_of([methane, water], flow)


@pytest.mark.parametrize(
    ("features", "flow", "given", "known"),
    [("joint", True, False, True), ("given", False, True, True), ("none", False, False, False)],
)
def test_what_flows_is_no_condition(features, flow, given, known):
    config = ENFConfig(features=features, species=("H", "O"))
    assert (config.types_flow, config.types_given, config.knows_types) == (flow, given, known)
    assert (config.flow_features, config.context_features) == (3 * flow, 2 * given)
    assert config.species == (("H", "O") if known else ())


# Likelihood


def test_log_prob_is_invariant_to_rotation_reflection_and_translation(flow, batch_of, methane, water, tolerance):
    noise = noise_for(flow, batch_of([methane, water], flow))
    before = flow.log_prob(batch_of([methane, water], flow), noise, solver=FIXED).log_prob
    rotation = random_rotations(1, 3, torch.Generator().manual_seed(0), torch.float64)[0].numpy()
    for matrix in (rotation, -rotation):
        moved = [a.copy() for a in (methane, water)]
        for a in moved:
            a.positions = a.positions @ matrix.T + [1.0, -2.0, 3.0]
        after = flow.log_prob(batch_of(moved, flow), noise, solver=FIXED).log_prob
        assert torch.allclose(after, before, **tolerance)


def test_log_prob_is_invariant_to_the_order_of_atoms_with_their_noise(flow, batch_of, methane, tolerance):
    order = np.array([3, 0, 4, 1, 2])
    batch = batch_of([methane], flow)
    noise = noise_for(flow, batch)
    before = flow.log_prob(batch, noise, solver=FIXED).log_prob
    after = flow.log_prob(batch_of([methane[order]], flow), noise[:, order], solver=FIXED).log_prob
    assert torch.allclose(after, before, **tolerance)


def test_log_prob_is_that_of_each_molecule_alone(flow, molecules, tolerance):
    noise = noise_for(flow, molecules)
    together = flow.log_prob(molecules, noise, solver=FIXED)
    alone = molecules.select(torch.tensor([1], device=molecules.mask.device))
    alone = type(alone)(*(field[:, :3] for field in alone[:4]))
    single = flow.log_prob(alone, noise[1:, :3], solver=FIXED)
    assert torch.allclose(single.log_prob[0], together.log_prob[1], **tolerance)


def test_gnn_log_prob_is_not_invariant(make_flow, batch_of, methane):
    flow = make_flow("given", network="gnn")
    turned = methane.copy()
    turned.rotate(50, (1, 2, 3))
    first, second = flow.log_prob(batch_of([methane, turned], flow), solver=FIXED).log_prob
    assert (first - second).abs() > 0.01


def test_terms_add_up(flow, molecules, tolerance):
    result = flow.log_prob(molecules, noise_for(flow, molecules), solver=FIXED)
    total = result.log_base + result.ladj - result.log_q + result.log_size
    assert torch.allclose(result.log_prob, total, **tolerance)
    assert torch.allclose(result.samples[0], result.ladj, **tolerance)
    if flow.features == "joint":
        expected = torch.tensor([math.log(1 / 5), math.log(2 / 5)], dtype=torch.float64).to(total)  # sizes 5 and 3
        assert torch.allclose(result.log_size, expected, **tolerance) and (result.log_q != 0).all()
    else:
        assert (result.log_size == 0).all() and (result.log_q == 0).all()


def test_a_size_never_seen_has_no_probability_under_joint_alone(make_flow, batch_of, methane):
    for features, expected in (("joint", -math.inf), ("given", 0.0)):
        flow = make_flow(features, sizes={3: 1})
        assert flow.log_prob(batch_of([methane], flow), solver=FIXED).log_size.item() == expected


def test_hutchinson_log_prob_is_the_exact_one_within_its_error(flow, molecules):
    noise = noise_for(flow, molecules)
    probes = divergence.draw_probes(molecules.positions, noise, 40, torch.Generator().manual_seed(0))
    solver = Solver("rk4", steps=3)
    exact = flow.log_prob(molecules, noise, solver=solver, intervals=16)
    estimate = flow.log_prob(molecules, noise, functools.partial(_probed, probes=probes), solver, intervals=16)
    stderr = estimate.samples.std(dim=0) / 40**0.5
    assert (stderr > 0).all() and ((estimate.log_prob - exact.log_prob).abs() < 4 * stderr).all()


def _probed(field, x, h, probes):
    return divergence.hutchinson(field, x, h, probes)


def test_density_of_two_particles_integrates_to_one(make_flow, dtype):
    """Positions only, n = 2: with x = (d, −d)/√2 the subspace is the plane of d, and p depends on |d| alone."""
    flow = make_flow("none", dimension=2, sizes={2: 1}, hidden=6)
    r = torch.linspace(1e-3, 16.0, 400, dtype=dtype)
    positions = torch.zeros(len(r), 2, 2, dtype=dtype)
    positions[:, 0, 0], positions[:, 1, 0] = r / math.sqrt(2), -r / math.sqrt(2)
    atoms = torch.ones(len(r), 2, dtype=torch.bool)
    batch = model_module.Batch(positions, positions[..., :0], torch.ones(len(r), 2, 1, dtype=dtype), atoms)
    log_prob = flow.log_prob(batch.to(flow.device), solver=FINE, intervals=32).log_prob.cpu()
    assert log_prob[-1] < -15  # the tail is inside the grid
    assert torch.trapezoid(log_prob.exp() * 2 * math.pi * r, r).item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_position_scale_is_a_change_of_variables_on_the_subspace(flow, molecules, scale, tolerance):
    """log p_s(s x) = log p_1(x) − (M − 1) n log s: there are n dimensions fewer than coordinates of atoms."""
    plain = ENF(dataclasses.replace(flow.config, position_scale=1.0)).to(flow.device, flow.dtype)
    scaled = ENF(dataclasses.replace(flow.config, position_scale=scale)).to(flow.device, flow.dtype)
    for model in (plain, scaled):
        model.load_state_dict(flow.state_dict())
    noise = noise_for(flow, molecules)
    before = plain.log_prob(molecules, noise, solver=FIXED)
    after = scaled.log_prob(molecules._replace(positions=scale * molecules.positions), noise, solver=FIXED)
    expected = (molecules.n_atoms - 1).double() * 3 * math.log(scale)
    assert torch.allclose(after.log_prob, before.log_prob - expected.to(before.log_prob), **tolerance)


def test_feature_scale_is_a_change_of_variables(make_flow, batch_of, methane, tolerance):
    """log_volume = M Σ log s, and the latents are those of the standardised features."""
    flow = make_flow("joint")
    batch = batch_of([methane], flow)
    noise = noise_for(flow, batch)
    encoded = flow.encode(batch, noise)
    config = flow.config
    x_volume = -4 * 3 * math.log(config.position_scale)
    assert encoded.log_volume.item() == pytest.approx(x_volume + 5 * sum(math.log(s) for s in config.feature_scale))
    raw = ENF(dataclasses.replace(config, feature_shift=(), feature_scale=())).to(flow.device, flow.dtype)
    lifted = raw.encode(batch, noise).h
    shift, scale = (
        torch.tensor(v, dtype=lifted.dtype, device=lifted.device) for v in (config.feature_shift, config.feature_scale)
    )
    assert torch.allclose(encoded.h, (lifted - shift) * scale, **tolerance)


def test_decode_inverts_encode(flow, molecules, tolerance):
    encoded = flow.encode(molecules, noise_for(flow, molecules))
    decoded = flow.decode(encoded.x, encoded.h, encoded.mask, encoded.context)
    assert torch.allclose(decoded.positions, molecules.positions, **tolerance)
    assert torch.equal(decoded.types, molecules.types)
    if flow.features == "joint":
        assert torch.equal(decoded.charges, molecules.charges)


def test_sample_is_the_inverse_of_the_latent_of_log_prob(flow, molecules):
    """encode → f → z, and sample(z) returns the molecules."""
    encoded = flow.encode(molecules, noise_for(flow, molecules))
    z = flow.flow(encoded.mask, encoded.context, FINE).forward(encoded.x, encoded.h)
    back = flow.sample(z.x, z.h, encoded.mask, encoded.context, FINE)
    assert torch.allclose(back.positions, molecules.positions, atol=5e-3)
    assert torch.equal(back.types, molecules.types)
    assert [len(a) for a in to_atoms(back, flow.species)] == [5, 3]


def test_two_ways_to_ask_for_a_likelihood_give_one_answer(make_flow):
    """``log_prob`` and ``score`` use the default solver of the flow."""
    for objective in ("flow_matching", "nll"):
        flow, water = make_flow("given", layers=1, scale=1.5).double(), molecule("H2O")
        flow.config = dataclasses.replace(flow.config, path="linear" if objective == "flow_matching" else None)
        batch = to_batch([water], flow.species, dtype=torch.float64)
        row = score(flow, water, trace="exact", max_stderr=math.inf).iloc[0]
        ours = flow.log_prob(batch)
        assert ours.log_prob.item() == pytest.approx(row.log_likelihood, abs=1e-11)
        assert ours.error.item() == pytest.approx(row.stderr, rel=1e-6) and ours.nfe == row.nfe


def test_two_ways_to_ask_for_samples_give_one_answer(make_flow):
    """``sample`` is the flow itself without noise, and the sampler of ``generate`` with it."""
    flow = make_flow("given", layers=1, scale=0.3, sizes={3: 1}, compositions={"H2O": 1}).double()
    flow.config = dataclasses.replace(flow.config, path="linear")
    sampler = Sampler(flow, Request(formula="H2O", batch_size=2))
    drafts = [sampler.draft(index, 0) for index in range(2)]
    latents = sampler.latents(drafts)
    for noise, options in ((None, {"churn": 0.0}), (sampler.noise(drafts), {})):
        batch = flow.sample(*latents, noise=noise)
        expected = generate(flow, 2, formula="H2O", **options)
        for ours, theirs in zip(to_atoms(batch, flow.species), expected, strict=True):
            assert np.allclose(ours.positions, theirs.positions, atol=1e-11)
    assert isinstance(flow.sampling_solver, StochasticSampler)  # otherwise both would agree


def test_samples_of_a_density_have_its_entropy(make_flow, dtype):
    """E[−log p] over samples is the entropy, and the entropy of the base minus E[ladj of the inverse] as well."""
    flow = make_flow("none", dimension=2, sizes={3: 1}, hidden=6)
    rng = np.random.default_rng(0)
    z = torch.tensor(np.stack([sample_latent(rng, 3, 2, 0)[0] for _ in range(64)]), dtype=dtype, device=flow.device)
    mask = torch.ones(64, 3, dtype=torch.bool, device=flow.device)
    x = flow.sample(z, z[..., :0], mask, solver=FIXED)
    log_prob = flow.log_prob(x, solver=FIXED)
    back = flow.flow(mask, None, FIXED).inverse(z, z[..., :0], divergence.exact)
    volume = 4 * math.log(flow.config.position_scale)
    expected = model_module.base.position_log_prob(z, mask) - back.ladj - volume
    assert torch.allclose(log_prob.log_prob, expected, atol=1e-3)


@pytest.mark.parametrize("dequantizer", ["fixed", "learned"])
def test_every_parameter_gets_a_gradient(features, make_flow, batch_of, methane, water, dequantizer):
    flow = make_flow(features, dequantizer=dequantizer)
    batch = batch_of([methane, water], flow)
    encoded = flow.encode(batch, noise_for(flow, batch))
    z = flow.flow(encoded.mask, encoded.context, Solver("euler", steps=2)).forward(encoded.x, encoded.h)
    (z.x.square().sum() + z.h.square().sum() + encoded.log_q.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_log_prob_leaves_model_and_batch_alone(flow, molecules):
    before, copy = {k: v.clone() for k, v in flow.state_dict().items()}, molecules.to(dtype=torch.float64)
    state = torch.get_rng_state()
    first = flow.log_prob(molecules, noise_for(flow, molecules), solver=FIXED).log_prob
    second = flow.log_prob(molecules, noise_for(flow, molecules), solver=FIXED).log_prob
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(molecules[:4], copy[:4], strict=True))
    assert all(p.grad is None and p.requires_grad for p in flow.parameters())


# Configuration


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"features": "both"}, "features 'both' is unknown; choose one of joint, none, given"),
        ({"dimension": 4}, "dimension 4"),
        ({"dequantizer": "flow"}, "dequantizer 'flow' is unknown"),
        ({"species": ()}, "needs the species"),
        ({"position_scale": 0.0}, "position_scale 0.0"),
        ({"position_scale": math.nan}, "position_scale nan"),
        ({"feature_shift": (1.0,)}, "need 6 numbers"),
    ],
)
def test_configuration_refuses_what_makes_no_model(fields, words):
    with pytest.raises(ValueError) as caught:
        ENFConfig(**fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_configuration_survives_json():
    config = ENFConfig(species=("H", "C"), sizes={3: 4}, compositions={"CH2": 4}, feature_shift=(0.1, 0.2, 0.3))
    assert ENFConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 3


@pytest.mark.parametrize("network", ["transformer", ""])
def test_unknown_network_is_refused(network):
    with pytest.raises(ValueError, match="choose one of egnn, gnn, simple, kernel"):
        ENF(ENFConfig(network=network))


# Files


@pytest.fixture
def saved(make_flow, tmp_path, request):
    flow = make_flow("joint").float()
    flow.provenance = {"data": "three molecules", "steps": 7}
    path = tmp_path / "model.safetensors"
    flow.save(path)
    return flow, path


@pytest.mark.parametrize("dequantizer", ["fixed", "learned"])
def test_save_and_load_give_the_same_number(
    features, make_flow, batch_of, methane, tmp_path, dtype, device, dequantizer
):
    flow = make_flow(features, dequantizer=dequantizer)
    flow.save(tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors", device=device, dtype=dtype)
    batch = batch_of([methane], flow)
    noise = noise_for(flow, batch)
    assert torch.equal(again.log_prob(batch, noise, solver=FIXED)[0], flow.log_prob(batch, noise, solver=FIXED)[0])
    assert again.config == flow.config and again.species == flow.species
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["flow.safetensors"]  # no temporary file is left


def test_a_flow_says_in_two_lines_what_it_is(saved):
    flow, path = saved
    weights = sum(p.numel() for p in flow.parameters())
    assert repr(load(path, device="cpu")).splitlines() == [
        "ENF 'model': features joint, H C O, 2 to 9 atoms".replace("'model'", repr(path.parent.name)),
        f"    egnn, 2 layers x 8, {weights:,} weights, float32 on cpu",
    ]


def test_header_is_readable_without_the_weights(saved):
    flow, path = saved
    header = read_header(path)
    assert header["format"] == FORMAT_VERSION and header["units"]["positions"] == "angstrom"
    assert header["provenance"] == {"data": "three molecules", "steps": 7} == load(path, "cpu").provenance
    assert header["config"]["species"] == ["H", "C", "O"]
    with safe_open(path, framework="pt") as file:  # and by any other reader of the format
        assert json.loads(file.metadata()[METADATA_KEY]) == header


@pytest.mark.parametrize(("objective", "path"), [("flow_matching", "linear"), ("nll", None), (None, None)])
def test_a_file_of_format_1_tells_its_path_by_its_objective(saved, objective, path):
    flow, file = saved
    config = {key: value for key, value in read_header(file)["config"].items() if key != "path"}
    _with_header(file, flow, format=1, config=config, provenance={"objective": objective})
    again = load(file, "cpu")
    assert again.config == dataclasses.replace(flow.config, path=path) and again.matched == (path is not None)


def test_file_holds_tensors_and_json_and_no_pickle(saved):
    _, path = saved
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert len(data) == 8 + length + end
    assert not data.startswith((b"\x80", b"PK"))


def test_saving_over_a_file_replaces_it_whole_or_not_at_all(saved, monkeypatch):
    flow, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", _killed)
    with pytest.raises(KeyboardInterrupt):
        flow.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    flow.provenance = {"data": "others"}
    flow.save(path)
    assert load(path, "cpu").provenance == {"data": "others"}


def _killed(*_):
    raise KeyboardInterrupt


def test_saving_needs_its_folder(make_flow, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        make_flow("none").save(tmp_path / "missing" / "model.safetensors")


def _truncated(path, _):
    path.write_bytes(path.read_bytes()[:-100])


def _half_a_header(path, _):
    path.write_bytes(path.read_bytes()[:60])


def _empty(path, _):
    path.write_bytes(b"")


def _garbage(path, _):
    path.write_bytes(bytes(range(256)) * 40)


def _pickled(path, flow):
    torch.save({"model": flow.state_dict()}, path)


def _foreign(path, flow):
    save_file({"weight": torch.zeros(3)}, path)


def _with_header(path, flow, **changes):
    header = read_header(path) | changes
    tensors = {k: v.cpu().contiguous() for k, v in flow.state_dict().items()}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(header)})


def _newer(path, flow):
    _with_header(path, flow, format=FORMAT_VERSION + 1, package="99.0")


def _other_shape(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"hidden": 16})


def _more_layers(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"layers": 3})


def _unknown_field(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"spherical": True})


def _no_config(path, flow):
    header = read_header(path)
    del header["config"]
    tensors = {k: v.cpu().contiguous() for k, v in flow.state_dict().items()}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(header)})


def _broken_json(path, flow):
    save_file({"weight": torch.zeros(3)}, path, metadata={METADATA_KEY: "{not json"})


def _json_of_another_kind(path, flow):
    save_file({"weight": torch.zeros(3)}, path, metadata={METADATA_KEY: "[1, 2]"})


def _config_of_another_kind(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"sizes": [3, 4]})


@pytest.mark.parametrize(
    "spoil",
    [
        _truncated,
        _half_a_header,
        _empty,
        _garbage,
        _pickled,
        _foreign,
        _newer,
        _other_shape,
        _more_layers,
        _unknown_field,
        _no_config,
        _broken_json,
        _json_of_another_kind,
        _config_of_another_kind,
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(saved, spoil):
    flow, path = saved
    spoil(path, flow)
    with pytest.raises(ValueError) as caught:
        load(path, device="cpu")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message


def _endless(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"layers": 10**9})


def _wide(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"hidden": 10**9, "layers": 1})


def _many_functions(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"radial": 10**9})


def _astronomic(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"sizes": {"3": 10**400}})


def _astronomic_formula(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"compositions": {"H2O": 10**400}})


def _infinite(path, flow):
    _with_header(path, flow, config=read_header(path)["config"] | {"sizes": {"3": float("inf")}})


def _deep(path, flow):
    save_file({"weight": torch.zeros(3)}, path, metadata={METADATA_KEY: "[" * 100_000})


@pytest.mark.parametrize(
    "spoil", [_endless, _wide, _many_functions, _astronomic, _astronomic_formula, _infinite, _deep]
)
def test_absurd_files_are_refused_at_once(saved, spoil):
    flow, path = saved
    spoil(path, flow)
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load(path, device="cpu")
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500 + len(str(path))


@pytest.mark.parametrize("network", ["egnn", "gnn", "simple", "kernel"])
def test_every_network_comes_back_though_it_is_built_without_weights(network, make_flow, tmp_path):
    flow = make_flow("none", network=network, hidden=3, layers=5).float()
    flow.save(tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", device="cpu").state_dict()
    assert again.keys() == flow.state_dict().keys()
    assert all(torch.equal(again[name], value.cpu()) for name, value in flow.state_dict().items())


def test_loading_leaves_global_random_numbers_alone(saved):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    load(saved[1], device="cpu")
    assert states() == before


@pytest.mark.parametrize("name", ["qm99", "no/such/file.safetensors", ""])
def test_an_unknown_name_lists_the_shipped_ones(name):
    with pytest.raises(FileNotFoundError, match="shipped names are") as caught:
        load(name, device="cpu")
    assert all(known in str(caught.value) for known in shipped()) and "\n" not in str(caught.value)


def test_a_shipped_name_is_found(saved, monkeypatch):
    flow, path = saved
    monkeypatch.setattr(weights, "PRETRAINED", path.parent)
    assert shipped() == ["model"]
    assert load("model", device="cpu").config == flow.config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:99", "usable CUDA device"),
        *((name, "is unknown; choose auto, cpu or cuda") for name in ("warp", True, [], -math.inf)),
    ],
)
def test_a_device_that_is_not_there_is_named(saved, name, words):
    with pytest.raises(ValueError, match=words) as caught:
        load(saved[1], device=name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("float64") is resolve_dtype(torch.float64) is torch.float64
    with pytest.raises(ValueError, match="choose float32 or float64"):
        resolve_dtype("float16")


def test_two_dimensional_model_goes_from_atoms_to_a_number(make_flow, dtype):
    flow = make_flow("none", dimension=2, sizes={4: 1})
    square = Atoms("X4", positions=[[0, 0, 0], [4, 0, 0], [0, 4, 0], [4, 4, 0]])
    batch = to_batch([square], flow.species, dimension=2, dtype=dtype).to(flow.device)
    assert torch.isfinite(flow.log_prob(batch, solver=FIXED).log_prob).all()
