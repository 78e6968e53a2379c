"""The sampler samples exp(−U) from any start; free energies agree with solvable systems."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ase.cluster import Icosahedron

from ase_enf.data import DataError
from ase_enf.data.mcmc import free_energy, run
from ase_enf.data.particles import SYSTEMS, System, lennard_jones, quadrature, resolve

SMALL = [name for name in SYSTEMS if name != "lj55-factor2"]


@pytest.fixture(scope="module")
def short_runs():
    """A short run of each system."""
    ladders = {"dw4": 128, "lj13": 24, "lj13-factor2": 24}
    return {name: run(name, seed=3, sweeps=100, ladders=ladders[name], burn_in=100, thin=20) for name in SMALL}


def spring(reference: float) -> System:
    """Five particles in three dimensions, each pair on a spring: ½ (5 · 0.4) Σ |x − x̄|², 12 Gaussian coordinates."""
    return System("spring", 5, 3, lambda r2: (0.2 * r2, np.full_like(r2, 0.4)), reference=reference, rungs=4)


@pytest.mark.parametrize("name", SMALL)
def test_equipartition(short_runs, name):
    result = short_runs[name].diagnostics()
    expected = resolve(name).degrees_of_freedom
    assert abs(result.equipartition - expected) < 4 * result.equipartition_stderr < 0.5 * expected


@pytest.mark.parametrize("name", SMALL)
def test_the_rungs_overlap_and_ladders_agree(short_runs, name):
    result = short_runs[name].diagnostics()
    assert all(0.6 < rate < 0.97 for rate in result.acceptance)
    assert all(rate > 0.3 for rate in result.exchange)
    assert result.r_hat < 1.2
    assert result.renewals > 1
    assert result.effective_size > 100


@pytest.mark.parametrize("name", SMALL)
def test_configurations_have_no_mean_and_the_energies_of_the_series(short_runs, name):
    result = short_runs[name]
    assert result.positions.shape[:2] == (5, result.energy.shape[1])
    assert np.abs(result.positions.mean(axis=2)).max() < 1e-12
    latest = resolve(name).evaluate(result.positions[-1])
    assert np.allclose(latest.energy, result.energy[-1], rtol=1e-9)
    assert np.allclose(-(latest.forces * result.positions[-1]).sum(axis=(1, 2)), result.virial[-1], rtol=1e-8)


@pytest.mark.slow
def test_lj55_comes_to_equilibrium_from_hot_starts():
    """Independent ladders agree with each other and with equipartition; their rungs overlap."""
    result = run("lj55-factor2", seed=3, sweeps=200, ladders=4, burn_in=400, thin=20).diagnostics()
    assert not result.trouble(162)
    assert abs(result.equipartition - 162) < 4 * result.equipartition_stderr < 0.5 * 162
    assert result.r_hat < 1.2
    assert all(rate > 0.25 for rate in result.exchange)


def test_springs_have_the_distribution_of_springs():
    """U of 12 Gaussian coordinates is a gamma variable of mean 6 and variance 6, each coordinate of variance ½."""
    result = run(spring(1.0), sweeps=400, ladders=32, burn_in=100, thin=4)
    assert result.energy.mean() == pytest.approx(6.0, abs=4 * result.diagnostics().energy_stderr)
    assert result.energy.var() == pytest.approx(6.0, rel=0.1)
    x = result.positions.reshape(-1, 5, 3)
    covariance = np.einsum("sin,sjn->ij", x, x) / (3 * len(x))
    assert np.abs(covariance - 0.5 * (np.eye(5) - 0.2)).max() < 0.03


def test_double_wells_have_the_energy_of_the_quadrature(short_runs):
    result = short_runs["dw4"].diagnostics()
    assert abs(result.energy - quadrature("dw4").energy) < 4 * result.energy_stderr < 0.3


def test_the_start_is_forgotten():
    """A cold cluster and hot independent gases lead to the same mean energy."""
    cold = Icosahedron("Ar", 2, latticeconstant=math.sqrt(2)).positions
    assert resolve("lj13").evaluate(cold[None]).energy < -36
    from_cold, from_hot = (
        run("lj13", seed=i, sweeps=80, ladders=24, burn_in=150, start=start).diagnostics()
        for i, start in enumerate((cold, None))
    )
    tolerance = 4 * math.hypot(from_cold.energy_stderr, from_hot.energy_stderr)
    assert abs(from_cold.energy - from_hot.energy) < tolerance < 6


def test_a_run_is_a_function_of_its_seed():
    settings = {"sweeps": 10, "ladders": 4, "burn_in": 5, "thin": 5}
    first, second, third = (run("dw4", seed, **settings) for seed in (1, 1, 2))
    assert np.array_equal(first.positions, second.positions)
    assert not np.array_equal(first.positions, third.positions)


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()
    run("dw4", sweeps=4, ladders=2, burn_in=2)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("reference", [1.0, 2.0, 5.0])
def test_free_energy_of_springs(reference):
    """ln Z = 6 ln(2π / 2) and S = 6 + ln Z; a reference that is the system itself leaves no error in ln Z."""
    result = free_energy(spring(reference), ladders=32, sweeps=200, burn_in=100)
    expected = 6 * math.log(math.pi)
    bound = 4 * result.log_z_stderr if reference != 2.0 else 1e-8
    assert abs(result.log_z - expected) <= bound < 0.3
    assert abs(result.log_z_ti - expected) <= max(4 * result.log_z_ti_stderr, 1e-4) < 0.3
    assert abs(result.entropy - 6 - expected) < 4 * result.entropy_stderr < 0.5


def test_free_energy_of_double_wells_is_that_of_the_quadrature():
    result, exact = free_energy("dw4", ladders=32, sweeps=300, burn_in=150), quadrature("dw4")
    assert abs(result.log_z - exact.log_z) < 4 * result.log_z_stderr < 0.2
    assert abs(result.log_z_ti - exact.log_z) < 4 * result.log_z_ti_stderr < 0.2
    assert abs(result.entropy - exact.entropy) < 4 * result.entropy_stderr < 0.2


def test_the_errors_are_the_spread_of_repeated_runs():
    exact, runs = quadrature("dw4"), [free_energy("dw4", seed, ladders=16, sweeps=60, burn_in=60) for seed in range(48)]
    for value, stderr, truth in (
        ("log_z", "log_z_stderr", exact.log_z),
        ("log_z_ti", "log_z_ti_stderr", exact.log_z),
        ("entropy", "entropy_stderr", exact.entropy),
    ):
        errors = np.array([getattr(result, value) - truth for result in runs])
        stated = np.array([getattr(result, stderr) for result in runs])
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.sqrt(np.mean(stated**2)), rel=0.3), value
        assert stated.std() < 0.35 * stated.mean(), value  # 15 degrees of freedom: 0.18


def test_free_energy_of_a_lennard_jones_pair_is_a_radial_integral():
    """Z = 2^(−3/2) ∫ 4π d² exp(−v(d) − ¼ d²) dd: a path across the singularity with a known result."""
    pair = lennard_jones(2.0, n_atoms=2)
    d = np.linspace(0.4, 14.0, 50001)
    energy = pair.pair(d * d)[0] + 0.25 * d * d
    weight = 4 * math.pi * d * d * np.exp(-energy) / 2**1.5
    z = np.trapezoid(weight, d)
    result = free_energy(pair, ladders=32, sweeps=300, burn_in=100)
    assert abs(result.log_z - math.log(z)) < 4 * result.log_z_stderr < 0.1
    assert abs(result.log_z_ti - math.log(z)) < 4 * result.log_z_ti_stderr < 0.1
    assert abs(result.entropy - math.log(z) - np.trapezoid(weight * energy, d) / z) < 4 * result.entropy_stderr < 0.2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ladders": 1}, "ladders=1"),
        ({"sweeps": 3}, "sweeps=3"),
        ({"thin": 0}, "thin=0"),
        ({"start": np.zeros((4, 3))}, r"it takes \(B, 4, 2\)"),
        ({"start": np.full((4, 2), np.nan)}, "no finite energy there"),
        ({"burn_in": -1}, "burn_in=-1"),
    ],
)
def test_numbers_that_are_none(settings, words):
    with pytest.raises(DataError, match=words):
        run("dw4", **{"sweeps": 10} | settings)
