"""Benchmarks of free energies and of out-of-distribution frames: results in cases where the answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms

from benchmarks.models.free_energies import MOLECULES, Reference, built, per_visit, reference
from benchmarks.models.out_of_distribution import apparent, auc


@pytest.mark.parametrize("name", MOLECULES)
def test_torsions_turn_about_bonds_of_heavy_atoms(name):
    atoms, torsions = built(MOLECULES[name])
    for four in torsions:
        assert len(set(four)) == 4
        chain = [atoms.get_distance(a, b) for a, b in zip(four, four[1:], strict=False)]
        assert max(chain) < 1.6 and min(atoms.numbers[list(four[1:3])]) > 1


def test_frames_of_a_harmonic_well_have_its_temperature():
    rng, dimension, frames = np.random.default_rng(0), 21, 4000
    hot = {kelvin: -0.5 * kelvin / 300.0 * rng.chisquare(dimension, frames) for kelvin in (300.0, 600.0, 1000.0)}
    for kelvin, seen in apparent(hot, dimension).items():
        error = kelvin * np.sqrt(2.0 / dimension / frames)
        assert seen.mean() == pytest.approx(kelvin, abs=5 * np.hypot(error, 300.0 * np.sqrt(2.0 / dimension / frames)))
        assert seen.std() == pytest.approx(kelvin * np.sqrt(2.0 / dimension), rel=0.1)


def test_the_area_is_a_probability():
    seen = {300.0: np.array([1.0, 2.0]), 600.0: np.array([3.0, 4.0]), 1000.0: np.array([1.0, 2.0])}
    assert auc(seen, 600.0) == "1.0000" and auc(seen, 1000.0) == "0.5000"


def test_independent_frames_are_visits_of_their_own():
    inside = np.random.default_rng(0).random(4000) < 0.5
    frames = [Atoms("H", [[float(there), 0, 0]]) for there in inside]
    walk = SimpleNamespace(frames=frames, walkers=4, diagnostics=SimpleNamespace(calls=16 * len(frames)))
    found = reference(walk, lambda atoms: "trans" if atoms.positions[0, 0] else "gauche", "trans")
    assert found.tau == pytest.approx(1.0, abs=0.2) and found.visits == pytest.approx(inside.sum(), rel=0.2)


def test_few_visits_are_said():
    assert per_visit(Reference(np.inf, 0.0, 1000)) == "more than 1000"
    assert per_visit(Reference(10.0, 2.0, 1000)) == "500 (of 2.0 visits)"
    assert per_visit(Reference(1.0, 100.0, 1000)) == "10"
