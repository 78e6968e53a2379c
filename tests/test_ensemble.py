"""A study from molecule to free energies: basins and errors, other isomers, and resuming of every stage."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import read

from ase_enf.chem.mmff import MMFF94
from ase_enf.ensemble import study as module
from ase_enf.ensemble.basins import Basins, Torsions, assign, free_energies
from ase_enf.ensemble.calculators import OUTSIDE, OneMolecule, calculator
from ase_enf.ensemble.study import boltzmann
from ase_enf.scoring.reweight import ReweightingError
from ase_enf.training.config import TrainConfig

TINY = TrainConfig(features="given", hidden=8, layers=1, steps=3, batch_size=8, validation_size=2, warmup=1)


@pytest.fixture(autouse=True)
def _once(dtype):
    if dtype != torch.float64:
        pytest.skip("nothing here depends on it")


@pytest.mark.parametrize("given", [MMFF94, None, 300.0])
def test_what_is_no_calculator_is_refused(tmp_path, given):
    with pytest.raises(TypeError, match=r"calculator=.*must be an ASE calculator or one of the names gfn2, gfn1, mmff"):
        boltzmann(molecule("CH3OH"), given, 300.0, tmp_path / "out")
    with pytest.raises(ValueError, match="calculator 'gfn3' is unknown"):
        boltzmann(molecule("CH3OH"), "gfn3", 300.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_free_energies_and_errors_of_known_shares():
    """Independent frames with populations of 70, 25 and 5 %, and equally many draws with these as weights."""
    truth, rng, found = np.array([0.7, 0.25, 0.05]), np.random.default_rng(0), []
    for _ in range(200):
        seen = rng.choice(3, (250, 4), p=truth)
        drawn = rng.integers(0, 3, 1500)
        weights = truth[drawn] * rng.gamma(2.0, size=1500)
        found.append(free_energies(Basins(["a", "b", "c"], seen, drawn), weights / weights.sum()))
    for way in ("md", "reweighted"):
        for name, exact in (("share", truth), ("free_energy", -np.log(truth / truth[0]))):
            values = np.array([table[f"{name}_{way}"] for table in found])
            errors = np.array([table[f"{name}_{way}_stderr"] for table in found]).mean(axis=0)
            spread = values.std(axis=0, ddof=1)
            assert np.allclose(values.mean(axis=0), exact, atol=0.03)
            assert np.allclose(errors, spread, rtol=0.25, atol=1e-12), (way, name)


def test_too_few_effective_samples_have_no_error():
    """A basin with a single draw, for which the delta method alone would give too small an error."""
    drawn = np.array([0] * 200 + [1] * 20)
    weights = np.ones(220)
    weights[200] = 50.0
    table = free_energies(Basins(["a", "b"], np.zeros((50, 4), dtype=int), drawn), weights / weights.sum())
    assert table.effective_reweighted[1] < 10 < table.effective_reweighted[0]
    assert np.isinf(table.share_reweighted_stderr[1]) and np.isinf(table.free_energy_reweighted_stderr[1])
    assert np.isfinite(table.share_reweighted_stderr[0])
    assert table.share_md[1] == 0 and np.isinf(table.free_energy_md[1]) and np.isinf(table.share_md_stderr[1])


def test_correlated_walkers_have_fewer_effective_frames():
    rng = np.random.default_rng(1)
    slow = np.repeat(rng.integers(0, 2, (100, 4)), 10, axis=0)
    table = free_energies(Basins(["a", "b"], slow, np.array([0, 1])), np.full(2, 0.5))
    assert table.effective_md.sum() == pytest.approx(400, rel=0.3)  # of 4,000
    assert table.share_md_stderr[0] == pytest.approx(0.5 / np.sqrt(400), rel=0.2)


def test_torsions_name_basins_and_mirror_images_share_one():
    ethanol = molecule("CH3CH2OH")
    other = ethanol.copy()
    basin = Torsions([(0, 1, 2, 3)])
    names = {}
    for angle in (60, 170, 190, 300):
        other.set_dihedral(0, 1, 2, 3, angle, indices=[3])
        names[angle] = basin(other)
    assert names == {60: "gauche", 170: "trans", 190: "trans", 300: "gauche"}
    found = assign(basin, [ethanol, other, other, other, ethanol], 2, [ethanol, other], np.array([1.0, 0.0]))
    assert found.names == ["gauche", "trans"]
    assert found.walkers.tolist() == [[1, 0], [0, 0]] and found.draws.tolist() == [1, -1]


def test_only_the_molecule_has_a_weight():
    ethanol = molecule("CH3CH2OH")
    bound = OneMolecule(ethanol, MMFF94(ethanol))
    energies = []
    for atoms in (ethanol, ethanol[[8, 0, 3, 1, 2, 4, 7, 6, 5]], molecule("CH3OCH3")):
        atoms.calc = bound
        energies.append(atoms.get_potential_energy())
    assert energies[0] == pytest.approx(energies[1], abs=1e-9) and energies[2] == OUTSIDE
    assert np.exp(-OUTSIDE / 1000.0) == 0 and bound.calls == 2


def test_in_order_only_one_numbering_of_equal_atoms_has_a_weight():
    ethanol = molecule("CH3CH2OH")
    bound = OneMolecule(ethanol, MMFF94(ethanol), ordered=True)
    swapped = ethanol.copy()
    swapped.positions[[3, 4]] = ethanol.positions[[4, 3]]  # the hydrogen of the hydroxyl group and one of a carbon
    for atoms, inside in ((ethanol, True), (swapped, False)):
        atoms.calc = bound
        assert (atoms.get_potential_energy() < OUTSIDE) == inside
    swapped.calc = OneMolecule(ethanol, MMFF94(ethanol))
    assert swapped.get_potential_energy() == pytest.approx(ethanol.get_potential_energy(), abs=1e-9)


def test_a_study_gives_the_flow_the_graph_of_the_molecule(tmp_path, monkeypatch):
    """The default training has it; draws then have the atoms and bonds of the molecule, in its order."""
    small = dataclasses.replace(TINY, graph=True)
    monkeypatch.setattr(module, "default_training", lambda atoms: small)
    monkeypatch.setattr(module, "OneMolecule", lambda atoms, calculator, ordered: calculator if ordered else None)
    water = molecule("H2O")[[1, 0, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = boltzmann(water, MMFF94(water), 300.0, tmp_path, n=16, draws=4, sampling={"burn_in": 5})
    assert study.flow.config.graph
    assert {str(atoms.symbols) for atoms in study.reweighted.samples} == {"HOH"}
    assert read(tmp_path / "thermal.extxyz").info["enf_bonds"] == "0-1-1 1-2-1"


def test_calculators_by_name():
    with pytest.raises(ValueError, match="calculator 'dft' is unknown; choose one of gfn2, gfn1, mmff"):
        calculator("dft", molecule("H2O"))
    pytest.importorskip("tblite")
    water = molecule("H2O")
    water.calc = calculator("gfn2", water)
    assert water.get_potential_energy() < -100


def test_a_study_is_resumed_stage_by_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 4)
    atoms, told = molecule("H2O"), []
    options = {
        "n": 48, "draws": 10, "basin": lambda atoms: "wide" if atoms.get_angle(1, 0, 2) > 104 else "narrow",
        "training": TINY, "sampling": {"leapfrog": 4, "burn_in": 40},
        "progress": lambda *heard: told.append(heard),
    }  # fmt: skip

    class Counting(MMFF94):
        calls = 0

        def calculate(self, *arguments) -> None:
            type(self).calls += 1
            super().calculate(*arguments)

    # Every draw of the untrained flow counts as the molecule: the stages are under test.
    class Anything(OneMolecule):
        def calculate(self, atoms=None, properties=("energy",), system_changes=()) -> None:
            super().calculate(atoms, properties, system_changes)
            if self.results["energy"] == OUTSIDE:
                self.results["energy"] = 0.5

    monkeypatch.setattr(module, "OneMolecule", Anything)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = boltzmann(atoms, Counting(atoms), 300.0, tmp_path / "out", **options)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files >= {
            "thermal.npz", "thermal.extxyz", "flow", "draws", "samples.extxyz", "free_energies.csv", "report.md",
            "log_weights.png",
        }  # fmt: skip
        assert len(read(tmp_path / "out" / "samples.extxyz", ":")) == len(first.reweighted.samples) == 10
        assert (tmp_path / "out" / "report.md").read_text().startswith("# H2O at 300 K")
        # A lost part of the draws is drawn again, with the same weights; the others are not.
        (tmp_path / "out" / "draws" / "part_0001_4.npz").unlink()
        # Each stage tells of its results. Parts of 4, 4 and 2 are drawn first: half of each draw, without its energy.
        halves = [2, 2, 3, 3, 4, *(parts := [6, 6, 7, 7, 8]), 9, 9, 10]
        for what, noun, counted, total in (
            ("sampling 48 frames of H2O at 300 K by Counting", "sweep", range(47), 46),
            ("training a flow on 40 frames of H2O at 300 K", "step", [1, 2, 3], 3),
            ("drawing 10 structures from the flow and weighting them by Counting", "draw", halves, 10),
        ):
            assert [done for *heard, done, most in told if (*heard, most) == (what, noun, total)] == [*counted]
        Counting.calls = 0
        told.clear()
        again = boltzmann(atoms, Counting(atoms), 300.0, tmp_path / "out", **options)
    assert np.array_equal(again.reweighted.log_weights, first.reweighted.log_weights)
    assert np.array_equal(again.ensemble.energies, first.ensemble.energies)
    assert [(noun, done) for _, noun, done, _ in told] == [("draw", done) for done in parts]
    assert Counting.calls <= 8 + 8 + 4  # walkers at the start and as saved, and the draws
    assert again.table.equals(first.table) and set(first.table.basin) <= {"wide", "narrow"}
    with pytest.raises(ValueError, match="drawn from another flow, or at other settings"):
        module.read_part(tmp_path / "out" / "draws" / "part_0000_4.npz", "another")


def test_a_flow_that_never_draws_the_molecule_says_so(tmp_path):
    atoms = molecule("CH3OH")
    with warnings.catch_warnings(), pytest.raises(ReweightingError, match="none of 3 draws is the molecule; train"):
        warnings.simplefilter("ignore")
        boltzmann(
            atoms, MMFF94(atoms), 300.0, tmp_path / "out", n=24, draws=3, training=TINY,
            sampling={"leapfrog": 2, "burn_in": 10}, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torsions": [(0, 1, 2, 9)]}, r"torsion \[0, 1, 2, 9\]: need four different atom indices from 0 to 8"),
        ({"torsions": [(0, 1, 1, 2)]}, "torsion"),
        ({"torsions": [(1, 0, 2, 3)]}, r"torsion \[1, 0, 2, 3\]: C0 and O2 are not bonded"),
        ({"draws": 0}, "draws=0"),
        ({"n": 0}, "n=0"),
        ({"sampling": {"turn": [(0, 2)]}}, "bonded atoms"),
    ],
)
def test_bad_input(tmp_path, options, message):
    atoms = molecule("CH3CH2OH")
    with pytest.raises(ValueError, match=message):
        boltzmann(atoms, MMFF94(atoms), 300.0, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
