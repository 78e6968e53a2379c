"""Structures to files: nothing is lost, and no partial file is left."""

from __future__ import annotations

import datetime
import os
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength
from ase.db import connect
from ase.db.sqlite import SQLite3Database
from ase.io import read, write
from ase.io.formats import ioformats
from ase.spacegroup import Spacegroup

import ase_enf
from ase_enf.atoms.io import GrowingFile, check_output, check_structures, write_structures
from ase_enf.data import qm9

INFO = {
    "enf_model": "tiny",
    "enf_seed": 7,
    "enf_log_likelihood": -12.345678901234567,
    "enf_log_likelihood_kind": "exact",
}


@pytest.fixture
def structures():
    many = [molecule(name) for name in ("H2O", "CH4", "CH3OH")]
    for index, atoms in enumerate(many):
        atoms.info |= INFO | {"enf_index": index, "enf_log_likelihood": -12.345678901234567 - index}
    return many


@pytest.mark.parametrize("name", ["m.extxyz", "m.xyz", "m.traj", "m.extxyz.gz", "m.xyz.bz2"])
def test_formats_that_keep_info(structures, tmp_path, name):
    assert write_structures(tmp_path / name, (atoms for atoms in structures)) == 3
    for before, after in zip(structures, read(tmp_path / name, index=":"), strict=True):
        assert after.numbers.tolist() == before.numbers.tolist()
        assert np.allclose(after.positions, before.positions, atol=1e-8)
        assert after.info == before.info
    assert os.listdir(tmp_path) == [name]


ODD = {
    "empty": "", "code": "007", "flag": "F", "none": None, "list": "[1, 2]", "equation": "x=1", "smiles": "C/C=C\\C",
    "quotes": '"it\'s"', "json": '_JSON "x"', "lines": "a\nb", "nan": "nan", "words": "two words",
    "more lines": "two words\nand more", "texts": ["C/C=C\\C", 'q"', "a b"], "nested": {"smiles": "C/C=C\\C"},
    "entropy": 2**127, "one": {"deep": [1, 2]},
}  # fmt: skip


@pytest.mark.parametrize("name", ["m.extxyz", "m.xyz", "m.extxyz.gz"])
def test_extended_xyz_gives_back_texts_as_they_were(tmp_path, name):
    atoms = molecule("H2O")
    atoms.info |= ODD
    write_structures(tmp_path / name, [atoms])
    assert read(tmp_path / name).info == ODD and atoms.info == ODD


def test_a_format_without_info_says_so(structures, tmp_path):
    with pytest.warns(UserWarning, match=r"keeps no info .*use \.extxyz"):
        write_structures(tmp_path / "m.pdb", structures[:1])


def test_databases_select_by_likelihood(structures, tmp_path):
    assert write_structures(tmp_path / "m.db", structures) == 3
    with connect(tmp_path / "m.db") as database:
        rows = list(database.select())
        assert [row.key_value_pairs for row in rows] == [
            {
                "log_likelihood": atoms.info["enf_log_likelihood"],
                "log_likelihood_kind": "exact",
                "seed": 7,
                "index": atoms.info["enf_index"],
            }
            for atoms in structures
        ]
        assert [row.data["info"] for row in rows] == [atoms.info for atoms in structures]
        assert [row.formula for row in database.select("log_likelihood>-13.4,log_likelihood_kind=exact")] == [
            "H2O",
            "CH4",
        ]
        assert np.array_equal(rows[2].toatoms().positions, structures[2].positions)
    assert os.listdir(tmp_path) == ["m.db"]


def test_databases_of_structures_without_provenance(tmp_path):
    atoms = molecule("H2O")
    atoms.info = {"mine": [1, 2]}
    write_structures(tmp_path / "m.db", [atoms])
    with connect(tmp_path / "m.db") as database:
        assert database.get(1).key_value_pairs == {} and database.get(1).data["info"] == {"mine": [1, 2]}


@pytest.mark.parametrize("ending", ["extxyz", "xyz", "db", "traj", "xyz.gz"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_half_way_leaves_the_old_file(structures, tmp_path, ending, error):
    path = tmp_path / f"m.{ending}"
    write_structures(path, structures[:1])
    before = path.read_bytes()

    def breaking():
        yield from structures
        raise error

    with pytest.raises(error):
        write_structures(path, breaking())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ["extxyz", "db", "traj"])
def test_an_old_file_is_replaced_not_extended(structures, tmp_path, ending):
    for many in (structures, structures[:1]):
        write_structures(tmp_path / f"m.{ending}", many)
    if ending == "db":
        assert connect(tmp_path / "m.db").count() == 1
    else:
        assert len(read(tmp_path / f"m.{ending}", index=":")) == 1


def test_streams_are_written_as_they_come(structures, tmp_path):
    sizes = []

    def watched():
        for atoms in structures:
            (part,) = tmp_path.iterdir()  # the temporary file alone
            sizes.append(part.name)
            yield atoms

    write_structures(tmp_path / "m.extxyz", watched())
    assert len(set(sizes)) == 1 and sizes[0] != "m.extxyz"


@pytest.mark.parametrize("name", ["m.nonsense", "m", "m.out", "m.log"])
def test_formats_that_cannot_be_written_are_refused_before_anything_is_drawn(tmp_path, name):
    def never():
        raise AssertionError("a structure was drawn")
        yield

    for check in (check_output, lambda path: write_structures(path, never())):
        with pytest.raises(ValueError, match=r"use \.extxyz") as caught:
            check(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_missing_folder_is_named(structures, tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder .*/no does not exist; create it first$"):
        write_structures(tmp_path / "no" / "m.extxyz", structures)
    assert not os.listdir(tmp_path)


def test_the_structures_are_not_modified(structures, tmp_path):
    before = [(atoms.copy(), dict(atoms.info)) for atoms in structures]
    for ending in ("extxyz", "db", "traj"):
        write_structures(tmp_path / f"m.{ending}", structures)
    assert all(atoms == copy and atoms.info == info for atoms, (copy, info) in zip(structures, before, strict=True))


def test_xyz_is_the_extended_format_that_plain_ase_writes(structures, tmp_path):
    write_structures(tmp_path / "ours.xyz", structures)
    write(tmp_path / "theirs.xyz", structures, format="extxyz")
    assert (tmp_path / "ours.xyz").read_text() == (tmp_path / "theirs.xyz").read_text()


def water(**info):
    atoms = molecule("H2O")
    atoms.info = info
    return atoms


def round_trip(path, atoms):
    """Writes a structure and returns what is read back, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_structures(path, [atoms])
    (back,) = qm9.load(path)
    return back


@pytest.mark.parametrize(
    "value", [np.array([]), [], np.array([5]), np.array([1.5, 2.0]), np.eye(2), np.zeros(2, np.uint8), [[1], [2]]]
)
@pytest.mark.parametrize("ending", ["extxyz", "xyz.gz", "db", "traj"])
def test_arrays_in_info_come_back(tmp_path, ending, value):
    info = round_trip(tmp_path / f"m.{ending}", water(value=value, after=1)).info
    assert info.keys() == {"value", "after"} and info["after"] == 1
    assert np.array_equal(info["value"], value)


@pytest.mark.parametrize("key", ["virial", "stress"])
def test_matrices_of_extended_xyz_come_back(tmp_path, key):
    for value in (np.diag([1.0, 2.0, 3.0]), np.diag([1.0, 2.0, 3.0]).tolist()):
        back = round_trip(tmp_path / "m.extxyz", water(**{key: value}))
        found = back.get_stress(voigt=False) if key == "stress" else back.info[key]
        assert np.array_equal(found, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("x", [[1, 2], [3]]),
        ("x", {1}),
        ("x", 1j),
        ("virial", np.zeros(6)),
        ("pbc", 3),
        ("Lattice", np.eye(3)),
        ("a=b", 1),
    ],
)
def test_what_extended_xyz_cannot_hold_is_named_and_the_rest_is_written(tmp_path, key, value):
    atoms = water(**{key: value, "after": 1})
    with pytest.warns(UserWarning) as caught:
        write_structures(tmp_path / "m.extxyz", [atoms, atoms])
    (message,) = (str(warning.message) for warning in caught)
    assert message == f"{tmp_path}/m.extxyz: this format keeps no info[{key!r}]; use .db to keep it"
    first, second = qm9.load(tmp_path / "m.extxyz")
    assert first.info == second.info == {"after": 1} and not first.pbc.any() and not first.cell.any()


NUMPY = {
    "int": np.int64(3), "flag": np.bool_(True), "real": np.float32(0.5), "text": np.str_("two words"), 7: "seven",
    "texts": np.array(["a", "bc"]), "mixed": np.array([1, "x", None], dtype=object), "group": Spacegroup(1),
    "nested": {1: [np.int64(4), (np.float64(0.5),)]}, "big": np.array([1.0, 2.0], dtype=">f8"), "complex": 1j,
}  # fmt: skip


def test_databases_hold_what_numpy_made(tmp_path):
    info = round_trip(tmp_path / "m.db", water(**{str(key): NUMPY[key] for key in NUMPY if key != 7})).info
    atoms = water()
    atoms.info = NUMPY
    assert round_trip(tmp_path / "n.db", atoms).info.pop("7") == "seven"
    assert info.pop("big").tolist() == [1.0, 2.0]
    assert info == {
        "int": 3, "flag": True, "real": 0.5, "text": "two words", "texts": ["a", "bc"], "mixed": [1, "x", None],
        "group": {"number": 1, "setting": 1}, "nested": {"1": [4, [0.5]]}, "complex": 1j,
    }  # fmt: skip
    with connect(tmp_path / "m.db") as database:
        assert database.get("int=3,flag=1,real=0.5").formula == "H2O"


def test_scores_of_a_written_file_go_to_a_database(structures, tmp_path):
    write_structures(tmp_path / "m.extxyz", structures)
    again = qm9.load(tmp_path / "m.extxyz")
    assert isinstance(again[0].info["enf_seed"], np.int64)
    write_structures(tmp_path / "m.db", again)
    assert [atoms.info["enf_index"] for atoms in qm9.load(tmp_path / "m.db")] == [0, 1, 2]


@pytest.mark.parametrize("value", [{1}, b"x", object(), np.datetime64("2020-01-01"), {"deep": [{1}]}, {1: 0, "1": 0}])
def test_what_a_database_cannot_hold_is_named(tmp_path, value):
    for refuses in (write_structures, check_structures):
        with pytest.raises(ValueError, match=r"^info\['mine'\].*; (remove|rename)") as caught:
            refuses(tmp_path / "m.db", [water(mine=value)])
        assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mine", np.array(["a", "", "c"])),
        ("mine", np.array(["a", "b c", "d"])),
        ("mine", np.array(["a", None, "d"], dtype=object)),
        ("mine", np.array([b"a", b"b", b"c"])),
        ("mine", np.zeros((3, 3, 3))),
        ("mine", np.zeros((3, 0))),
        ("mine", np.zeros(3, complex)),
        ("mine", np.array([1, 2, 2**31])),
        ("my array", np.zeros(3)),
        ("a:b", np.zeros(3)),
        ("pos", np.zeros(3)),
    ],
)
@pytest.mark.parametrize("ending", ["extxyz", "xyz.gz"])
def test_arrays_that_extended_xyz_cannot_hold_are_named(tmp_path, ending, name, array):
    atoms = water()
    atoms.set_array(name, array)
    for refuses in (write_structures, check_structures):
        with pytest.raises(ValueError, match=rf"^arrays\['{name}'\]: extended xyz cannot hold .*write \.db$") as caught:
            refuses(tmp_path / f"m.{ending}", [atoms])
        assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", ["extxyz", "xyz.gz", "db"])
@pytest.mark.parametrize(
    "array", [np.array(["a", "'b'", "c"]), np.arange(3, dtype=np.uint8), np.eye(3), np.array([True, False, True])]
)
def test_arrays_of_the_atoms_come_back(tmp_path, ending, array):
    atoms = water(mine=1)
    atoms.set_array("mine", array)
    back = round_trip(tmp_path / f"m.{ending}", atoms)
    assert np.array_equal(back.arrays["mine"], array) and back.info == {"mine": 1}
    assert atoms.arrays["mine"].dtype == array.dtype


def test_data_of_others_that_are_called_arrays_stay_in_info(tmp_path):
    for value in ("text", {"mine": [1, 2]}):
        with connect(tmp_path / "m.db", append=False) as database:
            database.write(molecule("H2O"), data={"arrays": value})
        assert qm9.load(tmp_path / "m.db")[0].info == {"arrays": value}


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("m.traj", "keeps no arrays['mulliken']; use .db to keep it"),
        ("m.extxyz", "keeps no FixBondLengths; use .db to keep it"),
        ("m.extxyz.gz", "keeps no FixBondLengths; use .db to keep it"),
        ("m.json", "may lose arrays['mulliken'], may lose FixBondLengths; use .extxyz, .xyz, .db, .traj to keep it"),
        ("m.db", None),
    ],
)
def test_arrays_and_constraints_that_vanish_are_named_once(tmp_path, name, lost):
    atoms = water()
    atoms.set_array("mulliken", np.zeros(3))
    atoms.set_constraint(FixBondLength(0, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_structures(tmp_path / name, [atoms, atoms])
    assert [str(warning.message) for warning in caught] == ([f"{tmp_path / name}: this format {lost}"] if lost else [])


def test_fixed_atoms_are_kept(tmp_path):
    atoms = water()
    atoms.set_constraint(FixAtoms([0]))
    for ending in ("extxyz", "traj", "db"):
        assert round_trip(tmp_path / f"m.{ending}", atoms).constraints[0].index.tolist() == [0]


@pytest.mark.parametrize("name", ["m.pdb", "m.PDB", "m.pdb.gz", "m.xsf", "m.xtd", "m.mol"])
def test_formats_of_one_formula_take_one_structure(structures, tmp_path, name):
    check_output(tmp_path / name)
    for refuses in (
        lambda path: check_output(path, 3),
        lambda path: write_structures(path, structures),
        lambda path: write_structures(path, iter(structures)),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}: the format .* holds one structure, not 3; use \.extxyz or \.db$"
        ):
            refuses(tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("m.db.gz", "use .db or .extxyz"),
        ("m.DB", "use .db or .extxyz"),
        ("m.json.gz", "leave .gz out, or use .extxyz"),
        ("m.arc.xz", "leave .xz out, or use .extxyz"),
    ],
)
def test_what_ase_cannot_compress_is_refused(tmp_path, name, remedy):
    if name == "m.arc.xz" and ioformats["dmol-arc"].acceptsfd:
        pytest.skip("this ASE can")
    with pytest.raises(ValueError, match=f"{name}: .*{remedy}$"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("name", ["m.poscar", "m.pwi", "m.xtl", "m.rmc6f", "m.cell.gz", "m.db", "m.extxyz"])
def test_errors_of_ases_writers_are_one_line(tmp_path, name, monkeypatch):
    def fail(*_, **__):
        raise KeyError("two\nlines")

    monkeypatch.setattr("ase_enf.atoms.io.write", fail)
    monkeypatch.setattr("ase.db.sqlite.SQLite3Database.write", fail)
    with pytest.raises(ValueError, match=rf"{name}: ASE cannot write .*KeyError.*; use \.extxyz or \.db$") as caught:
        write_structures(tmp_path / name, [water()])
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["m.poscar", "m.pwi", "m.xtl", "m.rmc6f"])
def test_formats_of_crystals_refuse_molecules_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: ASE cannot write these structures .*; use \.extxyz or \.db$"):
        write_structures(tmp_path / name, [water()])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", [-1, 119])
@pytest.mark.parametrize("ending", ["extxyz", "db", "traj"])
def test_atomic_numbers_of_no_element_are_not_written(tmp_path, ending, number):
    """ASE would write −1 as oganesson."""
    wrong = water()
    wrong.numbers[0] = number
    words = rf"^structure 1: has the atomic number {number}; elements are 1 to 118"
    with pytest.raises(ValueError, match=words):
        write_structures(tmp_path / f"m.{ending}", [water(), wrong])
    assert not os.listdir(tmp_path)
    with GrowingFile(tmp_path / f"m.{ending}") as file:
        file.add(water())
        with pytest.raises(ValueError, match=words):
            file.add(wrong)
    assert len(read(tmp_path / f"m.{ending}", ":")) == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ase_enf.atoms.io.write", full)
    with pytest.raises(OSError, match=r"m\.extxyz: cannot be written .*No space left.*make room"):
        write_structures(tmp_path / "m.extxyz", [water()])


COMPUTED = (
    "charge",
    "mass",
    "volume",
    "symbols",
    "fmax",
    "smax",
    "natoms",
    "formula",
    "count_atoms",
    "toatoms",
    "get",
    "_data",
)


@pytest.mark.parametrize("key", COMPUTED)
def test_keys_of_a_database_come_back_though_ase_computes_a_property_of_that_name(tmp_path, key):
    assert round_trip(tmp_path / "m.db", water(**{key: -1})).info == {key: -1}


@pytest.mark.parametrize("key", ["charge", "mass", "volume", "symbols"])
def test_keys_in_a_database_of_others_hide_behind_no_property(tmp_path, key):
    with connect(tmp_path / "theirs.db") as database:
        database.write(molecule("H2O"), key_value_pairs={key: -1})
    assert connect(tmp_path / "theirs.db").get(1).key_value_pairs != {key: -1}
    assert qm9.load(tmp_path / "theirs.db")[0].info == {key: -1}


def test_info_of_a_database_keeps_its_types_and_keys_that_were_changed_count(tmp_path):
    assert round_trip(tmp_path / "m.db", water(flag=True, gap=5.0)).info["flag"] is True
    with connect(tmp_path / "m.db") as database:
        database.update(1, gap=6.0, more="x")
    assert qm9.load(tmp_path / "m.db")[0].info == {"flag": True, "gap": 6.0, "more": "x"}


@pytest.mark.parametrize("ending", ["db", "extxyz", "traj"])
@pytest.mark.parametrize("start", ["db", "extxyz", "traj"])
def test_a_new_score_leaves_nothing_of_an_earlier_one(tmp_path, start, ending):
    scored = water(enf_log_likelihood=1.0, enf_log_likelihood_stderr=0.5, enf_log_likelihood_kind="bound")
    again = round_trip(tmp_path / f"a.{start}", scored)
    assert again.info == scored.info
    again.info["enf_log_likelihood"] = 2.0
    del again.info["enf_log_likelihood_stderr"]
    back = round_trip(tmp_path / f"b.{ending}", again)
    assert back.info == {"enf_log_likelihood": 2.0, "enf_log_likelihood_kind": "bound"}
    if ending == "db":
        (row,) = connect(tmp_path / "b.db").select()
        assert row.key_value_pairs == {"log_likelihood": 2.0, "log_likelihood_kind": "bound"}


def test_keys_without_prefix_of_an_earlier_score_are_no_keys_of_a_new_one(tmp_path):
    atoms = water(log_likelihood=1.0, log_likelihood_stderr=0.5, enf_log_likelihood=2.0)  # as from a row of ASE's
    write_structures(tmp_path / "m.db", [atoms])
    (row,) = connect(tmp_path / "m.db").select()
    assert row.key_value_pairs == {"log_likelihood": 2.0}


def computed(**results):
    atoms = water()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_what_stands_beside_a_result_of_a_calculator_is_named_and_the_result_is_written(tmp_path):
    atoms = computed(energy=-5.0, charges=np.ones(3))
    atoms.info |= {"energy": -1.0, "after": 1}
    atoms.set_array("charges", np.zeros(3))
    check_structures(tmp_path / "m.extxyz", [atoms])
    with pytest.warns(UserWarning, match=r"keeps no info\['energy'\] beside the calculator's, .*arrays\['charges'\]"):
        write_structures(tmp_path / "m.extxyz", [atoms])
    (back,) = qm9.load(tmp_path / "m.extxyz")
    assert back.get_potential_energy() == -5.0 and back.calc.results["charges"].tolist() == [1, 1, 1]
    assert back.info == {"after": 1} and atoms.info["energy"] == -1.0


def test_what_extended_xyz_takes_for_a_result_is_named(tmp_path):
    atoms = water(energy=-1.0, after=1)
    atoms.set_array("forces", np.ones((3, 3)))
    with pytest.warns(UserWarning, match=r"moves info\['energy'\] to .*results, moves arrays\['forces'\] to"):
        write_structures(tmp_path / "m.extxyz", [atoms])
    (back,) = qm9.load(tmp_path / "m.extxyz")
    assert back.get_potential_energy() == -1.0 and back.get_forces().tolist() == np.ones((3, 3)).tolist()


def test_what_is_no_result_is_not_written_under_the_name_of_one(tmp_path):
    with pytest.warns(UserWarning, match=r"keeps no info\['dipole'\]"):
        write_structures(tmp_path / "m.extxyz", [water(dipole="large", after=1)])
    assert qm9.load(tmp_path / "m.extxyz")[0].info == {"after": 1}  # ASE could not read it otherwise
    atoms = water()
    atoms.set_array("forces", np.array(["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"^arrays\['forces'\]: extended xyz cannot hold .*remove or rename"):
        check_structures(tmp_path / "m.extxyz", [atoms])


@pytest.mark.parametrize("value", [datetime.datetime(2020, 1, 1), {1}, b"x", {"deep": [datetime.date(2020, 1, 1)]}])
@pytest.mark.parametrize("name", ["m.traj", "m.db"])
def test_what_a_file_could_not_give_back_is_refused(tmp_path, name, value):
    for refuses in (write_structures, check_structures):
        with pytest.raises(ValueError, match=r"^info\['mine'\].*; remove it") as caught:
            refuses(tmp_path / name, [water(mine=value)])
        assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("when", ["write", "commit"])
def test_a_full_disk_leaves_nothing_of_a_database(tmp_path, monkeypatch, when):
    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    method = "write" if when == "write" else "__exit__"
    original = getattr(SQLite3Database, method)

    def failing(self, *arguments, **options):
        (part,) = tmp_path.glob(".m.db*.part.db")
        (tmp_path / f"{part.name}-journal").write_text("as sqlite leaves it")
        full()

    monkeypatch.setattr(SQLite3Database, method, failing)
    with pytest.raises(OSError, match=r"m\.db: cannot be written .*disk is full.*; make room there, or name") as caught:
        write_structures(tmp_path / "m.db", [water()])
    assert ".part" not in str(caught.value) and not os.listdir(tmp_path)
    monkeypatch.setattr(SQLite3Database, method, original)


@pytest.mark.parametrize("ending", ["extxyz", "db", "traj"])
def test_the_target_of_a_link_is_written(tmp_path, ending):
    (tmp_path / "real").mkdir()
    (tmp_path / f"m.{ending}").symlink_to(tmp_path / "real" / f"target.{ending}")
    for many in ([water()], [water(), water()]):  # a new and an existing target
        write_structures(tmp_path / f"m.{ending}", many)
        assert (tmp_path / f"m.{ending}").is_symlink()
        assert len(qm9.load(tmp_path / "real" / f"target.{ending}")) == len(many)
    assert os.listdir(tmp_path / "real") == [f"target.{ending}"] and len(os.listdir(tmp_path)) == 2


KILLED = """
import os, sys
from ase.build import molecule
from ase_enf.atoms import io
io.COMMIT_SECONDS = 0.0
io.FlushClock.due = lambda clock: True
with io.GrowingFile(sys.argv[1]) as file:
    for index in range(5):
        atoms = molecule("H2O")
        atoms.info = {"index": index}
        file.add(atoms)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("ending", ["extxyz", "xyz", "db", "traj"])
def test_a_killed_process_leaves_what_it_has_written(tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    environment = os.environ | {"PYTHONPATH": str(Path(ase_enf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment)
    assert done.returncode == -9
    assert [atoms.info["index"] for atoms in qm9.load(path)] == [0, 1, 2, 3, 4]
    with GrowingFile(path, append=True) as file:
        file.add(water(index=5))
    assert [atoms.info["index"] for atoms in qm9.load(path)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["m.xyz.gz", "m.json", "m.traj"])
def test_formats_that_are_written_whole_are_written_half_minute_by_half_minute(tmp_path, monkeypatch, name):
    clock = [0.0]
    monkeypatch.setattr("ase_enf.atoms.io.time.monotonic", lambda: clock[0])
    path, seen = tmp_path / name, []
    with warnings.catch_warnings(), GrowingFile(path) as file:
        warnings.simplefilter("ignore")  # that a format keeps no info
        for index in range(7):
            clock[0] += 11.0
            file.add(water(index=index))
            seen.append(len(read(path, index=":")) if path.exists() else 0)
    assert seen == [0, 0, 3, 3, 3, 6, 6] and file.count == len(read(path, index=":")) == 7


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_structure_for_which_there_is_no_room_leaves_no_part_of_it(tmp_path, monkeypatch, error):
    def partly(handle, content):
        handle.write(content[: len(content) // 2])
        raise error

    path = tmp_path / "m.extxyz"
    with pytest.raises(type(error)), GrowingFile(path) as file:
        file.add(water(index=0))
        monkeypatch.setattr("ase_enf.atoms.io.write_whole", partly)
        file.add(water(index=1))
    assert file.count == 1 and [atoms.info["index"] for atoms in qm9.load(path)] == [0]
    with pytest.raises(type(error)), GrowingFile(tmp_path / "n.extxyz") as file:
        file.add(water(index=0))
    assert file.count == 0 and os.listdir(tmp_path) == ["m.extxyz"]


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), KeyboardInterrupt()])
def test_a_row_for_which_there_is_no_room_leaves_no_part_of_it(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ase_enf.atoms.io.COMMIT_SECONDS", 0.0)
    with pytest.raises((OSError, KeyboardInterrupt)), GrowingFile(tmp_path / "m.db") as file:
        file.add(water(index=0))
        monkeypatch.setattr(SQLite3Database, "write", fail)
        file.add(water(index=1))
    assert file.count == 1 and [atoms.info["index"] for atoms in qm9.load(tmp_path / "m.db")] == [0]
    with pytest.raises((OSError, KeyboardInterrupt)), GrowingFile(tmp_path / "n.db") as file:
        file.add(water(index=0))
    assert file.count == 0 and os.listdir(tmp_path) == ["m.db"]


@pytest.mark.parametrize("ending", ["extxyz", "db", "traj"])
def test_nothing_is_there_without_a_structure_and_an_old_file_stays(tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    with pytest.raises(KeyboardInterrupt), GrowingFile(path):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)
    write_structures(path, [water()])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), GrowingFile(path):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    with GrowingFile(path) as file:
        file.add(water())
        file.add(water())
    assert file.count == 2 and len(qm9.load(path)) == 2


def test_a_growing_file_follows_links_and_completes_lines(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "m.extxyz"
    target.write_text("1\n\nH 0 0 0")
    (tmp_path / "m.extxyz").symlink_to(target)
    with GrowingFile(tmp_path / "m.extxyz", append=True) as file:
        file.add(water())
    assert [len(atoms) for atoms in qm9.load(target)] == [1, 3] and (tmp_path / "m.extxyz").is_symlink()


def test_what_a_growing_file_does_not_keep_is_named_once(tmp_path):
    with pytest.warns(UserWarning) as caught, GrowingFile(tmp_path / "m.extxyz") as file:
        for _ in range(2):
            file.add(water(virial=np.zeros(6)))
    (message,) = (str(warning.message) for warning in caught)
    assert message == f"{tmp_path}/m.extxyz: this format keeps no info['virial']; use .db to keep it"
