"""Properties and molecular graphs on the command line, from training to scores."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from ase.build import molecule
from ase.io import read, write
from commands import FAST, error_of, run

SMALL = ["--hidden", 16, "--layers", 1, "--batch-size", 4, "--steps", 2, "--warmup", 0, "--validation-size", 2]


@pytest.fixture
def structures(tmp_path):
    rng = np.random.default_rng(0)
    atoms = [molecule(name) for name in ("H2O", "CH4", "CH3OH", "CH3CH2OH")] * 3
    for item in atoms:
        item.info |= {"gap": float(rng.uniform(4, 8)), "alpha": 5.0 * len(item) + float(rng.uniform())}
    write(tmp_path / "some.extxyz", atoms)
    return tmp_path / "some.extxyz"


def test_properties_from_training_to_scores(structures, tmp_path):
    run_folder, out = tmp_path / "run", tmp_path / "drawn.extxyz"
    data = ["--data", structures, "--valid", structures, "--out", run_folder]
    assert run("train", *data, *SMALL, "--condition", "gap", "--condition", "alpha") == 0
    assert json.loads((run_folder / "config.json").read_text())["condition"] == "gap,alpha"
    assert run("train", "--resume", run_folder, "--steps", 3) == 0
    weights = run_folder / "model.safetensors"
    wanted = ["--property", "gap=5.5", "--property", "alpha=24:32"]
    assert run("generate", weights, "-n", 4, "-o", out, *wanted, *FAST) == 0
    drawn = read(out, index=":")
    assert {atoms.info["enf_condition_gap"] for atoms in drawn} == {5.5}
    assert all(24 <= atoms.info["enf_condition_alpha"] <= 32 for atoms in drawn)
    scores = []
    for words in ([], ["--property", "gap=5.5"]):
        table = tmp_path / f"scores{len(words)}.csv"
        assert run("score", weights, structures, "-o", table, "--importance-samples", 1, "--steps", 4, *words) == 0
        scores.append(pd.read_csv(table).log_likelihood)
    assert np.isfinite(scores).all() and (scores[0] != scores[1]).any()


def test_conformers_from_training_to_scores(structures, tmp_path):
    run_folder, out = tmp_path / "run", tmp_path / "drawn.extxyz"
    data = ["--data", structures, "--valid", structures, "--out", run_folder]
    assert run("train", *data, *SMALL, "--features", "given", "--graph") == 0
    weights = run_folder / "model.safetensors"
    assert run("generate", weights, "-n", 2, "-o", out, "--smiles", "OC", *FAST) == 0
    drawn = read(out, index=":")
    assert [str(atoms.symbols) for atoms in drawn] == ["OCH4"] * 2 and drawn[0].info["enf_graph"] == "CO"
    assert run("score", weights, out, "-o", tmp_path / "scores.csv", "--steps", 4) == 0  # bonds as drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--property", "gap=5"], "has no conditions; train one with --condition"),
        (["--property", "gap"], "property 'gap': write each once, as NAME=VALUE or NAME=LOW:HIGH"),
        (["--smiles", "CCO"], "knows no molecular graphs; use one that does, such as qm9-conformers"),
    ],
)
def test_what_a_model_does_not_know_is_one_line(here, tmp_path, capsys, words, message):
    assert message in error_of(capsys, "generate", "joint.safetensors", "-n", 1, "-o", tmp_path / "m.extxyz", *words)


def test_a_condition_that_no_structure_has_is_one_line(structures, tmp_path, capsys):
    words = ["--data", structures, "--valid", structures, "--out", tmp_path / "run", *SMALL, "--condition", "weight"]
    said = error_of(capsys, "train", *words)
    assert "training set: structure 0 (H2O): has no property 'weight' in its info, which has" in said


def test_info_says_what_conditions_a_model(structures, tmp_path, capsys):
    data = ["--data", structures, "--valid", structures, "--out", tmp_path / "run"]
    assert run("train", *data, *SMALL, "--condition", "gap", "--features", "given", "--graph") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "run" / "model.safetensors") == 0
    said = capsys.readouterr().out
    assert "condition      gap: 4." in said and said.count("condition ") == 1 and "eV\n" in said
    assert "graph          the molecular graph conditions the flow" in said
