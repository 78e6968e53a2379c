"""``ase-enf info``: descriptions of models."""

from __future__ import annotations

import json
import re
import shutil

from commands import error_of, run

from ase_enf.flow.weights import shipped


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
    assert run("info") == 0  # the shipped models
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped() and all(len(line) < 140 for line in lines)
    for line in lines:
        assert re.search(r" \d+( to \d+)? atoms: .*(stable|effective sample size|NLL) ?\d*", line), line


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
