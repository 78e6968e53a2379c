"""Named pipes and ``<(cat file)``: read like the file itself, or refused in one line."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from commands import FAST, TINY, error_of, run

SCORE = ["score", "given.safetensors"]


@pytest.fixture
def piped(tmp_path):
    """Creates a named pipe that delivers a text once."""
    writers = []

    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        os.mkfifo(path)
        writers.append(threading.Thread(target=path.write_text, args=(text,)))
        writers[-1].start()
        return path

    yield make
    for writer in writers:
        writer.join(timeout=10)
        assert not writer.is_alive()  # all of it has been read


@pytest.mark.parametrize(
    ("name", "file"), [("p.xyz", "methane.xyz"), ("p.extxyz", "good.extxyz"), ("p", "methane.xyz")]
)
def test_scores_of_a_pipe_are_those_of_the_file(here, piped, capsys, name, file):
    assert run(*SCORE, file, *FAST) == 0
    expected = capsys.readouterr().out
    path = piped(name, (here / file).read_text())
    assert run(*SCORE, path, *FAST) == 0
    assert capsys.readouterr().out == expected.replace(file, str(path))
    assert path.exists()  # the pipe itself is not removed


def test_a_pipe_is_a_reference_too(here, piped, capsys):
    pytest.importorskip("rdkit")
    assert (
        run("evaluate", "good.extxyz", "--reference", piped("reference.xyz", (here / "methane.xyz").read_text())) == 0
    )
    assert "novelty" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "It was a bright cold day in April,\nand the clocks were striking thirteen.\n"])
@pytest.mark.parametrize("name", ["p.xyz", "p"])
def test_a_pipe_without_structures_is_one_line_that_names_it(here, piped, capsys, name, text):
    path = piped(name, text)
    said = error_of(capsys, *SCORE, path)
    assert str(path) in said and "piped" not in said


def test_a_run_needs_files(here, tmp_path, capsys):
    os.mkfifo(tmp_path / "p.xyz")  # there is no writer: it is refused before it is opened
    words = ["train", "--out", tmp_path / "run", "--device", "cpu", *FAST, *TINY]
    said = error_of(capsys, *words, "--data", tmp_path / "p.xyz", "--valid", "good.extxyz")
    assert "p.xyz: is a pipe or a device, which cannot be read twice; save it to a file" in said


def test_process_substitution(here):
    command = "python -m ase_enf evaluate <(cat good.extxyz)"
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and "n_structures 2" in done.stdout, done.stderr
