"""Helpers of the benchmarks: pieces are saved and never mixed up, and percentages have errors."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import molecule

import ase_enf
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from benchmarks import common
from benchmarks.accuracy import calculator
from benchmarks.tables import qm9


@pytest.fixture
def flow(monkeypatch) -> ENF:
    monkeypatch.setattr(common, "PIECE", 2)
    torch.manual_seed(0)
    return ENF(ENFConfig(features="given", sizes={3: 1}, compositions={"H2O": 1}, hidden=8, layers=1)).eval()


def test_pieces_are_drawn_once_and_are_those_of_generate(flow, tmp_path, monkeypatch):
    expected = ase_enf.generate(flow, 3, seed=5)
    first = common.draw_in_pieces(flow, 3, 5, tmp_path)
    assert len(list(tmp_path.glob("samples_*.extxyz"))) == 2
    monkeypatch.setattr(ase_enf, "igenerate", None)  # existing pieces are not drawn again
    again = common.draw_in_pieces(flow, 3, 5, tmp_path)
    for a, b, c in zip(expected, first, again, strict=True):
        assert str(a.symbols) == str(b.symbols) and np.allclose(a.positions, b.positions, atol=1e-5)
        assert (b.positions == c.positions).all()


def test_scored_pieces_have_noise_of_their_own_and_name_their_rows(flow, tmp_path, monkeypatch):
    atoms = [molecule("H2O") for _ in range(5)]
    how = {"trace": "hutchinson", "probes": 1, "importance_samples": 1, "steps": 4}
    table = common.score_in_pieces(flow, atoms, [4, 0, 2], 0, tmp_path, how)
    assert table.molecule.tolist() == [4, 0, 2] and table.log_likelihood.nunique() == 3
    monkeypatch.setattr(ase_enf, "score", None)
    assert common.score_in_pieces(flow, atoms, [4, 0, 2], 0, tmp_path, how).equals(table)
    for piece in tmp_path.glob("scores_*.csv"):
        piece.write_text(piece.read_text().replace("importance_samples", "draws"))  # as written by an earlier version
    assert common.score_in_pieces(flow, atoms, [4, 0, 2], 0, tmp_path, how).equals(table)


def test_no_rows_end_in_one_line(flow, tmp_path):
    with pytest.raises(SystemExit, match="at least one"):
        common.score_in_pieces(flow, [], [], 0, tmp_path, {"trace": "exact"})


def test_a_folder_of_other_weights_is_refused(flow, tmp_path):
    common.open_work(tmp_path, flow, seed=0)
    with pytest.raises(SystemExit, match="other work"):
        common.open_work(tmp_path, flow, seed=1)
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    with pytest.raises(SystemExit, match="other work"):
        common.open_work(tmp_path, flow, seed=0)


def test_percentages_carry_their_errors():
    report = pd.DataFrame({"metric": ["a", "b"], "value": [0.5, 0.8499], "stderr": [0.1, 0.0031]})
    assert common.percent(report, "b", 1) == "85.0 ± 0.3"


def test_another_budget_is_another_folder(tmp_path):
    budgets = [argparse.Namespace(work=tmp_path, steps=steps, seed=seed) for steps, seed in ((10, 0), (20, 0), (10, 1))]
    assert len({qm9.budget_folder("E-NF", options) for options in budgets}) == 3


def test_the_calculator_benchmark_runs(tmp_path, monkeypatch):
    """One small molecule, few steps: both tables are written, and a short NVE run conserves the energy."""
    monkeypatch.setattr(calculator, "SOLVER_STEPS", (16, 32))
    monkeypatch.setattr(sys, "argv", ["calculator", "--steps",
            "16",
            "--molecules", "1", "--converged", "1", "--smears", "0.05",
                                      "--md-steps", "2", "--bfgs-steps", "1", "--out", str(tmp_path)])  # fmt: skip
    calculator.main()
    assert len(list(tmp_path.glob("calculator_*_qm9-conditional.md"))) == 2
    found = pd.read_csv(tmp_path / "calculator_dynamics_qm9-conditional.csv", comment="#").set_index("what")["value"]
    assert found["failed"] == "0" and found["BFGS converged"].endswith("of 1")
    assert float(found["NVE: range of the total energy an atom, meV"]) < 20
    error = pd.read_csv(tmp_path / "calculator_convergence_qm9-conditional.csv", comment="#")["energy, eV"]
    assert error[1] < error[0]  # more steps, a smaller error
