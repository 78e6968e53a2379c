"""Raw QM9 files: their content is read, ASE opens them by itself, and damage is reported."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import formats, read, write

from ase_enf.data import DataError, gdb9

ROOT = Path(__file__).parents[1]
RAW = Path(__file__).parent / "data" / "raw"
METHANE, PYRROLE = RAW / "dsgdb9nsd_000001.xyz", RAW / "dsgdb9nsd_000212.xyz"
ENTRY_POINT = EntryPoint("gdb9-xyz", "ase_enf.data.gdb9:format", "ase.ioformats")


@pytest.fixture
def plugin() -> Iterator[None]:
    """ASE with the format registered, as an installed entry point does it."""
    if ENTRY_POINT.name in formats.ioformats:
        yield
        return
    formats.define_external_io_format(ENTRY_POINT)
    yield
    del formats.ioformats[ENTRY_POINT.name]


def test_everything_published_arrives_in_published_units() -> None:
    record = gdb9.parse(METHANE.read_text())[0]
    atoms = record.to_atoms()
    assert str(atoms.symbols) == "CH4"
    np.testing.assert_array_equal(atoms.positions[0], [-0.0126981359, 1.0858041578, 0.0080009958])
    np.testing.assert_array_equal(atoms.arrays["qm9_mulliken"], [-0.535689, 0.133921, 0.133922, 0.133923, 0.133923])
    assert atoms.info["qm9_index"] == 1
    assert (atoms.info["qm9_A"], atoms.info["qm9_U0"], atoms.info["qm9_Cv"]) == (157.7118, -40.47893, 6.469)
    assert atoms.info["qm9_gap"] == pytest.approx(atoms.info["qm9_lumo"] - atoms.info["qm9_homo"])
    assert len(atoms.info["qm9_frequencies"]) == 3 * 5 - 6
    assert not atoms.pbc.any() and atoms.calc is None


def test_the_smiles_is_that_of_the_geometry() -> None:
    info = gdb9.parse(PYRROLE.read_text())[0].to_atoms().info
    assert (info["qm9_smiles_gdb17"], info["qm9_smiles"]) == ("CN1C=CC=C1", "Cn1cccc1")


def test_exponents_of_mathematica() -> None:
    assert "2.1997*^-6" in PYRROLE.read_text()
    assert gdb9.parse(PYRROLE.read_text())[0].positions[0, 0] == 2.1997e-6


def test_ase_reads_raw_files_without_being_told(plugin: None) -> None:
    atoms = read(PYRROLE)
    assert isinstance(atoms, Atoms)
    assert atoms.info["qm9_index"] == 212 and len(atoms) == 13
    assert len(read(PYRROLE, index=":")) == 1


def test_ase_reads_joined_raw_files(plugin: None, tmp_path: Path) -> None:
    joined = tmp_path / "joined.xyz"
    joined.write_text(METHANE.read_text() + PYRROLE.read_text())
    assert [atoms.info["qm9_index"] for atoms in read(joined, index=":")] == [1, 212]
    assert read(joined).info["qm9_index"] == 212
    assert read(joined, index=0).info["qm9_index"] == 1


def test_windows_line_ends(plugin: None, tmp_path: Path) -> None:
    file = tmp_path / "crlf.xyz"
    file.write_bytes(METHANE.read_bytes().replace(b"\n", b"\r\n"))
    assert read(file).info["qm9_smiles"] == "C"


@pytest.mark.parametrize("format", ["xyz", "extxyz"])
def test_ordinary_xyz_files_are_left_alone(plugin: None, tmp_path: Path, format: str) -> None:
    file = tmp_path / "ethanol.xyz"
    write(file, [molecule("CH3CH2OH"), molecule("H2O")], format=format)
    assert formats.filetype(str(file)) == "extxyz"
    assert [str(atoms.symbols) for atoms in read(file, index=":")] == ["C2OH6", "OH2"]


def test_a_comment_that_mentions_gdb_is_no_raw_file(plugin: None, tmp_path: Path) -> None:
    file = tmp_path / "comment.xyz"
    file.write_text("1\ngdb 5\nH 0 0 0\n1\ngdb entry\nH 0 0 0\n")
    assert formats.filetype(str(file)) == "extxyz"


def test_info_survives_extxyz() -> None:
    atoms = gdb9.parse(PYRROLE.read_text())[0].to_atoms()
    buffer = io.StringIO()
    write(buffer, atoms, format="extxyz")
    buffer.seek(0)
    again = read(buffer, format="extxyz")
    assert again.calc is None
    assert again.info.keys() == atoms.info.keys()
    assert all(np.array_equal(again.info[key], atoms.info[key]) for key in atoms.info)
    np.testing.assert_allclose(again.arrays["qm9_mulliken"], atoms.arrays["qm9_mulliken"])


def test_the_entry_point_works_in_a_fresh_interpreter_and_imports_nothing_heavy(tmp_path: Path) -> None:
    metadata = tmp_path / "ase_enf_plugin-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ase-enf-plugin\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT.group}]\n{ENTRY_POINT.name} = {ENTRY_POINT.value}\n")
    script = (
        "import sys, warnings\n"
        "warnings.filterwarnings('ignore', message='Failed to register')\n"  # where the package is installed already
        "import ase.io\n"
        f"print(ase.io.read({str(METHANE)!r}).info['qm9_smiles'])\n"
        "heavy = {'torch', 'rdkit', 'tqdm', 'pandas', 'torchdiffeq', 'openbabel', 'ase_enf.data.qm9'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert run.stdout.split() == ["C", "[]"]


LINES = METHANE.read_text().splitlines()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (LINES[:-1], "9 of the 10 lines"),
        (LINES[:4], "4 of the 10 lines"),
        (["five", *LINES[1:]], "number of atoms, found 'five'"),
        (["0", *LINES[1:]], "number of atoms, found '0'"),
        ([LINES[0], "a comment", *LINES[2:]], "line 2 .* 'gdb <index> <15 properties>'"),
        ([LINES[0], LINES[1].rsplit("\t", 2)[0], *LINES[2:]], "line 2 .* expected 17 values, found 16"),
        ([*LINES[:2], "Xx" + LINES[2][1:], *LINES[3:]], "line 3 .* 'Xx'"),
        ([*LINES[:3], LINES[3].replace("0.0019761204", "nan"), *LINES[4:]], "line 4 .* not a finite number"),
        ([*LINES[:3], LINES[3].rsplit("\t", 1)[0], *LINES[4:]], "line 4 .* expected 4 values, found 3"),
        ([*LINES[:7], "13x.5", *LINES[8:]], "line 8 .* '13x.5'"),
        ([*LINES[:8], "C", *LINES[9:]], "line 9 .* expected 2 values, found 1"),
        ([*LINES, "5"], "1 of the 10 lines"),
    ],
)
def test_damage_is_named(lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        gdb9.parse("\n".join(lines), "methane.xyz")
    assert str(caught.value).startswith("methane.xyz: ") and "\n" not in str(caught.value)
