"""``ase-enf --completion``: completions in bash."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from commands import run

from ase_enf.flow.weights import shipped
from ase_enf.values import OBJECTIVES

# Completes the words that follow as bash would, one answer a line.
TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p ase-enf | sed 's/.*-F \\([^ ]*\\).*/\\1/') ase-enf "${@: -1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """Returns the completions after some words."""
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    folder = tmp_path_factory.mktemp("completion")
    script = folder / "script"
    code = "import sys; from ase_enf.cli import main; sys.exit(main(['--completion', 'bash']))"
    script.write_text(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    (folder / "mine.xyz").touch()

    def offer(*words: str) -> set[str]:
        command = ["bash", "-c", TAB, "bash", str(script), "ase-enf", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
        return set(done.stdout.split())

    return offer


def test_commands_models_options_names_and_files(offered):
    assert {"generate", "score", "evaluate", "train", "info", "convert-en-flows"} <= offered("")
    assert offered("ge") == {"generate"}
    assert set(shipped()) <= offered("generate", "")
    assert offered("generate", "qm9", "--traj") == {"--trajectory"}
    assert offered("train", "--objective", "") == set(OBJECTIVES)
    assert offered("train", "--muon-l") == {"--muon-learning-rate"}
    assert offered("score", "qm9", "mi") == offered("train", "--data", "mi") == {"mine.xyz"}


def test_an_unknown_shell_and_a_missing_package_are_one_line(capsys, monkeypatch):
    assert run("--completion", "fish") == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("--completion", "bash") == 2
    said = capsys.readouterr()
    assert said.out == "" and "pip install ase-enf[completion]" in said.err and said.err.count("\n") == 1


def test_zsh_has_a_script_too(capsys):
    pytest.importorskip("shtab")
    assert run("--completion", "zsh") == 0
    said = capsys.readouterr().out
    assert said.startswith("#compdef ase-enf") and "_ase_enf_models" in said and "--learning-rate" in said
