"""Open-ended runs: a constant learning rate, two averages, and branches whose rate falls while the trunk continues."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_train import TRAIN, VALID, assert_same_run, equal, log_of, state_of, stop_at, tiny

from ase_enf import cli
from ase_enf.flow.loading import load
from ase_enf.flow.weights import read_header
from ase_enf.training import validation
from ase_enf.training.branch import branch_steps
from ase_enf.training.config import TrainConfig
from ase_enf.training.loop import train
from ase_enf.training.optimizers import moving_average, schedule
from ase_enf.training.validation import Validation

PEAK = 1e-3


def trunk_config(**fields) -> TrainConfig:
    return tiny(**{"schedule": "constant", "long_ema_decay": 0.99, "steps": 12} | fields)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rates(folder) -> list[float]:
    return [float(row["lr"]) for row in log_of(folder)]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    """A run of twelve steps at a constant rate."""
    folder = tmp_path_factory.mktemp("trunk") / "run"
    train(trunk_config(out=folder), TRAIN, VALID)
    return folder


def test_a_trunk_has_a_constant_rate_and_no_end_of_its_own(trunk, tmp_path):
    assert rates(trunk) == pytest.approx([PEAK / 2] + [PEAK] * 11)
    with pytest.raises(ValueError, match="schedule='constant' has no end; give steps, time_limit, or out"):
        TrainConfig(schedule="constant")
    config = trunk_config(out=tmp_path / "run", steps=None, epochs=1, time_limit=1e-9)
    for step in (1, 2, 3, 4, 5):  # an epoch has three steps
        flow = train(config, TRAIN, VALID, resume=step > 1)
        assert state_of(tmp_path / "run")["step"] == step
    assert flow.provenance["total_steps"] is None


def test_where_a_trunk_pauses_makes_no_difference(trunk, tmp_path):
    """Neither a pause nor raising the number of steps later has an effect, except one more validation at the pause."""
    config = trunk_config(out=tmp_path / "run", steps=None, time_limit=1e-9)
    train(config, TRAIN, VALID)
    train(dataclasses.replace(config, steps=12, time_limit=None), TRAIN, VALID, resume=True)
    assert_same_run(trunk, tmp_path / "run")
    raised = trunk_config(out=tmp_path / "raised", steps=5)
    train(raised, TRAIN, VALID)
    train(dataclasses.replace(raised, steps=12), TRAIN, VALID, resume=True)
    for name in ("model", "ema", "long_ema", "optimizer"):
        assert equal(state_of(tmp_path / "raised")[name], state_of(trunk)[name]), name


def test_a_branch_ends_at_rate_zero_with_weights_of_its_own(trunk, tmp_path):
    before = content(trunk)
    config = trunk_config(out=tmp_path / "branch", cool_down=0.5)
    flow = train(config, TRAIN, VALID, branch_of=trunk)
    assert content(trunk) == before
    assert branch_steps(12, 2, 0.5) == 22  # the fall takes half of the 20 steps after the warm-up
    assert [int(row["step"]) for row in log_of(tmp_path / "branch")] == list(range(13, 23))
    fall = [PEAK * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert rates(tmp_path / "branch") == pytest.approx(fall, rel=1e-6) and schedule(22, 22, 2, 0.5) == 0
    about = flow.provenance
    assert about["total_steps"] == 22 and 12 < about["step"] <= 22  # not the trunk's best
    assert (about["training"]["schedule"], about["training"]["cool_down"]) == ("cosine", 0.5)
    assert equal(flow.state_dict(), load(tmp_path / "branch" / "model.safetensors", "cpu").state_dict())
    assert not equal(state_of(tmp_path / "branch")["model"], state_of(trunk)["model"])


def test_a_trunk_goes_on_as_if_it_had_no_branches(trunk, tmp_path):
    config = trunk_config(out=tmp_path / "run", steps=6)
    train(config, TRAIN, VALID)
    train(dataclasses.replace(config, out=tmp_path / "branch", cool_down=0.2), TRAIN, VALID, branch_of=config.out)
    train(dataclasses.replace(config, steps=12), TRAIN, VALID, resume=True)
    for name in ("model", "ema", "long_ema", "optimizer"):
        assert equal(state_of(tmp_path / "run")[name], state_of(trunk)[name]), name


def test_a_branch_starts_from_the_weights_of_its_trunk(trunk, tmp_path):
    """With a learning rate of zero, a branch keeps the weights of its trunk."""
    copied = shutil.copytree(trunk, tmp_path / "run")
    state = state_of(copied)
    still = {"learning_rate": 1e-30, "muon_learning_rate": 1e-30}
    config = trunk_config(out=tmp_path / "branch", cool_down=0.1, **still)
    torch.save(state | {"config": json.dumps(json.loads(state["config"]) | still)}, copied / "state.pt")
    train(config, TRAIN, VALID, branch_of=copied)
    assert equal(state_of(tmp_path / "branch")["model"], state["model"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cool_down": 1.0}, r"cool_down=1\.0: a branch cools down over a part of the steps; give for example 0\.15"),
        ({"cool_down": 0.2, "hidden": 16}, "run: the run was made with hidden=8, not 16"),
        ({"cool_down": 0.2, "out": "trunk"}, "already holds a run"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(trunk, tmp_path, fields, words):
    before = content(trunk)
    out = trunk if fields.pop("out", None) else tmp_path / "branch"
    with pytest.raises(ValueError, match=words):
        train(trunk_config(out=out, **fields), TRAIN, VALID, branch_of=trunk)
    assert content(trunk) == before and not (tmp_path / "branch").exists()


def test_a_branch_leaves_from_a_plateau_only(tmp_path):
    falling = tiny(out=tmp_path / "falling", steps=8)
    train(dataclasses.replace(falling, time_limit=1e-9), TRAIN, VALID)
    early = dataclasses.replace(falling, out=tmp_path / "branch", cool_down=0.2)
    with pytest.raises(ValueError, match="has done 1 steps, and its warm-up takes 2"):
        train(early, TRAIN, VALID, branch_of=falling.out)
    train(falling, TRAIN, VALID, resume=True)
    with pytest.raises(ValueError, match="is falling already at step 8"):
        train(early, TRAIN, VALID, branch_of=falling.out)
    with pytest.raises(ValueError, match="choose one of them"):
        train(early, TRAIN, VALID, resume=True, branch_of=falling.out)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(early, TRAIN, VALID, branch_of=tmp_path / "nowhere")


# Two averages


def test_two_averages_are_those_of_their_decays(monkeypatch):
    """Compared with averages computed outside the run; both have the same short memory in the first steps."""
    from ase_enf.training import loop

    plain, beside = loop.train_step, []

    def watched(run, index):
        if not beside:
            beside.extend(moving_average(run.model, decay) for decay in (0.3, 0.6))
        plain(run, index)
        for average in beside:
            average.update_parameters(run.model)
        ends[:] = [average.module.state_dict() for average in run.averages]

    ends: list[dict] = []
    monkeypatch.setattr(loop, "train_step", watched)
    train(trunk_config(steps=20, validate_every=100, ema_decay=0.3, long_ema_decay=0.6), TRAIN, VALID)
    first, second = (average.module.state_dict() for average in beside)
    assert not equal(first, second)
    assert equal(ends[1], second)  # the first holds the best weights by now


@pytest.mark.parametrize("better", [0, 1])
def test_the_better_average_is_kept_and_every_file_says_its_own_likelihood(tmp_path, monkeypatch, better):
    def scored(run, model):
        k = [average.module for average in run.averages].index(model)
        return Validation(1.0, 5.0 if k == better else 7.0)

    monkeypatch.setattr(validation, "score_validation_set", scored)
    flow = train(trunk_config(out=tmp_path, validate_every=99), TRAIN, VALID)
    state = state_of(tmp_path)
    kept = state[("ema", "long_ema")[better]]
    assert all(torch.equal(value, kept[f"module.{name}"]) for name, value in flow.state_dict().items())
    assert (flow.provenance["ema_decay"], flow.provenance["validation_nll"]) == ((0.9, 0.99)[better], 5.0)
    said = [read_header(tmp_path / f"{name}.safetensors")["provenance"] for name in ("last", "last-long")]
    assert [about["validation_nll"] for about in said] == [5.0 if k == better else 7.0 for k in (0, 1)]
    assert [about["ema_decay"] for about in said] == [0.9, 0.99]


# The command


def test_a_branch_by_the_command_resumes_like_any_run(tmp_path, monkeypatch, capsys):
    from ase.io import write

    monkeypatch.chdir(tmp_path)
    write("data.extxyz", TRAIN)
    small = "--hidden 8 --layers 1 --batch-size 4 --validation-size 2 --warmup 2 --device cpu --log-every 1".split()
    words = ["train", "--data", "data.extxyz", "--valid", "data.extxyz", *small]
    assert cli.main([*words, "--out", "trunk", "--schedule", "constant", "--time-limit", "1e-9"]) == 0
    said = capsys.readouterr().err
    assert "stopped by the time limit at step 1; continue with ase-enf train --resume trunk" in said
    assert cli.main(["train", "--resume", "trunk", "--steps", "10"]) == 0
    assert cli.main(["train", "--resume", "trunk", "--cool-down", "0.2"]) == 2
    assert "makes a branch; add --out" in capsys.readouterr().err
    before = content(Path("trunk"))
    branch = ["train", "--resume", "trunk", "--cool-down", "0.2", "--checkpoint-every", "1", "--out"]
    assert cli.main([*branch, "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 11, RuntimeError("kill -9"))
        with pytest.raises(RuntimeError):
            cli.main([*branch, "killed"])
    assert cli.main(["train", "--resume", "killed"]) == 0
    assert_same_run("whole", "killed")
    assert state_of("whole")["step"] == branch_steps(10, 2, 0.2) == 12
    assert content(Path("trunk")) == before
    assert cli.main(["train", "--resume", "trunk", "--steps", "11"]) == 0 and state_of("trunk")["step"] == 11
