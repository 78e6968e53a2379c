"""The covariance computed by the benchmark is that of ASE's Langevin."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin

from benchmarks.models.rotamers import internal, stationary

K = 2.0  # eV/Å²


class Well(Calculator):
    """U = ½ K Σ |x|²."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        x = atoms.positions
        self.results = {"energy": 0.5 * K * float(np.square(x).sum()), "forces": -K * x}


@pytest.mark.parametrize("fixcm", [True, False])
def test_the_lyapunov_equation_has_the_covariance_of_a_run(fixcm):
    atoms, friction, step = Atoms("CHO", np.zeros((3, 3))), 0.2, 1.0
    covariance = stationary(atoms, K * np.eye(9), 300.0, friction, step, fixcm)
    atoms.calc = Well()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        md = Langevin(
            atoms, step * units.fs, temperature_K=300.0, friction=friction / units.fs, fixcm=fixcm,
            rng=np.random.RandomState(0),
        )  # fmt: skip
    seen = []
    for _ in md.irun(12_000):
        seen.append(np.square(atoms.positions).mean(axis=1))
    predicted = np.diag(covariance).reshape(3, 3).mean(axis=1)
    assert np.allclose(np.mean(seen[200:], axis=0), predicted, rtol=0.1)
    # Without fixcm every atom is at the temperature; with it hydrogen is far hotter than carbon and oxygen.
    kelvin = K * predicted / units.kB
    if fixcm:
        assert kelvin[1] > 1.5 * kelvin[0]
    else:
        assert np.allclose(kelvin, 300.0, rtol=0.02)


def test_internal_displacements_neither_move_nor_turn():
    atoms = molecule("CH3OH")
    basis = internal(atoms)
    assert basis.shape == (18, 12)
    moved = basis.T @ np.tile([1.0, 0.0, 0.0], 6)
    turned = basis.T @ np.cross([0.0, 0.0, 1.0], atoms.positions - atoms.positions.mean(axis=0)).ravel()
    assert np.allclose(moved, 0, atol=1e-12) and np.allclose(turned, 0, atol=1e-12)
