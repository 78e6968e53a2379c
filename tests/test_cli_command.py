"""The command line as a whole: help, overwriting, progress, terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import molecule
from ase.io import write
from commands import FAST, SCORE, TINY, error_of, process, run

import ase_enf
from ase_enf.cli import progress
from ase_enf.flow.model import ENF


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


def test_processes_of_torchrun_do_not_write_the_same_files(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in ([*SCORE, "-o", "scores.csv"], ["evaluate", "good.extxyz", "-o", "report.json"],
                  ["boltzmann", "good.extxyz", "-o", "study"],
                  ["convert-en-flows", "weights.npz", "-o", "weights.safetensors"]):  # fmt: skip
        assert f"{words[0]} is for one process; leave torchrun out" in error_of(capsys, *words)
        assert not (here / words[-1]).exists()
    assert run("info", "dw4") == 0


def test_nothing_is_overwritten_silently(here, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(ENF, "sample")  # before anything is computed
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
        assert f"{tmp_path / name}: already exists; --overwrite replaces it{added}, or name another" in said
        assert (tmp_path / name).read_text() == "mine"
    assert "choose one" in error_of(capsys, *generate, "-o", tmp_path / "m.extxyz", "--append", "--overwrite")
    assert "is no ASE database; nothing can be added" in error_of(
        capsys, *generate, "-o", tmp_path / "m.db", "--append"
    )
    for words in ([*generate, "-o", tmp_path / "m.cif"], [*SCORE, "-o", tmp_path / "s.json"]):
        assert "added to such a" in error_of(capsys, *words, "--append")
    assert "name it by -o" in error_of(capsys, *SCORE, "--append")
    assert "good.extxyz holds 2 structures" in error_of(capsys, *SCORE, "--start", 2)


@pytest.mark.parametrize("ending", ["extxyz", "xyz", "db", "traj", "csv"])
def test_a_file_that_is_there_says_how_the_command_that_left_it_goes_on(here, tmp_path, capsys, monkeypatch, ending):
    path = tmp_path / f"out.{ending}"
    words = SCORE if ending == "csv" else ["generate", "joint.safetensors", "-n", 5, "--start", 3, *FAST]
    assert run(*words, *(() if ending == "csv" else ("-n", 2)), "-o", path) == 0
    monkeypatch.delattr(ENF, "sample")
    monkeypatch.delattr(ENF, "log_prob")
    done, go_on = ("2 scores", "--start 2") if ending == "csv" else ("2 molecules", "--start 5 -n 3")
    end = f"; if this command wrote it and ended after {done}, --append {go_on} continues it\n"
    assert error_of(capsys, *words, "-o", path).endswith(end)
    if ending != "csv":  # the file is complete
        assert error_of(capsys, *words, "-n", 2, "-o", path).endswith("or name another file\n")
    for content in (b"", b"mine", path.read_bytes()[:50]):  # the number of structures cannot be determined
        path.write_bytes(content)
        assert error_of(capsys, *words, "-o", path).endswith("or name another file\n")
        assert path.read_bytes() == content


def test_what_a_command_reads_is_not_replaced_by_what_it_writes(here, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(ENF, "sample")
    fragment, listed, study = tmp_path / "fragment.extxyz", tmp_path / "listed.json", tmp_path / "study"
    study.mkdir()
    for path in (fragment, listed, study / "thermal.extxyz"):
        write(path, molecule("H2O"))
    (tmp_path / "link.extxyz").symlink_to(fragment)
    before = {path: path.read_bytes() for path in (fragment, listed, study / "thermal.extxyz")}
    generate = ["generate", "joint.safetensors", "--fragment", fragment, "--overwrite"]
    for words in (
        [*generate, "-o", fragment],
        [*generate, "-o", tmp_path / "link.extxyz"],
        [*generate, "-o", tmp_path / "m.extxyz", "--trajectory", fragment],
        ["evaluate", listed, "-o", listed, "--overwrite"],
        ["evaluate", "good.extxyz", "--reference", listed, "-o", listed, "--overwrite"],
        ["boltzmann", study / "thermal.extxyz", "-o", study],
    ):
        assert "is what this command reads, and it would be lost" in error_of(capsys, *words)
    assert {path: path.read_bytes() for path in before} == before


def test_long_work_says_how_far_it_is_where_no_terminal_shows_a_bar(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    one = ["--batch-size", 1]
    assert run("generate", "joint.safetensors", "-n", 3, "-o", tmp_path / "m.extxyz", *FAST, *one) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "ase-enf: 1 of 3 molecules, about 1 minute left",
        "ase-enf: 2 of 3 molecules, about 1 minute left",
    ]
    paths = ["-o", tmp_path / "p.extxyz", "--trajectory", tmp_path / "t.traj", "--frames", 2]
    assert run("generate", "joint.safetensors", "-n", 2, *paths, *FAST, *one) == 0
    assert capsys.readouterr().err.startswith("ase-enf: 1 of 2 molecules, about 1 minute left\n")
    assert run(*SCORE, "--batch-size", 1) == 0
    assert capsys.readouterr().err == "ase-enf: 1 of 2 structures, about 1 minute left\n"


def test_the_time_that_is_left_is_that_of_the_rest_at_the_same_pace(capsys, monkeypatch):
    clock = iter([0.0, 29.0, 59.0, 100.0, 170.0, 300.0])  # the start, and five batches
    monkeypatch.setattr("ase_enf.cli.progress.monotonic", lambda: next(clock))
    told = progress.Minutely("molecule", " of this process")
    for done in (1, 10, 11, 40, 50):
        told(done, 50)
    assert capsys.readouterr().err.splitlines() == [
        "ase-enf: 11 of 50 molecules of this process, about 5 minutes left",  # 10 in 71 s
        "ase-enf: 40 of 50 molecules of this process, about 1 minute left",  # 39 in 141 s
    ]


def test_training_says_how_far_it_is_too(here, tmp_path, capsys, monkeypatch):
    """A resumed run at its own pace, and one without an end without the time that is left."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    words = ["train", "--data", "good.extxyz", "--valid", "good.extxyz", "--device", "cpu", *TINY]
    assert run(*words, "--out", tmp_path / "run", "--steps", 3) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "steps" in line]
    assert lines == [f"ase-enf: {k} of 3 steps, about 1 minute left" for k in (1, 2)]
    assert run("train", "--resume", tmp_path / "run", "--steps", 5) == 0
    assert "ase-enf: 4 of 5 steps, about 1 minute left" in capsys.readouterr().err
    endless = ["--schedule", "constant", "--time-limit", 1e-9]
    assert run(*words, "--out", tmp_path / "endless", *endless) == 0
    assert "ase-enf: 1 step\n" in capsys.readouterr().err


def test_an_interruption_does_not_hide_the_error_before_it(here, tmp_path, capsys, monkeypatch):
    """For instance when torchrun ends a process that has just lost another one."""

    def lost(*_, **__):
        try:
            raise ConnectionError("process 0 of 2 lost another one")
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr("ase_enf.flow.loading.load", lost)
    assert run("generate", "joint.safetensors", "-n", 1, "-o", tmp_path / "m.xyz") == 130
    assert capsys.readouterr().err == "ase-enf: interrupted; process 0 of 2 lost another one\n"


def test_an_interruption_while_an_error_is_said_ends_in_one_line(here, tmp_path, capsys, monkeypatch):
    def cut(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ase_enf.flow.devices.out_of_memory", cut)
    assert run("generate", "no-such-model", "-n", 1, "-o", tmp_path / "m.xyz") == 130
    said = capsys.readouterr().err
    assert said.startswith("ase-enf: interrupted; ") and "no-such-model" in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [["evaluate"], ["evaluate", "good.extxyz", "--reference"], ["score", "qm9"]])
def test_what_cannot_be_read_twice_is_refused(here, tmp_path, capsys, words):
    os.mkfifo(tmp_path / "pipe.smi")
    for path in (tmp_path / "pipe.smi", "/dev/null"):
        said = error_of(capsys, *words, path)
        assert f"{path}: is a pipe or a device, which cannot be read twice; save it to a file and name that" in said


@pytest.mark.parametrize("words", [["info", "qm9"], ["train", "--help"], ["evaluate", "good.extxyz"]])
def test_a_terminal_that_knows_ascii_alone(here, words):
    done = process(*words, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and "?" in done.stdout and done.stdout.isascii(), done.stderr


@pytest.mark.parametrize("words", ["--completion bash", "train --help", "info qm9"])
def test_a_reader_that_has_seen_enough_is_no_error(here, words):
    pytest.importorskip("shtab")
    root = str(Path(ase_enf.__file__).parents[1])
    shell = f"set -o pipefail; {sys.executable} -m ase_enf {words} | head -n 1 | cut -c 1-3 | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert done.stderr == ""


def test_the_package_is_a_command(here, tmp_path):
    done = process("--version", module="ase_enf")
    assert done.returncode == 0 and done.stdout.startswith("ase-enf ")
    assert process("create", module="ase_enf").stderr.startswith("ase-enf: error: argument COMMAND: invalid choice")
