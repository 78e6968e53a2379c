"""Helpers for tests of the command line: a folder of inputs, and commands run as by a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write
from safetensors.torch import save_file

import ase_enf
from ase_enf.cli import main
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF

SAMPLE = Path(__file__).parent / "data" / "qm9_sample.npz"

TINY = ["--hidden", "8", "--layers", "1", "--batch-size", "8", "--validation-size", "4", "--log-every", "1"]

FAST = ["--steps", "3"]

SCORE = ["score", "joint.safetensors", "good.extxyz", "--importance-samples", 2, *FAST]

GENERATE = ["generate", "joint.safetensors", "-o", "out.extxyz"]

TRAIN = ["train", "--out", "run", "--device", "cpu", "--steps", "1"]


def fill_workshop(folder: Path) -> Path:
    """Fills a folder with tiny models, good structures and every kind of bad ones."""
    torch.manual_seed(0)
    sizes, species = {3: 2, 5: 1}, ("H", "C", "O")
    fields = {"hidden": 8, "layers": 1, "sizes": sizes, "species": species, "position_scale": 0.7}
    ENF(ENFConfig(features="joint", **fields), {"data": "nothing", "step": 3}).save(folder / "joint.safetensors")
    ENF(ENFConfig(features="given", compositions={"H2O": 1}, **fields)).save(folder / "given.safetensors")
    good = [molecule("H2O"), molecule("CH4")]
    write(folder / "good.extxyz", good)
    write(folder / "methane.xyz", good[1:], format="xyz")
    for name, atoms in {
        "periodic": Atoms("H2O", good[0].positions, cell=[9, 9, 9], pbc=True),
        "element": Atoms("H2S", good[0].positions),
        "one": Atoms("H"),
        "point": Atoms("H2O", [(0, 0, 0), (1, 0, 0), (1, 0, 0)]),
        "nan": Atoms("H2O", [(0, 0, 0), (1, 0, np.nan), (0, 1, 0)]),
        "size": molecule("CH3OH"),
    }.items():
        write(folder / f"{name}.extxyz", [good[0], atoms])
    (folder / "zero.xyz").write_text("0\n\n")
    (folder / "nothing.xyz").write_text("")
    (folder / "prose.xyz").write_text("It was a bright cold day in April,\nand the clocks were striking thirteen.\n")
    (folder / "prose").write_text("It was a bright cold day in April.\n")
    (folder / "half.safetensors").write_bytes((folder / "joint.safetensors").read_bytes()[:-100])
    (folder / "tiny.safetensors").write_bytes(b"\x07")
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    sizeless = {"config": fields | {"features": "joint", "sizes": {}}, "package": "1", "provenance": {}}
    for name, header in {"bare": {}, "sizeless": sizeless}.items():
        save_file({"weight": torch.zeros(2)}, folder / f"{name}.safetensors", {"ase_enf": json.dumps(header)})
    (folder / "latin1.smi").write_bytes("C méthane\n".encode("latin-1"))
    (folder / "empty.smi").write_text("\n")
    (folder / "folder.smi").mkdir()
    return folder


def run(*words: object) -> int:
    """Runs a command and returns its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def error_of(capsys, *words: object) -> str:
    """Runs a command that fails, and returns its one line on standard error."""
    capsys.readouterr()
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("ase-enf: error: ") and said.count("\n") == 1
    return said


def process(*words: str, module: str = "ase_enf.cli", **settings: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(ase_enf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, env=environment)
