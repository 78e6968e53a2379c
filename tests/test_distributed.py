"""Several processes: they share the validation, and what is left of them ends when one is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

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
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(script: Path, world: int) -> list[subprocess.Popen[str]]:
    """Starts the processes of a group, with nobody who watches over them."""
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
    assert "onnection" in out  # what the group said
    assert time.monotonic() - began < 60
