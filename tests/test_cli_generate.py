"""``ase-enf generate``: its output, what is saved if it ends early, and how it continues."""

from __future__ import annotations

import os
import re
import signal

import numpy as np
import pytest
import torch
from ase.db import connect
from ase.io import read
from commands import FAST, error_of, process, run

import ase_enf
from ase_enf.cli.generate import own_device
from ase_enf.cli.inputs import read_structures
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF


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
    assert any(atoms.info["enf_attempts"] > 1 for atoms in closed)  # without it, there would be radicals


def test_torchrun_shares_the_work_and_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [own_device(name) for name in ("auto", "cuda", "cpu")] == ["auto", "cuda", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


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
        rf"ase-enf: (\d+) of 30 molecules are in {out}; continue with (--start \1 -n (\d+) --append)\n"
        "ase-enf: interrupted\n",
        said,
    )
    assert found and int(found.group(1)) + int(found.group(3)) == 30 and int(found.group(1)) >= 1
    assert len(read_structures(str(out))) == int(found.group(1))
    assert run(*words, *found.group(2).split(), "-o", out) == 0
    for ours, theirs in zip(read_structures(str(out)), read(whole, index=":"), strict=True):
        assert ours.numbers.tolist() == theirs.numbers.tolist() and ours.info == theirs.info
        assert np.allclose(ours.positions, theirs.positions, atol=1e-7)
    assert sorted(os.listdir(tmp_path)) == sorted([f"m.{ending}", "whole.extxyz"])


def test_overwriting_is_possible(here, tmp_path):
    for name in ("m.extxyz", "m.db", "m.traj"):
        words = ["generate", "joint.safetensors", "-o", tmp_path / name, *FAST]
        assert run(*words, "-n", 3) == 0 and run(*words, "-n", 2, "--overwrite") == 0
        assert len(read_structures(str(tmp_path / name))) == 2
        assert run(*words, "-n", 2, "--start", 2, "--append") == 0
        assert [atoms.info["enf_index"] for atoms in read_structures(str(tmp_path / name))] == [0, 1, 2, 3]


def test_one_molecule_is_no_plural(here, tmp_path, capsys):
    words = ["-n", 1, "-o", tmp_path / "m.extxyz", "--gallery", tmp_path / "m.png", *FAST]
    assert run("generate", "joint.safetensors", *words) == 0
    said = capsys.readouterr().err
    assert "wrote 1 molecule to" in said and "drew 1 molecule in" in said


def test_a_smiles_as_formula_is_one_line(here, capsys):
    said = error_of(capsys, "generate", "given.safetensors", "--formula", "CCO")
    assert "formula 'CCO': is a SMILES, and a formula counts every atom, hydrogens too; write C2H6O for CCO" in said


@pytest.mark.parametrize("error", [MemoryError("full"), RuntimeError("[enforce] can't allocate memory: 9 bytes")])
def test_running_out_of_memory_has_a_remedy(here, tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ENF, "sample", fail)
    assert run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz") == 2
    assert "lower --batch-size" in capsys.readouterr().err


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
        assert signal.getsignal(signal.SIGTERM) is unhandled  # the handler of the caller is restored
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == "ase-enf: terminated\n" and not os.listdir(tmp_path)


def test_a_defect_keeps_its_traceback(here, tmp_path, monkeypatch):
    def defective(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(ENF, "sample", defective)
    with pytest.raises(AssertionError, match="ours"):
        run("generate", "joint.safetensors", "-n", 2, "-o", tmp_path / "m.extxyz")


def test_a_process_that_succeeds(here, tmp_path):
    done = process("generate", "joint.safetensors", "-n", "2", "-o", str(tmp_path / "m.extxyz"), *FAST)
    assert (done.returncode, done.stdout) == (0, "") and "wrote 2 molecules" in done.stderr
    assert len(read(tmp_path / "m.extxyz", index=":")) == 2


def test_the_path_of_each_molecule(here, tmp_path, capsys):
    words = ["generate", "joint.safetensors", "-n", 3, "--seed", 5, "--solver", "rk4", "--steps", 8]
    assert run(*words, "-o", tmp_path / "plain.extxyz") == 0
    more = ["--trajectory", tmp_path / "t.traj", "--gif", tmp_path / "t.gif", "--frames", 4]
    capsys.readouterr()
    assert run(*words, "-o", tmp_path / "m.extxyz", *more) == 0
    said = capsys.readouterr().err.splitlines()
    assert f"ase-enf: wrote 12 frames to {tmp_path}/t.traj" in said and "drew the path of 3 molecules in" in said[-2]
    frames = read(tmp_path / "t.traj", index=":")
    assert [atoms.info["enf_index"] for atoms in frames] == [0] * 4 + [1] * 4 + [2] * 4
    plain, molecules = (read(tmp_path / f"{name}.extxyz", index=":") for name in ("plain", "m"))
    for last, ours, theirs in zip(frames[3::4], molecules, plain, strict=True):
        assert last.info["enf_time"] == 0 and ours.info == theirs.info
        assert last.numbers.tolist() == ours.numbers.tolist() == theirs.numbers.tolist()
        assert np.allclose(ours.positions, theirs.positions, atol=1e-5)
        assert np.allclose(ours.positions, last.positions, atol=1e-5)
    assert (tmp_path / "t.gif").read_bytes().startswith(b"GIF89a")


def test_paths_that_cannot_be_written_are_refused_before_the_work(here, tmp_path, capsys, monkeypatch):
    words = ["generate", "joint.safetensors", "-o", tmp_path / "m.extxyz", *FAST]
    (tmp_path / "there.traj").write_text("mine")
    for more, expected in (
        (["--gif", tmp_path / "a.png"], "an animation is written as .gif"),
        (["--trajectory", tmp_path / "a.nonsense"], "ASE knows no format"),
        (["--trajectory", tmp_path / "m.extxyz"], "another output has that name; name a file for each"),
        (["--trajectory", tmp_path / "there.traj"], "--overwrite replaces it"),
        (["--trajectory", tmp_path / "a.traj", "--frames", 1], "--frames 1: a path has at least 2"),
    ):
        assert expected in error_of(capsys, *words, *more)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "work in one process only" in error_of(capsys, *words, "--gif", tmp_path / "a.gif")
    assert os.listdir(tmp_path) == ["there.traj"]
