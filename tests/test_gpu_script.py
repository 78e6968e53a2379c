"""The GPU benchmark, rehearsed on a CPU from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import report
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


def test_trainings_are_added_to_the_table_and_replace_those_of_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def add(name, loss):
        result = dict(stage="result", name=name, layers=2, hidden=16, steps=10, batch_size=4, epochs=1.0)
        result |= dict(molecules_per_s=100.0, preparation_s=1.0, best="last", valid_loss={"last": loss})
        lines = [dict(stage="start", device="a card", torch="2.13.0"), result]
        (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
        gpu.write_table(tmp_path / "results.jsonl")
        table = pd.read_csv(tmp_path / "gpu.csv", comment="#")
        return dict(zip(table["run"], table["validation loss"], strict=True))

    assert add("one", 0.5) == {"one": 0.5}
    assert add("other", 0.25) == {"one": 0.5, "other": 0.25}
    assert add("one", 0.125) == {"other": 0.25, "one": 0.125}
