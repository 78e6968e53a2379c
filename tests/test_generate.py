"""Generation: molecule i depends on (seed, i) only, failures are redrawn and reported, bad requests are one line."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.formula import Formula
from ase.io import read, write

import ase_enf
from ase_enf.flow import base
from ase_enf.flow.continuous import Solver, SolverError, resolve_solver
from ase_enf.flow.model import ENF, SAMPLING_SOLVER, STOCHASTIC_SAMPLER
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.sampling.generate import generate, igenerate
from ase_enf.sampling.sampler import MAX_ATTEMPTS, GenerationError
from ase_enf.sampling.samplers import resolve_sampler

FAST = Solver("midpoint", steps=4, warp=1.5)
COMPOSITIONS = {"H2O": 3, "CH4": 1, "CHO": 2}


@pytest.fixture
def joint(make_flow):
    return make_flow("joint", layers=1).double()


@pytest.fixture
def given(make_flow):
    return make_flow("given", layers=1, compositions=COMPOSITIONS).double()


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.numbers.tolist() == b.numbers.tolist()
        assert np.allclose(a.positions, b.positions, rtol=0, atol=1e-10)
        assert a.info == b.info


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("n", [6, 9])
def test_a_molecule_depends_on_seed_and_index_alone(flow, n, batch_size):
    flow = flow.double()
    fields = {"formula": "C2H6O"} if flow.features == "given" else {}
    reference = generate(flow, 6, seed=3, solver=FAST, **fields)
    assert len({len(atoms) for atoms in reference}) > 1 or fields  # of several sizes, so batches are mixed
    assert_same(generate(flow, n, seed=3, solver=FAST, batch_size=batch_size, **fields)[:6], reference)


@pytest.mark.parametrize("start", [1, 4])
def test_processes_share_one_sequence(joint, start):
    reference = generate(joint, 6, seed=3, solver=FAST)
    assert_same(list(igenerate(joint, 6 - start, seed=3, solver=FAST, start=start)), reference[start:])


def test_seeds_and_indices_differ(joint):
    drawn = [a for seed in (0, 1) for a in generate(joint, 3, seed=seed, n_atoms=5, solver=FAST)]
    for a, b in itertools.combinations(drawn, 2):
        assert np.abs(a.positions - b.positions).max() > 1e-3


def test_sizes_follow_the_prior(make_flow):
    flow = make_flow("none", layers=1, hidden=4, sizes={2: 1, 3: 3, 4: 4})
    n = 400
    counts = Counter(len(a) for a in generate(flow, n, seed=1, solver=Solver("euler", steps=1), batch_size=n))
    assert set(counts) == {2, 3, 4}
    expected = {2: n / 8, 3: 3 * n / 8, 4: n / 2}
    assert sum((counts[size] - e) ** 2 / e for size, e in expected.items()) < 13.8  # χ² of 2, p = 0.001


def test_latents_are_of_the_base_distribution(make_flow, monkeypatch):
    flow = make_flow("none", layers=1, hidden=4, sizes={3: 1}).double()
    seen = []
    sample = ENF.sample
    monkeypatch.setattr(ENF, "sample", lambda self, z_x, *rest: (seen.append(z_x), sample(self, z_x, *rest))[1])
    generate(flow, 600, solver=Solver("euler", steps=1), batch_size=600)
    z = torch.cat(seen).flatten(1).numpy()  # (600, 9)
    projector = np.kron(np.eye(3) - 1 / 3, np.eye(3))
    assert np.abs(np.cov(z.T) - projector).max() < 0.25  # 4 standard errors
    assert np.abs(z.reshape(-1, 3, 3).sum(axis=1)).max() < 1e-12


@pytest.mark.parametrize("n_atoms", [2, 9])
def test_n_atoms_fixes_the_size(joint, n_atoms):
    assert {len(a) for a in generate(joint, 4, n_atoms=n_atoms, solver=FAST)} == {n_atoms}


@pytest.mark.parametrize("formula", ["CH4", "C2H6O", "OH2"])
def test_formula_fixes_the_composition(given, formula):
    for atoms in generate(given, 3, formula=formula, solver=FAST):
        assert atoms.symbols.formula.count() == Formula(formula).count()


def test_compositions_are_drawn_from_the_training_counts(given):
    n = 240
    counts = Counter(
        a.get_chemical_formula() for a in generate(given, n, seed=2, solver=Solver("euler", steps=1), batch_size=n)
    )
    assert set(counts) == set(COMPOSITIONS)
    expected = {formula: n * count / 6 for formula, count in COMPOSITIONS.items()}
    assert sum((counts[formula] - e) ** 2 / e for formula, e in expected.items()) < 13.8
    assert {a.get_chemical_formula() for a in generate(given, 12, n_atoms=3, solver=FAST)} == {"H2O", "CHO"}


def test_positions_are_centred_and_without_cell(joint):
    for atoms in generate(joint, 4, solver=FAST):
        assert np.abs(atoms.positions.mean(axis=0)).max() < 1e-12
        assert not atoms.pbc.any() and not atoms.cell.any()


@pytest.mark.parametrize("dimension", [2, 3])
def test_positions_only_gives_unknown_elements(make_flow, dimension):
    flow = make_flow("none", dimension=dimension, layers=1).double()
    for atoms in generate(flow, 3, n_atoms=5, solver=FAST):
        assert str(atoms.symbols) == "X5"
        assert bool(np.ptp(atoms.positions[:, 2])) == (dimension == 3)
        assert np.ptp(atoms.positions[:, :2], axis=0).min() > 0.01
        assert "enf_charge_mismatches" not in atoms.info


def test_charge_mismatches_count_atoms_of_another_charge(joint, monkeypatch):
    sample = ENF.sample

    def one_wrong(self, *arguments):
        batch = sample(self, *arguments)
        z = torch.tensor([1.0, 6.0, 8.0], dtype=batch.types.dtype)  # H, C, O
        charges = (batch.types @ z).unsqueeze(-1)
        charges[:, 0] += 1.0
        return batch._replace(charges=charges)

    monkeypatch.setattr(ENF, "sample", one_wrong)
    assert [a.info["enf_charge_mismatches"] for a in generate(joint, 3, solver=FAST)] == [1, 1, 1]


BAD = [
    ("joint", {"n": 0}, "n=0"),
    ("joint", {"n": -3}, "n=-3"),
    ("joint", {"seed": -1}, "seed=-1"),
    ("joint", {"batch_size": 0}, "batch_size=0"),
    ("joint", {"n_atoms": 4}, "n_atoms=4"),
    ("joint", {"n_atoms": 0}, "n_atoms=0"),
    ("joint", {"formula": "H2O"}, "features='given'"),
    ("none", {"formula": "H2O"}, "features='given'"),
    ("none", {"n_atoms": 99}, "n_atoms=99"),
    ("given", {"formula": "C7H1O("}, "C7H1O("),
    ("given", {"formula": ""}, "has no atoms"),
    ("given", {"formula": "CF4"}, "F unknown"),
    ("given", {"formula": "H"}, "one atom"),
    ("given", {"formula": "H2O", "n_atoms": 4}, "n_atoms=4"),
    ("given", {"n_atoms": 4}, "n_atoms=4"),
    ("joint", {"solver": "rk5"}, "'rk5'"),
    ("joint", {"steps": 0}, "steps=0"),
    ("joint", {"solver": "dopri5", "steps": 8}, "dopri5 chooses its own steps"),
    ("joint", {"solver": FAST, "steps": 8}, "leave one of them out"),
    ("joint", {"device": "cpuu"}, "'cpuu'"),
    ("joint", {"churn": 1.0}, "was not trained by it; use churn=0"),
    ("joint", {"solver": StochasticSampler(churn=1.0)}, "was not trained by it; use churn=0"),
    ("joint", {"churn": -1.0}, "churn=-1.0"),
    ("joint", {"churn": math.nan}, "churn=nan"),
    ("joint", {"solver": "dopri5", "churn": 1.0}, "and churn=1 are two ways to draw; leave one of them out"),
    ("joint", {"solver": StochasticSampler(), "steps": 8}, "already says its steps and churn"),
]


@pytest.mark.parametrize(("features", "request_", "words"), BAD)
def test_bad_requests_are_one_line_before_anything_is_drawn(make_flow, features, request_, words):
    flow = make_flow(features, layers=1, **({"compositions": COMPOSITIONS} if features == "given" else {}))
    for draw in (generate, igenerate):  # igenerate is not iterated here
        with pytest.raises(ValueError, match=".") as caught:
            draw(flow, **({"n": 2} | request_))
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_start(joint):
    with pytest.raises(ValueError, match="start=-1"):
        igenerate(joint, 1, start=-1)


def test_given_without_known_compositions_asks_for_a_formula(make_flow):
    with pytest.raises(ValueError, match="^this model knows .* give a formula$"):
        generate(make_flow("given", layers=1), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device(joint):
    with pytest.raises(ValueError, match="^device 'cuda'.*use cpu or auto$"):
        generate(joint, 1, device="cuda")


def test_resolve_solver():
    assert resolve_solver(None, None, SAMPLING_SOLVER) is not FAST
    assert resolve_solver(None, None, SAMPLING_SOLVER) == SAMPLING_SOLVER
    assert resolve_solver("rk4", 7, SAMPLING_SOLVER) == Solver("rk4", steps=7, warp=SAMPLING_SOLVER.warp)
    assert resolve_solver(FAST, None, SAMPLING_SOLVER) is FAST
    assert resolve_solver("dopri5", None, SAMPLING_SOLVER).adaptive
    with pytest.raises(TypeError, match="^solver stochastic, .*: has no likelihood; give a Solver or the name"):
        resolve_solver(STOCHASTIC_SAMPLER, None, SAMPLING_SOLVER)


def test_resolve_sampler(make_flow):
    flow = matched(make_flow("joint", layers=1, hidden=4))
    assert resolve_sampler(flow, None, None, None) == STOCHASTIC_SAMPLER
    assert resolve_sampler(flow, None, 8, 3.0) == dataclasses.replace(STOCHASTIC_SAMPLER, steps=8, churn=3.0)
    assert resolve_sampler(flow, None, 8, 0) == dataclasses.replace(flow.ode_solver, steps=8)
    assert resolve_sampler(flow, "rk4", None, 0) == resolve_sampler(flow, "rk4", None, None)
    assert resolve_sampler(flow, FAST, None, None) is FAST


def matched(flow):
    flow.config = dataclasses.replace(flow.config, path="linear")
    return flow


@pytest.mark.parametrize("churn", [0.5, 4.0])
def test_renewed_noise_is_each_molecules_own(flow, churn):
    flow = matched(flow.double())
    fields = {"formula": "C2H6O"} if flow.features == "given" else {}
    fields["steps"] = 4
    reference = generate(flow, 5, seed=3, churn=churn, **fields)
    assert reference[0].info["enf_solver"] == f"stochastic, 4 steps, warp 2, churn {churn:g}"
    for batch_size in (1, 2):
        assert_same(generate(flow, 5, seed=3, churn=churn, batch_size=batch_size, **fields), reference)
    for other in (generate(flow, 5, seed=s, churn=c, **fields) for s, c in ((3, 0), (3, 1.0), (4, churn))):
        pairs = [(a, b) for a, b in zip(other, reference, strict=True) if len(a) == len(b)]
        assert pairs and all(np.abs(a.positions - b.positions).max() > 1e-6 for a, b in pairs)


def test_fresh_noise_is_of_the_base_distribution(make_flow, monkeypatch):
    flow = matched(make_flow("joint", layers=1, hidden=4, sizes={3: 1}).double())
    seen, features = [], []

    def keep(self, z_x, z_h, mask, context, solver, noise, velocity):
        draws = [(z_x, z_h), noise(), noise()]
        seen.extend(x for x, _ in draws)
        features.extend(h for _, h in draws)
        return self.decode(z_x, z_h, mask, context)

    monkeypatch.setattr(ENF, "sample", keep)
    generate(flow, 600, solver=StochasticSampler(steps=1), batch_size=600)
    z = torch.stack(seen, dim=1).flatten(1).numpy()  # (600, 27): the start and two renewals
    projector = np.kron(np.eye(3), np.kron(np.eye(3) - 1 / 3, np.eye(3)))
    assert np.abs(np.cov(z.T) - projector).max() < 0.25  # 4 standard errors; nothing is drawn twice
    assert np.abs(z.reshape(-1, 3, 3, 3).sum(axis=2)).max() < 1e-12
    h = torch.stack(features, dim=1).flatten(1).numpy()
    assert np.abs(np.cov(h.T) - np.eye(h.shape[1])).max() < 0.25


def test_noise_is_renewed_by_default_for_molecules_of_flow_matching(make_flow):
    for features, path, expected in (
        ("joint", "linear", STOCHASTIC_SAMPLER),
        ("given", "linear", STOCHASTIC_SAMPLER),
        ("none", "linear", SAMPLING_SOLVER),
        ("joint", None, SAMPLING_SOLVER),
    ):
        flow = make_flow(features, layers=1)
        flow.config = dataclasses.replace(flow.config, path=path)
        assert flow.sampling_solver == expected
    flow = matched(make_flow("joint", layers=1, hidden=4))
    drawn = {
        words: generate(flow, 1, n_atoms=2, **request)[0].info["enf_solver"]
        for words, request in {
            "default": {},
            "steps": {"steps": 8},
            "name": {"solver": "midpoint", "steps": 8},
            "none": {"churn": 0},
        }.items()
    }
    assert drawn["default"] == str(STOCHASTIC_SAMPLER)
    assert drawn["steps"].startswith("stochastic, 8 steps") and "churn" in drawn["steps"]
    assert "churn" not in drawn["name"] + drawn["none"]


def test_igenerate_is_lazy_and_in_order(joint, monkeypatch):
    drawn = []
    sample = ENF.sample
    monkeypatch.setattr(ENF, "sample", lambda self, z, *rest: (drawn.append(len(z)), sample(self, z, *rest))[1])
    stream = igenerate(joint, 10**9, solver=FAST, batch_size=1)
    assert not drawn  # nothing is computed before the first molecule is requested
    first = list(itertools.islice(stream, 9))
    assert [a.info["enf_index"] for a in first] == list(range(9))
    assert 9 <= sum(drawn) <= 16  # the molecules of two windows at most, of a billion


def test_the_first_molecule_of_a_stream_comes_alone_and_the_next_by_the_batch(joint, monkeypatch):
    drawn = []
    sample = ENF.sample
    monkeypatch.setattr(ENF, "sample", lambda self, z, *rest: (drawn.append(len(z)), sample(self, z, *rest))[1])
    stream = igenerate(joint, 200, seed=1, solver=FAST, batch_size=16)
    following = [next(stream)]
    assert drawn == [1]
    following.append(next(stream))
    assert len(drawn) == 2  # its own batch, not the whole window
    several = [*following, *itertools.islice(stream, 30)]
    drawn.clear()
    whole = generate(joint, 32, seed=1, solver=FAST, batch_size=16)
    assert max(drawn) > 1 and len(drawn) <= 5  # a list waits for nothing: batches of each of the three sizes
    assert [a.info["enf_index"] for a in several] == [a.info["enf_index"] for a in whole] == list(range(32))
    assert_same(several, whole)


UNENDING = """
import sys, torch
from ase_enf.flow.continuous import ContinuousFlow, SolverError
from ase_enf.sampling.generate import generate
from ase_enf.sampling.sampler import GenerationError
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.flow.model import ENF
assert not __debug__  # assertions are left out
flow = ENF(ENFConfig(features="given", species=("H", "O"), sizes={3: 1}, hidden=8, layers=1))
with torch.no_grad():
    for parameter in flow.parameters():
        parameter.fill_(torch.nan)
try:
    generate(flow, 1, formula="H2O", solver="dopri5")
except GenerationError as error:
    print(error)
x = torch.randn(1, 3, 3)
try:
    explosion = lambda t, x, h: (20 * x * x.square().sum(), h)
    ContinuousFlow(explosion, torch.ones(1, 3, dtype=torch.bool)).forward(x, x[..., :0])
except SolverError as error:
    print(error)
"""


def test_a_solve_that_assertions_alone_would_end_is_an_error_without_them():
    words = [sys.executable, "-O", "-c", UNENDING]
    root = str(Path(ase_enf.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=100)
    first, second = done.stdout.splitlines()
    assert first.startswith("molecule 0 (seed 0) failed 10 times with dopri5; use more steps")
    assert second.startswith("dopri5 failed (the step size vanishes or is not finite); loosen rtol")


def fail(monkeypatch, bad, how):
    """Makes the integration of the latents that ``bad`` recognises fail."""
    sample = ENF.sample

    def failing(self, z_x, *rest):
        hit = torch.tensor([bad(z) for z in z_x.double()])
        if how == "error" and hit.any():
            raise SolverError("dt underflow")
        batch = sample(self, z_x, *rest)
        if how == "nan":
            batch.positions[hit, 0, 0] = torch.nan
        if how == "inf charge" and batch.charges.shape[-1]:
            batch.charges[hit, 0] = torch.inf
        if how == "collapse":
            batch.positions[hit] = 0.0
        return batch

    monkeypatch.setattr(ENF, "sample", failing)


@pytest.mark.parametrize("how", ["error", "nan", "inf charge", "collapse"])
def test_failed_integrations_are_drawn_again_and_said(joint, monkeypatch, how):
    good = generate(joint, 6, seed=3, solver=FAST)

    def latent(index, attempt):
        rng, noise = (
            np.random.default_rng(np.random.SeedSequence(3, spawn_key=key)) for key in ((index,), (index, attempt))
        )
        size = joint.size_prior.sample(rng)
        return base.sample_latent(noise, size, 3, joint.config.flow_features)[0]

    hopeless = [latent(1, 0), latent(4, 0), latent(4, 1)]
    fail(monkeypatch, lambda z: any(z.shape == h.shape and np.allclose(z, h) for h in hopeless), how)
    with pytest.warns(UserWarning, match="^3 of 9 integrations failed and were drawn again$"):
        atoms = generate(joint, 6, seed=3, solver=FAST, batch_size=4)
    assert [a.info["enf_attempts"] for a in atoms] == [1, 2, 1, 1, 3, 1]
    assert [a.info["enf_index"] for a in atoms] == list(range(6))
    untouched = [0, 2, 3, 5]
    assert_same([atoms[k] for k in untouched], [good[k] for k in untouched])
    for k in (1, 4):
        assert np.isfinite(atoms[k].positions).all() and np.abs(atoms[k].positions).max() > 0.01
        assert len(atoms[k]) == len(good[k])  # a failure must not tilt the sizes
        assert not np.allclose(atoms[k].positions, good[k].positions)


@pytest.mark.parametrize("how", ["error", "nan"])
def test_ten_failures_are_an_error(joint, monkeypatch, how):
    attempts = []
    fail(monkeypatch, lambda z: attempts.append(1) is None, how)
    with pytest.raises(GenerationError, match=r"^molecule 0 \(seed 5\) failed 10 times with midpoint; use more steps"):
        generate(joint, 1, seed=5, solver=FAST)
    assert len(attempts) == MAX_ATTEMPTS


@pytest.mark.parametrize("batch_size", [2, 64])
def test_closed_shells_are_drawn_by_rejection(joint, batch_size):
    everything = generate(joint, 12, seed=3, solver=FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # radicals are not failures
        closed = generate(joint, 12, seed=3, solver=FAST, batch_size=batch_size, closed_shell=True)
    odd = [bool(atoms.numbers.sum() % 2) for atoms in everything]
    assert any(odd) and not all(odd)
    assert not any(atoms.numbers.sum() % 2 for atoms in closed)
    assert [len(atoms) for atoms in closed] == [len(atoms) for atoms in everything]  # p_M stays
    assert [atoms.info["enf_attempts"] > 1 for atoms in closed] == odd
    assert all(atoms.info["enf_require"] == "closed_shell" for atoms in closed)
    for before, after, again in zip(everything, closed, odd, strict=True):
        if not again:
            assert before.numbers.tolist() == after.numbers.tolist()
            assert np.allclose(before.positions, after.positions, rtol=0, atol=1e-10)


def test_closed_shells_of_given_types_are_a_matter_of_formulas(given, make_flow):
    formulas = {atoms.get_chemical_formula() for atoms in generate(given, 20, solver=FAST, closed_shell=True)}
    assert formulas == {"H2O", "CH4"}  # CHO is a radical
    with pytest.raises(ValueError, match="^formula='CH3' has an odd number of electrons; leave closed_shell out$"):
        generate(given, 1, formula="CH3", closed_shell=True)
    radicals = make_flow("given", layers=1, compositions={"CH3": 1})
    with pytest.raises(ValueError, match="no such composition with an even number of electrons"):
        generate(radicals, 1, closed_shell=True)
    with pytest.raises(ValueError, match="knows no elements"):
        generate(make_flow("none", layers=1), 1, closed_shell=True)


def test_nothing_but_radicals_is_an_error(make_flow):
    scales = {"feature_shift": (1.0, 1.0), "feature_scale": (1.0, 1.0)}
    hydrogen = make_flow("joint", layers=1, species=("H",), sizes={3: 1, 4: 1}, **scales)
    generate(hydrogen, 1, n_atoms=4, solver=FAST, closed_shell=True)
    with pytest.raises(GenerationError, match=r"^molecule 0 \(seed 0\) had an odd number of electrons 100 times"):
        generate(hydrogen, 1, n_atoms=3, solver=FAST, closed_shell=True)


def test_success_is_silent(joint):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(joint, 3, solver=FAST)


def test_provenance_survives_extxyz(joint, tmp_path):
    joint.name = "tiny"
    atoms = generate(joint, 3, seed=7, solver="rk4", steps=3)
    write(tmp_path / "m.extxyz", atoms)
    back = read(tmp_path / "m.extxyz", index=":")
    for index, (before, after) in enumerate(zip(atoms, back, strict=True)):
        assert before.info == {
            "enf_model": "tiny",
            "enf_seed": 7,
            "enf_index": index,
            "enf_solver": "rk4, 3 steps, warp 1",
            "enf_attempts": 1,
            "enf_charge_mismatches": before.info["enf_charge_mismatches"],
        }
        assert after.info == before.info
        assert after.numbers.tolist() == before.numbers.tolist()


def test_adaptive_solvers_name_no_steps(given):
    assert generate(given, 1, solver="dopri5")[0].info["enf_solver"] == "dopri5, rtol 1e-05, atol 1e-05"


def test_the_default_solver_agrees_with_an_adaptive_one(make_flow):
    flow = make_flow("given", scale=0.3, layers=1).double()
    fixed, adaptive = (
        generate(flow, 2, formula="CH4", solver=solver) for solver in (None, Solver("dopri5", rtol=1e-8, atol=1e-8))
    )
    for a, b in zip(fixed, adaptive, strict=True):
        assert np.abs(a.positions - b.positions).max() < 0.01


def test_the_flow_is_not_modified(joint):
    before = copy.deepcopy(joint.state_dict())
    attributes = {k: v for k, v in vars(joint).items() if not k.startswith("_")}
    state = torch.get_rng_state()
    generate(joint, 2, solver=FAST, device="cpu")
    assert all(torch.equal(before[name], value) for name, value in joint.state_dict().items())
    assert {k: v for k, v in vars(joint).items() if not k.startswith("_")} == attributes
    assert torch.equal(torch.get_rng_state(), state)  # randomness is an argument


def test_the_progress_bar_is_shown_when_asked(joint, capsys):
    generate(joint, 2, solver=FAST, progress=False)
    assert capsys.readouterr().err == ""
    generate(joint, 2, solver=FAST, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_the_name_stays_a_function():
    import ase_enf

    assert callable(ase_enf.generate) and sys.modules["ase_enf.sampling.generate"].generate is ase_enf.generate


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 2.5}, "n=2.5: must be a whole"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"n_atoms": 3.0}, "n_atoms=3.0"),
        ({"seed": np.array(3)}, "^seed=3: must be a whole number, not ndarray$"),
        ({"seed": np.eye(3, dtype=int)}, r"^seed=\[\[1 0 0\] .*: must be a whole number, not ndarray$"),
        ({"n": torch.tensor(1)}, r"^n=tensor\(1\): must be a whole number, not Tensor$"),
        ({"seed": None}, "^seed=None: must be a whole number, not NoneType$"),
    ],
)
def test_numbers_are_whole(make_flow, options, words):
    with pytest.raises(ValueError, match=words):
        generate(make_flow("joint", layers=1), **{"n": 1, "n_atoms": None} | options)


def test_a_name_is_no_flow():
    with pytest.raises(TypeError, match="expected a flow, got 'qm9'"):
        generate("qm9", 1)


def test_a_size_between_those_seen_is_refused_with_its_neighbours(make_flow):
    with pytest.raises(ValueError, match="n_atoms=4: .* such as 3 or 5"):
        generate(make_flow("joint", layers=1), 1, n_atoms=4)


def test_a_formula_may_be_one_of_ase_and_a_large_one_is_named(make_flow, ethanol):
    flow = make_flow("given", layers=1)
    assert generate(flow, 1, formula=ethanol.symbols, steps=2)[0].get_chemical_formula() == "C2H6O"
    with pytest.warns(UserWarning, match="formula='C12' has 12 atoms; this model saw at most 9"):
        generate(flow, 1, formula="C12", steps=2)
    with pytest.raises(ValueError, match="has 99999999999 atoms, too many"):
        generate(flow, 1, formula="H99999999999")
