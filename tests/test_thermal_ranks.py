"""The table of rank correlations among structures of a molecule."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.units import kB

from benchmarks.models import thermal_ranks
from benchmarks.models.thermal_ranks import MINIMA, TEMPERATURE, THERMAL
from benchmarks.thermal_wells import Well

ENERGIES = [0.0, 0.05, 0.02, 0.3]


def entry(log_likelihood: list[float]) -> dict:
    asked = {"energy": ENERGIES, "log_likelihood": log_likelihood, "stderr": [0.1] * 4}
    return {MINIMA: asked | {"free_energy": [0.0, 0.02, 0.05, 0.3]}, THERMAL: asked}


def test_a_boltzmann_density_ranks_by_energy_with_slope_one():
    boltzmann = [7.0 - energy / (kB * TEMPERATURE) for energy in ENERGIES]
    row = thermal_ranks.row([entry(boltzmann), entry(boltzmann)], MINIMA)
    assert (row["Spearman"], row["median"], row["0.8 or more"], row["slope"]) == (
        "1.00 ± 0.00",
        "1.00",
        "2 of 2",
        "1.00",
    )
    assert row["Spearman of F"] == "0.80 ± 0.00"  # two of four minima change places
    assert row["picked, eV"] == "0.000 ± 0.000" and row["at random, eV"] == f"{np.mean(ENERGIES):.3f} ± 0.000"


def test_a_density_that_prefers_high_energies_ranks_them_the_other_way():
    reverse = [energy / (kB * TEMPERATURE) for energy in ENERGIES]
    row = thermal_ranks.row([entry(reverse), entry([-value for value in reverse])], THERMAL)
    assert (row["Spearman"], row["0.8 or more"], row["Spearman of F"]) == ("0.00 ± 1.00", "1 of 2", "")
    assert row["picked, eV"] == "0.150 ± 0.150"


def test_minima_of_one_energy_are_one(monkeypatch):
    energies = {0: 0.3, 1: 0.1, 2: 0.1005, 3: 0.2}
    monkeypatch.setattr(thermal_ranks, "energy", lambda atoms: energies[atoms.info["k"]])
    found = [Well(Atoms("H", info={"k": k}), np.zeros((1, 3)), 0.0, 1) for k in energies]
    kept = [well.atoms.info["k"] for well in thermal_ranks.lowest(found, 2)]
    assert kept == [1, 3]


def test_a_flow_that_draws_elements_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["thermal_ranks", "qm9-small", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="features='joint'; conformers are scored by a 'given' model"):
        thermal_ranks.main()
