"""Scores: equal to an independent computation, invariant, and with errors that cover the true ones."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.db import connect
from ase.io import read, write
from scipy.linalg import null_space
from scipy.spatial.transform import Rotation
from scipy.special import expit, log_expit
from scipy.stats import norm

import ase_enf
from ase_enf.atoms.io import write_structures
from ase_enf.data import qm9
from ase_enf.flow.continuous import Solver
from ase_enf.flow.loading import load
from ase_enf.scoring import score as score_module
from ase_enf.scoring.importance import combine
from ase_enf.scoring.score import (
    AUTOGRAD_DIMENSIONS,
    CLOSED_FORM_DIMENSIONS,
    COLUMNS,
    RENAMED,
    Row,
    Scorer,
    annotate,
    score,
)

# No refinement, whatever the error: theorems that hold to rounding, at the cost of one pass.
FAST = {"solver": Solver("rk4", steps=4, warp=2.0), "max_stderr": math.inf}


def ethane(twist: float) -> Atoms:
    """Returns ethane with methyl groups rotated against each other by ``twist`` degrees: chiral (D3) unless 0 or 60."""
    angles = np.radians([[0, 120, 240], [twist, twist + 120, twist + 240]])
    hydrogens = [
        (1.02 * math.cos(angle), 1.02 * math.sin(angle), z)
        for z, ring in zip((1.16, -1.16), angles, strict=True)
        for angle in ring
    ]
    return Atoms("C2H6", [(0, 0, 0.76), (0, 0, -0.76), *hydrogens])


def neopentane() -> Atoms:
    """Returns neopentane (Td), with twelve equivalent hydrogens."""
    corners = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
    carbons = 0.885 * corners
    hydrogens = [
        carbon + 1.09 * (0.943 * other + 0.333 * corner / math.sqrt(3))
        for corner, carbon in zip(corners, carbons, strict=True)
        for axis in range(3)
        for other in [(corner * np.eye(3)[axis] * -2 + corner * (1 - np.eye(3)[axis])) / math.sqrt(6)]
    ]
    return Atoms("C5H12", [(0, 0, 0), *carbons, *hydrogens])


def moved(atoms: Atoms, seed: int = 0) -> Atoms:
    """Returns the same molecule reflected, rotated, shifted, and with its atoms in another order."""
    rng = np.random.default_rng(seed)
    other = atoms[rng.permutation(len(atoms))]
    turn = Rotation.random(random_state=seed).as_matrix() * (-1) ** seed
    other.positions = other.positions @ turn.T + rng.standard_normal(3)
    return other


def values(flow, atoms, **options) -> np.ndarray:
    return score(
        flow, atoms, **({"trace": "exact", "importance_samples": 2} | FAST | options)
    ).log_likelihood.to_numpy()


@pytest.mark.parametrize("name", ["H2O", "CH3CH2OH", "CH4"])
def test_invariant_to_rotation_reflection_translation_and_order(flow, name):
    flow, atoms = flow.double(), molecule(name)
    if name == "CH3CH2OH":
        atoms.rattle(0.1, seed=2)
    expected = values(flow, atoms)
    assert values(flow, [moved(atoms, seed) for seed in range(4)]) == pytest.approx(np.repeat(expected, 4), abs=1e-8)


@pytest.mark.parametrize(
    "atoms",
    [
        molecule("C6H6"),
        ethane(60),
        neopentane(),
        ethane(25),  # D3: no mirror plane
    ],
    ids=["benzene", "ethane", "neopentane", "twisted ethane"],
)
def test_equivalent_atoms_share_their_noise_in_symmetric_molecules(make_flow, atoms):
    flow = make_flow("joint", layers=1, sizes={len(atoms): 1}).double()
    expected = values(flow, atoms, importance_samples=1)
    copies = [moved(atoms, seed) for seed in range(6)]
    assert values(flow, copies, importance_samples=1) == pytest.approx(np.repeat(expected, 6), abs=1e-8)


def test_hutchinson_does_not_depend_on_the_order_of_atoms(flow):
    flow, atoms = flow.double(), molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=2)
    expected = values(flow, atoms, trace="hutchinson", probes=2)
    shuffled = atoms[np.random.default_rng(1).permutation(9)]
    shuffled.positions += 1.0
    assert values(flow, shuffled, trace="hutchinson", probes=2) == pytest.approx(expected, abs=1e-8)


def integrate(flow, y0: torch.Tensor, n: int, context: torch.Tensor | None, steps: int = 32) -> torch.Tensor:
    """Takes one molecule, shape (M, n + F), to latent space with the classical Runge-Kutta method in s, t = s²."""
    mask = torch.ones(1, len(y0), dtype=torch.bool)

    def slope(s: float, y: torch.Tensor) -> torch.Tensor:
        t = torch.tensor(s**2, dtype=torch.float64)
        dx, dh = flow.dynamics(t, y[None, :, :n], y[None, :, n:], mask, context)
        return 2 * s * torch.cat([dx, dh], dim=-1)[0]

    y, d = y0, 1.0 / steps
    for k in range(steps):
        s = k * d
        k1 = slope(s, y)
        k2 = slope(s + d / 2, y + d / 2 * k1)
        k3 = slope(s + d / 2, y + d / 2 * k2)
        k4 = slope(s + d, y + d * k3)
        y = y + d / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def reference_log_density(flow, positions: np.ndarray, h: np.ndarray, context: torch.Tensor | None) -> float:
    """Returns log p(x, h̃) from the whole Jacobian, in orthonormal coordinates of the subspace."""
    m, n = positions.shape
    features = h.shape[1]
    basis = torch.from_numpy(np.kron(null_space(np.ones((1, m))), np.eye(n)))  # (M n, (M − 1) n)
    scale = flow.config.position_scale
    start = basis.T @ torch.from_numpy((positions - positions.mean(axis=0)).ravel())
    dimension = len(start)

    def latent(c: torch.Tensor) -> torch.Tensor:
        x = (basis @ c[:dimension]).view(m, n) / scale
        z = integrate(flow, torch.cat([x, c[dimension:].view(m, features)], dim=1), n, context)
        return torch.cat([basis.T @ z[:, :n].reshape(-1), z[:, n:].reshape(-1)])

    c = torch.cat([start, torch.from_numpy(h.ravel())])
    jacobian = torch.autograd.functional.jacobian(latent, c)
    return float(norm.logpdf(latent(c).detach().numpy()).sum() + np.linalg.slogdet(jacobian.numpy())[1])


ACCURATE = {"trace": "exact", "solver": Solver("rk4", steps=32, warp=2.0), "max_stderr": 1e-6}


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("features", ["given", "none"])
def test_exact_score_is_the_change_of_variables(make_flow, features, dimension):
    flow = make_flow(features, scale=0.6, layers=1, dimension=dimension).double()
    atoms = Atoms("OHH", [(0, 0, 0), (0.96, 0.1, 0), (-0.24, 0.93, 0)])
    context = torch.eye(3, dtype=torch.float64)[[2, 0, 0]][None] if features == "given" else None  # H, C, O
    expected = reference_log_density(flow, atoms.positions[:, :dimension], np.zeros((3, 0)), context)
    row = score(flow, atoms, **ACCURATE).iloc[0]
    assert row.log_likelihood == pytest.approx(expected, abs=1e-6)
    assert row.stderr < 1e-6


def test_joint_bound_is_eq_12(make_flow, monkeypatch):
    flow = make_flow("joint", scale=0.4, layers=1, sizes={2: 3, 3: 1}).double()
    atoms = Atoms("OH", [(0, 0, 0), (0.96, 0.1, 0)])
    noise = np.random.default_rng(0).standard_normal((2, 2, 4))  # draw, atom, (H, C, O, charge)
    monkeypatch.setattr(Scorer, "noise", lambda self, rows, width: torch.from_numpy(noise))
    shift, scale = np.array(flow.config.feature_shift), np.array(flow.config.feature_scale)
    weights = []
    for eps in noise:
        log_q, lifted = 0.0, np.zeros((2, 4))
        for i, (kind, charge) in enumerate([(2, 8), (0, 1)]):
            u = np.eye(4)[kind] * [1, 1, 1, 0] + eps[i] * [0.1, 0.1, 0.1, 0.25]
            log_q += norm.logpdf(eps[i]).sum() - 3 * math.log(0.1) - math.log(0.25)
            for k in range(3):
                gap = u[kind] - u[k]
                lifted[i, k] = u[kind] - np.logaddexp(0, gap) if k != kind else u[k]
                log_q -= log_expit(gap) if k != kind else 0.0
            lifted[i, 3] = charge + expit(u[3])
            log_q -= log_expit(u[3]) + log_expit(-u[3])
        log_p = reference_log_density(flow, atoms.positions, (lifted - shift) * scale, None)
        weights.append(log_p + 2 * np.log(scale).sum() - log_q + math.log(3 / 4))
    row = score(flow, atoms, importance_samples=2, **ACCURATE).iloc[0]
    assert row.log_likelihood == pytest.approx(np.logaddexp(*weights) - math.log(2), abs=1e-6)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_row_does_not_depend_on_its_batch(flow, trace):
    flow = flow.double()
    many = [molecule(name) for name in ("H2O", "CH4", "HCO")]
    many[0].rattle(0.1, seed=1)
    alone = np.concatenate([values(flow, atoms, trace=trace) for atoms in many])
    for batch_size in (3, 32):
        assert values(flow, many, trace=trace, batch_size=batch_size) == pytest.approx(alone, abs=1e-9)


def test_refinement_is_that_of_the_row_itself(make_flow):
    flow = make_flow("none", layers=2, scale=1.5).double()
    stretched = [molecule("H2O"), molecule("H2O")]
    stretched[1].positions *= 3.0
    rough = score(flow, stretched, max_stderr=math.inf)
    options = {"max_stderr": float(np.sqrt(rough.stderr.prod()))}  # between the errors of the two
    table = score(flow, stretched, **options)
    refined = table.nfe > rough.nfe
    assert refined.tolist() == (rough.stderr > options["max_stderr"]).tolist() and refined.sum() == 1
    assert (table.stderr[refined] < rough.stderr[refined]).all()
    alone = pd.concat([score(flow, atoms, **options) for atoms in stretched], ignore_index=True)
    pd.testing.assert_frame_equal(table, alone, rtol=1e-10)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_each_row_may_have_its_own_seed(make_flow, trace):
    flow, waters = make_flow("joint", layers=1).double(), [molecule("H2O")] * 3
    together = values(flow, waters, trace=trace, seed=[5, 6, 5])
    assert together[0] == together[2] != together[1]
    assert values(flow, waters, trace=trace, seed=np.array([5, 6, 5])) == pytest.approx(together, abs=1e-12)
    assert values(flow, waters[0], trace=trace, seed=np.int64(5))[0] == pytest.approx(together[0], abs=1e-9)
    assert together[:2] == pytest.approx([values(flow, waters[0], trace=trace, seed=s)[0] for s in (5, 6)], abs=1e-9)
    with pytest.raises(ValueError, match="2 seeds for 3 structures: give one for all or one for each"):
        score(flow, waters, seed=range(2))


def test_conformers_share_their_noise(make_flow):
    flow = make_flow("joint", layers=1).double()
    noisy = [values(flow, molecule("H2O"), seed=seed, importance_samples=1)[0] for seed in range(6)]
    near = molecule("H2O")
    near.positions *= 1.0001
    gaps = [values(flow, near, seed=seed, importance_samples=1)[0] - value for seed, value in enumerate(noisy)]
    assert np.std(noisy) > 0.3  # seeds matter
    assert np.std(gaps) < 0.02 * np.std(noisy)


KINDS = {"joint": "bound", "given": "exact", "none": "exact"}


def test_columns_and_kinds(flow):
    atoms = [molecule("H2O"), molecule("CH3CH2OH")]
    table = score(flow, atoms, importance_samples=2, **FAST)
    assert tuple(table.columns) == COLUMNS and list(table.index) == [0, 1]
    assert table.kind.tolist() == [KINDS[flow.features]] * 2
    assert table.formula.tolist() == ["H2O", "C2H6O"] and table.n_atoms.tolist() == [3, 9]
    assert table.trace.tolist() == ["exact", "exact"] and table.probes.tolist() == [0, 0]
    assert table.importance_samples.tolist() == [2 if flow.features == "joint" else 1] * 2
    assert np.isfinite(table.log_likelihood).all() and (table.stderr >= 0).all() and (table.nfe > 15).all()
    table = score(flow, iter(atoms), trace="hutchinson", probes=3, importance_samples=2, **FAST)
    assert table.trace.tolist() == ["hutchinson"] * 2 and table.probes.tolist() == [3, 3]
    several = {"joint": "estimate"}.get(flow.features, "exact")  # a noisy trace inside log-mean-exp is no bound
    assert table.kind.tolist() == [several] * 2
    single = score(flow, atoms[0], trace="hutchinson", importance_samples=1, **FAST)
    assert single.kind.tolist() == [KINDS[flow.features]]


def test_the_noise_of_a_trace_lifts_the_mean_over_several_draws_and_not_one():
    """E log 1/K Σ exp(ε_k) of independent Gaussian ε is near σ²/2 (1 − 1/K), whatever the draws."""
    noise = np.random.default_rng(0).standard_normal((20_000, 1, 8))
    for draws, lifted in ((1, 0.0), (8, 0.5 * 0.5**2 * (1 - 1 / 8))):
        values = [combine(0.5 * row[:, :draws], 0.0)[0] for row in noise]
        assert np.mean(values) == pytest.approx(lifted, abs=0.02)


@pytest.mark.parametrize("closed", [True, False])
def test_auto_changes_to_hutchinson_above_its_limit(make_flow, closed):
    network = "egnn" if closed else "gnn"
    flow = make_flow("none", layers=1, hidden=2, network=network)
    limit = (CLOSED_FORM_DIMENSIONS if closed else AUTOGRAD_DIMENSIONS) // 3
    chains = [Atoms(f"H{m}", [(k, 0.1 * (k % 2), 0) for k in range(m)]) for m in (limit, limit + 1)]
    table = score(flow, chains, probes=2, solver=Solver("euler", steps=1), max_stderr=math.inf)
    assert table.trace.tolist() == ["exact", "hutchinson"]


def test_the_bound_grows_with_the_draws(make_flow):
    flow, water = make_flow("joint", layers=1).double(), molecule("H2O")
    seeds = range(6)
    few, some, many = (
        np.array([values(flow, water, seed=seed, importance_samples=draws)[0] for seed in seeds])
        for draws in (1, 4, 16)
    )
    # Burda et al. 2016: E log mean of K weights rises with K, for every spread of the weights.
    assert few.mean() < some.mean() < many.mean()
    # The first draws of a seed are those of a shorter request, and no weight is negative.
    assert (some >= few - math.log(4) - 1e-9).all() and (many >= some - math.log(4) - 1e-9).all()


def test_more_draws_only_add_to_the_noise(make_flow):
    flow = make_flow("joint", layers=1).double()
    small, large = (score_noise(flow, draws) for draws in (2, 5))
    assert torch.equal(large[:2], small)


def test_scores_share_no_noise_with_samples_of_the_same_seed(make_flow):
    scorer = Scorer(make_flow("joint", layers=1), "hutchinson", 2, 6, 1.0, 32)
    rows = [Row(0, molecule("H2O"), np.arange(3), 0)]
    of_q, probes = (
        scorer.normals(stream, rows, (6, 7))[0] for stream in (score_module.NOISE_OF_Q, score_module.PROBES)
    )
    assert not np.isin(of_q, probes).any()
    for index in range(4):
        for attempt in range(4):  # see test_generate for these keys
            drawn = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(index, attempt))).standard_normal(64)
            assert not np.isin(drawn, of_q).any() and not np.isin(drawn, probes).any()


def score_noise(flow, draws: int) -> torch.Tensor:
    return Scorer(flow, "exact", 1, draws, 1.0, 32).noise([Row(0, molecule("H2O"), np.array([2, 0, 1]), 0)], 4)


def test_hutchinson_agrees_with_the_exact_trace_within_its_error(make_flow):
    flow, atoms = make_flow("given", layers=1).double(), molecule("CH4")
    exact = values(flow, atoms)[0]
    rows = [score(flow, atoms, trace="hutchinson", probes=16, seed=seed, **FAST).iloc[0] for seed in range(10)]
    z = np.array([(row.log_likelihood - exact) / row.stderr for row in rows])
    assert np.abs(z).max() < 4.5  # t with 15 degrees of freedom, ten of them
    assert 0.4 < np.sqrt((z**2).mean()) < 1.8  # the error bar is neither too short nor too long


def test_hutchinson_is_unbiased_for_one_draw_of_a_bound(make_flow):
    flow, atoms = make_flow("joint", layers=1).double(), molecule("CH4")
    gaps = [
        values(flow, atoms, trace="hutchinson", probes=8, seed=seed, importance_samples=1)[0]
        - values(flow, atoms, seed=seed, importance_samples=1)[0]
        for seed in range(8)
    ]
    assert abs(np.mean(gaps)) < 4.5 * np.std(gaps, ddof=1) / math.sqrt(len(gaps))


def test_spreads_that_one_number_cannot_tell_are_nan(make_flow):
    water = molecule("H2O")
    joint, given = make_flow("joint", layers=1), make_flow("given", layers=1)
    assert math.isnan(score(joint, water, importance_samples=1, **FAST).stderr[0])
    assert math.isnan(score(given, water, trace="hutchinson", probes=1, **FAST).stderr[0])
    assert score(joint, water, importance_samples=2, **FAST).stderr[0] > 0
    assert score(given, water, trace="hutchinson", probes=2, **FAST).stderr[0] > 0
    assert score(given, water, importance_samples=1, **FAST).stderr[0] >= 0


def test_combine():
    assert combine(np.log([[1.0, 3.0]]), 0.0)[0] == pytest.approx(math.log(2.0))
    assert combine(np.array([[-5000.0, -5001.0]]), 0.0)[0] == pytest.approx(-5000 + math.log((1 + math.exp(-1)) / 2))
    assert combine(np.array([[1.0]]), 0.3) == (1.0, pytest.approx(0.3))
    probes = np.array([[1.0], [3.0]])
    assert combine(probes, 0.0) == (2.0, pytest.approx(1.0))  # std √2, two probes
    assert combine(np.log([[1.0, 3.0]]), 0.0)[1] == pytest.approx(math.log(3) / 2)  # std (ln 3) / √2, over √2
    many = combine(np.log([[1.0] * 8 + [3.0] * 2]), 0.0)[1]  # the delta method's: std 0.843 / √10 over a mean of 1.4
    assert many == pytest.approx(max(0.8433 / 10**0.5 / 1.4, math.log(3) * 0.4216 / 10**0.5), rel=1e-3)
    assert combine(probes, 2.0)[1] == pytest.approx(math.sqrt(5.0))


def test_annotate_returns_copies(flow):
    atoms = [molecule("H2O"), molecule("CH4")]
    atoms[0].info["mine"] = "kept"
    before = copy.deepcopy(atoms)
    table = score(flow, atoms, importance_samples=2, **FAST)
    scored = annotate(flow, atoms, importance_samples=2, **FAST)
    for original, untouched, item, row in zip(atoms, before, scored, table.itertuples(), strict=True):
        assert original == untouched and original.info == untouched.info and item is not original
        assert item == original
        assert item.info == untouched.info | {
            "enf_log_likelihood": row.log_likelihood,
            "enf_log_likelihood_stderr": row.stderr,
            "enf_log_likelihood_kind": KINDS[flow.features],
            "enf_log_likelihood_trace": "exact",
            "enf_log_likelihood_model": "unnamed",
        }
        item.positions += 1.0
        item.info.clear()
        assert original == untouched and original.info == untouched.info


def test_who_made_a_structure_and_who_scored_it_are_two_things(make_flow):
    atoms = molecule("H2O")
    atoms.info["enf_model"] = "maker"
    (scored,) = annotate(make_flow("given", layers=1), atoms, **FAST)
    assert scored.info["enf_model"] == "maker" and scored.info["enf_log_likelihood_model"] == "unnamed"


def test_large_structures_are_scored_by_fewer_rows_at_once(make_flow, monkeypatch):
    atoms = [molecule("CH4"), molecule("CH4"), molecule("H2O"), molecule("H2O")]
    flow, rows = make_flow("given", layers=1), []
    plain = type(flow).log_prob
    monkeypatch.setattr(
        type(flow),
        "log_prob",
        lambda self, batch, *a, **k: rows.append(len(batch.mask)) or plain(self, batch, *a, **k),
    )
    monkeypatch.setattr(score_module, "PAIRS_TOGETHER", {"cpu": 25})
    score(flow, atoms, **FAST)
    assert rows == [2, 1, 1]


def test_no_order_is_looked_for_where_there_is_no_noise(make_flow, monkeypatch):
    monkeypatch.setattr(score_module, "canonical_order", None)  # slow for large symmetric clusters
    score(make_flow("given", layers=1), molecule("H2O"), **FAST)


def test_an_unknown_error_is_left_out(make_flow):
    (scored,) = annotate(make_flow("joint", layers=1), molecule("H2O"), importance_samples=1, **FAST)
    assert "enf_log_likelihood_stderr" not in scored.info and "enf_log_likelihood" in scored.info


def test_scores_survive_the_formats(make_flow, tmp_path):
    scored = annotate(make_flow("given", layers=1), [molecule("H2O"), molecule("CH4")], **FAST)
    write(tmp_path / "s.extxyz", scored)
    for before, after in zip(scored, read(tmp_path / "s.extxyz", index=":"), strict=True):
        assert after.info == before.info  # to the last digit
    write_structures(tmp_path / "s.db", scored)
    with connect(tmp_path / "s.db") as database:
        for before, row in zip(scored, database.select(), strict=True):
            assert row.log_likelihood == before.info["enf_log_likelihood"]
            assert row.log_likelihood_kind == "exact"
            assert row.data["info"] == before.info


BAD_STRUCTURES = {
    "periodic": (Atoms("H2", [(0, 0, 0), (0, 0, 1)], cell=[5, 5, 5], pbc=[1, 0, 0]), "periodic"),
    "element": (Atoms("HCl", [(0, 0, 0), (0, 0, 1)]), "Cl unknown"),
    "one atom": (Atoms("H"), "1 atom"),
    "zero atoms": (Atoms(), "0 atom"),
    "one point": (Atoms("OHH", [(0, 0, 0), (0, 0, 1), (0, 0, 1)]), "atoms 1 and 2 lie on one point"),
    "NaN": (Atoms("H2", [(0, 0, 0), (0, math.nan, 1)]), "atom 1 has non-finite"),
    "size": (molecule("CH3OH"), "6 atoms, a size this model never saw"),
}


@pytest.mark.parametrize("name", BAD_STRUCTURES)
def test_bad_structures_are_one_line_that_names_them(make_flow, name):
    bad, words = BAD_STRUCTURES[name]
    with pytest.raises(ValueError, match=words) as caught:
        score(make_flow("joint", layers=1), [molecule("H2O"), molecule("CH4"), bad])
    assert str(caught.value).startswith("structure 2 (") and "\n" not in str(caught.value)


def test_a_structure_off_the_plane_is_named_by_its_place(make_flow):
    flat = Atoms("X3", [(0, 0, 0), (1, 0, 0), (0, 1, 0)])
    with pytest.raises(ValueError, match=r"^structure 3 \(X3\): leaves the xy plane"):
        tilted = flat.copy()
        tilted.rotate(20, "x")
        score(make_flow("none", layers=1, dimension=2), [flat, flat, flat, tilted], batch_size=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace": "exakt"}, "trace 'exakt'"),
        ({"probes": 0}, "probes=0"),
        ({"importance_samples": 0}, "importance_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"max_stderr": 0.0}, "max_stderr=0.0"),
        ({"max_stderr": math.nan}, "max_stderr=nan"),
        ({"solver": "rk5"}, "'rk5'"),
        ({"device": "cpuu"}, "'cpuu'"),
    ],
)
def test_bad_options_are_one_line(make_flow, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        score(make_flow("joint", layers=1), molecule("H2O"), **options)
    assert "\n" not in str(caught.value)


def test_nothing_to_score(make_flow):
    with pytest.raises(ValueError, match="^no structures to score"):
        score(make_flow("joint", layers=1), [])


@pytest.mark.parametrize("wrong", [["H2O"], [molecule("H2O").positions]])
def test_what_is_no_atoms(make_flow, wrong):
    with pytest.raises(TypeError, match=r"^structure 0: expected ase\.Atoms"):
        score(make_flow("joint", layers=1), wrong)


def test_sizes_never_seen_are_fine_where_no_prior_counts(make_flow):
    assert np.isfinite(score(make_flow("given", layers=1), molecule("CH3OH"), **FAST).log_likelihood[0])


def test_what_is_larger_than_all_of_training_is_named(make_flow):
    flow = make_flow("given", layers=1, sizes={3: 1, 2: 1})
    words = r"1 structure\(s\) have more atoms than any .* 3, .* structure 8 \(CH4\)"
    with pytest.warns(UserWarning, match=words) as said:
        score(flow, [molecule("H2O"), molecule("CH4")], first=7, **FAST)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(flow, molecule("H2O"), **FAST)


def test_the_flow_is_not_modified(make_flow):
    flow = make_flow("joint", layers=1)
    before, state = copy.deepcopy(flow.state_dict()), torch.get_rng_state()
    score(flow, molecule("H2O"), importance_samples=2, device="cpu", **FAST)
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_name_stays_a_function():
    assert ase_enf.score is score and callable(ase_enf.annotate)


@pytest.mark.parametrize(("spread", "draws"), [(0.3, 2), (3.0, 2), (6.0, 2), (0.3, 16)])
def test_the_error_over_draws_covers_their_spread(spread, draws):
    """Compared with the scatter of many estimates from log-normal weights, like those of q."""
    log_w = spread * np.random.default_rng(0).standard_normal((2000, 1, draws))
    values, errors = np.transpose([combine(row, 0.0) for row in log_w])
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.2)


@pytest.mark.parametrize(("name", "truth"), [("C4N4O", 63.655), ("C2H6", -117.91), ("CH3CH2OH", 35.89)])
def test_the_error_covers_what_the_path_does_to_the_trace(name, truth):
    """Geometries by another method than the training data are hard for the shipped flow: those of g2, but not of QM9.

    The reference is rk4 on the nodes of 384 intervals, in float64.
    """
    known = name == "C4N4O"
    atoms = min(qm9.load(Path(__file__).parent / "data" / "qm9_sample.npz"), key=len) if known else molecule(name)
    assert atoms.get_chemical_formula() == name or not known
    row = score(load("qm9-conditional", "cpu"), atoms, max_stderr=math.inf).iloc[0]
    assert abs(row.log_likelihood - truth) < 3 * row.stderr + 0.05
    assert row.stderr < 0.2 or not known


def test_refinement_reaches_the_largest_error_allowed(make_flow):
    flow, atoms = make_flow("given", layers=2).double(), molecule("CH4")
    rough = score(flow, atoms, max_stderr=math.inf).iloc[0]
    fine = score(flow, atoms, max_stderr=rough.stderr / 5).iloc[0]
    assert 0 < fine.stderr < rough.stderr / 5 and fine.nfe > 2 * rough.nfe
    assert fine.log_likelihood == pytest.approx(rough.log_likelihood, abs=3 * rough.stderr)


def test_what_stays_above_the_largest_error_allowed_is_named(make_flow):
    flow = make_flow("given", layers=1)
    with pytest.warns(
        UserWarning, match=r"1 structure\(s\) keep an integration error above max_stderr=1e-30, .* 0 \(H2O\)"
    ) as said:
        score(flow, molecule("H2O"), max_stderr=1e-30)
    assert said[0].filename == __file__  # the warning points to the caller of score, not into the package


@pytest.mark.parametrize("ask", [score, annotate])
@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_earlier_keyword_says_what_it_is_called_today(make_flow, ask, old, new):
    with pytest.raises(TypeError, match=f"^score: {old} is now called {new}; write {new}=3$"):
        ask(make_flow("given", layers=1), molecule("H2O"), **{old: 3})
    assert new in inspect.signature(score).parameters and old not in inspect.signature(score).parameters


def test_what_is_not_finite_is_refined_and_named(make_flow):
    flow = make_flow("given", layers=1)
    with torch.no_grad():
        flow.dynamics.network.embed.bias.fill_(math.nan)
    with pytest.warns(UserWarning, match=r"1 structure\(s\) have no finite log-likelihood; use 200 steps or float64"):
        table = score(flow, molecule("H2O"))
    assert math.isnan(table.log_likelihood[0]) and table.nfe[0] > 1000


def test_a_new_score_takes_an_old_error_bar_away(make_flow):
    flow = make_flow("joint", layers=1)
    (first,) = annotate(flow, molecule("H2O"), importance_samples=2, **FAST)
    (second,) = annotate(flow, first, importance_samples=1, **FAST)
    assert "enf_log_likelihood_stderr" in first.info and "enf_log_likelihood_stderr" not in second.info


def test_annotate_keeps_energies_that_are_known(make_flow):
    atoms = molecule("H2O")
    atoms.calc = EMT()
    flow = make_flow("given", layers=1)
    assert annotate(flow, atoms, **FAST)[0].calc is None  # nothing is computed
    energy = atoms.get_potential_energy()
    assert annotate(flow, atoms, **FAST)[0].get_potential_energy() == energy
    atoms.positions[0] += 0.1  # what is known is of other positions
    assert annotate(flow, atoms, **FAST)[0].calc is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"importance_samples": 1.5}, "importance_samples=1.5"),
        ({"probes": "4"}, "probes=4"),
    ],
)
def test_numbers_are_whole(make_flow, option, words):
    with pytest.raises(ValueError, match=words):
        score(make_flow("joint", layers=1), molecule("H2O"), **option)


def test_a_name_is_no_flow():
    with pytest.raises(TypeError, match=r"expected a flow, got 'qm9'; ase_enf.load\('qm9'\) gives one"):
        score("qm9", molecule("H2O"))
