"""Stated errors: for every shipped model and solver, the true error is below three times the stated one.

The true error is relative to two independent rules that agree to a tenth of it (``benchmarks.accuracy.reference``).
"""

from __future__ import annotations

import pytest
from ase.collections import g2

from ase_enf.flow.loading import load
from benchmarks.accuracy.honesty import ALLOWED, COARSE, SOLVERS, errors, structures

FEW = {key: SOLVERS[key] for key in ("own", "dopri5", "dopri5, loose")}


def check(name: str, chosen: int | tuple[str, ...], solvers, kind: str) -> None:
    """Checks the theorem for a number of structures, or for molecules of g2 given by name."""
    flow = load(name, "cpu", "float64")
    flow.use_backend("auto")
    atoms = structures(flow, chosen) if isinstance(chosen, int) else [g2[name] for name in chosen]
    for key, (true, stated) in errors(flow, atoms, solvers, kind).items():
        ratio = true / stated
        print(f"{name}, {kind}, {key}: true over stated at most {ratio.max():.2f}, median {ratio.median():.2f}")
        assert (ratio <= ALLOWED).all(), f"{key}: true error {ratio.max():.1f} times the stated one"


SMALL = [("dw4", "exact"), ("dw4", "hutchinson"), ("qm9-small", "exact"), ("qm9-conditional", "hutchinson")]


@pytest.mark.parametrize(("name", "kind"), SMALL)
def test_stated_errors_cover_the_true_ones(name, kind):
    check(name, 2, FEW, kind)


# lj13-factor2 is not included: with 768 intervals its reference is not within a tenth of the error of
# "dopri5, tight".
COUNTS = {"dw4": 20, "lj13": 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", COUNTS)
def test_stated_errors_cover_the_true_ones_of_many(name, kind):
    check(name, COUNTS[name], SOLVERS if kind == "exact" else FEW, kind)


# References of molecules are expensive, hence small ones and no tight solver. Some are hard: in HCN the trace of
# qm9-conditional has a dip between two nodes; for methane in its exact symmetry, the steps of qm9-conformers are too
# long to be stable.
MOLECULES = {
    "qm9-small": 5,
    "qm9": ("H2O", "NH3", "HCN"),
    "qm9-conditional": ("H2O", "NH3", "HCN", "H2CO", "CH4"),
    "qm9-conformers": ("CH4", "H2CO", "CH3OH"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOLECULES)
def test_stated_errors_cover_the_true_ones_of_molecules(name):
    check(name, MOLECULES[name], FEW if name == "qm9" else COARSE, "exact")
