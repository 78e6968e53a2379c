"""Training under faults: other settings of torch, two runs in one folder, damaged states, kills, Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TRAIN, VALID, assert_same_run, equal, log_of, state_of, stop_at, tiny

from ase_enf import cli
from ase_enf.atoms import files
from ase_enf.training import loop
from ase_enf.training.folder import LOCK_FILE, FolderLock, check_new_run
from ase_enf.training.loop import train
from ase_enf.training.optimizers import schedule

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of eight steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(out=folder), TRAIN, VALID)
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_the_log_has_the_learning_rate_of_its_step(whole):
    logged = [float(row["lr"]) for row in log_of(whole)]
    assert logged == pytest.approx([1e-3 * schedule(step, 8, 2) for step in range(8)], rel=1e-6)
    assert (
        logged[0] == pytest.approx(0.5e-3) and logged[-1] > 0
    )  # the first step of the warm-up, and no step of rate zero


# Settings of the process


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"objective": "nll", "steps": 2},
        {"network": "gnn", "augment": True},
        {"features": "none", "network": "kernel"},
    ],
)
def test_a_default_of_float64_changes_nothing(fields):
    fields = {"steps": 3, **fields}
    single = train(tiny(**fields), TRAIN, VALID)
    torch.set_default_dtype(torch.float64)
    try:
        double = train(tiny(**fields), TRAIN, VALID)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.dtype == torch.float32 and equal(single.state_dict(), double.state_dict())


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_one_line(without, tmp_path):
    with without(), pytest.raises(RuntimeError, match="training needs gradients.*call it outside") as caught:
        train(tiny(out=tmp_path / "run"), TRAIN, VALID)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [None, "quick", {"steps": 3}])
def test_settings_that_are_none_are_named(config):
    with pytest.raises(TypeError, match="expected a TrainConfig, got "):
        train(config, TRAIN, VALID)


def test_global_random_numbers_stay_those_of_the_caller(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    train(tiny(out=tmp_path / "joint", time_limit=1e-9), TRAIN, VALID)
    train(tiny(out=tmp_path / "joint"), TRAIN, VALID, resume=True)
    train(tiny(objective="nll", features="joint", dequantizer="learned", steps=2), TRAIN, VALID)
    train(tiny(network="gnn", augment=True, steps=2), TRAIN, VALID)
    assert states() == before


# One run at a time


def test_a_second_run_in_a_folder_is_refused_and_disturbs_nothing(whole, tmp_path, monkeypatch):
    out, seen = tmp_path / "run", []

    def second(resume: bool) -> None:
        with pytest.raises(
            ValueError, match=rf"a run is in progress there \(process {os.getpid()} on .*\); wait"
        ) as caught:
            train(tiny(out=out), TRAIN, VALID, resume=resume)
        seen.append(str(caught.value))

    with monkeypatch.context() as patch:
        from ase_enf.training import loop

        plain = loop.train_step

        def watched(run, index):
            if run.step in (1, 5) and len(seen) < 4:
                second(False), second(True)
            plain(run, index)

        patch.setattr(loop, "train_step", watched)
        train(tiny(out=out), TRAIN, VALID)
    assert len(seen) == 4 and not any("\n" in line for line in seen)
    assert log_of(out) == log_of(whole) and equal(state_of(out)["model"], state_of(whole)["model"])
    assert not (out / LOCK_FILE).exists()


def test_a_lock_that_a_dead_process_left_stops_nobody(tmp_path):
    code = f"""
        import os, pathlib
        from ase_enf.training.folder import FolderLock
        FolderLock().take(pathlib.Path({str(tmp_path / "run")!r}))
        os._exit(9)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=False)
    assert "process" in (tmp_path / "run" / LOCK_FILE).read_text()
    check_new_run(tmp_path / "run")
    train(tiny(out=tmp_path / "run", steps=1), TRAIN, VALID)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_lock_ends_with_its_block_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock() as lock:
        lock.take(tmp_path)
        with pytest.raises(ValueError, match="a run is in progress there"):
            check_new_run(tmp_path)
        _ = 1 / 0
    check_new_run(tmp_path)


# Damage


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def _with(**fields):
    return lambda path: torch.save(torch.load(path, weights_only=True) | fields, path)


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _with(step="abc"),
        _with(step=-1),
        _with(step=True),
        _with(norms=None),
        _with(norms=["a"]),
        _with(window=[[1.0]]),
        _with(validated=[1]),
        _with(elapsed="long"),
        _with(config="{"),
        _with(config='"text"'),
        _with(model={}),
        _with(ema={"module.x": torch.zeros(1)}),
        _with(optimizer=[]),
        _with(optimizer=[{"state": 3}]),
        _with(best_weights={"x": torch.zeros(1)}),
    ],
)
def test_a_damaged_state_is_one_line(copied, damage):
    damage(copied / "state.pt")
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(ValueError, match=r"state\.pt: is damaged or no training state; start a new run") as caught:
        train(tiny(out=copied), TRAIN, VALID, resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


# Kills


def test_what_a_kill_left_half_written_goes_at_the_next_start(copied):
    ours = [f".{name}.{'0f' * 16}.part" for name in ("state.pt", "model.safetensors", "log.csv")]
    for name in (*ours, ".mine.part", "notes.part"):
        (copied / name).write_text("half")
    train(tiny(out=copied), TRAIN, VALID, resume=True)
    left = {path.name for path in copied.iterdir() if path.name.endswith(".part")}
    assert left == {".mine.part", "notes.part"}


class Cut(io.BytesIO):
    """A file whose second part cannot be written, for a reason of its own."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__()
        self.reason, self.parts = reason, 0

    def write(self, content) -> int:
        self.parts += 1
        if self.parts == 2:
            raise self.reason
        return super().write(content)


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_cuts_the_writing_of_a_state_short_is_said_and_not_torchs_error(copied, monkeypatch, reason):
    before = (copied / "state.pt").read_bytes()
    written = files.atomic_write

    @contextlib.contextmanager
    def cut(path):
        with written(path):
            yield Cut(reason)

    with monkeypatch.context() as patch, pytest.raises(type(reason)) as caught:
        patch.setattr("ase_enf.training.state.atomic_write", cut)
        train(tiny(out=copied, steps=9), TRAIN, VALID, resume=True)
    if isinstance(reason, OSError):
        assert f"{copied / 'state.pt'}: cannot be written (OSError: No space left on device)" in str(caught.value)
    assert (copied / "state.pt").read_bytes() == before


@pytest.mark.parametrize(("where", "saved"), [("before", 5), ("inside", None), ("validating", 6)])
def test_control_c_says_how_to_resume(whole, tmp_path, monkeypatch, where, saved):
    """An interrupted validation is repeated, so that the run is the same as without interruption."""
    out, step = tmp_path / "run", saved or 5
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        stop_at(patch, step, KeyboardInterrupt(), where)
        train(tiny(out=out), TRAIN, VALID)
    (note,) = caught.value.__notes__
    assert f"ase-enf train --resume {out}" in note and (f"saved at step {saved};" if saved else "its last save") in note
    train(tiny(out=out), TRAIN, VALID, resume=True)
    assert log_of(out) == log_of(whole) and equal(state_of(out)["best_weights"], state_of(whole)["best_weights"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        stop_at(patch, 5, KeyboardInterrupt())
        train(tiny(), TRAIN, VALID)
    assert "5 steps are lost" in caught.value.__notes__[0]


def test_control_c_after_the_last_step_finds_everything_saved(whole, tmp_path, monkeypatch):
    plain, out = loop.finish, tmp_path / "run"

    def interrupted(run):
        plain(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(out=out), TRAIN, VALID)
    (note,) = caught.value.__notes__
    state = state_of(out)
    assert f"saved at step {state['step']}; continue with ase-enf train --resume {out}" in note
    assert log_of(out) == log_of(whole) and equal(state["ema"], state_of(whole)["ema"])


def test_a_signal_that_comes_with_the_loss_of_a_process_says_how_to_resume(tmp_path, monkeypatch):
    """If a step waited for a lost process, the signal handler runs only later, while the log is closed."""
    plain = loop.Log.close

    def interrupted(log):
        plain(log)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Log, "close", interrupted)
    stop_at(monkeypatch, 5, RuntimeError("Connection closed by peer"), "inside")
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(out=tmp_path / "run"), TRAIN, VALID)
    (note,) = caught.value.__notes__
    assert "its last save" in note and f"ase-enf train --resume {tmp_path / 'run'}" in note


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    from ase.io import write

    monkeypatch.chdir(tmp_path)
    write("data.extxyz", TRAIN)
    write("valid.extxyz", VALID)
    small = "--hidden 8 --layers 1 --batch-size 4 --validation-size 2 --warmup 2 --steps 8 --device cpu".split()
    return ["train", "--data", "data.extxyz", "--valid", "valid.extxyz", "--out", "run", *small]


def test_a_time_limit_outlives_a_control_c_and_ends_when_it_is_used_up(words, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        assert cli.main([*words, "--time-limit", "5"]) == 130
    said = capsys.readouterr().err
    assert said == (
        "ase-enf: interrupted; the run is saved at step 3; continue with ase-enf train --resume run, or in Python with "
        "resume=True\n"
    )
    assert json.loads(Path("run/config.json").read_text())["time_limit"] == 5.0
    with monkeypatch.context() as patch:
        seconds = iter([0.0, *[1.0] * 4])
        patch.setattr("ase_enf.training.loop.time.monotonic", lambda: next(seconds, 5 * 3600 + 1.0))
        assert cli.main(["train", "--resume", "run"]) == 0
    assert "stopped by the time limit" in capsys.readouterr().err and 3 < state_of("run")["step"] < 8
    assert cli.main(["train", "--resume", "run"]) == 0 and state_of("run")["step"] == 8


def test_a_process_killed_at_work_goes_on_to_the_same_numbers(words):
    words = [*words, "--checkpoint-every", "1", "--log-every", "1", "--validate-every", "3", "--schedule", "constant"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ase_enf.cli", *words, "--steps", "100000"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while not Path("run/state.pt").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert cli.main(words) == 2  # the folder is in use
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = state_of("run")["step"] + 3
    assert cli.main(["train", "--resume", "run", "--steps", str(end)]) == 0
    assert cli.main([*words, "--steps", str(end), "--out", "whole"]) == 0
    assert [int(row["step"]) for row in log_of("run")] == list(range(1, end + 1))
    assert_same_run("run", "whole")
    assert not [name for name in os.listdir("run") if name.endswith(".part") or name == LOCK_FILE]
