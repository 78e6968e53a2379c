"""Every mistake on the command line gives exit code 2 and one line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import GENERATE, TRAIN, process, run

import ase_enf
from ase_enf.flow.model import ENF

BAD = {
    "periodic cell": (["score", "joint.safetensors", "periodic.extxyz"], "structure 1 (H2O): has periodic boundaries"),
    "unknown element": (["score", "joint.safetensors", "element.extxyz"], "S unknown to this model"),
    "one atom": (["score", "joint.safetensors", "one.extxyz"], "structure 1 (H): has 1 atom"),
    "zero atoms": (["score", "joint.safetensors", "zero.xyz"], "structure 0 (empty): has 0 atom"),
    "one point": (["score", "joint.safetensors", "point.extxyz"], "atoms 1 and 2 lie on one point"),
    "NaN": (["score", "joint.safetensors", "nan.extxyz"], "atom 1 has non-finite coordinates"),
    "size never seen": (["score", "joint.safetensors", "size.extxyz"], "a size this model never saw"),
    "empty file": (["score", "joint.safetensors", "nothing.xyz"], "nothing.xyz"),
    "no structure": (["score", "joint.safetensors", "prose.xyz"], "prose.xyz"),
    "no format": (["score", "joint.safetensors", "prose"], "prose"),
    "missing structures": (["score", "joint.safetensors", "missing.xyz"], "missing.xyz: no such file; name one"),
    "a model for structures": (["score", "good.extxyz", "qm9"], "qm9: is a model, not a file; name a file that holds"),
    "evaluate a model": (["evaluate", "qm9"], "qm9: is a model, not a file; name a file that holds"),
    "no name": (["score", "joint.safetensors", ""], "'': no such file"),
    "truncated weights": (["generate", "half.safetensors"], "half.safetensors: is no readable .safetensors"),
    "a byte of weights": (["info", "tiny.safetensors"], "tiny.safetensors: is no readable .safetensors"),
    "foreign weights": (["score", "foreign.safetensors", "good.extxyz"], "holds no ase-enf model"),
    "text as weights": (["info", "prose"], "prose: is no readable .safetensors"),
    "unknown model": (["generate", "qm8", "-n", "3"], "qm8: no such weights file"),
    "unknown model info": (["info", "qm8"], "qm8: no such weights file"),
    "folder of output": ([*GENERATE[:2], "-o", "no/out.extxyz"], "the folder no does not exist"),
    "folder of scores": (
        ["score", "joint.safetensors", "good.extxyz", "-o", "no/s.csv"],
        "the folder no does not exist",
    ),
    "folder of report": (["evaluate", "good.extxyz", "-o", "no/r.json"], "the folder no does not exist"),
    "folder of gallery": ([*GENERATE, "--gallery", "no/g.png"], "the folder no does not exist"),
    "format of output": ([*GENERATE[:2], "-o", "out.nonsense"], "ASE knows no format"),
    "format of scores": (["score", "joint.safetensors", "good.extxyz", "-o", "s.nonsense"], "ASE knows no format"),
    "format of report": (["evaluate", "good.extxyz", "-o", "r.nonsense"], "one of these endings"),
    "n=0": ([*GENERATE, "-n", "0"], "n=0: must be at least 1"),
    "negative n": ([*GENERATE, "-n", "-3"], "n=-3: must be at least 1"),
    "n is no number": ([*GENERATE, "-n", "many"], "invalid int value: 'many'"),
    "seed": ([*GENERATE, "--seed", "-1"], "seed=-1: must be at least 0"),
    "batch size": ([*GENERATE, "--batch-size", "0"], "batch_size=0"),
    "n_atoms": ([*GENERATE, "--n-atoms", "4"], "n_atoms=4"),
    "formula of a joint model": ([*GENERATE, "--formula", "H2O"], "features='given'"),
    "formula": (["generate", "given.safetensors", "--formula", "H2("], "not a chemical formula"),
    "formula with a charge": (["generate", "given.safetensors", "--formula", "H2O+"], "no charges"),
    "formula without atoms": (["generate", "given.safetensors", "--formula", "C0H4"], "no atoms of an element"),
    "radical": (["generate", "given.safetensors", "--formula", "CH3", "--closed-shell"], "odd number of electrons"),
    "device": ([*GENERATE, "--device", "cpuu"], "device 'cpuu' is unknown"),
    "dtype": ([*GENERATE, "--dtype", "float16"], "choose float32 or float64"),
    "solver": ([*GENERATE, "--solver", "rk5"], "choose one of dopri5"),
    "steps of dopri5": ([*GENERATE, "--solver", "dopri5", "--steps", "3"], "chooses its own steps"),
    "trace": (["score", "joint.safetensors", "good.extxyz", "--trace", "exakt"], "trace 'exakt' is unknown"),
    "importance samples": (
        ["score", "joint.safetensors", "good.extxyz", "--importance-samples", "0"],
        "importance_samples=0",
    ),
    "max stderr": (["score", "joint.safetensors", "good.extxyz", "--max-stderr", "-1"], "max_stderr=-1.0"),
    "calculator": (["boltzmann", "good.extxyz", "--calculator", "dft", "-o", "new"], "calculator 'dft' is unknown"),
    "torsion": (
        ["boltzmann", "good.extxyz", "--torsion", "0", "1", "2", "99", "-o", "new"],
        "need four different atom indices",
    ),
    "turn": (["boltzmann", "good.extxyz", "--turn", "1", "2", "-o", "new"], "need the indices of two bonded atoms"),
    "temperature": (["boltzmann", "good.extxyz", "--temperature", "0", "-o", "new"], "temperature=0.0: must be"),
    "no command": ([], "arguments are required: COMMAND"),
    "unknown command": (["create"], "invalid choice: 'create'"),
    "unknown option": ([*GENERATE, "--fast"], "unrecognized arguments: --fast"),
    "misspelt option": ([*GENERATE, "--requre=stable"], "--requre=stable; did you mean --require?"),
    "misspelt option of train": (["train", "--hiden", "3"], "did you mean --hidden?"),
    "missing argument": (["score", "joint.safetensors"], "arguments are required: structures"),
    "evaluate a missing file": (["evaluate", "missing.xyz"], "missing.xyz: no such file"),
    "evaluate nothing": (["evaluate", "nothing.xyz"], "nothing.xyz"),
    "missing reference": (
        ["evaluate", "good.extxyz", "--reference", "missing.smi"],
        "--reference 'missing.smi': no such file; name qm9, a file of SMILES",
    ),
    "a name in capitals": (
        ["evaluate", "good.extxyz", "--reference", "QM9"],
        "--reference 'QM9': no such file; write qm9 for the shipped one",
    ),
    "reference in Latin-1": (["evaluate", "good.extxyz", "--reference", "latin1.smi"], "latin1.smi: is no text in"),
    "reference of nothing": (["evaluate", "good.extxyz", "--reference", "empty.smi"], "empty.smi: holds no SMILES"),
    "a folder as reference": (["evaluate", "good.extxyz", "--reference", "folder.smi"], "folder.smi: is a folder"),
    "info on no fields": (["info", "bare.safetensors"], "bare.safetensors: has a damaged header (KeyError: 'config')"),
    "info on no sizes": (["info", "sizeless.safetensors"], "sizeless.safetensors: has a damaged header"),
    "negative start": ([*GENERATE, "--start", "-1"], "start=-1: must be at least 0"),
    "histogram of nothing": (["evaluate", "good.extxyz", "--histogram", "h.png"], "add --reference"),
    "train on nothing": (["train"], "training needs --data"),
    "train without validation": (["train", "--data", "good.extxyz", "--out", "run"], "--valid"),
    "train without out": (["train", "--data", "good.extxyz", "--valid", "good.extxyz"], "--out is missing"),
    "train on a missing file": (
        [*TRAIN, "--data", "missing.xyz", "--valid", "good.extxyz"],
        "missing.xyz: no such file",
    ),
    "train on a cell": ([*TRAIN, "--data", "periodic.extxyz", "--valid", "good.extxyz"], "periodic"),
    "train without that size": (
        [*TRAIN, "--data", "good.extxyz", "--valid", "good.extxyz", "--n-atoms", "9"],
        "of 9 atoms",
    ),
    "train a strange objective": (
        [*TRAIN, "--data", "x", "--valid", "x", "--objective", "gan"],
        "objective 'gan' is unknown",
    ),
    "split of unnumbered": ([*TRAIN, "--data", "good.extxyz", "--qm9-split"], "good.extxyz"),
    "train into a file": (
        ["train", "--data", "good.extxyz", "--valid", "good.extxyz", "--out", "good.extxyz"],
        "is a file; name the folder",
    ),
    "train on two splits": (
        [*TRAIN, "--data", "good.extxyz", "--valid", "good.extxyz", "--qm9-split"],
        "leave --valid out",
    ),
    "validate on other elements": (
        [*TRAIN, "--data", "methane.xyz", "--valid", "good.extxyz"],
        "validation set: structure 0 (H2O): element(s) O are not in the training set",
    ),
    "train by an earlier name": ([*TRAIN, "--matrix-rate", 0.1], "--matrix-rate is now called --muon-learning-rate"),
    "score by an earlier name": (
        ["score", "joint.safetensors", "good.extxyz", "--draws", "4"],
        "--draws is now called --importance-samples",
    ),
    "score by another earlier name": (
        ["score", "joint.safetensors", "good.extxyz", "--tolerance=0.1"],
        "--tolerance is now called --max-stderr",
    ),
    "generate by an earlier name": ([*GENERATE, "--kernel", "plain"], "--kernel is now called --backend"),
    "generate by an unknown backend": ([*GENERATE, "--backend", "fast"], "backend 'fast' is unknown; choose one of"),
    "resume elsewhere": (["train", "--resume", "run", "--out", "else"], "leave --out out"),
    "resume nothing": (["train", "--resume", "missing"], "--resume takes the folder"),
    "resume a part": (["train", "--resume", "run", "--n-atoms", 19], "leave --qm9-split and --n-atoms out"),
    "train a strange network": (
        [*TRAIN, "--data", "good.extxyz", "--valid", "good.extxyz", "--network", "mlp"],
        "network 'mlp' is unknown; choose one of egnn, gnn, simple, kernel",
    ),
    "train on a strange device": (["train", "--out", "run", "--device", "gpu"], "device 'gpu' is unknown"),
    "start from nothing": (
        [*TRAIN, "--data", "good.extxyz", "--valid", "good.extxyz", "--init-from", "qm8"],
        "qm8: no such weights file",
    ),
    "churn": ([*GENERATE, "--churn", "-1"], "sampler churn=-1.0: must be a finite number, at least 0"),
    "strength": ([*GENERATE, "--fragment", "methane.xyz", "--strength", "2"], "strength=2.0: must be in (0, 1]"),
    "guidance": ([*GENERATE, "--guidance", "nan"], "guidance=nan: must be a finite number"),
    "requirement": ([*GENERATE, "--require", "stabel"], "require='stabel': is unknown; choose among closed_shell"),
    "property": ([*GENERATE, "--property", "gap"], "property 'gap': write each once, as NAME=VALUE"),
    "missing fragment": ([*GENERATE, "--fragment", "missing.xyz"], "missing.xyz: no such file; name one"),
    "steps=0": ([*GENERATE, "--steps", "0"], "solver steps=0: must be at least 1"),
    "score n=0": (["score", "joint.safetensors", "good.extxyz", "-n", "0"], "n=0: must be at least 1"),
    "evaluate n=0": (["evaluate", "good.extxyz", "-n", "0"], "n=0: must be at least 1"),
    "frames of boltzmann": (["boltzmann", "good.extxyz", "-n", "0", "-o", "new"], "n=0: must be at least 1"),
    "structure of boltzmann": (["boltzmann", "missing.xyz", "-o", "new"], "missing.xyz: no such file; name one"),
    "convert nothing": (["convert-en-flows", "missing", "-o", "w.safetensors"], "missing: no such checkpoint"),
}


# Mistakes that show in what was typed, in the header of a model or in a missing file.
WITHOUT_TORCH = (
    "missing structures", "a model for structures", "evaluate a model", "no name", "truncated weights",
    "a byte of weights", "foreign weights", "text as weights", "unknown model", "unknown model info",
    "folder of output", "folder of scores", "folder of report", "folder of gallery", "format of output",
    "format of scores", "format of report", "n=0", "negative n", "n is no number", "seed", "batch size", "formula",
    "formula with a charge", "formula without atoms", "radical", "device", "dtype", "solver", "trace",
    "importance samples", "max stderr", "no command", "unknown command", "unknown option", "misspelt option",
    "misspelt option of train", "missing argument", "evaluate a missing file", "evaluate nothing",
    "missing reference", "a name in capitals", "reference in Latin-1", "reference of nothing",
    "a folder as reference", "info on no fields", "info on no sizes", "negative start", "histogram of nothing",
    "train on nothing", "train without validation", "train without out", "train on a missing file",
    "train without that size", "train a strange objective", "train into a file", "train on two splits",
    "train by an earlier name", "score by an earlier name", "generate by an earlier name",
    "generate by an unknown backend", "resume elsewhere", "resume nothing", "resume a part",
    "train a strange network", "train on a strange device", "churn", "strength", "guidance", "requirement",
    "property", "missing fragment", "steps=0", "score n=0", "evaluate n=0", "frames of boltzmann",
    "structure of boltzmann", "convert nothing", "start from nothing",
)  # fmt: skip


def test_what_needs_no_model_does_not_wait_for_torch(here):
    """The import of torch takes seconds: a mistake, help and the description of a model come without it."""
    asked = [[str(word) for word in BAD[name][0]] for name in WITHOUT_TORCH]
    asked += [["--help"], ["--version"], ["info"], ["info", "qm9"], ["info", "joint.safetensors"], ["train", "--help"]]
    asked += [["generate", "--help"], ["evaluate", "good.extxyz"]]
    code = f"""
import contextlib, io, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchdiffeq"):
            raise RuntimeError("torch is imported")
sys.meta_path.insert(0, Blocker())
from ase_enf.cli import main
codes = []
for words in json.loads({json.dumps(json.dumps(asked))}):
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        except RuntimeError as error:
            code = str(error)
    codes.append((code or 0, said.getvalue()))
print(json.dumps(codes))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(ase_enf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (code, said) in zip(WITHOUT_TORCH, found[: len(WITHOUT_TORCH)], strict=True):
        assert code == 2 and BAD[name][1] in said and said.count("\n") == 1, (name, code, said)
    assert [code for code, _ in found[len(WITHOUT_TORCH) :]] == [0] * 8


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_exit_code_2_and_one_line(here, capfd, name, monkeypatch):
    words, expected = BAD[name]
    if name.startswith(("folder of", "format of")):  # before anything is computed
        monkeypatch.delattr(ENF, "sample")
        monkeypatch.delattr(ENF, "log_prob")
    before = set(os.listdir(here))
    assert run(*words) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("ase-enf") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
    assert expected in said.err and "Traceback" not in said.err
    assert set(os.listdir(here)) - before <= {"run"}  # no partial file is left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("words", [GENERATE, ["score", "joint.safetensors", "good.extxyz"]])
def test_a_missing_gpu_is_one_line(here, capfd, words):
    assert run(*words, "--device", "cuda") == 2
    said = capfd.readouterr().err
    assert said.startswith("ase-enf: error: device 'cuda': this machine has 0 usable CUDA") and said.count("\n") == 1


@pytest.mark.parametrize("name", ["periodic cell", "unknown command"])
def test_a_process_that_fails(here, name):
    words, expected = BAD[name]
    done = process(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr and done.stderr.count("\n") == 1
