"""Structures to files: nothing of ours is lost, and nothing half is left."""

from __future__ import annotations

import os

import numpy as np
import pytest
from ase.build import molecule
from ase.db import connect
from ase.io import read, write

from ase_enf.io import check_output, write_structures

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
}  # fmt: skip


@pytest.mark.parametrize("name", ["m.extxyz", "m.xyz", "m.extxyz.gz"])
def test_extended_xyz_gives_back_texts_as_they_were(tmp_path, name):
    atoms = molecule("H2O")
    atoms.info |= ODD
    write_structures(tmp_path / name, [atoms])
    assert read(tmp_path / name).info == ODD and atoms.info == ODD


def test_a_format_without_info_says_so(structures, tmp_path):
    with pytest.warns(UserWarning, match=r"keeps no info .*use \.extxyz"):
        write_structures(tmp_path / "m.pdb", structures)


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
