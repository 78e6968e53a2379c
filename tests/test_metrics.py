"""The report on a set of structures: values computed by hand, denominators, standard errors, and invariances."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from ase.data import atomic_numbers

from ase_enf import chem, metrics
from ase_enf.chem.convert import rdkit_version, to_smiles
from ase_enf.metrics import Reference, evaluate, survey

pytest.importorskip("rdkit")

QM9_SIZES = {  # molecules of each size in the training split, as published
    3: 1, 4: 4, 5: 5, 6: 9, 7: 16, 8: 49, 9: 124, 10: 362, 11: 807, 12: 1689, 13: 3060, 14: 5136, 15: 7796, 16: 10644,
    17: 13025, 18: 13364, 19: 13832, 20: 9482, 21: 9970, 22: 3393, 23: 4848, 24: 539, 25: 1506, 26: 48, 27: 266, 29: 25,
}  # fmt: skip
SHARED_QM9 = Path(__file__).parents[2] / "shared" / "data" / "qm9.npz"


def separated(*names: str) -> Atoms:
    """Returns molecules 9 Å apart as one structure."""
    together = Atoms()
    for place, name in enumerate(names):
        part = molecule(name)
        part.positions[:, 0] += 9 * place
        together += part
    return together


@pytest.fixture
def mixed() -> list[Atoms]:
    """Two methanes, a water, a radical, two molecules in one structure, and carbon with five hydrogens."""
    crowded = Atoms("CH5", [(0, 0, 0), (1.1, 0, 0), (-1.1, 0, 0), (0, 1.1, 0), (0, -1.1, 0), (0, 0, 1.1)])
    return [molecule("CH4"), molecule("CH4"), molecule("H2O"), molecule("CH3"), separated("CH3OH", "CH4"), crowded]


@pytest.fixture
def report(mixed: list[Atoms]) -> pd.DataFrame:
    return evaluate(mixed, reference=["C"]).set_index("metric")


@pytest.mark.parametrize(
    ("metric", "numerator", "denominator"),
    [
        ("atom_stability", 5 + 5 + 3 + 3 + 11 + 5, 5 + 5 + 3 + 4 + 11 + 6),
        ("molecule_stability", 4, 6),
        ("connected", 5, 6),
        ("validity_stable", 4, 4),
        ("validity_largest_fragment", 5, 6),
        ("validity_strict", 3, 6),
        ("uniqueness_stable", 3, 4),  # C, O, CO.C
        ("uniqueness_stable_of_all", 3, 6),
        ("uniqueness_largest_fragment", 4, 5),  # C, O, [CH3], CO
        ("uniqueness_largest_fragment_of_all", 4, 6),
        ("uniqueness_strict", 2, 3),
        ("uniqueness_strict_of_all", 2, 6),
        ("novelty_stable", 2, 4),
        ("novelty_stable_of_all", 2, 6),
        ("novelty_largest_fragment", 3, 5),
        ("novelty_largest_fragment_of_all", 3, 6),
        ("novelty_strict", 1, 3),
        ("novelty_strict_of_all", 1, 6),
    ],
)
def test_values_and_denominators_by_hand(report: pd.DataFrame, metric: str, numerator: int, denominator: int) -> None:
    assert report.denominator[metric] == denominator
    assert report.value[metric] == pytest.approx(numerator / denominator)


def test_the_columns_are_the_contract(mixed: list[Atoms]) -> None:
    table = evaluate(mixed)
    assert list(table.columns) == ["metric", "value", "stderr", "denominator", "definition"]
    assert table.metric.is_unique
    assert table.definition.str.len().min() > 20
    assert pd.api.types.is_integer_dtype(table.denominator)


def test_rows_follow_what_the_reference_knows(mixed: list[Atoms]) -> None:
    def names(reference: object) -> set[str]:
        return set(evaluate(mixed, reference).metric)

    alone, smiles, structures = names(None), names(["C"]), names([molecule("CH4")])
    assert not any(name.startswith(("novelty", "distance")) for name in alone)
    assert smiles - alone == {name for name in smiles if name.startswith("novelty")}
    assert structures - smiles == {"distance_js"}


def test_attrs_hold_what_is_printed_with_the_figures(mixed: list[Atoms]) -> None:
    attrs = evaluate(mixed, reference=["C"]).attrs
    assert attrs["rdkit"] == rdkit_version()
    assert attrs["n_structures"] == 6
    assert attrs["reference_smiles"] == 1
    json.dumps(attrs)


def test_each_function_gives_its_row_of_the_report(mixed: list[Atoms], report: pd.DataFrame) -> None:
    rows = [metrics.atom_stability(mixed), metrics.molecule_stability(mixed), metrics.connected(mixed)]
    rows += [metrics.validity(mixed, name) for name in metrics.VALIDITY]
    rows += [metrics.uniqueness(mixed, name, over) for name in metrics.VALIDITY for over in ("valid", "all")]
    rows += [metrics.novelty(mixed, ["C"], name, over) for name in metrics.VALIDITY for over in ("valid", "all")]
    assert [row.metric for row in rows] == list(report.index)
    assert [row.value for row in rows] == pytest.approx(list(report.value))


def test_one_atoms_is_a_list_of_one() -> None:
    assert evaluate(molecule("CH4")).equals(evaluate([molecule("CH4")]))


def test_an_iterator_is_as_good_as_a_list(mixed: list[Atoms]) -> None:
    assert evaluate(iter(mixed)).equals(evaluate(mixed))


def test_a_broken_molecule_is_counted(report: pd.DataFrame, mixed: list[Atoms]) -> None:
    better = evaluate(mixed[:-1], reference=["C"]).set_index("metric")
    for metric in ("molecule_stability", "validity_largest_fragment", "validity_strict", "uniqueness_strict_of_all"):
        assert better.denominator[metric] - report.denominator[metric] == -1
        assert better.value[metric] > report.value[metric]


def test_a_structure_without_atoms_is_counted_as_a_failure() -> None:
    report = evaluate([molecule("CH4"), Atoms()]).set_index("metric")
    for metric in ("molecule_stability", "connected", "validity_largest_fragment", "validity_strict"):
        assert report.value[metric] == 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_position_that_is_not_finite_is_counted_as_a_failure(value: float) -> None:
    broken = molecule("H2O")
    broken.positions[1, 2] = value
    whole = [molecule("CH4"), molecule("CH3OH")]
    report = evaluate([whole[0], broken, whole[1]], reference=[whole[0]]).set_index("metric")
    for metric in ("molecule_stability", "connected", "validity_largest_fragment", "validity_strict"):
        assert (report.value[metric], report.denominator[metric]) == (pytest.approx(2 / 3), 3)
    assert (report.value["atom_stability"], report.denominator["atom_stability"]) == (pytest.approx(11 / 14), 14)
    assert report.value["distance_js"] == pytest.approx(metrics.distance_js(whole, whole[:1]).value)
    assert evaluate(broken).set_index("metric").value["molecule_stability"] == 0
    assert metrics.as_reference([broken, whole[0]]).smiles == {"C"}


def test_an_atom_of_no_element_is_no_molecule() -> None:
    for atoms in (Atoms("X"), Atoms("XH", [(0, 0, 0), (0, 0, 1)])):
        report = evaluate(atoms, ["C"]).set_index("metric")
        for metric in ("molecule_stability", "validity_largest_fragment", "validity_strict", "novelty_strict_of_all"):
            assert report.value[metric] == 0


@pytest.mark.parametrize("smiles", ["[2H]C", "[13CH4]", "[CH4:7]", "[2H]C([2H])([3H])[1H:2]", "[14CH3:1][H]"])
def test_a_reference_that_marks_atoms_is_known(smiles: str) -> None:
    assert metrics.novelty([molecule("CH4")], [smiles]).value == 0


def test_metrics_do_not_depend_on_how_numpy_treats_underflow(mixed: list[Atoms]) -> None:
    with np.errstate(all="raise"):
        careful = evaluate(mixed, reference=mixed)
    assert careful.equals(evaluate(mixed, reference=mixed))


def test_nothing_valid_gives_nan_over_nothing_and_zero_over_all() -> None:
    report = evaluate([molecule("CH3")]).set_index("metric")
    assert math.isnan(report.value["validity_stable"])
    assert report.denominator["validity_stable"] == 0
    assert math.isnan(report.value["uniqueness_strict"])
    assert report.value["uniqueness_strict_of_all"] == 0


def test_the_order_of_structures_and_of_atoms_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    atoms = [molecule(name) for name in g2.names]
    shuffled = [atoms[i][rng.permutation(len(atoms[i]))] for i in rng.permutation(len(atoms))]
    one, other = evaluate(atoms, ["C"]), evaluate(shuffled, ["C"])
    assert np.allclose(one[["value", "stderr"]], other[["value", "stderr"]], equal_nan=True)


def test_the_input_is_not_modified(mixed: list[Atoms]) -> None:
    before = [item.copy() for item in mixed]
    evaluate(mixed, reference=mixed)
    assert mixed == before


def test_a_survey_stands_for_its_structures(mixed: list[Atoms]) -> None:
    assert evaluate(survey(mixed), survey(mixed[:2])).equals(evaluate(mixed, mixed[:2]))


def test_survey_agrees_with_to_smiles() -> None:
    seen = survey([molecule(name) for name in g2.names])
    assert [reading.smiles for reading in seen.readings] == [to_smiles(molecule(name)) for name in g2.names]


def test_binomial_stderr(mixed: list[Atoms]) -> None:
    p, n = 4 / 6, 6
    assert metrics.molecule_stability(mixed).stderr == pytest.approx(math.sqrt(p * (1 - p) / n))


def test_atoms_of_one_molecule_are_no_independent_draws() -> None:
    """If all atoms of a molecule are stable or none, the error is that of 10 independent draws, not of all atoms."""
    coins = [molecule("H2") if i % 2 else Atoms("H2", [(0, 0, 0), (0, 0, 3)]) for i in range(10)]
    assert metrics.atom_stability(coins).value == 0.5
    assert metrics.atom_stability(coins).stderr == pytest.approx(math.sqrt(0.25 / 9))


def test_the_ratio_stderr_is_the_spread_over_repetitions() -> None:
    rng = np.random.default_rng(0)
    kinds = [molecule("CH3"), molecule("CH4"), molecule("CH3CHO"), molecule("OH")]
    draws = [metrics.atom_stability([kinds[k] for k in rng.integers(4, size=60)]) for _ in range(150)]
    assert np.mean([draw.stderr for draw in draws]) == pytest.approx(np.std([draw.value for draw in draws]), rel=0.2)


def test_uniqueness_stderr_is_the_jackknife() -> None:
    atoms = [molecule(name) for name in ("CH4", "CH4", "H2O", "NH3", "CH3OH", "H2O", "HF")]
    n = len(atoms)
    left_out = np.array([metrics.uniqueness(atoms[:i] + atoms[i + 1 :]).value for i in range(n)])
    jackknife = math.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    assert metrics.uniqueness(atoms).stderr == pytest.approx(jackknife)


def test_js_of_a_set_with_itself_is_zero() -> None:
    atoms = [molecule(name) for name in g2.names]
    assert metrics.distance_js(atoms, atoms).value == pytest.approx(0, abs=1e-9)


def test_js_is_symmetric_and_bounded() -> None:
    one, other = ([molecule(name) for name in names] for names in (g2.names[::2], g2.names[1::2]))
    forth, back = metrics.distance_js(one, other).value, metrics.distance_js(other, one).value
    assert forth == pytest.approx(back)
    assert 0 < forth < math.log(2)


def test_js_of_disjoint_histograms_is_log_two() -> None:
    near, far = (Atoms("H2", [(0, 0, 0), (0, 0, d)]) for d in (1.0, 5.0))
    assert metrics.distance_js(near, [far]).value == pytest.approx(math.log(2), abs=1e-6)


def test_js_follows_its_formula() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    m = (p + q) / 2
    expected = (0.5 * math.log(0.5 / m[0]) * 2 + 0.25 * math.log(0.25 / m[0]) * 2 + 0.5 * math.log(0.5 / m[2])) / 2
    assert metrics.js_divergence(100 * p, 8 * q) == pytest.approx(expected, abs=1e-7)


def test_js_stderr_is_the_spread_over_repetitions() -> None:
    rng = np.random.default_rng(0)
    kinds = [molecule(name) for name in ("CH4", "CH3CH2OH", "C6H6", "CH3CHO")]
    known = metrics.as_reference([molecule(name) for name in g2.names])
    draws = [metrics.distance_js([kinds[k] for k in rng.integers(4, size=40)], known) for _ in range(60)]
    assert np.mean([draw.stderr for draw in draws]) == pytest.approx(np.std([draw.value for draw in draws]), rel=0.3)


def test_distances_are_counted_over_ordered_pairs_and_never_lost() -> None:
    counts = metrics.distance_counts(np.array([[[0.0, 0, 0], [0, 0, 1.0], [0, 0, 40.0]]]))
    assert counts.sum() == 6
    assert counts[0, 7] == 2
    assert counts[0, -1] == 4


def test_js_needs_distances() -> None:
    with pytest.raises(ValueError, match="the reference .* has no distances"):
        metrics.distance_js(molecule("CH4"), ["C"])


def test_a_molecule_without_distances_has_no_js() -> None:
    assert math.isnan(metrics.distance_js(Atoms("H"), [molecule("CH4")]).value)


def test_a_reference_of_smiles_is_made_canonical() -> None:
    assert metrics.as_reference(["OCC", "C(O)C", "C[C@H](O)F"]).smiles == {"CCO", "CC(O)F"}


def test_a_reference_of_structures_knows_them_all() -> None:
    atoms = [molecule(name) for name in ("CH4", "CH3CHO", "H2O")]
    assert metrics.novelty(atoms, atoms).value == 0
    assert metrics.novelty(separated("CH3OH", "CH4"), [molecule("CH3OH")], "largest_fragment").value == 0


def test_unreadable_smiles_of_a_reference_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"cannot read 1 of 2 .* 'C\('"):
        assert metrics.as_reference(["C", "C("]).n_structures == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: evaluate([]), ValueError, "no structures to evaluate"),
        (lambda: evaluate(molecule("CH4"), []), ValueError, "the reference is empty"),
        (lambda: evaluate(molecule("CH4"), "qm10"), ValueError, "unknown reference 'qm10': shipped are 'qm9'"),
        (lambda: evaluate(molecule("CH4"), ["C", 1]), TypeError, "SMILES strings only or Atoms only"),
        (lambda: evaluate([molecule("CH4"), None]), TypeError, "structure 1 is a NoneType"),
        (lambda: evaluate([bulk("Si")]), ValueError, "structure 0 .* is periodic"),
        (
            lambda: evaluate([molecule("CH4"), Atoms([119])]),
            ValueError,
            "structure 1 has the atomic number 119: .*; c",
        ),
        (lambda: evaluate(Atoms([-1])), ValueError, "structure 0 has the atomic number -1: .*; correct it"),
        (lambda: evaluate(molecule("CH4"), ["C(", "name"]), ValueError, r"cannot read any of the 2 .* 'C\(': give"),
        (lambda: metrics.validity(molecule("CH4"), "edm"), ValueError, "unknown definition 'edm': choose one of"),
        (lambda: metrics.uniqueness(molecule("CH4"), over="some"), ValueError, "choose 'valid' or 'all'"),
    ],
)
def test_mistakes_are_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_shipped_reference() -> None:
    reference = metrics.load_reference("qm9")
    assert reference.n_structures == 100_000
    assert 97_000 < len(reference.smiles) < 100_000
    assert reference.distances.sum() == sum(count * n * (n - 1) for n, count in QM9_SIZES.items())
    assert metrics.novelty([molecule("CH3COCH3"), molecule("SiH4")], "qm9").value == 0.5


def test_a_reference_survives_its_file(tmp_path: Path) -> None:
    reference = metrics.as_reference([molecule(name) for name in g2.names])
    for name in ("one.npz", "two.npz"):
        metrics.write_reference(reference, tmp_path / name)
    again = metrics.read_reference(tmp_path / "one.npz")
    assert (again.name, again.smiles, again.n_structures) == (reference.name, reference.smiles, reference.n_structures)
    assert np.array_equal(again.distances, reference.distances)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_the_elements_share_out_the_stable_atoms() -> None:
    atoms = [molecule(name) for name in g2.names] + [Atoms("X2", [(0, 0, 0), (0, 0, 2)]), Atoms()]
    atoms.append(Atoms("HF", [(0, 0, 0), (np.nan, 0, 0)]))  # cannot be read: neither atom counts as stable
    found, whole = metrics.stability_by_element(atoms), metrics.atom_stability(atoms)
    assert list(found) == sorted({symbol for item in atoms for symbol in item.symbols}, key=atomic_numbers.get)
    assert sum(metric.denominator for metric in found.values()) == whole.denominator
    stable = sum(metric.value * metric.denominator for metric in found.values())
    assert stable / whole.denominator == pytest.approx(whole.value, abs=1e-12)
    for symbol, metric in found.items():
        assert metric.denominator == sum(list(item.symbols).count(symbol) for item in atoms)
    assert found["X"].value == 0 and metrics.stability_by_element(atoms[-1])["F"].value == 0


def test_the_error_of_an_element_is_that_of_a_ratio() -> None:
    atoms = [molecule("CH4"), molecule("CH3"), molecule("C2H6"), molecule("H2O")]
    carbon = metrics.stability_by_element(atoms)["C"]
    stable, sizes = np.array([1, 0, 2, 0]), np.array([1, 1, 2, 0])  # a structure without carbon has no weight
    residual = stable - 0.75 * sizes
    assert carbon.value == 0.75
    assert carbon.stderr == pytest.approx(math.sqrt(4 / 3 * (residual**2).sum()) / 4)


def test_another_rdkits_reference_is_made_canonical_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Reference("old", frozenset({"OCC", "C"}), np.ones(100, dtype=np.int64), 2)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.reference, "rdkit_version", lambda: "1999.01.1")
        metrics.write_reference(old, tmp_path / "old.npz")
    with pytest.warns(UserWarning, match="written by RDKit 1999.01.1, this is .*: 1 of 2 SMILES changed"):
        assert metrics.read_reference(tmp_path / "old.npz").smiles == {"CCO", "C"}


def test_another_rdkit_that_agrees_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Reference("same", frozenset({"CCO"}), np.ones(100, dtype=np.int64), 1)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.reference, "rdkit_version", lambda: "1999.01.1")
        metrics.write_reference(same, tmp_path / "same.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.read_reference(tmp_path / "same.npz").smiles == {"CCO"}


def test_a_reference_without_distances_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no distances to write"):
        metrics.write_reference(metrics.as_reference(["C"]), tmp_path / "c.npz")


def test_importing_brings_neither_torch_nor_rdkit() -> None:
    heavy = "{'torch', 'rdkit', 'openbabel', 'matplotlib'}"
    code = f"import sys, ase_enf.metrics; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(not SHARED_QM9.exists(), reason="needs the QM9 archive, which is not part of the repository")
def test_qm9_is_as_stable_as_published() -> None:
    """The paper's Table 2: 99 % of atoms, 95.2 % of molecules; here on 5,000 molecules of its training split."""
    with np.load(SHARED_QM9, allow_pickle=False) as data:
        ends = np.cumsum(data["n_atoms"], dtype=np.int64)
        numbers, positions, split, sizes = data["numbers"], data["positions"], data["split"], data["n_atoms"]
    train = np.random.default_rng(0).choice(np.flatnonzero(split == 0), 5_000, replace=False)
    atoms = [Atoms(numbers[ends[i] - sizes[i] : ends[i]], positions[ends[i] - sizes[i] : ends[i]]) for i in train]
    stable_atoms, n_atoms, stable = chem.stability(atoms)
    assert stable_atoms.sum() / n_atoms.sum() == pytest.approx(0.9936, abs=0.002)
    assert stable.mean() == pytest.approx(0.953, abs=0.01)
