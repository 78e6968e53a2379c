"""``ase-enf score``: tables and annotated structures, batch by batch."""

from __future__ import annotations

import csv
import json
import os
import shutil

import numpy as np
import pytest
from ase.build import molecule
from ase.db import connect
from ase.io import read, write
from commands import FAST, SCORE, error_of, run

import ase_enf
from ase_enf.cli.inputs import read_structures
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF


@pytest.fixture
def table(here):
    return ase_enf.score(
        load("joint.safetensors", device="cpu"), read("good.extxyz", index=":"), importance_samples=2, steps=3
    )


@pytest.fixture
def written(table):
    """Scores as they are written, each with the identity of its structure."""
    return table.assign(index=[0, 1], file="good.extxyz", smiles=["O", "C"])


def interrupt_second_batch(patch):
    """Raises Control-C in the second evaluation, which without refinement is that of the second batch."""
    log_prob, calls = ENF.log_prob, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return log_prob(self, *arguments, **options)

    patch.setattr(ENF, "log_prob", interrupted)


def test_score_to_a_pipe(written, capsys):
    assert run(*SCORE) == 0
    said = capsys.readouterr()
    assert said.out == written.to_csv(index=False) and said.err == ""


def test_an_interrupted_score_to_a_pipe_says_where_to_go_on(written, capsys, monkeypatch):
    interrupt_second_batch(monkeypatch)
    assert run(*SCORE, "--batch-size", 1, "--max-stderr", 1e9) == 130
    said = capsys.readouterr()
    assert said.out == written[:1].to_csv(index=False)
    assert said.err == "ase-enf: 1 of 2 scores is printed; continue with --start 1\nase-enf: interrupted\n"


def test_a_cpu_saves_scores_a_few_at_a_time(here, tmp_path, capsys, monkeypatch):
    write(tmp_path / "five.extxyz", [molecule("H2O")] * 5)
    interrupt_second_batch(monkeypatch)
    words = ["score", "given.safetensors", tmp_path / "five.extxyz", *FAST, "--max-stderr", 1e9, "--device", "cpu"]
    assert run(*words, "-o", tmp_path / "s.csv") == 130
    assert "4 of 5 scores are in" in capsys.readouterr().err
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 4


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
    refined = ["--max-stderr", 1e9]  # one call for each batch
    for ending in ("csv", "extxyz", "db", "json", "traj"):
        interrupt_second_batch(monkeypatch)
        out = tmp_path / f"s.{ending}"
        assert run(*words, *refined, "-o", out) == 130
        remedy = "-o ANOTHER" if ending == "json" else "--append"
        assert capsys.readouterr().err == (
            f"ase-enf: 1 of 2 scores is in {out}; continue with --start 1 {remedy}\nase-enf: interrupted\n"
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
            assert [str(atoms.symbols) for atoms in read_structures(str(out))] == ["OH2", "CH4"]
            assert all("enf_log_likelihood" in atoms.info for atoms in read_structures(str(out)))


def test_the_first_structures_alone(written, here, tmp_path, capsys):
    """-n N scores structures K to K + N - 1 with --start K, as ``generate`` draws them, or fewer at the end."""
    lines = written.to_csv(index=False).splitlines()
    for words, rows in ((["-n", 1], lines[1:2]), (["-n", 1, "--start", 1], lines[2:]), (["-n", 9], lines[1:])):
        assert run(*SCORE, *words, "-o", tmp_path / "s.csv", "--overwrite") == 0
        assert (tmp_path / "s.csv").read_text().splitlines() == [lines[0], *rows]
        assert f"wrote {len(rows)} score" in capsys.readouterr().err
    shutil.copy("good.extxyz", tmp_path / "in.extxyz")
    inplace = [SCORE[0], SCORE[1], tmp_path / "in.extxyz", "-o", tmp_path / "in.extxyz", "--overwrite", "-n", 1]
    assert "-n 1: would leave the other structures" in error_of(capsys, *inplace)


def test_an_interrupted_request_for_some_says_how_many_remain(written, here, tmp_path, capsys, monkeypatch):
    write("three.extxyz", [*read("good.extxyz", ":"), molecule("H2O")])
    interrupt_second_batch(monkeypatch)
    words = ["score", "joint.safetensors", "three.extxyz", *SCORE[3:], "--batch-size", 1, "--max-stderr", 1e9]
    assert run(*words, "-n", 2, "-o", tmp_path / "s.csv") == 130
    assert "1 of 2 scores is in" in (said := capsys.readouterr().err)
    assert "continue with --start 1 -n 1 --append" in said
    end = "--append --start 1 -n 1 continues it\n"
    assert error_of(capsys, *words, "-n", 2, "-o", tmp_path / "s.csv").endswith(end)


def test_rows_are_added_to_a_table_of_the_same_columns_alone(here, written, tmp_path, capsys, monkeypatch):
    earlier = written[:1].rename(columns={"importance_samples": "draws"}).to_csv(index=False)
    cases = {
        "earlier.csv": (earlier, "an earlier version wrote it: draws is now called importance_samples"),
        "other.csv": ("step,loss\n1,2.5\n", "its columns are step,loss, not log_likelihood,stderr,"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(ENF, "log_prob", None)  # refused before any work
        for name, (text, words) in cases.items():
            (tmp_path / name).write_text(text)
            assert words in error_of(capsys, *SCORE, "-o", tmp_path / name, "--append", "--start", 1)
            assert (tmp_path / name).read_text() == text
    mended = tmp_path / "earlier.csv"
    mended.write_text(earlier.replace("draws", "importance_samples"))  # the remedy
    (tmp_path / "empty.csv").touch()
    assert run(*SCORE, "-o", mended, "--append", "--start", 1) == 0
    assert run(*SCORE, "-o", tmp_path / "empty.csv", "--append") == 0
    assert mended.read_text() == (tmp_path / "empty.csv").read_text() == written.to_csv(index=False)


def test_what_a_warning_calls_a_structure_is_its_place_in_the_file(here, capsys):
    words = ["--batch-size", 1, "--max-stderr", 1e-12, "--importance-samples", 1, *FAST]
    assert run("score", "joint.safetensors", "good.extxyz", *words) == 0
    said = capsys.readouterr().err
    assert ": structure 0 (H2O)" in said and ": structure 1 (CH4)" in said


def test_a_file_scored_in_place_stays_whole(here, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.extxyz"
    shutil.copy("good.extxyz", path)
    before = path.read_bytes()
    words = ["score", "joint.safetensors", path, "-o", path, "--overwrite", "--importance-samples", 1, *FAST]
    assert "would leave the first structures" in error_of(capsys, *words, "--start", 1)
    with monkeypatch.context() as patch:
        interrupt_second_batch(patch)
        assert run(*words, "--batch-size", 1, "--max-stderr", 1e9) == 130
    (left,) = (name for name in os.listdir(tmp_path) if name != "mine.extxyz")
    assert path.read_bytes() == before and len(read(tmp_path / left, index=":")) == 1
    assert run(*words) == 0 and os.listdir(tmp_path) == ["mine.extxyz"]
    assert all("enf_log_likelihood" in atoms.info for atoms in read(path, index=":"))


def test_score_of_an_exact_model(here, capsys):
    words = ["--trace", "hutchinson", "--probes", 3, *FAST]
    assert run("score", "given.safetensors", "methane.xyz", *words) == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (row["kind"], row["trace"], row["probes"], row["formula"]) == ("exact", "hutchinson", "3", "CH4")


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
    assert [str(a.symbols) for a in read_structures(str(tmp_path / "three.sdf"))] == ["OH2", "COH4", "C2OH6"]


def test_a_database_keeps_the_keys_of_its_user(here, tmp_path):
    path = tmp_path / "mine.db"
    with connect(path) as database:
        database.write(molecule("H2O"), name="water", pka=14.0, data={"spec": [1, 2, 3]})
    assert run("score", "given.safetensors", path, "-o", path, "--overwrite", *FAST) == 0
    with connect(path) as database:
        (row,) = database.select("pka>3")
    assert row.name == "water" and row.data["info"]["spec"] == [1, 2, 3] and np.isfinite(row.log_likelihood)
