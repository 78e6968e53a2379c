"""The GPU benchmark, rehearsed on a CPU from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.speed import gpu

SAMPLE = Path(__file__).parent / "data" / "qm9_sample.npz"


@pytest.mark.slow
def test_every_stage_reports_and_none_fails(tmp_path, monkeypatch):
    stages = ["check", "speed", "recipe", "train", "use", "user"]
    arguments = [
        "--rehearse", "--data", str(SAMPLE), "--out", str(tmp_path), "--stages", *stages, "--models", "qm9-small",
        "--recipes", "rates / 2", "--recipe-seconds", "1", "--seconds", "qm9-small=2", "-n", "2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [line for line in lines if line["stage"] == "failed"]
    assert {*stages} - {"recipe", "train"} <= {line["stage"] for line in lines}
    assert [line["name"] for line in lines if line["stage"] == "result"] == ["rates / 2", "qm9-small"]
    # On the same device, results differ by rounding only.
    assert all(
        line["gradient_error"] < 1e-4 for line in lines if line["stage"] == "check" and line["products"] != "bf16"
    )
    by_call = {line["what"]: line for line in lines if line["stage"] == "user"}
    assert by_call["score"]["score_off_the_cpu_nats"] < 1e-3 and by_call["train"]["train_steps"] > 0
    assert by_call["generate"]["stochastic_molecules_per_s"] > 0
