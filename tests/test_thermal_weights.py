"""What the weights of draws of a thermal flow are worth."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule

import ase_enf
from ase_enf.ensemble.calculators import OUTSIDE
from ase_enf.scoring.reweight import Reweighted, ReweightingError
from benchmarks.common import measured_molecules
from benchmarks.models import thermal_weights


@pytest.fixture
def measured(monkeypatch):
    """Returns what is measured for given log weights and energies."""

    def measure(log_weights: list[float], energies: list[float]) -> dict:
        n = len(energies)
        found = Reweighted([], np.array(log_weights), np.array(energies), np.zeros(n), np.full(n, 0.02), 300.0)
        monkeypatch.setattr(ase_enf, "reweight", lambda *_, **__: found)
        return thermal_weights.weighted(None, molecule("CH3CH2OH"), n, 0)

    monkeypatch.setattr(thermal_weights, "calculator", lambda name, atoms: None)
    return measure


def test_equal_weights_are_worth_all_draws_inside_the_molecule(measured):
    found = measured([3.0] * 8 + [-np.inf, -np.inf], [-1.0] * 8 + [OUTSIDE, np.nan])
    assert found["size"] == pytest.approx(8) and found["outside"] == 2 and found["spread"] == 0.0
    assert thermal_weights.row(found)["effective sample size"] == "8.0 of 10"
    assert found["smiles"] == "CCO" and found["error"] == pytest.approx(0.02)


def test_one_large_weight_is_worth_one_draw(measured):
    assert measured([0.0, 50.0, 0.0], [-1.0] * 3)["size"] == pytest.approx(1.0)


def test_a_molecule_without_weights_is_left_out(measured, monkeypatch):
    assert measured([-np.inf] * 2, [OUTSIDE] * 2) == {}

    def fail(*_, **__):
        raise ReweightingError("the calculator failed on all")

    monkeypatch.setattr(ase_enf, "reweight", fail)
    assert thermal_weights.weighted(None, molecule("CH3CH2OH"), 2, 0) == {}


def test_molecules_are_measured_once_until_enough_could_be(tmp_path):
    molecules, asked = [molecule(name) for name in ("H2O", "CH4", "NH3", "HCN", "CH3OH")], []

    def measure(atoms, k):
        asked.append(k)
        return {"atoms": len(atoms)} if len(atoms) > 3 else {}

    first, tried = measured_molecules(tmp_path, molecules, 2, 0, measure)
    order = np.random.default_rng(0).permutation(5).tolist()
    assert asked == order[:tried] and first == [{"atoms": len(molecules[k])} for k in asked if len(molecules[k]) > 3]
    again = measured_molecules(tmp_path, molecules, 4, 0, measure)
    assert again[1] == 5 and again[0][:2] == first and asked == order  # all were tried, each once


def test_a_flow_without_graphs_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["thermal_weights", "qm9-small", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no flow of molecular graphs"):
        thermal_weights.main()
