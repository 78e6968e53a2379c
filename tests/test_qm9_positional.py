"""QM9 Positional: rows are trained in stages and resumed, and the table states their budgets."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ase_enf
from ase_enf.data import qm9
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from ase_enf.metrics import distance_js
from benchmarks import report
from benchmarks.tables import qm9_positional as table
from benchmarks.tables.qm9_positional import DENOISING, LIKELIHOOD, METHODS, PAPER

SAMPLE = Path(__file__).parent / "data" / "qm9_sample.npz"
SIZE = 12  # of the molecules of the sample here


@pytest.fixture
def options(tmp_path, monkeypatch) -> argparse.Namespace:
    small = {"hidden": 4, "layers": 1, "batch_size": 2}
    monkeypatch.setattr(table, "METHODS", {name: fields | small for name, fields in METHODS.items()})
    monkeypatch.setattr(table, "EPOCHS", dict.fromkeys(METHODS, 3.0))
    monkeypatch.setattr(table, "N_ATOMS", SIZE)
    monkeypatch.setattr(table, "POINT", 2)
    monkeypatch.setattr(table, "SCORED", 1)
    monkeypatch.setattr(table, "SOLVER", table.Solver("midpoint", steps=2))
    monkeypatch.setattr(table.ENF, "use_backend", lambda self, backend: "torch")  # compiling takes longer than all else
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    return argparse.Namespace(work=tmp_path, scale=1.0, test=2, n=3, seed=0, only=None, likelihood=False)


@pytest.fixture(scope="module")
def data() -> table.Split:
    return table.Split(*[qm9.load(SAMPLE, split="train", n_atoms=SIZE)[:8]] * 3)


def test_a_row_goes_on_where_it_stopped_to_the_same_numbers(options, data, monkeypatch, tmp_path):
    whole, curve = table.trained(DENOISING, data, tmp_path / "whole", options)
    train, calls = table.train, []

    def stopped(config, *arguments, **settings):
        calls.append((config.steps, settings["resume"]))
        flow = train(config, *arguments, **settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return flow

    monkeypatch.setattr(table, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        table.trained(DENOISING, data, tmp_path / "parts", options)
    flow, again = table.trained(DENOISING, data, tmp_path / "parts", options)
    ends = curve.step.tolist()
    assert calls == [(ends[0], False), (ends[1], True), (ends[1], True), *((step, True) for step in ends[2:])]
    assert again.drop(columns="hours").equals(curve.drop(columns="hours"))
    for one, other in zip(whole.state_dict().values(), flow.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(table, "train", None)  # what is finished is not trained again
    assert table.trained(DENOISING, data, tmp_path / "parts", options)[1].equals(again)


def test_the_rate_falls_in_the_last_stage_alone(options, data, tmp_path):
    table.trained("GNF", data, tmp_path / "row", options)
    log = pd.read_csv(tmp_path / "row" / "run" / "log.csv")
    assert log.lr.iloc[:-1].tolist() == pytest.approx([1e-3] * (len(log) - 1))
    assert 0 < log.lr.iloc[-1] < 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_a_flow_of_positions_for_so_many_epochs(name, tmp_path):
    config = table.settings(name, 13_832, argparse.Namespace(scale=2.0, seed=0), tmp_path)
    assert config.features == "none"
    assert config.steps * config.batch_size == pytest.approx(2 * table.EPOCHS[name] * 13_832, rel=0.02)
    assert (config.objective == "nll") == name.endswith(LIKELIHOOD)


def test_stages_end_with_the_falling_rate():
    config = table.settings(DENOISING, 13_832, argparse.Namespace(scale=1.0, seed=0), Path("run"))
    ends = table.stage_steps(config, 13_832)
    assert ends == sorted(set(ends)) and ends[-1] == config.steps
    assert ends[-2] == round((1 - table.COOL_DOWN) * config.steps)
    assert ends[0] * config.batch_size == pytest.approx(13_832, rel=0.01)


def test_a_flow_without_types_is_the_one_with_types_at_their_mean():
    """At h = 0, the mean of the standardised types, both move the positions alike, in every parameterisation."""
    torch.manual_seed(0)
    sizes = {"hidden": 8, "layers": 2, "parameterisation": "denoising", "path": "linear", "sizes": {5: 1}}
    both = ENF(ENFConfig(species=("H", "C"), feature_shift=(0.3,) * 3, feature_scale=(0.5,) * 3, **sizes)).eval()
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.normal_(std=0.3)
        x, mask, t = torch.randn(4, 5, 3), torch.ones(4, 5, dtype=torch.bool), torch.tensor(0.4)
        x = x - x.mean(1, keepdim=True)
        expected = both.dynamics(t, x, torch.zeros(4, 5, 3), mask)[0]
        found = table.positional(both).dynamics(t, x, torch.zeros(4, 5, 0), mask)[0]
    assert torch.allclose(found, expected, atol=1e-6) and expected.abs().max() > 0.1


def test_the_divergence_is_that_of_the_metrics(data):
    assert table.divergence(data.train[:4], data.train[4:]) == pytest.approx(
        distance_js(data.train[:4], data.train[4:]).value, abs=1e-12
    )


def test_rows_of_the_paper_are_all_there():
    assert set(PAPER) <= set(METHODS)
    assert [name for name in METHODS if name.endswith(LIKELIHOOD)]
    chosen = table.wanted(argparse.Namespace(only=None, likelihood=False))
    assert set(PAPER) <= set(chosen) and not any(name.endswith(LIKELIHOOD) for name in chosen)
    assert table.wanted(argparse.Namespace(only=["E-NF", "GNF"], likelihood=False)) == ["GNF", "E-NF"]


def test_table_and_pictures(options, data):
    names = [DENOISING, "Kernel dynamics"]
    rows = [table.measured(name, data, options) for name in names]
    rows[0].flow.save(options.work / "copy.safetensors")
    rows.append(table.measured_weights(str(options.work / "copy.safetensors"), data, options))
    table.write_tables(rows, data, options)
    results = options.work / "results"
    frame = pd.read_csv(results / "qm9_positional.csv", comment="#", dtype=str).set_index("method")
    scores = ase_enf.score(rows[1].flow, data.test, trace="exact", progress=False).log_likelihood
    nll = float(frame.loc["Kernel dynamics", "NLL, nats"].split(" ±")[0])
    order = np.random.default_rng(0).permutation(len(data.test))[:2]
    assert nll == pytest.approx(-scores[order].mean(), abs=0.06)
    assert frame.loc["Kernel dynamics", ["NLL, paper", "JS, paper"]].tolist() == ["38.6", "0.029"]
    assert float(frame.loc["test molecules themselves", "JS"]) == 0  # they are the training molecules here
    assert frame.loc["E-NF", ["NLL, nats", "NLL, paper"]].tolist() == ["–", "-70.2"]  # not run yet
    figures = ["NLL, nats", "JS", "weights"]  # of the same weights
    assert frame.loc[table.ELSEWHERE, figures].equals(frame.loc[DENOISING, figures].rename(table.ELSEWHERE))
    curves = pd.read_csv(results / "qm9_positional_curves.csv", comment="#")
    assert set(curves.method) == {*names, table.ELSEWHERE} and np.isfinite(curves[["valid_nll", "js"]]).all(axis=None)
    assert all((results / f"qm9_positional_{part}.png").stat().st_size > 5000 for part in ("curves", "distances"))
    assert "8 / 8 / 8" in (results / "qm9_positional.md").read_text()


def test_a_row_that_is_not_finished_says_how_far_it_is(data, tmp_path):
    options = argparse.Namespace(work=tmp_path, scale=1.0, seed=0)
    assert table.so_far("GNF", data, options) == ""
    log = table.place("GNF", options) / "run" / "log.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,value\n")
    assert table.so_far("GNF", data, options) == ""
    log.write_text("step,value\n1,3.5\n2,1.25\n")
    steps = table.settings("GNF", len(data.train), options, tmp_path).steps
    assert table.so_far("GNF", data, options) == f"GNF: not finished, 2 of {steps} steps, loss 1.250"
