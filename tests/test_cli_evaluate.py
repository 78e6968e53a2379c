"""``ase-enf evaluate``: reports and pictures."""

from __future__ import annotations

import csv
import json

import pytest
from commands import error_of, run


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
    assert max(map(len, said.out.splitlines())) <= 100
    assert all(f"\n{row['metric']}: " in said.out for row in rows)  # what each counts


def test_evaluate_draws_a_gallery(here, tmp_path, capsys):
    pytest.importorskip("rdkit")
    assert run("evaluate", "good.extxyz", "--gallery", tmp_path / "g.png") == 0
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert "drew 2 molecules" in capsys.readouterr().err


@pytest.mark.parametrize("reference", [[], ["--reference", "smiles.smi"], ["--reference", "methane.xyz"]])
def test_evaluate_draws_distances_and_elements(here, tmp_path, capsys, reference):
    pytest.importorskip("rdkit")
    (here / "smiles.smi").write_text("C methane\n")
    assert run("evaluate", "nan.extxyz", "--plot", tmp_path / "p.svg", *reference) == 0
    assert "stable atoms" in (tmp_path / "p.svg").read_text()
    said = error_of(capsys, "evaluate", "good.extxyz", "--plot", tmp_path / "p.svg", *reference)
    assert "p.svg" in said and "--overwrite" in said
    assert "p.xyz" in error_of(capsys, "evaluate", "good.extxyz", "--plot", tmp_path / "p.xyz", *reference)


def test_an_empty_database_is_left_alone(here, tmp_path, capsys):
    (tmp_path / "empty.db").touch()
    assert run("evaluate", tmp_path / "empty.db") == 2
    assert "is no ASE database" in capsys.readouterr().err and (tmp_path / "empty.db").stat().st_size == 0


def test_a_file_without_a_readable_smiles_is_refused(here, tmp_path, capsys):
    (tmp_path / "prose.smi").write_text("It was a bright\ncold day in April\n")
    said = error_of(capsys, "evaluate", "good.extxyz", "--reference", tmp_path / "prose.smi")
    assert "RDKit cannot read any of the 2 different SMILES of the reference, such as 'It'" in said


def test_a_position_that_is_not_finite_is_a_failure_and_not_drawn(here, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert run("evaluate", "nan.extxyz", "-o", out, "--gallery", tmp_path / "g.png") == 0
    values = {row["metric"]: row["value"] for row in json.loads(out.read_text())["rows"]}
    assert values["molecule_stability"] == 0.5 and "drew 1 molecule in" in capsys.readouterr().err
