"""The benchmark of properties: its samples and its table."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import Condition
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import igenerate
from benchmarks.models import properties


@pytest.fixture(scope="module")
def flow() -> ENF:
    torch.manual_seed(0)
    values, sizes = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3, 3, 5, 5])
    conditions = tuple(Condition.of(name, "", values, sizes) for name in properties.NAMES)
    config = ENFConfig(sizes={3: 1, 5: 1}, hidden=8, layers=1, conditions=conditions, path="linear")
    return ENF(config).double().eval().requires_grad_(False)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_molecules_are_those_that_generate_draws(flow, weight):
    values, sizes = np.array([1.5, 3.5, 2.5]), np.array([5, 3, 5])
    drawn = properties.draw(flow, "gap", values, sizes, weight, steps=3, seed=4)
    for k, atoms in enumerate(drawn):
        asked = {"properties": {"gap": values[k]}, "n_atoms": int(sizes[k]), "guidance": weight}
        (alone,) = igenerate(flow, 1, seed=4, start=k, steps=3, **asked)
        assert np.abs(atoms.positions - alone.positions).max() < 1e-10 and str(atoms.symbols) == str(alone.symbols)


def test_every_weight_has_its_rows(flow, tmp_path, monkeypatch):
    water, methane = molecule("H2O"), molecule("CH4")
    second = [Atoms(m, info=dict.fromkeys(properties.NAMES, 1.0 + k)) for k, m in enumerate([water, methane] * 2)]

    class Exact:  # a regressor that finds 2 everywhere
        known = ()

        def predict(self, molecules: list[Atoms]) -> np.ndarray:
            return np.full((len(molecules), len(properties.NAMES)), 2.0)

    tables = []
    monkeypatch.setattr(properties, "write_results", lambda table, *_: tables.append(table))
    options = argparse.Namespace(properties=["gap", "mu"], guidance=[1.0, 2.0], n=4, steps=2, seed=0)
    properties.run(flow, Exact(), second, options, tmp_path)
    rows = tables[0].set_index("molecules")
    assert list(rows.columns) == ["gap, eV", "mu, D", "stable, %", "of"]
    for label in ("`unnamed`", "`unnamed`, guidance 2"):  # |2 − c| of c = 1, 2, 3, 4
        assert rows.loc[label, "gap, eV"] == rows.loc[label, "mu, D"] == "1.000 ± 0.354"
    assert {path.name for path in tmp_path.glob("*.extxyz")} == {
        "free.extxyz", "gap.extxyz", "gap_2.extxyz", "mu.extxyz", "mu_2.extxyz"
    }  # fmt: skip


def test_the_regressor_learns_and_is_kept(tmp_path):
    rng, some = np.random.default_rng(0), []
    for _ in range(60):
        atoms = molecule("H2O")
        atoms.positions *= 1.0 + 0.3 * rng.random()
        some.append(Atoms(atoms, info=dict.fromkeys(properties.NAMES, atoms.get_distance(1, 2))))
    regressor = properties.Regressor.kept(tmp_path / "regressor.npz", some[:50], seed=0, count=40)
    truth = np.array([[atoms.get_distance(1, 2)] * len(properties.NAMES) for atoms in some[50:]])
    assert np.abs(regressor.predict(some[50:]) - truth).max() < 0.1 * truth.std()
    again = properties.Regressor.kept(tmp_path / "regressor.npz", [], seed=0)  # from the file
    assert np.array_equal(again.predict(some), regressor.predict(some))
