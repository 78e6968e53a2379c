"""``ase-enf score`` into the scored file: no structure is lost, and a kill loses at most the last scores."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from ase.build import molecule
from ase.io import read
from commands import FAST, error_of, run

from ase_enf.atoms import io
from ase_enf.atoms.io import write_structures
from ase_enf.cli.inplace import InPlaceFile
from ase_enf.cli.inputs import read_structures
from ase_enf.flow.model import ENF

MANY = 4


def score(path, *more):
    """Returns the words of a command that scores a file in place, structure by structure."""
    quick = ["--trace", "hutchinson", "--probes", 1, "--importance-samples", 1, "--max-stderr", 1e9, "--batch-size", 1]
    words = ["score", "joint.safetensors", path, "-o", path, "--overwrite", "--device", "cpu", "--solver", "euler"]
    return [*words, *quick, *FAST, *more]


def fill(path):
    """Writes a few structures to a file, and returns its content."""
    atoms = [molecule(name) for name in ("H2O", "CH4") * (MANY // 2)]
    for place, item in enumerate(atoms):
        item.info["mine"] = f"number {place}"
    write_structures(path, atoms)
    return path.read_bytes()


def content(path):
    """Returns the content of a file in a form that can be compared."""
    return [(str(item.symbols), item.info) for item in read_structures(str(path))]


def hidden(folder):
    """Returns the hidden files of a folder."""
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def ending_at(monkeypatch, call, end):
    """Replaces one call of a flow by another action, and counts the calls."""
    log_prob, calls = ENF.log_prob, []

    def ended(self, *arguments, **options):
        calls.append(1)
        if len(calls) == call:
            end()
        return log_prob(self, *arguments, **options)

    monkeypatch.setattr(ENF, "log_prob", ended)
    return calls


def kill(monkeypatch, call, words):
    """Runs a command in a child that is ended by SIGKILL at a call of the flow."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            io.COMMIT_SECONDS, io.FlushClock.due = 0.0, lambda clock: True
            ending_at(monkeypatch, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run(*words)
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(workshop, tmp_path_factory):
    """Returns the content of a file that was scored without interruption."""
    path = tmp_path_factory.mktemp("undisturbed") / "mine.extxyz"
    fill(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        assert run(*score(path)) == 0
    return content(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a command is killed in a forked child")
@pytest.mark.parametrize("ending", ["extxyz", "xyz", "db", "traj", "xyz.gz"])
def test_a_kill_costs_nothing_that_was_written_and_the_same_command_goes_on(
    here, tmp_path, capsys, monkeypatch, undisturbed, ending
):
    path = tmp_path / f"mine.{ending}"
    before = fill(path)
    kill(monkeypatch, 3, score(path))
    (left,) = hidden(tmp_path)
    assert path.read_bytes() == before
    calls = ending_at(monkeypatch, 0, interrupt)
    capsys.readouterr()
    assert run(*score(path, "--batch-size", 8)) == 0  # does not affect scores
    assert capsys.readouterr().err.startswith(f"ase-enf: 2 scores found in {tmp_path / left}; continues from there\n")
    assert len(calls) == MANY - 2 and os.listdir(tmp_path) == [path.name]
    for (one, ours), (other, theirs) in zip(content(path), undisturbed, strict=True):
        assert one == other and ours.keys() >= theirs.keys() and ours["mine"] == theirs["mine"]
        assert ours["enf_log_likelihood"] == pytest.approx(theirs["enf_log_likelihood"], abs=1e-3)


def test_control_c_says_that_the_same_command_goes_on(here, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.extxyz"
    before = fill(path)
    with monkeypatch.context() as patch:
        ending_at(patch, 2, interrupt)
        assert run(*score(path)) == 130
    (left,) = hidden(tmp_path)
    said = f"ase-enf: 1 of 4 scores is in {tmp_path / left}; the same command continues\nase-enf: interrupted\n"
    assert capsys.readouterr().err == said and path.read_bytes() == before
    with (tmp_path / left).open("a") as file:  # as left by a kill in the middle of a structure
        file.write('5\nProperties=species:S:1:pos:R:3 pbc="F F F"\nC 0.0 0.0 0.0\nH 0.6')
    calls = ending_at(monkeypatch, 0, interrupt)
    assert run(*score(path)) == 0 and len(calls) == MANY - 1
    assert os.listdir(tmp_path) == ["mine.extxyz"] and len(content(path)) == MANY
    assert all("enf_log_likelihood" in info for _, info in content(path))


def test_another_request_begins_anew_and_removes_the_old_one_when_it_is_done(here, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.extxyz"
    fill(path)
    with monkeypatch.context() as patch:
        ending_at(patch, 2, interrupt)
        assert run(*score(path)) == 130
        (left,) = hidden(tmp_path)
        for other in (["--seed", 1], ["--steps", 4], ["--dtype", "float64"]):
            ending_at(patch, 1, interrupt)
            capsys.readouterr()
            assert run(*score(path, *other)) == 130 and hidden(tmp_path) == [left]
            assert f"{tmp_path / left} holds scores of another command" in capsys.readouterr().err
    calls = ending_at(monkeypatch, 0, interrupt)
    assert run(*score(path, "--seed", 1)) == 0 and len(calls) == MANY
    assert os.listdir(tmp_path) == ["mine.extxyz"]


def test_what_changes_while_it_is_scored_is_left_alone(here, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.extxyz"
    fill(path)

    def change():
        path.write_text("1\n\nH 0 0 0\n")

    ending_at(monkeypatch, 2, change)
    assert f"{path}: has changed while it was scored" in error_of(capsys, *score(path))
    (left,) = hidden(tmp_path)
    assert len(content(path)) == 1 and len(content(tmp_path / left)) == MANY


def test_two_processes_do_not_score_one_file(here, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "mine.extxyz"
    fill(path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"{path}: another process is scoring it" in error_of(capsys, *score(path))
    assert run(*score(path)) == 0 and os.listdir(tmp_path) == ["mine.extxyz"]


def test_structures_that_are_scored_are_not_replaced_by_anything_else(here, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(ENF, "log_prob")
    path, table = tmp_path / "mine.extxyz", tmp_path / "mine.json"
    before = fill(path)
    with pytest.warns(UserWarning):
        fill(table)
    assert "a table would replace the structures" in error_of(capsys, *score(table))
    assert len(read(table, index=":")) == MANY
    words = [word for word in score(path) if word != "--overwrite"]
    assert f"{path}: is the file that is scored; --overwrite writes the scores into it" in error_of(capsys, *words)
    assert "would hold its structures twice" in error_of(capsys, *words, "--append")
    assert path.read_bytes() == before


def test_a_link_is_followed_and_what_is_lost_is_said_of_the_file(here, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "mine.extxyz", tmp_path / "mine.extxyz"
    link.symlink_to(target)
    fill(target)
    assert run(*score(link)) == 0 and link.is_symlink() and os.listdir(tmp_path / "real") == ["mine.extxyz"]
    assert all("enf_log_likelihood" in info for _, info in content(target))
    with pytest.warns(UserWarning, match=rf"^{target}: this format keeps no info\['virial'\]"):
        with InPlaceFile(str(target), "") as file:
            item = molecule("H2O")
            item.info["virial"] = [1.0, 2.0]
            file.add(item)


@pytest.mark.parametrize("ending", ["extxyz", "db", "traj"])
def test_an_exception_leaves_the_file_as_it_was(tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    write_structures(path, [molecule("H2O")])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), InPlaceFile(path, "") as file:
        file.add(molecule("H2O"))
        raise KeyboardInterrupt
    assert path.read_bytes() == before and file.count == 1
    with InPlaceFile(path, "") as file:
        file.add(molecule("H2O"))
    assert file.start == 1 and file.count == 2 and len(content(path)) == 2 and len(os.listdir(tmp_path)) == 1
