"""ln Z by Bennett's method is correct within its error, and weights in pieces are those of ``reweight``."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch
from ase.units import kB

import ase_enf
from ase_enf.data import mcmc, particles, samples
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from benchmarks.models import particle_models
from benchmarks.models.particle_measures import bennett, divergence, effective, jackknife, reweighted, scored

WIDTH = 1.3
LOG_Z = math.log(WIDTH) + 0.5 * math.log(2 * math.pi)  # of exp(-x² / 2 WIDTH²)


def log_ratio(x: np.ndarray) -> np.ndarray:
    """-U - log q of U = x² / 2 WIDTH² and a standard normal q."""
    return -np.square(x / WIDTH) / 2 + np.square(x) / 2 + 0.5 * math.log(2 * math.pi)


def test_bennett_finds_the_partition_function_of_a_gaussian_with_its_error():
    rng = np.random.default_rng(0)
    found = np.array(
        [bennett(log_ratio(rng.normal(size=400)), log_ratio(WIDTH * rng.normal(size=150))) for _ in range(200)]
    )
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - LOG_Z) < 4 * spread / 200**0.5
    assert found[:, 1].mean() == pytest.approx(spread, rel=0.3)


def test_bennett_shifts_with_the_energy():
    rng = np.random.default_rng(1)
    forward, backward = log_ratio(rng.normal(size=300)), log_ratio(WIDTH * rng.normal(size=300))
    assert bennett(forward + 40.0, backward + 40.0)[0] == pytest.approx(bennett(forward, backward)[0] + 40.0)


def test_the_error_of_the_effective_size_is_that_of_repetitions():
    """The jackknife over ten repetitions agrees with the spread of whole runs."""
    rng = np.random.default_rng(2)
    runs = rng.normal(scale=0.3, size=(300, 1000))
    spread = np.std([effective(run) for run in runs], ddof=1)
    assert np.mean([jackknife(run, 10) for run in runs]) == pytest.approx(spread, rel=0.2)


def test_the_divergence_of_gaussians_follows_from_the_weights_with_its_error():
    rng = np.random.default_rng(3)
    found = np.array([divergence(log_ratio(rng.normal(size=2000)) + 7.0) for _ in range(200)])
    exact = (WIDTH**2 - 1) / 2 - math.log(WIDTH)  # KL of the wider one from the standard normal
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - exact) < 4 * spread / 200**0.5 + exact / 100
    assert found[:, 1].mean() == pytest.approx(spread, rel=0.3)
    assert divergence(np.array([0.0, 0.0, -math.inf]))[0] == pytest.approx(math.log(1.5))


def test_pieces_are_repetitions_and_are_kept(tmp_path):
    flow = ENF(ENFConfig(features="none", species=(), sizes={4: 1}, dimension=2, hidden=8, layers=1)).double()
    options = argparse.Namespace(system="dw4", n=12, piece=4, seed=2, batch=4, intervals=48)
    whole, sizes, devices = reweighted(flow, tmp_path, options)
    direct = [ase_enf.reweight(flow, particles.DW4(), 4, 1 / kB, seed=2000 + k) for k in range(3)]
    assert np.array_equal(whole.log_weights, np.concatenate([part.log_weights for part in direct]))
    assert sizes.tolist() == pytest.approx([part.effective_sample_size / 4 for part in direct])
    assert devices == {"CPU"}
    again, *_ = reweighted(None, tmp_path, options)
    assert np.array_equal(again.log_weights, whole.log_weights)


def test_a_smaller_piece_of_an_earlier_run_is_not_taken_for_a_whole_one(tmp_path):
    flow = ENF(ENFConfig(features="none", dimension=2, sizes={4: 1}, hidden=4, layers=1))
    asked = {"system": "dw4", "piece": 4, "seed": 0, "batch": 4, "intervals": 8}
    for n in (2, 8):
        whole, _, _ = reweighted(flow, tmp_path, argparse.Namespace(**asked, n=n))
        assert len(whole.log_weights) == n


def test_fewer_nodes_give_the_same_scores_to_the_error_of_the_quadrature(tmp_path):
    torch.manual_seed(0)
    flow = ENF(ENFConfig(features="none", species=(), sizes={4: 1}, dimension=2, hidden=8, layers=1)).double()
    test = samples.sample("dw4", 6, ladders=4, burn_in=20)
    options = argparse.Namespace(system="dw4", batch=4, intervals=16, test=5, seed=0)
    found = scored(flow, test, tmp_path, options)
    expected = ase_enf.score(flow, test.to_atoms()[:5], trace="exact", progress=False).log_likelihood
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert np.array_equal(scored(None, test, tmp_path, options), found)
    options.test = 6  # the last batch had one sample only
    assert len(scored(flow, test, tmp_path, options)) == 6


def test_sets_of_a_liquid_are_of_different_chains(monkeypatch):
    monkeypatch.setattr(particle_models, "CHAINS", {"train": 5, "test": 3})
    settings = {"sweeps": 80, "ladders": 8, "burn_in": 100, "thin": 20}
    run = mcmc.run("lj13", 3, **settings)
    sets = particle_models.split_chains("lj13", run, settings)
    assert {name: set(part.ladder.tolist()) for name, part in sets.items()} == {
        "train": {0, 1, 2, 3, 4},
        "test": {5, 6, 7},
    }
    for part in sets.values():
        assert part.energies == pytest.approx(particles.resolve("lj13").evaluate(part.positions).energy)
        for chain in set(part.ladder.tolist()):
            mine = part.positions[part.ladder == chain]
            assert sorted(mine[:, 0, 0]) == sorted(run.positions[:, chain, 0, 0])


def test_chains_that_have_not_mixed_are_refused(monkeypatch):
    run = mcmc.run("lj13", 3, sweeps=80, ladders=8, burn_in=100, thin=20)
    drifting = run._replace(energy=run.energy + np.linspace(0, 100, 80)[:, None])
    with pytest.raises(SystemExit, match="no samples of exp"):
        particle_models.split_chains("lj13", drifting, {})
