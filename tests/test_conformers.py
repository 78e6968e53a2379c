"""Statistics and baseline of the conformer benchmark: they agree with their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import molecule
from scipy.integrate import trapezoid
from scipy.stats import special_ortho_group

from ase_enf.flow.config import ENFConfig
from ase_enf.flow.model import ENF
from benchmarks.models import conformers
from benchmarks.models.conformers import attach_scores
from benchmarks.models.conformers_geometries import MMFF, OTHERS, XTB, Topology, bond_fault, distinct
from benchmarks.models.conformers_histogram import DistanceHistogram
from benchmarks.models.conformers_tables import (
    FLOW,
    HISTOGRAM,
    auc,
    bootstrap,
    energy_table,
    energy_verdict,
    geometry_table,
    geometry_verdict,
    paired_auc,
)

NAMES = ("CH3CH2OH", "CH3CN", "C6H6", "H2O", "CH3OH")


def noisy(count: int = 40) -> list[Atoms]:
    result = [molecule(NAMES[k % len(NAMES)]) for k in range(count)]
    for k, item in enumerate(result):
        item.rattle(0.05, seed=k)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    positive, negative = rng.integers(0, 4, 13).astype(float), rng.integers(-1, 3, 8).astype(float)  # ties abound
    wins = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)]
    assert auc(positive, negative) == pytest.approx(np.mean(wins), abs=1e-12)
    assert auc(positive, negative) + auc(negative, positive) == pytest.approx(1.0)
    assert auc(np.exp(positive), np.exp(negative)) == auc(positive, negative)  # only ranks count


def test_auc_at_its_ends():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0, 1.5])) == 1.0
    assert auc(np.ones(3), np.ones(4)) == 0.5
    assert paired_auc(np.ones(3), np.ones(3)) == 0.5


def test_an_offset_of_the_molecule_ruins_the_pooled_auc_and_not_the_paired_one():
    offset = 100.0 * np.arange(20)
    assert paired_auc(offset + 1, offset) == 1.0
    assert auc(offset + 1, offset) == pytest.approx(0.525)


def test_bootstrap_is_the_binomial_error_of_a_share():
    wins = np.repeat([1.0, 0.0], [150, 50])
    error = bootstrap(paired_auc, wins, np.full(200, 0.5))
    assert error == pytest.approx(np.sqrt(0.75 * 0.25 / 200), rel=0.1)
    # Members of a pair stay together: a constant difference has no error, however much the pairs differ.
    assert bootstrap(paired_auc, np.arange(9.0), np.arange(9.0) - 1) == 0.0


@pytest.mark.parametrize(("width", "smoothing"), [(0.0025, 1.0), (0.02, 0.0), (0.1, 2.0)])
def test_densities_of_distances_integrate_to_one(width, smoothing):
    histogram = DistanceHistogram.fit(noisy(), width, smoothing, reach=6.0)
    centres = width * (np.arange(round(6.0 / width)) + 0.5)
    d = np.concatenate([[0.0], centres, [6.0]])  # linear between the centres, constant in the outer halves
    for first, second in itertools.product((1, 6, 8, 2), repeat=2):  # helium was never seen
        density = histogram.density(first, second, d)
        assert (density > 0).all()
        assert trapezoid(density, d) == pytest.approx(1.0, abs=1e-9)
        assert np.array_equal(density, histogram.density(second, first, d))


def test_densities_are_highest_where_the_distances_are():
    histogram = DistanceHistogram.fit([Atoms("CO", [(0, 0, 0), (0, 0, 1.128)])] * 10, 0.02)
    d = np.linspace(0.5, 3.0, 501)
    assert d[histogram.density(6, 8, d).argmax()] == pytest.approx(1.13, abs=0.011)


def test_baseline_is_the_sum_over_pairs():
    histogram, water = DistanceHistogram.fit(noisy(), 0.05), molecule("H2O")
    pairs = [(0, 1), (0, 2), (1, 2)]
    by_hand = sum(
        np.log(histogram.density(*water.numbers[list(pair)], np.array([water.get_distance(*pair)]))[0])
        for pair in pairs
    )
    assert histogram.log_likelihood(water) == pytest.approx(by_hand)


def test_baseline_does_not_see_rotation_reflection_translation_or_order():
    histogram, atoms = DistanceHistogram.fit(noisy()), molecule("CH3CH2OH")
    expected = histogram.log_likelihood(atoms)
    moved = atoms.copy()
    moved.positions = -moved.positions @ special_ortho_group.rvs(3, random_state=0) + [1.0, -2.0, 3.0]
    shuffled = moved[np.random.default_rng(0).permutation(len(moved))]
    assert histogram.log_likelihood(shuffled) == pytest.approx(expected, abs=1e-6)
    stretched = atoms.copy()
    stretched.positions *= 1.2
    assert histogram.log_likelihood(stretched) < expected - 10


def test_bonds_break_and_form_but_do_not_breathe():
    ethanol = molecule("CH3CH2OH")
    hot = ethanol.copy()
    hot.rattle(0.05, seed=0)
    assert bond_fault(ethanol, ethanol) == bond_fault(ethanol, hot) == "none"
    torn = ethanol.copy()
    torn.positions[3] *= 2.0
    assert bond_fault(ethanol, torn) == bond_fault(torn, ethanol) == "other bonds"


def test_repetitions_and_mirror_images_are_one_conformer():
    first = molecule("H2O2")
    mirror = first.copy()
    mirror.positions *= [1, 1, -1]
    turned = first.copy()
    turned.set_dihedral(2, 0, 1, 3, 180.0, indices=[3])
    assert distinct([first, mirror, turned, first], [0.0, 1e-4, 0.1, 0.0]) == [first, turned]
    assert distinct([first, mirror], [0.0, 0.1]) == [first, mirror]  # another energy, another conformer


def test_mmff_relaxes_downhill_and_says_what_it_lacks():
    ethanol = molecule("CH3CH2OH")
    topology = Topology.of(ethanol)
    relaxed, fault = topology.relaxed(ethanol)
    assert fault == "none" and topology.energy(relaxed) < topology.energy(ethanol)
    radical = Topology.of(molecule("CH3"))
    assert radical.mol is None and np.isnan(radical.energy(molecule("CH3")))
    assert radical.relaxed(molecule("CH3"))[1] == "no bond orders"


def described(kind: str, log_p: float, energy: float, mmff: float = 0.0, fault: str = "none") -> Atoms:
    item = molecule("H2O")
    item.info = {"kind": kind, "fault": fault, FLOW: log_p, HISTOGRAM: 0.0, XTB: energy, MMFF: mmff}
    return item


def test_what_failed_is_counted_and_the_verdict_is_plain():
    rng = np.random.default_rng(0)
    groups = [
        [
            described("DFT", 10.0, -5.0),
            *(described(kind, 9.0 if "noise" in kind else 11.0, -4.0, rng.normal()) for kind in OTHERS[:-1]),
            described(OTHERS[-1], 0.0, -6.0, fault="other bonds" if k < 3 else "none"),
        ]
        for k in range(8)
    ]
    groups[0][1].info[MMFF] = np.nan
    table = geometry_table(groups)
    rows = table.set_index(["against", "score"])
    assert rows.loc[(OTHERS[-1], FLOW), ["molecules", "left out"]].tolist() == [5, 3]
    assert rows.loc[(OTHERS[0], MMFF), ["molecules", "left out"]].tolist() == [7, 1]
    assert rows.value[OTHERS[0], FLOW] == 1.0 and rows.accuracy[OTHERS[0], FLOW] == "1.000 ± 0.106"
    assert rows.value[OTHERS[0], HISTOGRAM] == 0.5 and rows.accuracy[OTHERS[0], HISTOGRAM].startswith("0.000")
    assert rows["median difference"]["MMFF94", XTB] == "1 eV"
    words = geometry_verdict(table)
    assert "* it prefers the other geometry: MMFF94 (0.000 ± 0.000)" in words
    assert "GFN2-xTB energy: as good or better: noise 0.02 Å (1.000" in words


def test_a_molecule_without_any_counterpart_leaves_an_empty_row():
    table = geometry_table([[described("DFT", 1.0, 0.0)]])
    assert (table.molecules == 0).all() and (table["left out"] == 1).all() and (table.accuracy == "").all()
    assert "nowhere" in geometry_verdict(table)


def test_ranks_of_energies():
    energies = np.linspace(0.0, 0.4, 8)
    groups = [[described("conformers", -value, value, -value) for value in energies] for _ in range(3)]
    groups.append([described("conformers", 0.0, value, np.nan) for value in energies[:2]])  # too few to rank
    table = energy_table({"conformers": groups})
    rows = table.set_index("score")
    assert rows.Spearman[FLOW] == "1.000 ± 0.000" and rows.Kendall[MMFF] == "-1.000 ± 0.000"
    assert (
        rows["picked, meV"][FLOW] == "0" and rows["picked, meV"][MMFF] == "400" and rows["random, meV"][FLOW] == "200"
    )
    assert rows.loc[FLOW, ["molecules", "left out"]].tolist() == [3, 1]
    assert "nowhere" in energy_verdict(table[table.score != HISTOGRAM])


def test_scores_are_kept(monkeypatch, tmp_path):
    flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
    items = [described("DFT", 0.0, 0.0) for _ in range(3)]
    for k, item in enumerate(items):
        item.rattle(0.05, seed=k)
        item.info["name"] = f"water_{k}"
    attach_scores(flow, items[:2], tmp_path)
    first = [item.info[FLOW] for item in items[:2]]
    asked = []
    score = conformers.ase_enf.score

    def counted(flow: ENF, atoms: list[Atoms], **options: object) -> pd.DataFrame:
        asked.extend(atoms)
        return score(flow, atoms, **options)

    monkeypatch.setattr(conformers.ase_enf, "score", counted)
    attach_scores(flow, items, tmp_path)
    assert asked == items[2:]
    assert [item.info[FLOW] for item in items[:2]] == first and np.isfinite(items[2].info[FLOW])
