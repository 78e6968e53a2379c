"""The benchmark of conformers from SMILES: strain."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.morse import MorsePotential

from benchmarks.models.conformers_from_smiles import strain, strain_summary, strains


def test_strain_is_the_energy_above_the_minimum():
    """A Morse bond of depth 1 eV, stretched by d, is strained by (1 − exp(−ρ (r/r₀ − 1)))²."""
    for stretch in (0.0, 0.3):
        bond = Atoms("N2", [(0, 0, 0), (1.0 + stretch, 0, 0)])
        found = strain(bond, MorsePotential(epsilon=1.0, rho0=2.0, r0=1.0))
        assert found == pytest.approx((1 - np.exp(-2.0 * stretch)) ** 2, abs=1e-3)
        assert bond.positions[1, 0] == 1.0 + stretch and bond.calc is None


def test_what_does_not_relax_is_counted_and_left_out():
    found = [np.array([[0.1], [0.3], [np.nan]]), np.array([[0.5], [0.5], [0.5]]), np.array([[np.nan]] * 3)]
    middle, mean, lost = strain_summary("some", found, seed=0)
    assert (middle[2], middle[4]) == ("0.350", "2 molecules") and mean[2] == "0.350"
    assert lost[2:] == ("44.4", "", "9 conformers")


def test_a_distorted_molecule_is_strained():
    pytest.importorskip("tblite")
    water, stretched = molecule("H2O"), molecule("H2O")
    stretched.positions[1] *= 1.2
    near, far = strains([water, stretched])[:, 0]
    assert 0.0 <= near < 0.05 < 0.2 < far
