"""``ase-enf evaluate``: reports and pictures."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import write
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
    assert run("evaluate", "good.extxyz", "--reference", reference, "--all") == 0
    said = capsys.readouterr()
    assert "molecule_stability" in said.out and said.err == ""
    assert max(map(len, said.out.splitlines())) <= 100
    assert all(f"\n{row['metric']}: " in said.out for row in rows)  # what each counts


def test_the_rows_of_the_tables_of_models_are_seen_at_once(here, capsys):
    """In percent, under the words of README's table, each with its definition; the rest is asked for by --all."""
    pytest.importorskip("rdkit")
    write(here / "pair.extxyz", [molecule("CH4"), molecule("CH3"), molecule("CH4")])
    assert run("evaluate", "pair.extxyz", "--reference", "methane.xyz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 structures                                               in the report"
    assert lines[2:9] == [
        "molecules stable    66.7 ± 27.2 %  of 3 structures         molecule_stability",
        "valid              100.0 ±  0.0 %  of 3 structures         validity_largest_fragment",
        "atoms stable        92.9 ±  7.7 %  of 14 atoms             atom_stability",
        "in one piece       100.0 ±  0.0 %  of 3 structures         connected",
        "unique              66.7 ± 33.3 %  of 3 valid              uniqueness_largest_fragment",
        "new                 33.3 ± 27.2 %  of 3 valid              novelty_largest_fragment",
        lines[8],
    ]
    assert lines[8].startswith("distances") and "nats from reference" in lines[8]
    assert [line.split(":")[0] for line in lines[10:] if line[:5] in ("molec", "valid", "new: ")] == [
        "molecules stable", "valid", "new",
    ]  # fmt: skip
    assert "All 19 metrics" in " ".join(lines)


def test_the_first_structures_alone(here, tmp_path, capsys):
    assert run("evaluate", "good.extxyz", "-n", 1, "-o", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["n_structures"] == 1


def test_what_is_not_known_is_a_dash(here, capsys):
    write(here / "one.extxyz", molecule("CH4"))
    write(here / "broken.extxyz", [Atoms("OH", [(0, 0, 0), (0, np.nan, 1)])] * 2)
    assert run("evaluate", "one.extxyz") == 0
    assert "valid              100.0 ±  0.0 %  of 1 structure " in (said := capsys.readouterr().out)
    assert "unique             100.0 ±    - %  of 1 valid" in said  # the spread of one is unknown
    assert run("evaluate", "broken.extxyz") == 0
    assert "unique                 -           of 0 valid" in capsys.readouterr().out


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
