"""The trainer: it learns, resumes to the same numbers, loses little to a kill, and reports errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.flow.continuous import Solver, SolverError
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.flow.weights import read_header
from ase_enf.training import log, loop, validation
from ase_enf.training.config import RENAMED, TrainConfig, field_help
from ase_enf.training.loop import TrainingError, train
from ase_enf.training.objectives import FlowMatching
from ase_enf.training.optimizers import Clipper, resolve_optimizer, schedule

ROOT = Path(__file__).parents[1]
TIMING = ("examples_per_s", "elapsed_s")


def rattled(names: str, count: int, seed: int = 0) -> list[Atoms]:
    """Returns ``count`` distorted copies of each molecule."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        for name in names.split():
            atoms = molecule(name)
            atoms.positions += 0.05 * rng.standard_normal(atoms.positions.shape)
            result.append(atoms)
    return result


TRAIN, VALID = rattled("H2O CO2 NH3", 4), rattled("H2O CO2 NH3", 1, seed=1)


def tiny(**fields) -> TrainConfig:
    defaults = {
        "hidden": 8, "layers": 2, "batch_size": 4, "steps": 8, "warmup": 2, "validation_size": 3, "validate_every": 3,
        "checkpoint_every": 2, "log_every": 1, "device": "cpu", "ema_decay": 0.9,
    }  # fmt: skip
    if fields.get("objective") == "nll":
        defaults |= {"features": "given", "ode_tolerance": 1e-2, "learning_rate": 1e-3}
    return TrainConfig(**(defaults | fields))


def log_of(folder) -> list[dict[str, str]]:
    with open(Path(folder) / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def state_of(folder) -> dict:
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def equal(a, b) -> bool:
    """Bitwise equality of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def assert_same_run(first, second):
    assert log_of(first) == log_of(second)
    left, right = state_of(first), state_of(second)
    for name in left.keys() - {"config", "elapsed", "best_provenance"}:
        assert equal(left[name], right[name]), name
    for file in ("model.safetensors", "last.safetensors"):
        states = [load(Path(folder) / file, "cpu").state_dict() for folder in (first, second)]
        assert equal(*states), file


def stop_at(monkeypatch, step: int, error: BaseException, where: str = "before"):
    """Makes the run fail at a step: before it, in its bookkeeping, or in the validation after it."""
    plain, validate = loop.train_step, loop.validate

    def validating(run):
        if run.step == step:
            raise error
        return validate(run)

    if where == "validating":
        monkeypatch.setattr(loop, "validate", validating)

    def dying(run, index):
        if run.step == step and where == "before":
            raise error
        if run.step == step and where == "inside":
            update = run.optimizer.step

            def half():
                update()
                raise error

            run.optimizer.step = half
        plain(run, index)

    monkeypatch.setattr(loop, "train_step", dying)


# Learning


def test_structures_in_both_sets_are_said():
    turned = [atoms.copy() for atoms in TRAIN[:2]]
    turned[0].positions += 3.0  # the same molecule elsewhere
    turned[1].positions = turned[1].positions[::-1]  # other elements at these places
    with pytest.warns(UserWarning, match=r"validation set: 1 of 5 structures are also in the training set"):
        train(tiny(steps=1), TRAIN, [*turned, *VALID])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(tiny(steps=1), TRAIN, VALID)


def test_flow_matching_lowers_its_loss(tmp_path):
    slow = {"validate_every": 1000, "checkpoint_every": 1000, "log_every": 60}
    config = tiny(steps=60, learning_rate=5e-3, parameterisation="velocity", **slow)
    rows = []
    for steps in (1, 60):
        flow = train(dataclasses.replace(config, steps=steps), TRAIN, VALID)
        batch = MoleculeSet(TRAIN, flow.species, 3).batch(np.arange(12))
        with torch.no_grad():
            draws = [FlowMatching()(flow, batch, torch.Generator().manual_seed(s)).loss.item() for s in range(8)]
        rows.append(np.mean(draws))
    assert rows[1] < 0.85 * rows[0]


def test_maximum_likelihood_raises_the_likelihood(tmp_path):
    config = tiny(
        objective="nll", steps=12, learning_rate=1e-2, warmup=1, out=str(tmp_path / "run"), checkpoint_every=99
    )
    train(config, TRAIN[::3], VALID[::3])
    values = [float(row["value"]) for row in log_of(tmp_path / "run")]
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.5


def test_what_comes_back_is_the_best_average_in_evaluation_mode(tmp_path):
    flow = train(tiny(out=str(tmp_path / "run")), TRAIN, VALID)
    assert not flow.training and not any(p.requires_grad for p in flow.parameters())
    kept = load(tmp_path / "run" / "model.safetensors", "cpu")
    assert equal(flow.state_dict(), kept.state_dict())
    assert sorted(os.listdir(tmp_path / "run")) == [
        "config.json", "last.safetensors", "log.csv", "model.safetensors", "state.pt",
    ]  # fmt: skip
    provenance = read_header(tmp_path / "run" / "model.safetensors")["provenance"]
    assert provenance["objective"] == "flow_matching" and provenance["molecules"] == 12
    assert str(tmp_path) not in json.dumps(provenance)  # weights are given to others
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hidden"] == 8
    rows = log_of(tmp_path / "run")
    best = min(float(row["valid_nll"]) for row in rows if row["valid_nll"])
    assert provenance["validation_nll"] <= best + 1e-4
    assert [int(row["step"]) for row in rows] == list(range(1, 9))


def test_every_weights_file_says_its_own_validation_nll(tmp_path):
    train(tiny(out=tmp_path / "run", steps=8), TRAIN, VALID)
    (final,) = (float(row["valid_nll"]) for row in log_of(tmp_path / "run") if row["step"] == "8")
    assert read_header(tmp_path / "run" / "last.safetensors")["provenance"]["validation_nll"] == pytest.approx(final)
    config = tiny(out=tmp_path / "stopped", validate_every=1, time_limit=1e-9)
    train(config, TRAIN, VALID)  # stops after a step and its validation
    config = dataclasses.replace(config, validate_every=99)
    train(config, TRAIN, VALID, resume=True)  # and after another step, without
    best, last = (
        read_header(tmp_path / "stopped" / name)["provenance"] for name in ("model.safetensors", "last.safetensors")
    )
    assert best["step"] == 1 and math.isfinite(best["validation_nll"])
    assert last["step"] == 2 and last["validation_nll"] is None


def test_training_leaves_its_inputs_alone(monkeypatch):
    def seeded(seed):
        raise AssertionError("the random numbers of the GPUs are the caller's")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    before, random = [a.copy() for a in TRAIN], torch.get_rng_state()
    train(tiny(steps=1), TRAIN, VALID)
    assert all(a == b and np.array_equal(a.positions, b.positions) for a, b in zip(TRAIN, before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


# Facts that come from the data


def test_species_sizes_and_scales_come_from_the_data():
    flow = train(tiny(steps=1), TRAIN, VALID)
    assert flow.species == ("H", "C", "N", "O")
    assert flow.config.sizes == {3: 8, 4: 4} and flow.config.compositions == {}
    data = MoleculeSet(TRAIN, flow.species, 3)
    encoded = flow.encode(data.batch(np.arange(12)), torch.zeros(12, 4, 5))
    dimensions = 8 * 6 + 4 * 9
    assert encoded.x.square().sum().item() == pytest.approx(dimensions, rel=1e-4)  # unit variance on the subspace
    mean = encoded.h[encoded.mask].mean(dim=0)
    assert mean[4].abs() < 1e-4  # charges; types lie at 1 and at 1 − softplus(1) instead of 0, where q's mean puts them
    share = torch.tensor([20, 4, 4, 12]) / 40
    assert torch.allclose(mean[:4], 0.3 * (1 - share) * (1 - math.log(1 + math.e)), atol=1e-4)
    given = train(tiny(steps=1, features="given"), TRAIN, VALID)
    assert given.config.compositions == {"CO2": 4, "H2O": 4, "H3N": 4}
    positions = train(tiny(steps=1, features="none"), TRAIN, VALID)
    assert positions.species == () and positions.config.flow_features == 0


def test_scales_are_those_of_any_number_of_threads():
    """Sums in torch depend on the number of threads from 32768 terms on."""
    data, before = MoleculeSet(TRAIN, ("H", "C", "N", "O"), 3), torch.get_num_threads()
    data.positions, data.charges = torch.randn(99_999, 3), torch.randint(1, 9, (99_999, 1)).float()
    seen = set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            seen.add((data.position_scale(), data.feature_standardisation(0.3)))
    finally:
        torch.set_num_threads(before)
    ((scale, (shift, feature_scale)),) = seen
    dimensions = int((data.sizes - 1).sum()) * 3
    assert scale == pytest.approx((data.positions.double().square().sum() / dimensions).sqrt().item(), rel=1e-12)
    assert feature_scale[-1] == pytest.approx(0.3 / data.charges.double().std().item(), rel=1e-12)
    means = [data.types.double().mean(dim=0), data.charges.double().mean(dim=0) + 0.5]
    assert shift == pytest.approx(torch.cat(means).tolist(), rel=1e-12)


def test_one_element_alone_can_be_learned():
    trimers = rattled("O3", 4)
    assert train(tiny(steps=2), trimers, trimers).species == ("O",)


def test_initial_weights_bring_their_model(tmp_path):
    first = train(tiny(steps=2, features="given"), TRAIN, VALID)
    first.save(tmp_path / "first.safetensors")
    config = tiny(
        steps=1,
        learning_rate=1e-12,
        muon_learning_rate=1e-12,
        ema_decay=0.0,
        init_from=str(tmp_path / "first.safetensors"),
        hidden=99,
    )
    again = train(config, TRAIN, VALID)
    assert again.config == first.config
    assert again.provenance["training"]["hidden"] == 8 and again.provenance["training"]["features"] == "given"
    for a, b in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    with pytest.raises(ValueError, match="F unknown to this model"):
        train(config, [molecule("HF")], VALID)


def test_fine_tuning_takes_sizes_and_compositions_from_the_new_data(tmp_path):
    train(tiny(steps=2, features="given"), TRAIN, VALID).save(tmp_path / "first.safetensors")
    water = [atoms for atoms in TRAIN if len(atoms) == 3 and "H" in atoms.symbols]
    flow = train(tiny(steps=1, init_from=tmp_path / "first.safetensors", out=tmp_path / "run"), water, water)
    assert flow.provenance["training"]["init_from"] == "first.safetensors"
    assert flow.config.compositions == {"H2O": len(water)} and dict(flow.config.sizes) == {3: len(water)}
    assert flow.size_prior.counts == {3: len(water)} and flow.species == ("H", "C", "N", "O")
    assert flow.config.position_scale == load(tmp_path / "first.safetensors").config.position_scale


@pytest.mark.parametrize("features", ["joint", "given"])
def test_a_fine_tuning_run_resumes_without_the_weights_it_began_with(tmp_path, monkeypatch, features):
    train(tiny(steps=2, features=features, type_scale=0.7), TRAIN, VALID).save(tmp_path / "first.safetensors")
    config = tiny(steps=5, init_from=tmp_path / "first.safetensors", out=tmp_path / "whole", hidden=99)
    train(config, TRAIN, VALID)
    config = dataclasses.replace(config, out=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 4, RuntimeError("kill -9"))
        train(config, TRAIN, VALID)
    (tmp_path / "first.safetensors").unlink()
    with pytest.raises(ValueError, match="other data"):
        train(config, TRAIN[:6], VALID, resume=True)
    flow = train(config, TRAIN, VALID, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    said, saved = flow.provenance["training"], json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved == said | {name: saved[name] for name in ("init_from", "out")}
    assert (said["hidden"], said["features"], said["init_from"]) == (8, features, "first.safetensors")
    assert said["type_scale"] == (0.7 if features == "joint" else 0.3)  # a flow of positions has none


def test_tensorboard_gets_the_log_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: name)
    train(tiny(steps=2, out=tmp_path / "run"), TRAIN, VALID)
    assert written[0] == (tmp_path / "run" / "tensorboard", 0) and written[-1] == "closed"
    rows = log_of(tmp_path / "run")
    losses = [value for name, value, _ in written[1:-1] if name == "loss"]
    assert losses == pytest.approx([float(row["loss"]) for row in rows], rel=1e-6)
    assert [entry[2] for entry in written[1:-1] if entry[0] == "valid_nll"] == [2]
    written.clear()
    train(tiny(steps=4, out=tmp_path / "run"), TRAIN, VALID, resume=True)
    assert written[0] == (tmp_path / "run" / "tensorboard", 3)  # the rows of step 2 stay


def test_a_size_only_validation_has_does_not_stop_the_search_for_the_best(tmp_path):
    train(tiny(out=str(tmp_path / "run")), TRAIN, [*VALID, molecule("CH4")])
    assert all(math.isfinite(float(row["valid_nll"])) for row in log_of(tmp_path / "run") if row["valid_nll"])


# Batches


def test_epoch_plan_covers_every_molecule_once_and_repeats_with_its_seed():
    data = MoleculeSet(TRAIN + TRAIN[:1], ("H", "C", "N", "O"), 3)
    plans = [data.epoch_plan(4, seed) for seed in ((0, 0), (0, 0), (0, 1), (1, 0))]
    for plan in plans:
        assert sorted(np.concatenate(plan).tolist()) == list(range(13))
        assert max(map(len, plan)) <= 4 and len(plan) == len(plans[0])
        assert sum(len({int(data.sizes[k]) for k in index}) > 1 for index in plan) <= 1  # the leftovers alone mix sizes
    assert all(np.array_equal(a, b) for a, b in zip(plans[0], plans[1], strict=True))
    for other in plans[2:]:
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(plans[0], other, strict=True))


def test_gathered_batches_are_those_of_to_batch():
    from ase_enf.atoms.batch import to_batch

    species = ("H", "C", "N", "O")
    gathered = MoleculeSet(TRAIN, species, 3).batch(np.array([2, 0, 5]))
    direct = to_batch([TRAIN[2], TRAIN[0], TRAIN[5]], species)
    assert all(torch.equal(a, b) for a, b in zip(gathered[:4], direct[:4], strict=True))
    assert gathered[4:] == direct[4:] == (None,) * len(gathered[4:])  # no conditions


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: [molecule("H2O"), Atoms("H")], "structure 1 (H): has 1 atom"),
        (lambda: [Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.7]], pbc=True)], "structure 0 (H2): has periodic"),
        (lambda: [], "training set is empty"),
    ],
)
def test_bad_structures_are_named(bad, words):
    with pytest.raises(ValueError) as caught:
        train(tiny(), bad(), VALID)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_validation_is_checked_too():
    with pytest.raises(ValueError, match="validation set is empty"):
        train(tiny(), TRAIN, [])
    with pytest.raises(
        ValueError, match=r"validation set: structure 0 \(HF\): element\(s\) F are not in the training set"
    ):
        train(tiny(), TRAIN, [molecule("HF")])


def test_two_dimensions_refuse_structures_off_the_plane():
    with pytest.raises(ValueError, match=r"structure 0 .*leaves the xy plane"):
        train(tiny(dimension=2, features="none"), [molecule("CH4")], [molecule("CH4")])


# Interruption


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, one for each objective."""
    runs = {}
    for objective, steps in (("flow_matching", 8), ("nll", 5)):
        folder = tmp_path_factory.mktemp(objective) / "run"
        train(tiny(objective=objective, steps=steps, out=str(folder)), TRAIN, VALID)
        runs[objective] = folder
    return runs


@pytest.mark.parametrize(
    ("objective", "steps", "killed", "where", "saved"),
    [
        ("flow_matching", 8, 5, "before", 4),
        ("flow_matching", 8, 8, "validating", 6),
        ("nll", 5, 3, "before", 3),
    ],
)
def test_a_killed_run_loses_only_the_work_since_its_save_and_resumes_to_the_same_numbers(
    whole, tmp_path, monkeypatch, objective, steps, killed, where, saved
):
    """An unhandled error takes the place of a kill; the validation of step 3 saves as well."""
    config = tiny(objective=objective, steps=steps, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="kill"):
        stop_at(patch, killed, RuntimeError("kill -9"), where)
        train(config, TRAIN, VALID)
    assert state_of(tmp_path / "run")["step"] == saved
    torch.manual_seed(1234)  # state that a new process does not have
    train(config, TRAIN, VALID, resume=True)
    assert_same_run(whole[objective], tmp_path / "run")


@pytest.mark.parametrize(("where", "saved"), [("before", 5), ("inside", 4)])
def test_control_c_saves_what_is_whole(whole, tmp_path, monkeypatch, where, saved):
    config = tiny(out=str(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5, KeyboardInterrupt(), where)
        train(config, TRAIN, VALID)
    assert state_of(tmp_path / "run")["step"] == saved
    train(config, TRAIN, VALID, resume=True)
    assert_same_run(whole["flow_matching"], tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    shutil.copytree(whole["flow_matching"], tmp_path / "run")
    train(tiny(out=str(tmp_path / "run")), TRAIN, VALID, resume=True)
    assert_same_run(whole["flow_matching"], tmp_path / "run")


def test_a_time_limit_stops_and_leaves_the_rest_for_later(whole, tmp_path):
    config = tiny(out=str(tmp_path / "run"), time_limit=1e-9)
    train(config, TRAIN, VALID)
    assert state_of(tmp_path / "run")["step"] == 1
    train(dataclasses.replace(config, time_limit=None), TRAIN, VALID, resume=True)
    assert log_of(tmp_path / "run") == log_of(whole["flow_matching"])
    assert equal(state_of(tmp_path / "run")["model"], state_of(whole["flow_matching"])["model"])


def test_seeds_matter(whole):
    other = train(tiny(seed=1), TRAIN, VALID)
    assert not equal(other.state_dict(), load(whole["flow_matching"] / "model.safetensors", "cpu").state_dict())


def test_an_existing_run_is_not_overwritten(whole):
    before = (whole["flow_matching"] / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; resume it, or choose another folder"):
        train(tiny(out=str(whole["flow_matching"])), TRAIN, VALID)
    assert (whole["flow_matching"] / "state.pt").read_bytes() == before


MINE = {
    "config.json": '{"learning_rate": 1}',
    "log.csv": "step,epoch,mine\n1,2,3\n",
    "last.safetensors": "weights",
    "model.safetensors": "weights",
    "state.pt": "state",
    "run.lock": "mine",
}


@pytest.mark.parametrize("name", MINE)
def test_files_of_the_user_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text(MINE[name])
    with pytest.raises(ValueError, match="choose another folder") as caught:
        train(tiny(out=tmp_path), TRAIN, VALID)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == MINE[name]


def test_the_beginnings_of_a_run_are_no_obstacle(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown|not in the training set"):
        train(tiny(out=tmp_path / "run"), TRAIN, [molecule("HF")])
    assert not (tmp_path / "run").exists()  # nothing is written before the structures are found good
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 1, RuntimeError("kill -9"))
        train(tiny(out=tmp_path / "run"), TRAIN, VALID)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "log.csv"]
    train(tiny(out=tmp_path / "run", steps=1), TRAIN, VALID)
    assert [row["step"] for row in log_of(tmp_path / "run")] == ["1"]


def test_a_run_of_before_there_was_a_choice_of_optimizer_resumes_by_its_own(tmp_path):
    out = tmp_path / "run"
    train(tiny(out=str(out), optimizer="adamw", steps=4), TRAIN, VALID)
    state = torch.load(out / "state.pt", weights_only=True)
    config = json.loads(state["config"])
    del config["optimizer"], config["muon_learning_rate"], config["muon_weight_decay"]
    (state["optimizer"],) = state["optimizer"]  # one, not a list
    torch.save(state | {"config": json.dumps(config)}, out / "state.pt")
    with pytest.raises(ValueError, match="optimizer='adamw', not 'muon'"):
        train(tiny(out=str(out), optimizer="muon"), TRAIN, VALID, resume=True)
    moments = [entry["exp_avg"].abs().sum() for entry in state["optimizer"]["state"].values()]
    assert min(moments) > 0  # the run can be resumed
    train(tiny(out=str(out), optimizer="adamw"), TRAIN, VALID, resume=True)
    after = torch.load(out / "state.pt", weights_only=True)
    assert {float(entry["step"]) for entry in after["optimizer"][0]["state"].values()} == {8.0}


EARLIER = {new: old for old, new in RENAMED.items()}


@pytest.mark.parametrize("old", RENAMED)
def test_an_earlier_name_of_a_setting_says_what_it_is_called_today(old):
    with pytest.raises(TypeError, match=f"{old} is now called {RENAMED[old]}"):
        TrainConfig(**{old: 1})
    assert RENAMED[old] in {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_run_with_the_earlier_names_of_settings_resumes_to_the_same_numbers(whole, tmp_path):
    config = tiny(out=tmp_path / "run", backend="torch", time_limit=1e-9)
    train(config, TRAIN, VALID)
    state = state_of(tmp_path / "run")
    saved = {EARLIER.get(name, name): value for name, value in json.loads(state["config"]).items()}
    del saved["schedule"], state["noted"]  # there was one schedule
    torch.save(state | {"config": json.dumps(saved | {"kernel": "plain"})}, tmp_path / "run" / "state.pt")
    with pytest.raises(ValueError, match=r"made with type_scale=0\.3, not 0\.4"):
        train(dataclasses.replace(config, type_scale=0.4), TRAIN, VALID, resume=True)
    train(dataclasses.replace(config, time_limit=None, backend="auto"), TRAIN, VALID, resume=True)
    assert log_of(tmp_path / "run") == log_of(whole["flow_matching"])
    assert equal(state_of(tmp_path / "run")["model"], state_of(whole["flow_matching"])["model"])


def test_what_auto_chose_is_on_record(whole):
    chosen = {objective: load(run / "model.safetensors") for objective, run in whole.items()}
    assert chosen["nll"].provenance["training"]["optimizer"] == "adamw"
    assert chosen["flow_matching"].provenance["training"]["optimizer"] == resolve_optimizer("auto", "flow_matching")


def test_resuming_needs_a_run_of_the_same_data(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(tiny(out=str(tmp_path / "none")), TRAIN, VALID, resume=True)
    with pytest.raises(ValueError, match=r"needs config\.out"):
        train(tiny(), TRAIN, VALID, resume=True)
    with pytest.raises(ValueError, match="another model or other data"):
        train(tiny(out=str(whole["flow_matching"])), TRAIN[:6], VALID, resume=True)


@pytest.mark.parametrize("off", [1e-12, 1e-6])
def test_the_last_digits_of_a_scale_do_not_make_other_data(tmp_path, off):
    train(tiny(out=tmp_path, steps=4), TRAIN, VALID)
    state = state_of(tmp_path)
    config = json.loads(state["model_config"])
    config["position_scale"] *= 1 + off
    torch.save(state | {"model_config": json.dumps(config)}, tmp_path / "state.pt")
    if off > 1e-9:
        with pytest.raises(ValueError, match="another model or other data"):
            train(tiny(out=tmp_path), TRAIN, VALID, resume=True)
        return
    assert train(tiny(out=tmp_path), TRAIN, VALID, resume=True).config.position_scale == config["position_scale"]


def test_a_run_cannot_end_before_what_it_has_done(whole, tmp_path):
    shutil.copytree(whole["flow_matching"], tmp_path / "run")
    with pytest.raises(ValueError, match="has done 8 steps, more than the 4 it should end at"):
        train(tiny(out=tmp_path / "run", steps=4), TRAIN, VALID, resume=True)
    assert_same_run(whole["flow_matching"], tmp_path / "run")


def test_a_run_that_is_to_end_where_it_stands_is_validated(tmp_path):
    train(tiny(out=tmp_path, time_limit=1e-9), TRAIN, VALID)
    flow = train(tiny(out=tmp_path, steps=1), TRAIN, VALID, resume=True)
    assert flow.provenance["step"] == 1 and math.isfinite(flow.provenance["validation_nll"])


@pytest.mark.parametrize("content", [b"", b"It was a bright cold day in April.", {"step": 3}, [1], "half"])
def test_a_damaged_state_is_one_line_with_a_safe_remedy(whole, tmp_path, content):
    if content == "half":
        content = (whole["flow_matching"] / "state.pt").read_bytes()[:-5000]
    if isinstance(content, bytes):
        (tmp_path / "state.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt: is damaged or no training state; start a new run") as caught:
        train(tiny(out=tmp_path), TRAIN, VALID, resume=True)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_log_that_is_gone_begins_anew(whole, tmp_path):
    shutil.copytree(whole["flow_matching"], tmp_path / "run")
    (tmp_path / "run" / "log.csv").unlink()
    train(tiny(out=tmp_path / "run", steps=9), TRAIN, VALID, resume=True)
    assert [row["step"] for row in log_of(tmp_path / "run")] == ["9"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_resuming_leaves_the_counters_of_steps_on_the_cpu(tmp_path, monkeypatch):
    """On a GPU, every parameter would wait for them at every step."""
    devices = []
    update = loop.train_step

    def watched(run, index):
        update(run, index)
        for member in run.optimizer.members:
            devices.extend(state["step"].device.type for state in member.state.values() if "step" in state)

    monkeypatch.setattr(loop, "train_step", watched)
    config = tiny(out=tmp_path, device="cuda", steps=4)
    train(config, TRAIN, VALID)
    flow = train(dataclasses.replace(config, steps=6), TRAIN, VALID, resume=True)
    assert set(devices) == {"cpu"} and flow.device.type == "cuda"


def test_the_best_by_another_rule_gives_way_at_the_next_validation(tmp_path):
    out = tmp_path / "run"
    train(tiny(out=str(out), steps=4), TRAIN, VALID)
    state = state_of(out)
    del state["nll_rule"]  # as in runs of earlier versions, with an impossibly good value
    torch.save(state | {"best": -1e6}, out / "state.pt")
    flow = train(tiny(out=str(out)), TRAIN, VALID, resume=True)
    assert -1e3 < state_of(out)["best"] == flow.provenance["validation_nll"]


@pytest.mark.parametrize("change", ["nothing", "fewer scored", "other molecules", "moved atom"])
def test_the_best_on_another_validation_set_gives_way_too(tmp_path, change):
    out, valid, size = tmp_path / "run", VALID, {}
    train(tiny(out=str(out), steps=4), TRAIN, VALID)
    torch.save(state_of(out) | {"best": -1e6}, out / "state.pt")
    if change == "fewer scored":
        size = {"validation_size": 2}
    elif change == "other molecules":
        valid = TRAIN[: len(VALID)]
    elif change == "moved atom":
        valid = [item.copy() for item in VALID]
        valid[0].positions[0, 0] += 1e-3
    train(tiny(out=str(out), **size), TRAIN, valid, resume=True)
    assert (state_of(out)["best"] == -1e6) == (change == "nothing")


@pytest.mark.parametrize("objective", ["flow_matching", "nll"])
def test_the_validation_nll_is_accurate(objective, monkeypatch):
    """Compared with a tight path and four times the nodes, with the same noise and probe."""
    plain, errors = validation.validation_nll, []

    def both(model, batch, generator):
        assert model.matched == (objective == "flow_matching")
        state = generator.get_state()
        value = plain(model, batch, generator)
        with monkeypatch.context() as patch:
            patch.setattr(ENF, "likelihood_solver", Solver("dopri5", rtol=1e-7, atol=1e-7))
            log_prob = ENF.log_prob
            patch.setattr(ENF, "log_prob", lambda self, *a, **k: log_prob(self, *a, **k, intervals=192))
            generator.set_state(state)
            errors.append((plain(model, batch, generator) - value).abs().max())
        return value

    monkeypatch.setattr(validation, "validation_nll", both)
    train(tiny(objective=objective, steps=30, learning_rate=1e-2, validate_every=30), TRAIN, VALID)
    assert errors and max(errors) < 0.05


def test_every_folder_with_weights_can_be_resumed(tmp_path, monkeypatch):
    """A validation before the first checkpoint must not leave a run that can neither be resumed nor started again."""
    config = tiny(out=str(tmp_path / "run"), checkpoint_every=1000)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 4, RuntimeError("kill -9"))
        train(config, TRAIN, VALID)
    assert (tmp_path / "run" / "model.safetensors").exists()
    train(config, TRAIN, VALID, resume=True)
    assert state_of(tmp_path / "run")["step"] == 8


# Steps that fail


def fail_on(monkeypatch, steps, failure):
    plain = loop.train_step

    def failing(run, index):
        objective = run.stepper.objective
        if run.step in steps:
            run.stepper.objective = failure(objective)
        plain(run, index)
        run.stepper.objective = objective

    monkeypatch.setattr(loop, "train_step", failing)


def _nan_loss(objective):
    return lambda *a: objective(*a)._replace(loss=objective(*a).loss * math.nan)


class _Poison(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def _nan_gradient(objective):
    return lambda *a: objective(*a)._replace(loss=_Poison.apply(objective(*a).loss))


def _solver_fails(objective):
    def call(*a):
        raise SolverError("dopri5 failed")

    return call


class _Underflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("underflow in dt 0.0")


def _adjoint_fails(objective):
    return lambda *a: objective(*a)._replace(loss=_Underflow.apply(objective(*a).loss))


@pytest.mark.parametrize("failure", [_nan_loss, _nan_gradient, _solver_fails, _adjoint_fails])
def test_a_failing_step_is_skipped_and_counted(tmp_path, monkeypatch, failure):
    fail_on(monkeypatch, {2, 3}, failure)
    flow = train(tiny(out=str(tmp_path / "run"), validate_every=100, steps=6), TRAIN, VALID)
    rows = log_of(tmp_path / "run")
    assert [int(row["skipped"]) for row in rows] == [0, 0, 1, 2, 2, 2]
    assert [math.isfinite(float(row["loss"])) for row in rows] == [True, True, False, False, True, True]
    assert all(torch.isfinite(p).all() for p in flow.parameters())
    assert int(state_of(tmp_path / "run")["ema"]["n_averaged"]) == 4


@pytest.mark.parametrize("cost, validated", [(0, [3, 6, 8]), (1, [4, 8]), (110, [8])])
def test_small_sets_are_validated_less_often_than_every_epoch(tmp_path, monkeypatch, cost, validated):
    monkeypatch.setattr(validation, "VALIDATION_COST", cost)  # 3 molecules, a fifth of the time of batches of 4
    train(tiny(out=str(tmp_path / "run"), validate_every=0), TRAIN, VALID)
    assert [int(row["step"]) for row in log_of(tmp_path / "run") if row["valid_nll"]] == validated


def test_steps_that_keep_failing_end_the_run_with_a_remedy(monkeypatch):
    fail_on(monkeypatch, range(1000), _nan_loss)
    with pytest.raises(TrainingError, match=r"20 steps in a row .*lower learning_rate \(now 0\.001\)"):
        train(tiny(steps=100), TRAIN, VALID)


def test_a_validation_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    plain, calls = validation.validation_nll, []

    def once(*a):
        calls.append(a)
        if len(calls) == 1:
            raise SolverError("dopri5 failed")
        return plain(*a)

    monkeypatch.setattr(validation, "validation_nll", once)
    train(tiny(out=str(tmp_path / "run")), TRAIN, VALID)
    values = [float(row["valid_nll"]) for row in log_of(tmp_path / "run") if row["valid_nll"]]
    assert math.isnan(values[0]) and math.isfinite(values[1])
    assert math.isfinite(state_of(tmp_path / "run")["best"])


# Parts


def test_schedule_warms_up_and_falls_to_zero():
    values = [schedule(step, 100, 10) for step in range(101)]
    assert values[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert max(values) == 1.0 and values[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    assert all(0 < schedule(step, 3, 500) <= 1 for step in range(3))  # shorter than its warm-up


def test_clipper_follows_recent_norms():
    parameter = torch.nn.Parameter(torch.zeros(2))
    clip = Clipper()

    def push(size: float) -> float:
        parameter.grad = torch.tensor([0.0, size])
        return clip([parameter])

    assert [push(1.0) for _ in range(10)] == [1.0] * 10
    assert push(100.0) == pytest.approx(100.0)  # the norm before
    assert parameter.grad.norm().item() == pytest.approx(1.5, rel=1e-4)  # 1.5 · mean + 2 · std
    assert clip.norms[-1] == pytest.approx(1.5)
    norms = list(clip.norms)
    limit = 1.5 * np.mean(norms) + 2 * np.std(norms)
    assert not math.isfinite(push(math.inf)) and list(clip.norms) == norms
    push(1000.0)
    assert parameter.grad.norm().item() == pytest.approx(limit, rel=1e-4)
    assert list(Clipper(clip.norms).norms) == list(clip.norms)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "diffusion"}, "objective 'diffusion' is unknown; choose one of flow_matching, nll"),
        ({"precision": "int8"}, "precision 'int8' is unknown"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan: must be positive"),
        ({"learning_rate": math.inf}, "learning_rate=inf: must be positive and finite"),
        ({"learning_rate": "0.1"}, "learning_rate='0.1': must be a number"),
        ({"weight_decay": math.nan}, "weight_decay=nan: must be finite and not negative"),
        ({"regularisation": -1}, "regularisation=-1.0: must be finite and not negative"),
        ({"cool_down": math.nan}, "cool_down=nan: must be in (0, 1]"),
        ({"time_limit": math.inf}, "time_limit=inf: must be a positive number of hours, or None"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number"),
        ({"hidden": 8.0}, "hidden=8.0: must be a whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5: must be a whole number"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be below 2^64"),
        ({"attention": "no"}, "attention='no': must be True or False"),
        ({"objective": ["nll"]}, "objective=['nll']: must be a string"),
        ({"out": 3}, "out=3: must be a string"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: must be in [0, 1)"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"dequantizer": "learned"}, "collapses under flow matching"),
        ({"objective": "nll", "compile": True}, "use compile=False"),
        ({"objective": "nll", "precision": "bf16"}, "too coarse for likelihoods"),
        ({"network": "gnn", "precision": "bf16"}, "with another network use precision='float32'"),
    ],
)
def test_configuration_refuses_what_cannot_be_run(fields, words):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**fields)
    assert words in str(caught.value)


def test_every_setting_explains_itself_in_the_docstring_too():
    for name, text in field_help().items():
        assert text and f"{name}: {text}" in TrainConfig.__doc__


def test_configuration_keeps_plain_values_of_numbers_of_numpy():
    config = TrainConfig(
        steps=np.int64(2), hidden=np.int32(8), learning_rate=np.float32(1e-3), cool_down=1, adjoint=np.bool_(False),
        time_limit=np.float64(2), out=Path("run"),
    )  # fmt: skip
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
    kinds = {
        "steps": int,
        "hidden": int,
        "learning_rate": float,
        "cool_down": float,
        "adjoint": bool,
        "time_limit": float,
    }
    assert {name: type(getattr(config, name)) for name in kinds} == kinds and config.out == "run"


@pytest.mark.parametrize(
    "fields",
    [
        {"network": "gnn", "augment": True},
        {"precision": "bf16"},
        {"objective": "nll", "features": "joint", "dequantizer": "learned"},
        {"objective": "nll", "features": "none", "adjoint": False},
    ],
)
def test_combinations_run(fields):
    flow = train(tiny(steps=2, validate_every=100, **fields), TRAIN[:6], VALID)
    assert all(torch.isfinite(p).all() for p in flow.parameters())


def test_bf16_rounds_the_products_of_pairs_in_training_and_nothing_that_is_kept(monkeypatch):
    dtypes, plain = [], loop.train_step

    def watched(run, index):
        dtypes.append({layer.messages.products for layer in run.model.dynamics.network.layers})
        dtypes.append({layer.messages.products for layer in run.averages[0].module.dynamics.network.layers})
        plain(run, index)

    monkeypatch.setattr(loop, "train_step", watched)
    flow = train(tiny(steps=1, precision="bf16"), TRAIN, VALID)
    assert dtypes == [{torch.bfloat16}, {None}]
    assert {p.dtype for p in flow.parameters()} == {torch.float32}


def test_global_settings_are_put_back():
    precision = torch.get_float32_matmul_precision()
    train(tiny(steps=1, precision="tf32"), TRAIN, VALID)
    assert torch.get_float32_matmul_precision() == precision


# Several processes


def test_two_processes_of_torchrun_agree_on_the_weights(tmp_path):
    """Each process trains on its own part; weights and averaged weights agree bit for bit."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import glob, os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import torch
        torch.set_num_threads(1)
        from ase_enf.training import loop
        from test_train import TRAIN, VALID, tiny
        plain, seen = loop.train_step, []
        def watched(run, index):
            seen.extend(index.tolist())
            plain(run, index)
            torch.save([p.detach().clone() for p in run.parameters], {str(tmp_path)!r} + f"/raw{{run.ranks.rank}}.pt")
        loop.train_step = watched
        flow = loop.train(tiny(steps=3, validate_every=100, out={str(tmp_path / "run")!r}), TRAIN * 2, VALID)
        # Threads that outlive the group end the process with "terminate called without an active exception" at times.
        names = [open(name).read() for name in glob.glob("/proc/self/task/*/comm")]
        assert not [name for name in names if "gloo" in name], names
        flow.save({str(tmp_path)!r} + "/flow" + os.environ["RANK"] + ".safetensors")
        torch.save(seen, {str(tmp_path)!r} + "/seen" + os.environ["RANK"] + ".pt")
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    raw, seen = (
        [torch.load(tmp_path / f"{name}{k}.pt", weights_only=True) for k in (0, 1)] for name in ("raw", "seen")
    )
    assert equal(raw[0], raw[1])
    assert equal(*(load(tmp_path / f"flow{k}.safetensors", "cpu").state_dict() for k in (0, 1)))
    assert len(set(seen[0]) | set(seen[1])) == 24 and not set(seen[0]) & set(seen[1])
    assert [int(row["step"]) for row in log_of(tmp_path / "run")] == [1, 2, 3]
    assert state_of(tmp_path / "run")["world"] == 2
