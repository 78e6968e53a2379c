"""The command line: every command, and for every mistake exit code 2 with one line that says what to do."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.db import connect
from ase.io import read, write
from safetensors.torch import save_file

import ase_enf
from ase_enf import cli
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.flow.weights import shipped
from ase_enf.training import validation

SAMPLE = Path(__file__).parent / "data" / "qm9_sample.npz"
TINY = ["--hidden", "8", "--layers", "1", "--batch-size", "8", "--validation-size", "4", "--log-every", "1"]
FAST = ["--steps", "3"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with tiny models, good structures and every kind of bad ones."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    sizes, species = {3: 2, 5: 1}, ("H", "C", "O")
    fields = {"hidden": 8, "layers": 1, "sizes": sizes, "species": species, "position_scale": 0.7}
    ENF(ENFConfig(features="joint", **fields), {"data": "nothing", "step": 3}).save(folder / "joint.safetensors")
    ENF(ENFConfig(features="given", compositions={"H2O": 1}, **fields)).save(folder / "given.safetensors")
    good = [molecule("H2O"), molecule("CH4")]
    write(folder / "good.extxyz", good)
    write(folder / "methane.xyz", good[1:], format="xyz")
    for name, atoms in {
        "periodic": Atoms("H2O", good[0].positions, cell=[9, 9, 9], pbc=True),
        "element": Atoms("H2S", good[0].positions),
        "one": Atoms("H"),
        "point": Atoms("H2O", [(0, 0, 0), (1, 0, 0), (1, 0, 0)]),
        "nan": Atoms("H2O", [(0, 0, 0), (1, 0, np.nan), (0, 1, 0)]),
        "size": molecule("CH3OH"),
    }.items():
        write(folder / f"{name}.extxyz", [good[0], atoms])
    (folder / "zero.xyz").write_text("0\n\n")
    (folder / "nothing.xyz").write_text("")
    (folder / "prose.xyz").write_text("It was a bright cold day in April,\nand the clocks were striking thirteen.\n")
    (folder / "prose").write_text("It was a bright cold day in April.\n")
    (folder / "half.safetensors").write_bytes((folder / "joint.safetensors").read_bytes()[:-100])
    (folder / "tiny.safetensors").write_bytes(b"\x07")
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    sizeless = {"config": fields | {"features": "joint", "sizes": {}}, "package": "1", "provenance": {}}
    for name, header in {"bare": {}, "sizeless": sizeless}.items():
        save_file({"weight": torch.zeros(2)}, folder / f"{name}.safetensors", {"ase_enf": json.dumps(header)})
    (folder / "latin1.smi").write_bytes("C méthane\n".encode("latin-1"))
    (folder / "empty.smi").write_text("\n")
    (folder / "folder.smi").mkdir()
    return folder


@pytest.fixture
def here(workshop, monkeypatch) -> Path:
    monkeypatch.chdir(workshop)
    monkeypatch.delenv("ASE_ENF_QM9", raising=False)
    return workshop


def run(*words: object) -> int:
    """The exit code, as a shell would see it."""
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def test_generate_writes_what_the_function_returns(here, tmp_path, capsys):
    out = tmp_path / "m.extxyz"
    assert run("generate", "joint.safetensors", "-n", 3, "-o", out, "--seed", 5, "--dtype", "float64", *FAST) == 0
    flow = load("joint.safetensors", dtype="float64", device="cpu")
    for ours, theirs in zip(read(out, index=":"), ase_enf.generate(flow, 3, seed=5, steps=3), strict=True):
        assert ours.info == theirs.info and ours.info["enf_model"] == "joint"
        assert ours.numbers.tolist() == theirs.numbers.tolist()
        assert np.allclose(ours.positions, theirs.positions, atol=1e-7)
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"ase-enf: wrote 3 molecules to {out}\n"  # quiet in a pipe


def test_a_request_can_be_met_in_parts(here, tmp_path):
    words = ["generate", "joint.safetensors", "--seed", 5, "--dtype", "float64", *FAST]
    assert run(*words, "-n", 5, "-o", tmp_path / "whole.extxyz") == 0
    assert run(*words, "-n", 2, "--start", 3, "-o", tmp_path / "rest.extxyz") == 0
    whole, rest = (read(tmp_path / f"{name}.extxyz", index=":") for name in ("whole", "rest"))
    assert [atoms.info["enf_index"] for atoms in rest] == [3, 4]
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert ours.numbers.tolist() == theirs.numbers.tolist()
        assert np.allclose(ours.positions, theirs.positions, atol=1e-7)


def test_generate_options(here, tmp_path):
    out = tmp_path / "m.db"
    words = ["--formula", "CH4", "--gallery", tmp_path / "m.png", "--batch-size", 1, "--solver", "rk4", *FAST]
    assert run("generate", "given.safetensors", "-n", 2, "-o", out, *words) == 0
    with connect(out) as database:
        assert [(row.formula, row.seed, row.index, row.data["info"]["enf_solver"]) for row in database.select()] == [
            ("CH4", 0, 0, "rk4, 3 steps, warp 1"),
            ("CH4", 0, 1, "rk4, 3 steps, warp 1"),
        ]
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.traj", "--n-atoms", 5, *FAST) == 0
    assert {len(atoms) for atoms in read(tmp_path / "m.traj", index=":")} == {5}
    assert run("generate", "joint.safetensors", "-n", 9, "-o", tmp_path / "closed.extxyz", "--closed-shell", *FAST) == 0
    closed = read(tmp_path / "closed.extxyz", index=":")
    assert not any(atoms.numbers.sum() % 2 for atoms in closed)
    assert any(atoms.info["enf_attempts"] > 1 for atoms in closed)  # without, there would be radicals


def test_torchrun_shares_the_work_and_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [cli._own_device(name) for name in ("auto", "cuda", "cpu")] == ["auto", "cuda", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [cli._own_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli._own_device("auto") == "auto"


@pytest.fixture
def table(here):
    return ase_enf.score(load("joint.safetensors", device="cpu"), read("good.extxyz", index=":"), draws=2, steps=3)


SCORE = ["score", "joint.safetensors", "good.extxyz", "--draws", 2, *FAST]


@pytest.fixture
def written(table):
    """The scores as they are written: each says of which structure it is."""
    return table.assign(index=[0, 1], file="good.extxyz", smiles=["O", "C"])


def test_score_to_a_pipe(written, capsys):
    assert run(*SCORE) == 0
    said = capsys.readouterr()
    assert said.out == written.to_csv(index=False) and said.err == ""


def test_score_to_tables(table, written, tmp_path):
    for ending in ("csv", "json", "md"):
        assert run(*SCORE, "-o", tmp_path / f"s.{ending}") == 0
    assert (tmp_path / "s.csv").read_text() == written.to_csv(index=False)
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["log_likelihood"] for row in rows] == pytest.approx(table.log_likelihood.tolist(), rel=1e-12)
    lines = (tmp_path / "s.md").read_text().splitlines()
    assert (
        len(lines) == 4
        and lines[0].startswith("| log_likelihood | stderr |")
        and " H2O | 0 | good.extxyz | O |" in lines[2]
    )


def test_score_to_structures(table, tmp_path):
    for ending in ("extxyz", "db"):
        assert run(*SCORE, "-o", tmp_path / f"s.{ending}") == 0
    scored = read(tmp_path / "s.extxyz", index=":")
    assert [atoms.info["enf_log_likelihood"] for atoms in scored] == table.log_likelihood.tolist()
    with connect(tmp_path / "s.db") as database:
        best = database.select(f"log_likelihood>{table.log_likelihood.mean()}")
        assert [row.formula for row in best] == [table.formula[table.log_likelihood.idxmax()]]


def test_scores_come_batch_by_batch_and_go_on(written, here, tmp_path, capsys, monkeypatch):
    words = [*SCORE, "--batch-size", 1]
    assert run(*words, "-o", tmp_path / "whole.csv") == 0
    assert run(*words, "-o", tmp_path / "parts.csv", "--start", 1) == 0
    assert run(*words, "-o", tmp_path / "parts.csv", "--append", "--start", 1) == 0
    capsys.readouterr()
    lines = (tmp_path / "whole.csv").read_text().splitlines()
    assert (tmp_path / "parts.csv").read_text().splitlines() == [lines[0], lines[2], lines[2]]
    log_prob, calls = ENF.log_prob, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return log_prob(self, *arguments, **options)

    refined = ["--tolerance", 1e9]  # one call a batch
    for ending in ("csv", "extxyz", "db", "json", "traj"):
        calls.clear()
        monkeypatch.setattr(ENF, "log_prob", interrupted)
        out = tmp_path / f"s.{ending}"
        assert run(*words, *refined, "-o", out) == 130
        remedy = "-o ANOTHER" if ending == "json" else "--append"
        assert capsys.readouterr().err == (
            f"ase-enf: 1 of 2 scores is in {out}; go on with --start 1 {remedy}\nase-enf: interrupted\n"
        )
        monkeypatch.undo()
        monkeypatch.chdir(here)
        if ending != "json":
            assert run(*words, *refined, "-o", out, "--start", 1, "--append") == 0
            capsys.readouterr()
        if ending in ("csv", "json"):
            text = out.read_text()
            assert text.count("good.extxyz") == (1 if ending == "json" else 2)
        else:
            assert [str(atoms.symbols) for atoms in cli._read(str(out))] == ["OH2", "CH4"]
            assert all("enf_log_likelihood" in atoms.info for atoms in cli._read(str(out)))


def test_what_a_warning_calls_a_structure_is_its_place_in_the_file(here, capsys):
    words = ["--batch-size", 1, "--tolerance", 1e-12, "--draws", 1, *FAST]
    assert run("score", "joint.safetensors", "good.extxyz", *words) == 0
    said = capsys.readouterr().err
    assert ": structure 0 (H2O)" in said and ": structure 1 (CH4)" in said


def test_a_file_scored_in_place_stays_whole(here, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.extxyz"
    shutil.copy("good.extxyz", path)
    before = path.read_bytes()
    words = ["score", "joint.safetensors", path, "-o", path, "--overwrite", "--draws", 1, *FAST]
    assert "would leave the first structures" in error_of(capsys, *words, "--start", 1)
    log_prob, calls = ENF.log_prob, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return log_prob(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ENF, "log_prob", interrupted)
        assert run(*words, "--batch-size", 1, "--tolerance", 1e9) == 130
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["mine.extxyz"]
    assert run(*words) == 0
    assert all("enf_log_likelihood" in atoms.info for atoms in read(path, index=":"))


def test_nothing_is_overwritten_silently(here, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(ENF, "sample")  # said before anything is computed
    monkeypatch.delattr(ENF, "log_prob")
    generate, evaluate = ["generate", "joint.safetensors", "-n", 2], ["evaluate", "good.extxyz"]
    pictured = [*generate, "-o", tmp_path / "n.traj", "--gallery"]
    compared = [*evaluate, "--reference", "qm9", "--histogram"]
    for name, words in {
        "m.extxyz": [*generate, "-o"], "m.db": [*generate, "-o"], "m.png": pictured, "s.csv": [*SCORE, "-o"],
        "s.extxyz": [*SCORE, "-o"], "r.json": [*evaluate, "-o"], "g.png": [*evaluate, "--gallery"], "h.png": compared,
        "w.safetensors": ["convert-en-flows", "nothing.npz", "-o"],
    }.items():  # fmt: skip
        (tmp_path / name).write_text("mine")
        said = error_of(capsys, *words, tmp_path / name)
        added = ", --append adds to it" if name in ("m.extxyz", "m.db", "s.csv", "s.extxyz") else ""
        assert f"{tmp_path / name}: is there already; --overwrite replaces it{added}, or name another" in said
        assert (tmp_path / name).read_text() == "mine"
    assert "choose one" in error_of(capsys, *generate, "-o", tmp_path / "m.extxyz", "--append", "--overwrite")
    assert "is no ASE database; nothing can be added" in error_of(
        capsys, *generate, "-o", tmp_path / "m.db", "--append"
    )
    for words in ([*generate, "-o", tmp_path / "m.cif"], [*SCORE, "-o", tmp_path / "s.json"]):
        assert "added to such a" in error_of(capsys, *words, "--append")
    assert "name it by -o" in error_of(capsys, *SCORE, "--append")
    assert "good.extxyz holds 2 structures" in error_of(capsys, *SCORE, "--start", 2)


@pytest.mark.parametrize("ending", ["extxyz", "xyz", "db", "traj"])
def test_a_request_goes_on_where_it_was_interrupted(here, tmp_path, capsys, monkeypatch, ending):
    words = ["generate", "joint.safetensors", "--seed", 5, "--dtype", "float64", "--batch-size", 1, *FAST]
    whole, out = tmp_path / "whole.extxyz", tmp_path / f"m.{ending}"
    assert run(*words, "-n", 30, "-o", whole) == 0
    sample, calls = ENF.sample, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > 9:  # the first, and one window of eight
            raise KeyboardInterrupt
        return sample(self, *arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ENF, "sample", interrupted)
        assert run(*words, "-n", 30, "-o", out) == 130
    said = capsys.readouterr().err
    found = re.fullmatch(
        rf"ase-enf: (\d+) of 30 molecules are in {out}; go on with (--start \1 -n (\d+) --append)\n"
        "ase-enf: interrupted\n",
        said,
    )
    assert found and int(found.group(1)) + int(found.group(3)) == 30 and int(found.group(1)) >= 1
    assert len(cli._read(str(out))) == int(found.group(1))
    assert run(*words, *found.group(2).split(), "-o", out) == 0
    for ours, theirs in zip(cli._read(str(out)), read(whole, index=":"), strict=True):
        assert ours.numbers.tolist() == theirs.numbers.tolist() and ours.info == theirs.info
        assert np.allclose(ours.positions, theirs.positions, atol=1e-7)
    assert sorted(os.listdir(tmp_path)) == sorted([f"m.{ending}", "whole.extxyz"])


def test_overwriting_is_possible(here, tmp_path):
    for name in ("m.extxyz", "m.db", "m.traj"):
        words = ["generate", "joint.safetensors", "-o", tmp_path / name, *FAST]
        assert run(*words, "-n", 3) == 0 and run(*words, "-n", 2, "--overwrite") == 0
        assert len(cli._read(str(tmp_path / name))) == 2
        assert run(*words, "-n", 2, "--start", 2, "--append") == 0
        assert [atoms.info["enf_index"] for atoms in cli._read(str(tmp_path / name))] == [0, 1, 2, 3]


def test_long_work_says_how_far_it_is_where_no_terminal_shows_a_bar(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_QUIET", 0.0)
    assert run("generate", "joint.safetensors", "-n", 3, "-o", tmp_path / "m.extxyz", *FAST) == 0
    assert capsys.readouterr().err.splitlines()[:2] == ["ase-enf: 1 of 3 molecules", "ase-enf: 2 of 3 molecules"]
    assert run(*SCORE, "--batch-size", 1) == 0
    assert capsys.readouterr().err == "ase-enf: 1 of 2 structures\n"


def test_score_of_an_exact_model(here, capsys):
    words = ["--trace", "hutchinson", "--probes", 3, *FAST]
    assert run("score", "given.safetensors", "methane.xyz", *words) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (row["kind"], row["trace"], row["probes"], row["formula"]) == ("exact", "hutchinson", "3", "CH4")


@pytest.mark.parametrize("reference", ["smiles.smi", "methane.xyz"])
def test_evaluate(here, tmp_path, capsys, reference):
    pytest.importorskip("rdkit")
    (here / "smiles.smi").write_text("C methane\n\nCC ethane\n")
    for ending in ("json", "csv", "md"):
        words = ["--histogram", tmp_path / "h.png"] if reference == "methane.xyz" and ending == "csv" else []
        out = tmp_path / f"r.{ending}"
        assert run("evaluate", "good.extxyz", "--reference", reference, "-o", out, *words) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    values = {row["metric"]: row["value"] for row in report["rows"]}
    assert values["molecule_stability"] == 1.0 and values["novelty_strict"] == 0.5  # water is new, methane is not
    assert "rdkit" in " ".join(report).lower()
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert {row["metric"]: float(row["value"]) for row in rows} == pytest.approx(values)
    assert all(row["definition"] for row in rows)
    assert (tmp_path / "r.md").read_text().count("\n") == len(rows) + 2
    assert (tmp_path / "h.png").exists() == (reference == "methane.xyz")
    said = capsys.readouterr()
    assert "molecule_stability" in said.out and said.err == ""


def test_evaluate_draws_a_gallery(here, tmp_path, capsys):
    pytest.importorskip("rdkit")
    assert run("evaluate", "good.extxyz", "--gallery", tmp_path / "g.png") == 0
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert "drew 2 molecules" in capsys.readouterr().err


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
    assert json.loads((out / cli.DATA_FILE).read_text())["n_atoms"] == 19
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
    assert f"step 3 of 100; go on with ase-enf train --resume {out}" in capsys.readouterr().err
    assert run("train", "--resume", out, "--steps", 8, "--validate-every", 9, "--muon-weight-decay", 0.2) == 0
    assert last_step() == 8 and run("train", "--resume", out) == 0 and last_step() == 8
    assert load(out / "last.safetensors", device="cpu").provenance["training"]["muon_weight_decay"] == 0.2
    assert run("train", "--resume", out, "--steps", 12, "--time-limit", never) == 0 and last_step() == 9
    assert run("train", "--resume", out) == 0 and last_step() == 12  # an interrupted longer run goes on as such
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
    """A finished run of two steps, made from another folder than that of the tests."""
    out = tmp_path_factory.mktemp("finished") / "run"
    data = ["--data", workshop / "good.extxyz", "--valid", workshop / "good.extxyz"]
    assert run("train", *data, "--out", out, "--device", "cpu", "--steps", 2, *TINY) == 0
    return out


@pytest.fixture
def copied(finished, here, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def error_of(capsys, *words: object) -> str:
    """The one line that a mistake gives."""
    capsys.readouterr()
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("ase-enf: error: ") and said.count("\n") == 1
    return said


MINE = {"data.json": '{"1": {"numbers": [1, 1]}, "ids": [1]}', "config.json": '{"mine": 1}', "log.csv": "a,b\n1,2\n"}


@pytest.mark.parametrize("name", MINE)
def test_a_run_does_not_overwrite_files_of_its_user(here, tmp_path, capsys, name):
    (tmp_path / name).write_text(MINE[name])
    words = ["--data", "good.extxyz", "--valid", "good.extxyz", "--out", tmp_path, "--device", "cpu", *FAST, *TINY]
    assert f"{name}: is no file of a run, and a run would replace it; move" in error_of(capsys, "train", *words)
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
    good, sources = copied.parent / "moved.extxyz", json.loads((copied / cli.DATA_FILE).read_text())
    shutil.copy("good.extxyz", good)
    moved = sources | {"train": "/nowhere/good.extxyz", "valid": "/nowhere/good.extxyz"}
    (copied / cli.DATA_FILE).write_text(json.dumps(moved))
    words = ["train", "--resume", copied, "--steps", 3]
    assert "/nowhere/good.extxyz: no such file; say by --data and --valid" in error_of(capsys, *words)
    assert "other data" in error_of(capsys, *words, "--data", "methane.xyz", "--valid", good)
    assert json.loads((copied / cli.DATA_FILE).read_text()) == moved  # what is not of the run is not remembered
    assert run(*words, "--data", good, "--valid", good) == 0
    assert json.loads((copied / cli.DATA_FILE).read_text()) == sources | {"train": str(good), "valid": str(good)}
    (copied / cli.DATA_FILE).unlink()  # as a run that Python began has none
    assert "data.json: no such file; say by --data and --valid" in error_of(capsys, *words)
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
    assert json.loads((out / cli.DATA_FILE).read_text()) == sources


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.json", "{}", "data.json: names no data of a run; remove it, and say by --data and --valid"),
        ("data.json", "[", "data.json: is no JSON"),
        ("config.json", "[]", "config.json: holds no settings of a run; start the run again"),
        ("config.json", '{"hidden": 8, "depth": 3}', "config.json: 'depth' is no setting of this ase-enf"),
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


def test_scores_go_only_where_they_are_kept(here, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(ENF, "log_prob")
    for name in ("s.pdb", "s.cif", "s.vasp"):
        assert run("score", "joint.safetensors", "good.extxyz", "-o", tmp_path / name) == 2
        assert "keeps no scores; use .csv" in capsys.readouterr().err


def test_all_records_of_an_sdf_are_read(here, tmp_path, capsys):
    Chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    with Chem.SDWriter(str(tmp_path / "three.sdf")) as writer:
        for smiles in ("O", "CO", "CCO"):
            mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
            AllChem.EmbedMolecule(mol, randomSeed=1)
            writer.write(mol)
    assert [str(a.symbols) for a in cli._read(str(tmp_path / "three.sdf"))] == ["OH2", "COH4", "C2OH6"]


def test_an_empty_database_is_left_alone(here, tmp_path, capsys):
    (tmp_path / "empty.db").touch()
    assert run("evaluate", tmp_path / "empty.db") == 2
    assert "is no ASE database" in capsys.readouterr().err and (tmp_path / "empty.db").stat().st_size == 0


def test_a_database_keeps_the_keys_of_its_user(here, tmp_path):
    path = tmp_path / "mine.db"
    with connect(path) as database:
        database.write(molecule("H2O"), name="water", pka=14.0, data={"spec": [1, 2, 3]})
    assert run("score", "given.safetensors", path, "-o", path, "--overwrite", *FAST) == 0
    with connect(path) as database:
        (row,) = database.select("pka>3")
    assert row.name == "water" and row.data["info"]["spec"] == [1, 2, 3] and np.isfinite(row.log_likelihood)


@pytest.mark.parametrize("error", [MemoryError("full"), RuntimeError("[enforce] can't allocate memory: 9 bytes")])
def test_running_out_of_memory_has_a_remedy(here, tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ENF, "sample", fail)
    assert run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz") == 2
    assert "lower --batch-size" in capsys.readouterr().err


def test_validation_without_the_heaviest_element(here, tmp_path):
    words = ["--data", SAMPLE, "--qm9-split", "--n-atoms", 15, "--out", tmp_path / "run", "--device", "cpu", *TINY]
    assert run("train", *words, "--steps", 1) == 0  # fluorine in the training molecules only


def test_a_run_that_never_saved_is_started_again_with_its_new_data(here, tmp_path):
    out = tmp_path / "run"
    words = ["--valid", SAMPLE, "--out", out, "--device", "cpu", "--steps", 1, *TINY]
    assert run("train", "--data", "periodic.extxyz", *words) == 2
    assert run("train", "--data", SAMPLE, *words) == 0
    assert json.loads((out / cli.DATA_FILE).read_text())["train"] == str(SAMPLE.resolve())


def test_train_help_has_every_setting(here, capsys):
    assert run("train", "--help") == 0
    said = capsys.readouterr().out
    for name in ("--learning-rate", "--objective", "--no-attention", "--precision", "--time-limit"):
        assert name in said
    assert "λ of the kinetic" in said  # what the field says of itself


def test_info(here, capsys):
    assert run("info", "joint.safetensors") == 0
    said = capsys.readouterr().out
    assert (
        "species        H C O\n" in said
        and "sizes          3 to 5 atoms, 3 molecules\n" in said
        and "step           3\n" in said
    )
    assert run("info", "joint.safetensors", "--json") == 0
    header = json.loads(capsys.readouterr().out)
    assert header["config"]["hidden"] == 8 and header["provenance"] == {"data": "nothing", "step": 3}
    assert run("info") == 0  # the shipped ones
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped() and all(len(line) < 140 for line in lines)
    for line in lines:
        assert re.search(r" \d+( to \d+)? atoms: .*(stable|effective sample size) ?\d*", line), line


def test_version_and_help(here, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("ase-enf ")
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("generate", "score", "evaluate", "train", "info"))
    for command in ("generate", "score", "evaluate", "info"):
        assert run(command, "--help") == 0


def test_an_unknown_option_points_at_the_help_of_its_command(here, capsys):
    for command in (["generate", "qm9"], ["score", "qm9", "good.extxyz"], ["evaluate", "good.extxyz"], ["info"]):
        assert run(*command, "--stable") == 2
        said = capsys.readouterr().err
        expected = f"error: unrecognized arguments: --stable; see ase-enf {command[0]} --help\n"
        assert said == f"ase-enf {command[0]}: {expected}"


def test_one_molecule_is_no_plural(here, tmp_path, capsys):
    words = ["-n", 1, "-o", tmp_path / "m.extxyz", "--gallery", tmp_path / "m.png", *FAST]
    assert run("generate", "joint.safetensors", *words) == 0
    said = capsys.readouterr().err
    assert "wrote 1 molecule to" in said and "drew 1 molecule in" in said


def test_a_folder_is_told_from_weights(here, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert f"{tmp_path}/run: is a folder; name a weights file (.safetensors)" in error_of(
        capsys, "info", tmp_path / "run"
    )
    for name in ("model", "last"):
        shutil.copy("joint.safetensors", tmp_path / "run" / f"{name}.safetensors")
    for words in (["info"], ["generate", "-o", tmp_path / "m.extxyz"]):
        said = error_of(capsys, words[0], tmp_path / "run", *words[1:])
        assert f"is a folder; name a weights file, such as {tmp_path}/run/model.safetensors" in said


@pytest.mark.parametrize("words", [["evaluate"], ["evaluate", "good.extxyz", "--reference"], ["score", "qm9"]])
def test_what_cannot_be_read_twice_is_refused(here, tmp_path, capsys, words):
    os.mkfifo(tmp_path / "pipe.smi")
    for path in (tmp_path / "pipe.smi", "/dev/null"):
        said = error_of(capsys, *words, path)
        assert f"{path}: is a pipe or a device, which cannot be read twice; save it to a file and name that" in said


def test_a_file_without_a_readable_smiles_is_refused(here, tmp_path, capsys):
    (tmp_path / "prose.smi").write_text("It was a bright\ncold day in April\n")
    said = error_of(capsys, "evaluate", "good.extxyz", "--reference", tmp_path / "prose.smi")
    assert "RDKit cannot read any of the 2 different SMILES of the reference, such as 'It'" in said


def test_a_position_that_is_not_finite_is_a_failure_and_not_drawn(here, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert run("evaluate", "nan.extxyz", "-o", out, "--gallery", tmp_path / "g.png") == 0
    values = {row["metric"]: row["value"] for row in json.loads(out.read_text())["rows"]}
    assert values["molecule_stability"] == 0.5 and "drew 1 molecule in" in capsys.readouterr().err


def test_a_smiles_as_formula_is_one_line(here, capsys):
    said = error_of(capsys, "generate", "given.safetensors", "--formula", "CCO")
    assert "formula 'CCO': is a SMILES, and a formula counts every atom, hydrogens too; write C2H6O for CCO" in said


@pytest.mark.parametrize("words", [["info", "qm9"], ["train", "--help"], ["evaluate", "good.extxyz"]])
def test_a_terminal_that_knows_ascii_alone(here, words):
    done = process(*words, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and "?" in done.stdout and done.stdout.isascii(), done.stderr


def test_the_package_is_a_command(here, tmp_path):
    done = process("--version", module="ase_enf")
    assert done.returncode == 0 and done.stdout.startswith("ase-enf ")
    assert process("create", module="ase_enf").stderr.startswith("ase-enf: error: argument COMMAND: invalid choice")


GENERATE = ["generate", "joint.safetensors", "-o", "out.extxyz"]
TRAIN = ["train", "--out", "run", "--device", "cpu", "--steps", "1"]
BAD = {
    "periodic cell": (["score", "joint.safetensors", "periodic.extxyz"], "structure 1 (H2O): has periodic boundaries"),
    "unknown element": (["score", "joint.safetensors", "element.extxyz"], "S unknown to this model"),
    "one atom": (["score", "joint.safetensors", "one.extxyz"], "structure 1 (H): has 1 atom"),
    "zero atoms": (["score", "joint.safetensors", "zero.xyz"], "structure 0 (empty): has 0 atom"),
    "one point": (["score", "joint.safetensors", "point.extxyz"], "atoms 1 and 2 lie on one point"),
    "NaN": (["score", "joint.safetensors", "nan.extxyz"], "atom 1 has non-finite coordinates"),
    "size never seen": (["score", "joint.safetensors", "size.extxyz"], "a size this model never saw"),
    "empty file": (["score", "joint.safetensors", "nothing.xyz"], "nothing.xyz"),
    "no structure": (["score", "joint.safetensors", "prose.xyz"], "prose.xyz"),
    "no format": (["score", "joint.safetensors", "prose"], "prose"),
    "missing structures": (["score", "joint.safetensors", "missing.xyz"], "missing.xyz: no such file; name one"),
    "no name": (["score", "joint.safetensors", ""], "'': no such file"),
    "truncated weights": (["generate", "half.safetensors"], "half.safetensors: is no readable .safetensors"),
    "a byte of weights": (["info", "tiny.safetensors"], "tiny.safetensors: is no readable .safetensors"),
    "foreign weights": (["score", "foreign.safetensors", "good.extxyz"], "holds no ase-enf model"),
    "text as weights": (["info", "prose"], "prose: is no readable .safetensors"),
    "unknown model": (["generate", "qm8", "-n", "3"], "qm8: no such weights file"),
    "unknown model info": (["info", "qm8"], "qm8: no such weights file"),
    "folder of output": ([*GENERATE[:2], "-o", "no/out.extxyz"], "the folder no does not exist"),
    "folder of scores": (
        ["score", "joint.safetensors", "good.extxyz", "-o", "no/s.csv"],
        "the folder no does not exist",
    ),
    "folder of report": (["evaluate", "good.extxyz", "-o", "no/r.json"], "the folder no does not exist"),
    "folder of gallery": ([*GENERATE, "--gallery", "no/g.png"], "the folder no does not exist"),
    "format of output": ([*GENERATE[:2], "-o", "out.nonsense"], "ASE knows no format"),
    "format of scores": (["score", "joint.safetensors", "good.extxyz", "-o", "s.nonsense"], "ASE knows no format"),
    "format of report": (["evaluate", "good.extxyz", "-o", "r.nonsense"], "one of these endings"),
    "n=0": ([*GENERATE, "-n", "0"], "n=0: must be at least 1"),
    "negative n": ([*GENERATE, "-n", "-3"], "n=-3: must be at least 1"),
    "n is no number": ([*GENERATE, "-n", "many"], "invalid int value: 'many'"),
    "seed": ([*GENERATE, "--seed", "-1"], "seed=-1: must be at least 0"),
    "batch size": ([*GENERATE, "--batch-size", "0"], "batch_size=0"),
    "n_atoms": ([*GENERATE, "--n-atoms", "4"], "n_atoms=4"),
    "formula of a joint model": ([*GENERATE, "--formula", "H2O"], "features='given'"),
    "formula": (["generate", "given.safetensors", "--formula", "H2("], "not a chemical formula"),
    "formula with a charge": (["generate", "given.safetensors", "--formula", "H2O+"], "no charges"),
    "formula without atoms": (["generate", "given.safetensors", "--formula", "C0H4"], "no atoms of an element"),
    "radical": (["generate", "given.safetensors", "--formula", "CH3", "--closed-shell"], "odd number of electrons"),
    "device": ([*GENERATE, "--device", "cpuu"], "device 'cpuu' is unknown"),
    "dtype": ([*GENERATE, "--dtype", "float16"], "choose float32 or float64"),
    "solver": ([*GENERATE, "--solver", "rk5"], "choose one of dopri5"),
    "steps of dopri5": ([*GENERATE, "--solver", "dopri5", "--steps", "3"], "chooses its own steps"),
    "trace": (["score", "joint.safetensors", "good.extxyz", "--trace", "exakt"], "trace 'exakt' is unknown"),
    "draws": (["score", "joint.safetensors", "good.extxyz", "--draws", "0"], "draws=0"),
    "tolerance": (["score", "joint.safetensors", "good.extxyz", "--tolerance", "-1"], "tolerance=-1.0"),
    "no command": ([], "arguments are required: COMMAND"),
    "unknown command": (["create"], "invalid choice: 'create'"),
    "unknown option": ([*GENERATE, "--fast"], "unrecognized arguments: --fast"),
    "missing argument": (["score", "joint.safetensors"], "arguments are required: structures"),
    "evaluate a missing file": (["evaluate", "missing.xyz"], "missing.xyz: no such file"),
    "evaluate nothing": (["evaluate", "nothing.xyz"], "nothing.xyz"),
    "missing reference": (
        ["evaluate", "good.extxyz", "--reference", "missing.smi"],
        "--reference 'missing.smi': no such file; name qm9, a file of SMILES",
    ),
    "a name in capitals": (
        ["evaluate", "good.extxyz", "--reference", "QM9"],
        "--reference 'QM9': no such file; write qm9 for the shipped one",
    ),
    "reference in Latin-1": (["evaluate", "good.extxyz", "--reference", "latin1.smi"], "latin1.smi: is no text in"),
    "reference of nothing": (["evaluate", "good.extxyz", "--reference", "empty.smi"], "empty.smi: holds no SMILES"),
    "a folder as reference": (["evaluate", "good.extxyz", "--reference", "folder.smi"], "folder.smi: is a folder"),
    "info on no fields": (["info", "bare.safetensors"], "bare.safetensors: has a damaged header (KeyError: 'config')"),
    "info on no sizes": (["info", "sizeless.safetensors"], "sizeless.safetensors: has a damaged header"),
    "negative start": ([*GENERATE, "--start", "-1"], "start=-1: must be at least 0"),
    "histogram of nothing": (["evaluate", "good.extxyz", "--histogram", "h.png"], "add --reference"),
    "train on nothing": (["train"], "training needs --data"),
    "train without validation": (["train", "--data", "good.extxyz", "--out", "run"], "--valid"),
    "train without out": (["train", "--data", "good.extxyz", "--valid", "good.extxyz"], "--out is missing"),
    "train on a missing file": (
        [*TRAIN, "--data", "missing.xyz", "--valid", "good.extxyz"],
        "missing.xyz: no such file",
    ),
    "train on a cell": ([*TRAIN, "--data", "periodic.extxyz", "--valid", "good.extxyz"], "periodic"),
    "train without that size": (
        [*TRAIN, "--data", "good.extxyz", "--valid", "good.extxyz", "--n-atoms", "9"],
        "of 9 atoms",
    ),
    "train a strange objective": (
        [*TRAIN, "--data", "x", "--valid", "x", "--objective", "gan"],
        "objective 'gan' is unknown",
    ),
    "split of unnumbered": ([*TRAIN, "--data", "good.extxyz", "--qm9-split"], "good.extxyz"),
    "train into a file": (
        ["train", "--data", "good.extxyz", "--valid", "good.extxyz", "--out", "good.extxyz"],
        "is a file; name the folder",
    ),
    "train on two splits": (
        [*TRAIN, "--data", "good.extxyz", "--valid", "good.extxyz", "--qm9-split"],
        "leave --valid out",
    ),
    "validate on other elements": (
        [*TRAIN, "--data", "methane.xyz", "--valid", "good.extxyz"],
        "validation set: structure 0 (H2O): element(s) O are not in the training set",
    ),
    "train by an earlier name": ([*TRAIN, "--matrix-rate", 0.1], "--matrix-rate is now called --muon-learning-rate"),
    "resume elsewhere": (["train", "--resume", "run", "--out", "else"], "leave --out out"),
    "resume nothing": (["train", "--resume", "missing"], "--resume takes the folder"),
    "resume a part": (["train", "--resume", "run", "--n-atoms", 19], "leave --qm9-split and --n-atoms out"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_exit_code_2_and_one_line(here, capfd, name, monkeypatch):
    words, expected = BAD[name]
    if name.startswith(("folder of", "format of")):  # said before anything is computed
        monkeypatch.delattr(ENF, "sample")
        monkeypatch.delattr(ENF, "log_prob")
    before = set(os.listdir(here))
    assert run(*words) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("ase-enf") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
    assert expected in said.err and "Traceback" not in said.err
    assert set(os.listdir(here)) - before <= {"run"}  # no half file is left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("words", [GENERATE, ["score", "joint.safetensors", "good.extxyz"]])
def test_a_missing_gpu_is_one_line(here, capfd, words):
    assert run(*words, "--device", "cuda") == 2
    said = capfd.readouterr().err
    assert said.startswith("ase-enf: error: device 'cuda': this machine has 0 usable CUDA") and said.count("\n") == 1


def test_a_warning_is_one_line(here, tmp_path, capfd, monkeypatch):
    sample = ENF.sample
    calls = []

    def failing_once(self, *arguments):
        batch = sample(self, *arguments)
        if not calls:
            batch.positions[0] = torch.nan
        calls.append(1)
        return batch

    monkeypatch.setattr(ENF, "sample", failing_once)
    assert run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz", *FAST) == 0
    assert "ase-enf: warning: 1 of 3 integrations failed and were drawn again\n" in capfd.readouterr().err


def test_an_interruption_leaves_nothing_half(here, tmp_path, capfd, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ENF, "sample", interrupted)
    assert run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz") == 130
    assert capfd.readouterr().err == "ase-enf: interrupted\n" and not os.listdir(tmp_path)


def test_being_terminated_leaves_nothing_half(here, tmp_path, capfd, monkeypatch):
    def unhandled(*_: object) -> None:
        raise AssertionError("nobody handles SIGTERM")

    def terminated(*_: object) -> None:
        for _ in range(2):  # a queue may send it to the whole group, and torchrun once more
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, unhandled)
    try:
        monkeypatch.setattr(ENF, "sample", terminated)
        assert run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz") == 143
        assert signal.getsignal(signal.SIGTERM) is unhandled  # the caller's again
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "ase-enf: terminated\n" and not os.listdir(tmp_path)


def test_a_defect_keeps_its_traceback(here, tmp_path, monkeypatch):
    def defective(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(ENF, "sample", defective)
    with pytest.raises(AssertionError, match="ours"):
        run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz")


def process(*words: str, module: str = "ase_enf.cli", **settings: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(ase_enf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, env=environment)


def test_a_process_that_succeeds(here, tmp_path):
    done = process("generate", "joint.safetensors", "-n", "2", "-o", str(tmp_path / "m.extxyz"), *FAST)
    assert (done.returncode, done.stdout) == (0, "") and "wrote 2 molecules" in done.stderr
    assert len(read(tmp_path / "m.extxyz", index=":")) == 2


@pytest.mark.parametrize("name", ["periodic cell", "unknown command"])
def test_a_process_that_fails(here, name):
    words, expected = BAD[name]
    done = process(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr and done.stderr.count("\n") == 1
