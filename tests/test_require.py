"""Requirements: rejection at a fixed size, by words with the meaning of the metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase.build import molecule
from commands import FAST, error_of, run
from scipy.stats import binomtest, chi

from ase_enf import metrics
from ase_enf.cli.inputs import read_structures
from ase_enf.flow.continuous import Solver
from ase_enf.sampling import compositions
from ase_enf.sampling.generate import generate, igenerate
from ase_enf.sampling.requirements import REASONS, Requirements
from ase_enf.sampling.sampler import GenerationError

ONE_STEP = Solver("euler", steps=1)
REACH = 0.84  # Å, the longest H-H bond


@pytest.fixture
def hydrogen(make_flow):
    """Returns a flow that does not change noise: two H atoms at a distance of 0.5 √2 χ_3 Å."""
    flow = make_flow("given", scale=0.0, layers=1, species=("H",), sizes={2: 1}, position_scale=0.5)
    with torch.no_grad():
        for weights in flow.parameters():
            weights.zero_()
    return flow


def test_the_share_that_passes_is_that_of_the_density(hydrogen):
    """P(bonded) = P(χ_3 < 0.84 / (0.5 √2)), and the kept molecules follow the truncated Gaussian."""
    n = 300
    atoms = generate(hydrogen, n, seed=2, formula="H2", solver=ONE_STEP, require="stable")
    distances = np.array([a.get_distance(0, 1) for a in atoms])
    assert distances.max() < REACH
    share = chi(3).cdf(REACH / (0.5 * math.sqrt(2)))
    attempts = sum(a.info["enf_attempts"] for a in atoms)
    assert atoms[-1].info["enf_acceptance"] == n / attempts
    # n accepted of `attempts` is a negative binomial number; its tail is that of a binomial one.
    assert binomtest(n, attempts, share).pvalue > 1e-3
    uniform = np.sort(chi(3).cdf(distances / (0.5 * math.sqrt(2))) / share)
    assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)  # Kolmogorov, p = 0.001


@pytest.mark.parametrize("batch_size", [1, 3])
def test_neither_the_batch_nor_the_start_decides(hydrogen, batch_size):
    fields = {"seed": 4, "formula": "H2", "solver": ONE_STEP, "require": ("valid", "connected"), "with_smiles": True}
    whole = generate(hydrogen, 8, **fields)
    assert {a.info["enf_smiles"] for a in whole} == {"[H][H]"}
    assert {a.info["enf_require"] for a in whole} == {"connected, valid"}
    assert max(a.info["enf_attempts"] for a in whole) > 1  # or nothing was rejected
    again = generate(hydrogen, 8, batch_size=batch_size, **fields)
    rest = list(igenerate(hydrogen, 5, start=3, batch_size=batch_size, **fields))
    for ours, theirs in zip(again, whole, strict=True):
        assert ours.info == theirs.info and np.array_equal(ours.positions, theirs.positions)
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert ours.info["enf_attempts"] == theirs.info["enf_attempts"]
        assert np.array_equal(ours.positions, theirs.positions)


def test_smiles_are_written_of_valid_molecules_alone(hydrogen):
    atoms = generate(hydrogen, 20, formula="H2", solver=ONE_STEP, with_smiles=True)
    written = ["enf_smiles" in a.info for a in atoms]
    assert written == [a.get_distance(0, 1) < REACH for a in atoms]
    assert any(written) and not all(written)


def test_the_words_mean_what_the_metrics_mean():
    """For each word, a molecule passes exactly if the metric of that name counts it."""
    apart = molecule("H2O") + molecule("CH4")
    apart.positions[3:] += 9.0
    nitro = molecule("CH3NO2")
    examples = [molecule("CH4"), molecule("CH3"), molecule("H2O"), apart, nitro, molecule("OH"), molecule("C2H4")]
    counted = {
        "closed_shell": lambda a: 1.0 - a.numbers.sum() % 2,
        "connected": lambda a: metrics.connected(a).value,
        "stable": lambda a: metrics.molecule_stability(a).value,
        "valid": lambda a: metrics.validity(a, "strict").value,
    }
    assert counted.keys() == REASONS.keys()
    for name, count in counted.items():
        passed = [unmet is None for unmet in Requirements((name,)).unmet(examples)]
        assert passed == [bool(count(a)) for a in examples]
        assert any(passed) and not all(passed)


def test_the_limit_names_the_remedy(hydrogen):
    fields = {"formula": "H2", "solver": ONE_STEP, "max_attempts": 3}
    hydrogen.config = type(hydrogen.config)(features="given", species=("H",), sizes={2: 1}, position_scale=1e3)
    with pytest.raises(GenerationError, match=r"had an atom that is not stable 3 times; .*raise max_attempts$"):
        generate(hydrogen, 1, require="stable", **fields)
    with pytest.raises(GenerationError, match=r"did not pass connected, stable 3 times; leave connected out"):
        generate(hydrogen, 1, require=["stable", "connected"], **fields)


@pytest.mark.parametrize(
    ("features", "fields", "message"),
    [
        ("joint", {"require": "stabel"}, "^require='stabel': is unknown; choose among closed_shell, connected"),
        ("joint", {"require": "stable", "max_attempts": 0}, "^max_attempts=0: must be at least 1"),
        ("none", {"require": "stable"}, "^require=stable: this model knows no elements"),
        ("none", {"with_smiles": True}, "^with_smiles=True: this model knows no elements"),
    ],
)
def test_bad_requests_are_one_line(make_flow, features, fields, message):
    with pytest.raises(ValueError, match=message):
        generate(make_flow(features, layers=1), 1, **fields)


def test_the_command_reports_what_passed(here, tmp_path, capsys):
    words = ["generate", "joint.safetensors", "-n", 5, "--with-smiles", *FAST]
    assert run(*words, "-o", tmp_path / "m.extxyz", "--require", "closed_shell") == 0
    atoms = read_structures(str(tmp_path / "m.extxyz"))
    attempts = sum(a.info["enf_attempts"] for a in atoms)
    assert attempts > 5  # or nothing was rejected
    assert atoms[-1].info["enf_acceptance"] == pytest.approx(5 / attempts)
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"ase-enf: 5 of {attempts} drawn passed closed_shell ({5 / attempts:.1%})"
    assert "require='odd': is unknown" in error_of(capsys, *words, "-o", tmp_path / "n.extxyz", "--require", "odd")


@pytest.fixture
def waters(make_flow, monkeypatch):
    """Returns a joint flow trained as if on the same set as a shipped flow."""
    flow = make_flow("joint", layers=1, sizes={2: 4, 3: 100})
    header = {"features": "given", "species": ["H", "C", "O"], "sizes": {"2": 4, "3": 100}, "name": "twin"}
    seen = {"H2": 2, "HO": 2, "H2O": 99, "HO2": 1}
    monkeypatch.setattr(compositions, "shipped", lambda: ["twin"])
    monkeypatch.setattr(compositions, "shipped_path", lambda name: name)
    monkeypatch.setattr(compositions, "read_header", lambda path: {"config": header | {"compositions": seen}})
    return flow


def test_a_flow_that_draws_types_has_a_formula_by_rejection(waters):
    atoms = generate(waters, 6, seed=1, formula="H2", solver=ONE_STEP)
    assert {a.get_chemical_formula() for a in atoms} == {"H2"}
    assert {a.info["enf_require"] for a in atoms} == {"formula"}
    attempts = sum(a.info["enf_attempts"] for a in atoms)
    assert attempts > 6 and atoms[-1].info["enf_acceptance"] == 6 / attempts
    free = generate(waters, 200, seed=1, n_atoms=2, solver=ONE_STEP)
    share = np.mean([a.get_chemical_formula() == "H2" for a in free])
    assert binomtest(6, attempts, share).pvalue > 1e-3
    first = next(a for a in free if a.info["enf_index"] == 0)
    assert atoms[0].info["enf_attempts"] > 1 or np.array_equal(first.positions, atoms[0].positions)


def test_a_formula_that_is_unlikely_is_refused_with_the_remedy(waters, tmp_path, capsys):
    about = r"^formula='HO2': this model has features='joint' and draws types itself; 1 of 100 training molecules of 3 "
    with pytest.raises(ValueError, match=about + ".*such as twin, or raise max_attempts to 500$"):
        generate(waters, 1, formula="HO2")
    with pytest.raises(ValueError, match="; 0 of 0 training molecules of 4 atoms had .*, such as twin$"):
        generate(waters, 1, formula="H3O")
    with pytest.raises(ValueError, match="^formula='H2' has 2 atoms, but n_atoms=3; leave one of them out$"):
        generate(waters, 1, formula="H2", n_atoms=3)
    with pytest.raises(ValueError, match=r"^formula='NH3': element\(s\) N unknown to this model"):
        generate(waters, 1, formula="NH3")
    waters.save(tmp_path / "flow.safetensors")
    said = error_of(capsys, "generate", tmp_path / "flow.safetensors", "--formula", "HO2", "-o", tmp_path / "m.xyz")
    assert "such as twin" in said
