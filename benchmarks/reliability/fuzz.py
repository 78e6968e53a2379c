"""Malformed inputs: each must be refused in one line or processed; none may hang or end in a traceback."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import inspect
import io
import json
import math
import shutil
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculatorError
from ase.calculators.emt import EMT
from ase.io import write
from rdkit.Chem import MolToMolBlock

import ase_enf
from ase_enf import metrics
from ase_enf.chem.convert import to_mol, to_smiles
from ase_enf.cli import main as command_line
from ase_enf.cli.arguments import flag
from ase_enf.data import qm9

SECONDS = 120  # of the processor, after which an input is taken to hang
WAITING = 1200  # seconds of the clock, the same
MODEL = "dw4"  # the fastest to load and to score with
MOLECULES = "qm9-small"
NAMES = ("H2O", "CH4", "NH3", "CO2", "C2H6", "HCN", "CH3OH")
FORMATS = ("xyz", "extxyz", "traj", "db", "json", "cif", "pdb", "sdf", "xyz.gz", "smi", "npz")


QUICK = {"trace": "hutchinson", "importance_samples": 1, "max_stderr": 1e9}  # a score that costs least
DONE, REFUSED = "done", "refused"  # the two ways in which a call may end


class Hang(BaseException):
    """Raised by the alarm; no handler of ordinary errors catches it."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends code that takes more than a given processor time."""

    def ring(*_: object) -> None:
        raise Hang

    # A busy machine takes longer by the clock, and what waits takes no time of the processor.
    kinds = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    before = {number: signal.signal(number, ring) for number in kinds}
    for timer, limit in kinds.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in kinds.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def python(call: Callable[[], object]) -> str:
    """Calls a function and returns how it ended: done, refused in one line, or a description of the fault."""
    try:
        with alarm(SECONDS), contextlib.redirect_stderr(io.StringIO()):
            call()
    except Hang:
        return f"hangs for {SECONDS} s"
    except (ValueError, TypeError, OSError, CalculatorError) as error:
        words = str(error)
        return REFUSED if words and "\n" not in words.strip() else f"{type(error).__name__} of several lines or none"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return DONE


def command(words: list[str]) -> str:
    """Runs a command line and returns how it ended: done, refused in one line, or a description of the fault."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with alarm(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line(words)
    except Hang:
        return f"hangs for {SECONDS} s"
    except SystemExit as end:
        code = end.code
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    said = err.getvalue()
    if code not in (0, 2):
        return f"exit code {code}: {said[-200:]}"
    lines = [line for line in said.splitlines() if line.startswith("ase-enf") and "error" in line]
    if code == 2 and len(lines) != 1:
        return f"{len(lines)} lines of error: {said[-200:]!r}"
    return REFUSED if code else DONE


def structures(rng: np.random.Generator, _: Path) -> tuple[str, list[Callable[[], str]]]:
    """A damaged molecule, scored and evaluated."""
    atoms = molecule(rng.choice(NAMES))
    changes: dict[str, Callable[[], object]] = {
        "nan": lambda: atoms.positions.__setitem__(rng.integers(len(atoms)), np.nan),
        "infinite": lambda: atoms.positions.__setitem__((rng.integers(len(atoms)), rng.integers(3)), np.inf),
        "far": lambda: atoms.positions.__setitem__(rng.integers(len(atoms)), 10.0 ** rng.integers(3, 300)),
        "coincident": lambda: atoms.positions.__setitem__(slice(None), 0.0),
        "element": lambda: atoms.numbers.__setitem__(rng.integers(len(atoms)), rng.integers(-5, 200)),
        "cell": lambda: (atoms.set_cell(np.eye(3) * rng.normal()), atoms.set_pbc(rng.random(3) < 0.5)),
        "charge": lambda: atoms.info.update(charge=rng.choice([1, -1, 0.5, np.nan])),
        "spin": lambda: atoms.set_initial_magnetic_moments(rng.normal(size=len(atoms))),
        "info": lambda: atoms.info.update({"log_likelihood": object(), "ä": {1: 2}}),
        "one atom": lambda: atoms.__delitem__(list(range(1, len(atoms)))),
        "no atom": lambda: atoms.__delitem__(list(range(len(atoms)))),
        "huge": lambda: atoms.extend(Atoms("H" * 40, rng.normal(size=(40, 3)) * 5)),
    }
    names = rng.choice(sorted(changes), size=rng.integers(1, 3), replace=False)
    for name in names:
        with contextlib.suppress(IndexError, ValueError):  # one change may leave nothing for the next
            changes[name]()
    return f"{atoms.numbers.tolist()} with {', '.join(names)}", [
        lambda: python(lambda: metrics.evaluate([atoms])),
        lambda: python(lambda: to_smiles(atoms)),
        lambda: python(lambda: ase_enf.score(small_flow(), [atoms], **QUICK)) if len(atoms) < 30 else DONE,
    ]


def files(rng: np.random.Generator, folder: Path) -> tuple[str, list[Callable[[], str]]]:
    """A damaged file of structures or SMILES."""
    suffix = rng.choice(FORMATS)
    path, report = folder / f"damaged.{suffix}", folder / "r.json"
    path.unlink(missing_ok=True)
    frames = [molecule(name) for name in rng.choice(NAMES, size=3)]
    for frame in frames:
        frame.center(3.0)
        frame.info["energy_of_mine"] = float(rng.normal())
    if suffix == "smi":
        path.write_text("".join(f"{to_smiles(frame)}\n" for frame in frames))
    elif suffix == "npz":
        qm9.save_npz(frames, path)
    elif suffix == "sdf":
        path.write_text("".join(f"{MolToMolBlock(to_mol(frame))}$$$$\n" for frame in frames))
    else:
        write(path, frames[0] if suffix in ("cif", "pdb") else frames)
    how = damage(path, rng)
    source = folder / "whole.xyz"
    write(source, frames)
    words = [str(source), "--reference", str(path)] if suffix == "smi" else [str(path)]
    calls = [lambda: command(["evaluate", *words, "-o", str(report), "--overwrite"])]
    if suffix != "smi":
        scores = str(folder / "scores.csv")
        quick = [word for name, value in QUICK.items() for word in (flag(name), str(value))]
        few = [*quick, "--steps", "4", "-o", scores, "--overwrite"]
        calls += [lambda: python(lambda: qm9.load(path)), lambda: command(["score", MOLECULES, str(path), *few])]
    return f".{suffix}, {how}", calls


def options(rng: np.random.Generator, folder: Path) -> tuple[str, list[Callable[[], str]]]:
    """A command line with values that make no sense."""
    odd = ("-1", "0", "nan", "inf", "1e400", "", "ä", "2.5", "[]", "None", "true", "../..", "/dev/null", "9" * 30, "-")
    names = {
        "generate": ("-n", "--n-atoms", "--formula", "--seed", "--solver", "--steps", "--batch-size", "--churn", "-o",
                     "--start", "--device", "--dtype", "--backend", "--property", "--smiles", "--require",
                     "--trajectory", "--frames", "--gallery"),
        "score": ("--trace", "--probes", "--importance-samples", "--max-stderr", "--seed", "--solver", "--steps",
                  "--batch-size", "--start", "-o", "--device", "--dtype"),
        "evaluate": ("--reference", "-o"),
        "train": ("--data", "--hidden", "--layers", "--steps", "--batch-size", "--learning-rate", "--out", "--valid",
                  "--features", "--network", "--objective", "--ema-decay", "--time-limit", "--resume", "--init-from"),
        "info": (),
        "boltzmann": ("--calculator", "--temperature", "-n", "--draws", "--steps", "--seed", "-o"),
        "convert-en-flows": (),
    }  # fmt: skip
    verb = rng.choice(sorted(names))
    source = folder / "water.xyz"
    write(source, molecule("H2O"))
    fixed = {
        "generate": [rng.choice([MODEL, "", "no-such", str(source), str(folder)])],
        "score": [rng.choice([MODEL, MOLECULES, "no-such"]), rng.choice([str(source), "missing.xyz", str(folder), ""])],
        "evaluate": [rng.choice([str(source), "missing.xyz", ""])],
        "train": ["--data", str(source), "--valid", str(source), "--out", str(folder / f"run{rng.integers(10**9)}")],
        "info": [rng.choice([MODEL, "no-such", str(source), "", str(folder)])],
        "boltzmann": [rng.choice([str(source), "missing.xyz", "", str(folder)])],
        "convert-en-flows": [rng.choice([str(source), "missing.npy", "", str(folder)]), str(folder / "c.safetensors")],
    }[verb]
    words = [str(verb), *map(str, fixed)]
    few = {
        "generate": ["-n", "2", "-o", str(folder / "m.xyz"), "--overwrite"],
        "score": ["--steps", "4", "-o", str(folder / "s.csv"), "--overwrite"],
        "train": ["--steps", "2", "--hidden", "8", "--layers", "1", "--time-limit", "0.0005"],
        "boltzmann": ["-o", str(folder / f"study{rng.integers(10**9)}"), "-n", "8", "--draws", "8", "--steps", "1"],
    }
    words += few.get(verb, [])
    for name in rng.choice(names[verb], size=min(len(names[verb]), rng.integers(0, 3)), replace=False):
        words += [str(name), str(rng.choice(odd))]
    return " ".join(word if word else "''" for word in words), [lambda: command(words)]


def weights(rng: np.random.Generator, folder: Path) -> tuple[str, list[Callable[[], str]]]:
    """A weights file that is damaged or has an absurd header."""
    source = Path(ase_enf.__file__).parent / "pretrained" / f"{MODEL}.safetensors"
    path = folder / "damaged.safetensors"
    content = source.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(content)
        how = damage(path, rng)
    else:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        described = json.loads(header["__metadata__"]["ase_enf"])
        config = described["config"]
        name = str(rng.choice(sorted(config)))
        value = [-1, 0, 10**9, 10**400, "x", None, [], {}, 1e308, True, [1] * 1000, "nan"][rng.integers(12)]
        config[name] = value
        header["__metadata__"]["ase_enf"] = json.dumps(described)
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
        how = f"config[{name!r}] = {str(value)[:30]}"
    return f"weights, {how}", [lambda: python(lambda: ase_enf.load(str(path)))]


def damage(path: Path, rng: np.random.Generator) -> str:
    """Damages a file in a random way, and returns the way."""
    content = bytearray(path.read_bytes())
    way = rng.choice(["cut", "flip", "noise", "repeat", "empty", "text"])
    place = int(rng.integers(len(content)))
    if way == "cut":
        content = content[:place]
    elif way == "flip":
        for k in rng.integers(len(content), size=rng.integers(1, 20)):
            content[k] ^= 1 << int(rng.integers(8))
    elif way == "noise":
        content[place : place + 64] = rng.bytes(64)
    elif way == "repeat":
        content = content[:place] + content[:place]
    elif way == "empty":
        content = bytearray()
    else:
        content[place:place] = b"\n-9999999999999999999999 nan \xff\xfe \x00\n"
    path.write_bytes(content)
    return f"{way} at {place}"


_FLOWS: dict[str, ase_enf.ENF] = {}


def flow(name: str) -> ase_enf.ENF:
    """Returns a shipped flow, which is loaded once."""
    if name not in _FLOWS:
        _FLOWS[name] = ase_enf.load(name)
    return _FLOWS[name]


@functools.cache
def small_flow() -> ase_enf.ENF:
    """Returns an untrained flow for molecules of QM9 that scores quickly."""
    sizes = {n: 1 for n in range(3, 30)}
    config = ase_enf.ENFConfig(
        features="joint", species=("H", "C", "N", "O", "F"), sizes=sizes, hidden=8, layers=1, path="linear"
    )
    return ase_enf.ENF(config).eval()


def states(rng: np.random.Generator, folder: Path) -> tuple[str, list[Callable[[], str]]]:
    """A folder of a training run in which one file is damaged, resumed."""
    whole, damaged = folder / "run", folder / "damaged_run"
    if not whole.exists():
        frames = [molecule(name) for name in ("H2O", "NH3", "CH4")]
        write(folder / "few.xyz", frames)
        small = ["--hidden", "8", "--layers", "1", "--steps", "4", "--batch-size", "3", "--validation-size", "2"]
        data = ["--data", str(folder / "few.xyz"), "--valid", str(folder / "few.xyz")]
        if (ended := command(["train", *data, *small, "--out", str(whole)])) != DONE:
            raise RuntimeError(f"the run that is to be damaged: {ended}")
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    name = str(rng.choice(["state.pt", "state.pt", "config.json", "data.json", "log.csv", "model.safetensors"]))
    how = damage(damaged / name, rng)
    return f"{name}, {how}", [lambda: command(["train", "--resume", str(damaged)])]


def arguments(rng: np.random.Generator, folder: Path) -> tuple[str, list[Callable[[], str]]]:
    """A call of a Python function with values that make no sense."""
    # fmt: off
    odd = (
        -1, 0, 1, 2.5, math.nan, math.inf, -math.inf, 10**400, "", "ä", "nan", None, True, [], [1, "x"], {}, {"a": {}},
        object(), b"x", 1j, np.array(3), np.array([]), np.array([1.5, math.nan]), np.float32(2), np.int64(2), len,
        Atoms(), Atoms("X"), molecule("H2O"), [molecule("H2O"), None], Path(), folder,
    )
    # fmt: on
    calls: dict[str, tuple[Callable[..., object], dict[str, object]]] = {
        "load": (ase_enf.load, {"name_or_path": MODEL}),
        "generate": (ase_enf.generate, {"flow": flow(MODEL), "n": 2}),
        "score": (ase_enf.score, {"flow": flow(MODEL), "atoms": Atoms("X4", rng.normal(size=(4, 3)) * [1, 1, 0])}),
        "evaluate": (metrics.evaluate, {"atoms": [molecule("CH4")]}),
        "to_smiles": (to_smiles, {"atoms": molecule("CH4")}),
        "TrainConfig": (ase_enf.TrainConfig, {}),
        "train": (
            ase_enf.train,
            {
                "train_atoms": [molecule("H2O")],
                "valid_atoms": [molecule("H2O")],
                "config": ase_enf.TrainConfig(steps=1, hidden=8, layers=1, device="cpu"),
            },
        ),
        "ENFCalculator": (ase_enf.ENFCalculator, {"flow": flow(MODEL)}),
        "reweight": (
            ase_enf.reweight,
            {"flow": flow(MODEL), "calculator": EMT(), "n": 2, "temperature": 300.0, "symbols": "Cu4"},
        ),
    }  # fmt: skip
    name = str(rng.choice(sorted(calls)))
    function, given = calls[name]
    if name == "TrainConfig":
        names = [field.name for field in dataclasses.fields(ase_enf.TrainConfig)]
    else:
        names = list(inspect.signature(function).parameters)
    changed = {
        str(key): odd[rng.integers(len(odd))] for key in rng.choice(names, size=rng.integers(1, 3), replace=False)
    }
    shown = ", ".join(f"{key}={' '.join(repr(value).split())[:40]}" for key, value in changed.items())
    return f"{name}({shown})", [lambda: python(lambda: function(**(given | changed)))]


KINDS = {
    "structures": structures,
    "files": files,
    "options": options,
    "weights": weights,
    "states": states,
    "arguments": arguments,
}


class Ended(NamedTuple):
    """How one call of one input ended."""

    kind: str
    seed: int
    tried: str
    how: str


def fuzz(kind: str, count: int, first: int, log: Path | None = None) -> list[Ended]:
    """Tries ``count`` inputs of a kind, with seeds from ``first`` on.

    Args:
        kind: A key of ``KINDS``.
        count: Number of inputs.
        first: Seed of the first.
        log: A CSV file to which every input is added; inputs found in it are not tried again.

    Returns:
        How every call ended.
    """
    seeds = range(first, first + count)
    ended = [end for end in _logged(log) if end.kind == kind and end.seed in seeds]
    done = {end.seed for end in ended}
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            if seed in done:
                continue
            rng = np.random.default_rng([seed, list(KINDS).index(kind)])
            tried, calls = KINDS[kind](rng, Path(name))
            new = [Ended(kind, seed, tried, call()) for call in calls]
            ended += new
            if log:
                with log.open("a", newline="") as file:
                    csv.writer(file).writerows(new)
    return ended


def _logged(log: Path | None) -> list[Ended]:
    if not (log and log.exists()):
        return []
    with log.open(newline="") as file:
        return [Ended(kind, int(seed), tried, how) for kind, seed, tried, how in csv.reader(file)]
