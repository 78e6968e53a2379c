"""Fragments: kept atoms keep their places, the others follow the conditional distribution, bad input is one line."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms, FixBondLength
from ase.io import read, write
from commands import error_of, run
from scipy.stats import kstest

from ase_enf.flow.stochastic import StochasticSampler, sample_stochastic
from ase_enf.geometry import center
from ase_enf.sampling.fragments import BoundFragment, Fragment
from ase_enf.sampling.generate import generate
from ase_enf.sampling.particles import Particles

QUICK = StochasticSampler(steps=6, churn=50.0)


@pytest.fixture
def matched(make_flow):
    """Returns a small flow configured as trained by flow matching."""

    def build(features="joint", **fields):
        fields = {"layers": 1, "scale": 0.3, "sizes": {2: 1, 5: 2, 7: 2, 9: 1}, "path": "linear"} | fields
        return make_flow(features, **fields).double()

    return build


@pytest.fixture
def water():
    atoms = molecule("H2O")
    atoms.positions += [4.0, -2.0, 1.0]
    return atoms


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("features", ["joint", "given"])
def test_kept_atoms_stay_and_new_ones_are_appended(matched, water, features, batch_size):
    compositions = {"C2H5O": 1, "CH3O": 2, "CH4": 5}
    flow = matched(features, **({"compositions": compositions} if features == "given" else {}))
    drawn = generate(flow, 6, seed=1, fragment=water, solver=QUICK, batch_size=batch_size)
    assert {len(atoms) for atoms in drawn} <= {5, 7, 8, 9} and len({len(atoms) for atoms in drawn}) > 1
    for atoms in drawn:
        assert np.array_equal(atoms.positions[:3], water.positions)
        assert atoms.numbers[:3].tolist() == water.numbers.tolist()
        assert atoms.info["enf_fragment"] == "H2O"
        if features == "given":
            assert str(atoms.symbols.formula.convert("hill")) in {"C2H5O", "CH3O"}
    alone = generate(flow, 6, seed=1, fragment=water, solver=QUICK, batch_size=2)
    for ours, theirs in zip(drawn, alone, strict=True):
        assert np.allclose(ours.positions, theirs.positions, atol=1e-9)


def test_constraints_say_what_is_kept_and_survive(matched, tmp_path):
    ethanol = molecule("CH3CH2OH")
    ethanol.set_constraint(FixAtoms([0, 2, 5]))
    atoms = generate(matched(), 1, fragment=ethanol, solver=QUICK)[0]
    moved = np.abs(atoms.positions - ethanol.positions).max(axis=1)
    assert (moved[[0, 2, 5]] == 0).all() and (np.delete(moved, [0, 2, 5]) > 1e-3).all()
    assert atoms.numbers[[0, 2, 5]].tolist() == ethanol.numbers[[0, 2, 5]].tolist()
    write(tmp_path / "m.extxyz", atoms)
    assert read(tmp_path / "m.extxyz").constraints[0].get_indices().tolist() == [0, 2, 5]


def test_a_fragment_elsewhere_is_completed_there(matched, water):
    """The frame of the fragment affects only the frame of the completion."""
    flow = matched("given", compositions={"CH3O": 1}, sizes={5: 1})
    before = generate(flow, 1, fragment=water, solver=QUICK)[0]
    moved = water.copy()
    moved.positions += [-30.0, 7.0, 2.0]
    after = generate(flow, 1, fragment=moved, solver=QUICK)[0]
    assert np.allclose(after.positions - before.positions, [-30.0, 7.0, 2.0], atol=1e-8)


def noise_of(x, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)

    def draw():
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return center(z, mask), x[..., :0]

    return draw


def test_data_in_one_molecule_are_completed_exactly():
    """If D is the same for all x_t, the completion is that molecule, centred by its kept atoms."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1, 6, 3, generator=generator, dtype=torch.float64)
    data -= data.mean(dim=1, keepdim=True)
    kept = torch.tensor([1, 4])
    own = BoundFragment(data[0] + 2.5, data[0, :, :0], kept, None)
    noise = noise_of(data, seed=1)
    x, _ = sample_stochastic(lambda t, x, h: ((x - data) / t, h), *noise(), noise, QUICK, own.corrected)
    assert torch.allclose(x, data, atol=1e-12)


@pytest.mark.parametrize("churn", [1.0, 50.0])
def test_gaussian_data_are_completed_by_their_conditional(churn):
    """For independent atoms N(0, s²), a drawn atom is N(0, s² (1 + 1/K)) relative to the centre of K kept atoms."""
    s, n, size, kept = 0.7, 4000, 4, torch.tensor([0, 2])
    like = torch.zeros(n, size, 3, dtype=torch.float64)
    noise = noise_of(like, seed=3)

    def velocity(t, x, h):
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * x, h

    fragment = torch.tensor([[0.0, 0.0, 0.0], [9.0, 9.0, 9.0], [1.1, 0.2, -0.4], [9.0, 9.0, 9.0]], dtype=torch.float64)
    own = BoundFragment(fragment, fragment[:, :0], kept, None)
    sampler = StochasticSampler(steps=200, churn=churn)
    x, _ = sample_stochastic(velocity, *noise(), noise, sampler, own.corrected)
    between = x[:, 2] - x[:, 0]
    assert torch.allclose(between, (fragment[2] - fragment[0]).expand(n, 3), atol=1e-12)
    assert x.mean(dim=1).abs().max() < 1e-12
    away = (x[:, 3] - x[:, kept].mean(dim=1)) / (s * (1 + 1 / 2) ** 0.5)
    assert kstest(away.flatten().numpy(), "norm").pvalue > 1e-3


def test_particles_find_the_molecule_that_the_fragment_is_of():
    """Two atoms of the rarer of two molecules are kept; without particles, most completions are the other molecule."""
    data = torch.tensor([[[1.5, 0, 0], [-1.0, 0, 0], [0, 2.0, 0]], [[1.5, 0, 0], [-1.2, 0, 0], [0, -2.0, 0]]])
    data = (data - data.mean(dim=1, keepdim=True)).double()
    prior, molecules, count = torch.tensor([0.2, 0.8]).double(), 200, 16

    def velocity(t, x, h):
        apart = (x[:, None] - (1 - t) * data[None]).square().sum(dim=(2, 3))
        weights = torch.softmax(prior.log() - apart / (2 * t**2), dim=1)
        return (x - torch.einsum("bk,kin->bin", weights, data)) / t, h

    def share(count, select=None):
        noise = noise_of(torch.zeros(molecules * count, 3, 3, dtype=torch.float64), seed=2)
        x, _ = sample_stochastic(own.looking(velocity), *noise(), noise, sampler, own.corrected, 1.0, select)
        return x

    own = BoundFragment(data[0], data[0, :, :0], torch.tensor([0, 1]), None)
    sampler = StochasticSampler(steps=40, churn=2.0)
    particles = Particles(own.misfit, count, [np.random.default_rng(k) for k in range(molecules)])
    alone = (share(1)[:, 2, 1] > 0).double().mean()
    together = (share(count, particles.select)[particles.last()][:, 2, 1] > 0).double().mean()
    assert alone < 0.5 and together > 0.9


def test_particles_go_on_by_their_weights_and_independent_of_batch_mates():
    generators = [np.random.default_rng(3) for _ in range(2)]
    misfits = iter([[0.0] * 8, [0.0, 1.0, 60.0, 60.0] + [0.0] * 4, [0.0] * 8])
    particles = Particles(lambda t, x, h: torch.tensor(next(misfits)), 4, generators, until=0.1)
    assert particles.select(0.9, None, None) is None
    places = particles.select(0.5, None, None).tolist()
    assert places[4:] == [4, 5, 6, 7]  # whose weights are equal
    assert set(places[:4]) == {0, 1} and places[:4].count(0) in (2, 3)  # 4 / (1 + 1/e) = 2.9
    assert particles.select(0.05, None, None) is None  # too late for a comparison


def test_particles_that_are_not_finite_are_replaced():
    misfits = iter([[0.0] * 4, [np.nan, np.inf, np.nan, 3.0]])
    particles = Particles(lambda t, x, h: torch.tensor(next(misfits)), 4, [np.random.default_rng(0)])
    particles.select(0.9, None, None)
    assert particles.select(0.8, None, None).tolist() == [3] * 4


def test_strength_says_how_far_a_structure_is_varied(matched):
    """With data in one molecule y and a start from x at t, nothing of x remains at the end."""
    ethanol = molecule("CH3CH2OH")
    flow = matched("given", scale=0.0, compositions={"C2H6O": 1}, sizes={9: 1})
    with torch.no_grad():
        for weights in flow.parameters():
            weights.zero_()
    spread = []
    for strength in (0.05, 0.2, 0.8):
        drawn = generate(flow, 20, fragment=ethanol, strength=strength, solver=QUICK)
        assert all(atoms.numbers.tolist() == ethanol.numbers.tolist() for atoms in drawn)
        assert all(np.allclose(atoms.positions.mean(axis=0), ethanol.positions.mean(axis=0)) for atoms in drawn)
        assert {atoms.info["enf_strength"] for atoms in drawn} == {strength}
        spread.append(np.mean([np.abs(atoms.positions - ethanol.positions).mean() for atoms in drawn]))
    assert spread[0] < spread[1] < spread[2]
    ethanol.set_constraint(FixAtoms([0, 1]))
    for strength in (0.5, 0.01):  # the latter is too late for particles to be compared
        drawn = generate(flow, 1, fragment=ethanol, strength=strength, solver=QUICK)[0]
        assert np.array_equal(drawn.positions[:2], ethanol.positions[:2])


def test_latent_at_the_start_is_the_path():
    x, z = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, -1.0]]])
    own = BoundFragment(x, x, torch.tensor([], dtype=torch.long), 0.25)
    assert torch.allclose(own.started(z, z)[0], 0.75 * x + 0.25 * z)
    assert own.corrected(z, z)[0] is z
    assert BoundFragment(x, x, torch.tensor([0]), None).started(z, z)[0] is z


def test_given_elements_are_those_of_the_structure_and_the_rest(matched, water):
    fragment = Fragment(matched("given"), water)
    numbers = fragment.ordered(np.array([6, 1, 1, 1, 8, 1]))
    assert numbers[:3].tolist() == water.numbers.tolist()
    assert Counter(numbers.tolist()) == {1: 4, 8: 1, 6: 1}


def overlapping():
    return Atoms("OH2", [(0, 0, 0), (0, 0, 1), (0, 0, 1.3)])


def bonded():
    atoms = molecule("H2O")
    atoms.set_constraint(FixBondLength(0, 1))
    return atoms


def all_fixed():
    atoms = molecule("H2O")
    atoms.set_constraint(FixAtoms([0, 1, 2]))
    return atoms


@pytest.mark.parametrize(
    ("atoms", "fields", "message"),
    [
        (lambda: molecule("NH3"), {}, r"^fragment, structure 0 \(H3N\): element\(s\) N unknown to this model"),
        (overlapping, {}, r"^fragment: atoms 1 and 2 overlap, 0\.30 Å apart"),
        (lambda: Atoms("H", cell=[1, 1, 1], pbc=True), {}, "has periodic boundaries"),
        (lambda: molecule("C6H6"), {}, "^fragment: has 12 atoms, and this model saw at most 9"),
        (lambda: molecule("CH3CH2OH"), {}, "^fragment: has 9 atoms and leaves none to draw: this model saw at most 9"),
        (lambda: molecule("H2O"), {"n_atoms": 2}, "^n_atoms=2: the fragment has 3 atoms, 3 of them kept; ask for at"),
        (lambda: molecule("H2O"), {"strength": 1.5}, r"^strength=1\.5: must be in \(0, 1\]"),
        (lambda: molecule("H2O"), {"strength": 0.5, "n_atoms": 5}, "^n_atoms=5: variants of a structure have its 3"),
        (lambda: None, {"strength": 0.5}, r"^strength=0\.5: needs a structure to vary; give one"),
        (lambda: molecule("H2O"), {"churn": 0.0}, "^fragment: needs the stochastic sampler with churn, not "),
        (bonded, {}, "constraint FixBondLengths?, and only FixAtoms is understood"),
        (all_fixed, {"strength": 0.5}, r"^strength=0\.5: the constraint keeps every atom"),
    ],
)
def test_bad_fragments_are_one_line(matched, atoms, fields, message):
    with pytest.raises(ValueError, match=message):
        generate(matched(), 1, fragment=atoms(), **fields)


def test_flows_that_cannot_are_one_line(matched, make_flow, water):
    with pytest.raises(ValueError, match="^fragment: this model was not trained by flow matching"):
        generate(make_flow("joint", layers=1), 1, fragment=water)
    with pytest.raises(ValueError, match="^fragment: this model knows no elements"):
        generate(matched("none"), 1, fragment=water)
    with pytest.raises(ValueError, match="^fragment: formula='CH4' cannot hold H2O and at least 4 atoms"):
        generate(matched("given"), 1, fragment=water, formula="CH4")
    with pytest.raises(TypeError, match=r"^fragment: expected ase\.Atoms, got str"):
        generate(matched(), 1, fragment="water.xyz")


def test_the_command_completes_a_file(matched, tmp_path, water, capsys):
    flow = matched()
    flow.config = dataclasses.replace(flow.config, path="linear")
    flow.save(tmp_path / "flow.safetensors")
    water.set_constraint(FixAtoms([0, 1]))
    write(tmp_path / "water.extxyz", water)
    write(tmp_path / "two.xyz", [water, water])
    words = ["generate", tmp_path / "flow.safetensors", "-n", 2, "--steps", 4]
    assert run(*words, "-o", tmp_path / "m.extxyz", "--fragment", tmp_path / "water.extxyz") == 0
    for atoms in read(tmp_path / "m.extxyz", index=":"):
        assert np.allclose(atoms.positions[:2], water.positions[:2], atol=1e-6)
        assert atoms.constraints[0].get_indices().tolist() == [0, 1]
    said = error_of(capsys, *words, "-o", tmp_path / "n.extxyz", "--fragment", tmp_path / "two.xyz")
    assert "holds 2 structures; a fragment is one" in said
