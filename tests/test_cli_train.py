"""``ase-enf train``: new, resumed and damaged runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from ase.build import molecule
from ase.io import write
from commands import FAST, SAMPLE, TINY, error_of, run

from ase_enf.cli.arguments import flag
from ase_enf.cli.settings import GROUPS, settings
from ase_enf.cli.sources import DATA_FILE
from ase_enf.cli.train import CURVE_FILE
from ase_enf.flow.loading import load
from ase_enf.training import validation


def test_train_and_resume(here, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--data", SAMPLE, "--qm9-split", "--n-atoms", 19, "--out", out, "--device", "cpu", "--seed", 4, *TINY]
    assert run("train", *words, "--steps", 3, "--learning-rate", "2e-3", "--no-attention") == 0
    assert "validation NLL" in capsys.readouterr().err
    flow = load(out / "model.safetensors", device="cpu")
    assert (flow.config.hidden, flow.config.layers, flow.config.attention) == (8, 1, False)
    assert flow.provenance["training"]["learning_rate"] == 2e-3 and flow.provenance["step"] == 3
    assert flow.provenance["data"] == "qm9_sample.npz (published train split)"
    assert list(flow.size_prior.counts) == [19]
    assert json.loads((out / DATA_FILE).read_text())["n_atoms"] == 19
    assert run("train", "--resume", out) == 0
    with open(out / "log.csv") as log:
        steps = [int(row["step"]) for row in csv.DictReader(log)]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3}
    assert run("train", *words) == 2  # holds a run
    assert run("info", out / "model.safetensors") == 0
    assert "features       joint" in capsys.readouterr().out


def test_what_is_typed_on_resuming_counts_and_stays(here, tmp_path, capsys):
    out, never = tmp_path / "run", 1e-9  # hours
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--out", out, "--device", "cpu", *TINY]
    assert run("train", *words, "--epochs", 2) == 0

    def last_step() -> int:
        with open(out / "log.csv") as log:
            return int([row["step"] for row in csv.DictReader(log)][-1])

    assert last_step() == 2  # both molecules in one batch
    assert run("train", "--resume", out, "--epochs", 100, "--time-limit", never) == 0  # 100 is the default
    assert last_step() == 3
    assert f"step 3 of 100; continue with ase-enf train --resume {out}" in capsys.readouterr().err
    assert run("train", "--resume", out, "--steps", 8, "--validate-every", 9, "--muon-weight-decay", 0.2) == 0
    assert last_step() == 8 and run("train", "--resume", out) == 0 and last_step() == 8
    assert load(out / "last.safetensors", device="cpu").provenance["training"]["muon_weight_decay"] == 0.2
    assert run("train", "--resume", out, "--steps", 12, "--time-limit", never) == 0 and last_step() == 9
    assert run("train", "--resume", out) == 0 and last_step() == 12  # an interrupted run keeps its longer length
    capsys.readouterr()
    assert run("train", "--resume", out, "--hidden", 64) == 2  # the default, but not of this run
    assert "--hidden cannot change" in capsys.readouterr().err
    assert run("train", "--resume", out, "--hidden", 8) == 0


def test_a_run_stopped_before_its_first_validation_names_the_weights_that_are_there(here, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--out", out, "--device", "cpu", *TINY]
    assert run("train", *words, "--steps", 400, "--validate-every", 99, "--time-limit", 1e-9) == 0
    said = capsys.readouterr().err
    assert "no validation yet" in said and "last.safetensors" in said and "inf" not in said
    assert load(out / "last.safetensors", device="cpu").name == "run-last"
    assert not (out / "model.safetensors").exists()
    assert run("info", out / "last.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["validation_nll"] is None


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory) -> Path:
    """A finished run of two steps, started in another folder than the tests."""
    out = tmp_path_factory.mktemp("finished") / "run"
    data = ["--data", workshop / "good.extxyz", "--valid", workshop / "good.extxyz"]
    assert run("train", *data, "--out", out, "--device", "cpu", "--steps", 2, *TINY) == 0
    return out


@pytest.fixture
def copied(finished, here, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


MINE = {"data.json": '{"1": {"numbers": [1, 1]}, "ids": [1]}', "config.json": '{"mine": 1}', "log.csv": "a,b\n1,2\n"}


@pytest.mark.parametrize("name", MINE)
def test_a_run_does_not_overwrite_files_of_its_user(here, tmp_path, capsys, name):
    (tmp_path / name).write_text(MINE[name])
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--out", tmp_path, "--device", "cpu", *FAST, *TINY]
    assert f"{name}: is not a file of a run, and a run would replace it; move" in error_of(capsys, "train", *words)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == MINE[name]


@pytest.mark.parametrize("option", ["--data", "--valid"])
def test_a_run_does_not_overwrite_its_data(here, tmp_path, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    write("data.json", [molecule("H2O")], format="json")
    before = Path("data.json").read_bytes()
    words = {"--data": here / "good.extxyz", "--valid": here / "good.extxyz", option: "data.json"}
    words = [word for pair in words.items() for word in pair]
    said = error_of(capsys, "train", *words, "--out", ".", "--device", "cpu", *FAST, *TINY)
    assert "data.json: the run would replace its own data; choose another folder" in said
    assert os.listdir(tmp_path) == ["data.json"] and Path("data.json").read_bytes() == before


def test_a_run_whose_data_moved_goes_on(copied, capsys):
    good, sources = copied.parent / "moved.extxyz", json.loads((copied / DATA_FILE).read_text())
    shutil.copy("good.extxyz", good)
    moved = sources | {"train": "/nowhere/good.extxyz", "valid": "/nowhere/good.extxyz"}
    (copied / DATA_FILE).write_text(json.dumps(moved))
    words = ["train", "--resume", copied, "--steps", 3]
    assert "/nowhere/good.extxyz: no such file; give its new path by --data or --valid" in error_of(capsys, *words)
    assert "other data" in error_of(capsys, *words, "--data", "methane.xyz", "--valid", good)
    assert json.loads((copied / DATA_FILE).read_text()) == moved  # data of another run are not recorded
    assert run(*words, "--data", good, "--valid", good) == 0
    assert json.loads((copied / DATA_FILE).read_text()) == sources | {"train": str(good), "valid": str(good)}
    (copied / DATA_FILE).unlink()  # a run started in Python has none
    assert "data.json: no such file; give the data of the run by --data and --valid" in error_of(capsys, *words)
    assert run(*words, "--data", good, "--valid", good) == 0 and run(*words) == 0


def test_the_data_of_a_run_of_a_split_move_together(here, tmp_path, capsys):
    out, moved = tmp_path / "run", tmp_path / "moved.npz"
    words = ["--data", SAMPLE, "--qm9-split", "--n-atoms", 15, "--out", out, "--device", "cpu", "--steps", 1, *TINY]
    assert run("train", *words) == 0
    shutil.copy(SAMPLE, moved)
    said = error_of(capsys, "train", "--resume", out, "--data", moved, "--valid", moved)
    assert "takes both sets from --data; leave --valid out" in said
    assert run("train", "--resume", out, "--data", moved) == 0
    sources = {"train": str(moved), "valid": str(moved), "split": True, "n_atoms": 15}
    assert json.loads((out / DATA_FILE).read_text()) == sources


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.json", "{}", "data.json: names no data of a run; remove it and give the data by --data and --valid"),
        ("data.json", "[", "data.json: is not JSON"),
        ("config.json", "[]", "config.json: holds no settings of a run; start the run again"),
        ("config.json", '{"hidden": 8, "depth": 3}', "config.json: 'depth' is not a setting of ase-enf"),
        ("config.json", '{"hidden": 8.5}', "config.json: hidden=8.5: must be a whole number"),
        ("state.pt", "none", "state.pt: is damaged or no training state; start a new run in another folder"),
    ],
)
def test_a_damaged_run_is_one_line(copied, capsys, name, content, words):
    (copied / name).write_text(content)
    assert words in error_of(capsys, "train", "--resume", copied)


def test_a_run_cannot_end_before_what_it_has_done(copied, capsys):
    said = error_of(capsys, "train", "--resume", copied, "--steps", 1)
    assert "has done 2 steps, more than the 1 it should end at; ask for more" in said


def test_fine_tuning_contradicts_no_field_of_its_model(here, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "--data", "good.extxyz", "--valid", "good.extxyz", "--out", out, "--device", "cpu", "--steps", 1]
    words += ["--init-from", "given.safetensors", "--batch-size", 2]
    said = error_of(capsys, *words, "--hidden", 16)
    assert "--hidden=16: the model of --init-from given.safetensors has 8; leave it out" in said
    assert "--features=joint: the model" in error_of(capsys, *words, "--features", "joint")
    assert not out.exists()
    assert run(*words, "--hidden", 8) == 0
    trained = load(out / "model.safetensors", device="cpu")
    for said in (trained.provenance["training"], json.loads((out / "config.json").read_text())):
        assert (said["hidden"], said["layers"], said["features"]) == (8, 1, "given")
    assert "--init-from cannot change" in error_of(capsys, "train", "--resume", out, "--init-from", "joint.safetensors")


def test_a_validation_that_is_not_finite_is_called_that(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validation, "validation_nll", lambda model, batch, generator: torch.full((2,), torch.nan))
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--out", tmp_path / "run", "--device", "cpu", *TINY]
    assert run("train", *words, "--steps", 1) == 0
    said = capsys.readouterr().err
    assert "the validation NLL is not finite; lower --learning-rate" in said and "no validation yet" not in said


def test_validation_without_the_heaviest_element(here, tmp_path):
    words = ["--data", SAMPLE, "--qm9-split", "--n-atoms", 15, "--out", tmp_path / "run", "--device", "cpu", *TINY]
    assert run("train", *words, "--steps", 1) == 0  # fluorine in the training molecules only


def test_a_run_that_never_saved_is_started_again_with_its_new_data(here, tmp_path):
    out = tmp_path / "run"
    words = ["--valid", SAMPLE, "--out", out, "--device", "cpu", "--steps", 1, *TINY]
    assert run("train", "--data", "periodic.extxyz", *words) == 2
    assert run("train", "--data", SAMPLE, *words) == 0
    assert json.loads((out / DATA_FILE).read_text())["train"] == str(SAMPLE.resolve())


def test_train_help_has_every_setting(here, capsys):
    assert run("train", "--help") == 0
    said = capsys.readouterr().out
    for name in ("--learning-rate", "--objective", "--no-attention", "--precision", "--time-limit"):
        assert name in said
    assert "λ of the kinetic" in said  # the help text of the field


def test_train_help_is_in_groups_and_every_setting_is_in_one(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("train", "--help") == 0
    parts = re.split(r"^([a-z ]+):$", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(groups) == ["options", *GROUPS]
    listed = {title: re.findall(r"^  (--[a-z0-9-]+)", text, flags=re.MULTILINE) for title, text in groups.items()}
    assert listed["data"] == ["--data", "--valid", "--qm9-split", "--n-atoms"]
    assert listed["output"][:2] == ["--resume", "--out"] and "--backend" in listed["advanced"]
    everything = [name for names in listed.values() for name in names]
    assert {flag(field.name) for field in settings()} <= set(everything)
    assert len(set(everything)) == len(everything)
    assert "(default: None)" not in " ".join(groups.values())


def test_a_run_ends_with_its_learning_curve(copied, here, capsys, monkeypatch):
    curve = copied / CURVE_FILE
    assert curve.read_bytes().startswith(b"\x89PNG")
    before = curve.read_bytes()
    assert run("train", "--resume", copied, "--steps", 3) == 0
    assert curve.read_bytes() != before  # one more step
    curve.unlink()
    curve.mkdir()
    capsys.readouterr()
    assert run("train", "--resume", copied, "--steps", 4) == 0  # the run has not failed
    said = capsys.readouterr().err.splitlines()
    assert "validation NLL" in said[0] and len(said) == 2
    assert "warning: the learning curve could not be drawn" in said[1]


def test_the_validation_is_said_with_its_unit_and_what_to_compare_it_with(here, tmp_path, capsys, monkeypatch):
    """In nats a molecule, with the first one, since no value says by itself that a flow is good."""
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--device", "cpu", *TINY, "--steps", 3]

    def said_with(*values: float, every: int = 1) -> str:
        coming = iter(values)
        monkeypatch.setattr(validation, "validation_nll", lambda *_: torch.full((2,), next(coming)))
        out = tmp_path / "_".join(map(str, values))
        assert run("train", *words, "--out", out, "--validate-every", every) == 0
        lines = capsys.readouterr().err.splitlines()
        return next(line.partition("; weights in")[0] for line in lines if line.startswith(start))

    start = "ase-enf: validation NLL"
    assert said_with(9.0, 5.0, 2.0) == (
        f"{start} 2.000 nats a molecule at step 3 (lower is better; it was 9.000 at step 1)"
    )
    assert said_with(2.0, 5.0, 9.0) == (
        f"{start} 2.000 nats a molecule at step 1 (lower is better; none of those until step 3 was lower)"
    )
    assert said_with(4.0, every=9) == (
        f"{start} 4.000 nats a molecule at step 3 "
        "(lower is better; the only validation, --validate-every N asks for more)"
    )


def test_a_run_does_not_replace_a_picture_of_its_user(here, tmp_path, capsys):
    (tmp_path / CURVE_FILE).write_bytes(b"\x89PNG mine")
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--out", tmp_path, "--device", "cpu", *FAST, *TINY]
    assert f"{CURVE_FILE}: is not a file of a run" in error_of(capsys, "train", *words)
