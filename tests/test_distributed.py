"""Several processes: they share the validation, and the others end when one is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ase_enf.training.distributed import process_group
from benchmarks.reliability.torchrun import ranks_of

ROOT = Path(__file__).parents[1]
HEADER = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
from ase_enf.training import loop, validation
from test_train import TRAIN, VALID, rattled, tiny
"""

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def free_port() -> int:
    """Returns a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script: Path, world: int) -> list[subprocess.Popen[str]]:
    """Starts the processes of a group without a supervisor."""
    port = free_port() if world > 1 else 0
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def write(path: Path, body: str) -> Path:
    path.write_text(HEADER + textwrap.dedent(body))
    return path


def test_validation_is_shared_and_finds_what_one_process_finds(tmp_path):
    body = """
        valid = rattled("H2O CO2 NH3 CH4", 3, seed=2)
        scored, plain = [], validation.validation_nll
        def counted(model, batch, generator):
            scored.append(len(batch.mask))
            return plain(model, batch, generator)
        validation.validation_nll = counted
        found = []
        plain_validate = loop.validate
        def kept(run):
            # Weights that differ between one process and two would hide what is compared here.
            for average in run.averages:
                generator = torch.Generator().manual_seed(0)
                for p in average.module.parameters():
                    p.data = 0.1 * torch.randn(p.shape, generator=generator)
            found.append(plain_validate(run))
            return found[-1]
        loop.validate = kept
        loop.train(tiny(steps=1, validation_size=11, validate_every=1), TRAIN, valid)
        print(*map(repr, found[0]), sum(scored))
    """
    script = write(tmp_path / "script.py", body)
    (alone,), shared = ([p.communicate(timeout=120) for p in start(script, world)] for world in (1, 2))
    rows = [out.split() for out, _ in (alone, *shared)]
    assert all(len(row) == 3 for row in rows), (alone, shared)
    assert rows[0][:2] == rows[1][:2] == rows[2][:2]
    assert int(rows[0][2]) == 11 == int(rows[1][2]) + int(rows[2][2]) and min(int(row[2]) for row in rows[1:]) > 0


def test_what_is_left_of_a_group_ends_with_one_line(tmp_path):
    body = """
        plain = loop.train_step
        def dying(run, index):
            if run.ranks.rank == 1 and run.step == 3:
                os._exit(9)
            plain(run, index)
        loop.train_step = dying
        try:
            loop.train(tiny(steps=100_000, validate_every=100_000), TRAIN * 2, VALID)
        except ConnectionError as error:
            print(error)
    """
    left, lost = start(write(tmp_path / "script.py", body), 2)
    assert lost.wait(timeout=120) == 9
    began = time.monotonic()
    out, err = left.communicate(timeout=60)
    assert left.returncode == 0, err[-2000:]
    assert out.startswith("process 0 of 2 lost another one") and out.count("\n") == 1 and "--resume" in out
    assert "onnection" in out  # messages of the group
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("said", [None, "go on so"])
def test_a_signal_while_a_loss_is_cleaned_up_says_both(monkeypatch, said):
    """The signal comes from torchrun; a note on how to continue, if there is one, is not repeated."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    interrupt = KeyboardInterrupt()
    if said:
        interrupt.add_note(said)
    with pytest.raises(KeyboardInterrupt) as caught, process_group("cpu"):
        try:
            raise RuntimeError("[/src/gloo/pair.cc:553] Connection closed by peer [::1]:7. This is typically a bug.")
        finally:
            raise interrupt
    (note,) = caught.value.__notes__
    lost = "process 0 of 2 lost another one, which has ended or hangs (Connection closed by peer [::1]:7); see the"
    assert note == said if said else note.startswith(lost) and "--resume" in note
    with pytest.raises(RuntimeError, match="another fault"), process_group("cpu"):
        raise RuntimeError("another fault")


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [False, True])
def test_runs_of_torchrun_one_at_a_time_and_again_after_a_kill(tmp_path, waiting):
    """A second run in the folder is refused; a killed process ends the run, which can then be resumed.

    This also holds if the signal of torchrun reaches a process that waits for the killed one.
    """
    data = ROOT / "tests" / "data" / "qm9_sample.npz"
    words = f"train --data {data} --qm9-split --n-atoms 15 --hidden 8 --layers 1 --batch-size 4 --validation-size 2"
    words += " --checkpoint-every 5 --log-every 5 --validate-every 100000 --device cpu --out run --steps"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ase_enf"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "text": True}
    command = [*torchrun, *words.split(), "100000"]
    first = subprocess.Popen(command, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    give_up = time.monotonic() + 120
    while not (tmp_path / "run" / "state.pt").exists():
        assert time.monotonic() < give_up and first.poll() is None
        time.sleep(0.1)
    second = subprocess.run(command, **options, capture_output=True, timeout=120, check=False)
    assert second.returncode and "error: run: a run is in progress there (process " in second.stderr
    ranks = ranks_of(first.pid)
    if waiting:
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(1)
        os.kill(ranks[0], signal.SIGTERM)
        time.sleep(0.2)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    said, _ = first.communicate(timeout=60)
    assert first.returncode and time.monotonic() - began < 60
    ours = [line for line in said.splitlines() if line.startswith("ase-enf: ")]
    assert len(ours) == 1 and "--resume" in ours[0], said[-3000:]
    assert not (tmp_path / "run" / "run.lock").exists()
    end = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] + 2
    resumed = [*torchrun, "train", "--resume", "run", "--steps", str(end)]
    done = subprocess.run(resumed, **options, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == end
