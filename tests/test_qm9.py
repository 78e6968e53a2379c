"""QM9: every form gives the same ``Atoms``, the split is the published one, and no partial data are returned."""

from __future__ import annotations

import bz2
import hashlib
import io
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write
from ase.io.formats import open_with_compression

from ase_enf.atoms.files import atomic_write
from ase_enf.atoms.rows import SQLITE
from ase_enf.data import DataError, DataNotFoundError, compact, fetch, qm9

DATA = Path(__file__).parent / "data"
RAW, SAMPLE = DATA / "raw", DATA / "qm9_sample.npz"
SHARED = Path(__file__).parents[2] / "shared" / "data"
INDICES = [1, 3, 11, 212, 7235]  # train, valid, test, train, excluded

needs_shared = pytest.mark.skipif(not (SHARED / "qm9.npz").exists(), reason=f"{SHARED} is not on this machine")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the user's QM9 and cache from the tests."""
    monkeypatch.delenv(qm9.ENVIRONMENT, raising=False)
    monkeypatch.setenv("ASE_ENF_CACHE", str(tmp_path / "cache"))


def pack(path: Path, mode: str) -> Path:
    """Packs the raw files into an archive, last one first."""
    with tarfile.open(path, mode) as archive:
        for file in sorted(RAW.iterdir(), reverse=True):
            archive.add(file, arcname=file.name)
    return path


def join(path: Path) -> Path:
    path.write_text("".join(file.read_text() for file in sorted(RAW.iterdir())))
    return path


def save(path: Path) -> Path:
    qm9.save_npz(qm9.load(RAW), path)
    return path


def save_by_ase(path: Path) -> Path:
    write(path, qm9.load(RAW))
    return path


def save_db(path: Path) -> Path:
    with ase.db.connect(path) as database:
        for atoms in qm9.load(RAW):
            database.write(atoms, qm9_index=atoms.info["qm9_index"], data={"info": atoms.info})
    return path


EXACT: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: RAW,
    "tar": lambda folder: pack(folder / "raw.tar", "w"),
    "tar.bz2": lambda folder: pack(folder / "raw.tar.bz2", "w:bz2"),
    "tar.gz": lambda folder: pack(folder / "raw.tar.gz", "w:gz"),
    "tgz": lambda folder: pack(folder / "raw.tgz", "w:gz"),
    "tar.xz": lambda folder: pack(folder / "raw.tar.xz", "w:xz"),
    "figshare's name": lambda folder: pack(folder / "3195389", "w:bz2"),
    "joined": lambda folder: join(folder / "joined.xyz"),
    "npz": lambda folder: save(folder / "qm9.npz"),
}
BY_ASE: dict[str, Callable[[Path], Path]] = {
    "extxyz": lambda folder: save_by_ase(folder / "qm9.extxyz"),
    "traj": lambda folder: save_by_ase(folder / "qm9.traj"),
    "db": lambda folder: save_db(folder / "qm9.db"),
}


def assert_same(found: list[Atoms], expected: list[Atoms], atol: float = 0.0) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.info == b.info
        assert a.numbers.tolist() == b.numbers.tolist()
        np.testing.assert_allclose(a.positions, b.positions, rtol=0, atol=atol)


# Every form


@pytest.mark.parametrize("form", EXACT)
def test_every_form_gives_the_same_atoms(form: str, tmp_path: Path) -> None:
    atoms = qm9.load(EXACT[form](tmp_path))
    assert_same(atoms, qm9.load(RAW))
    assert [molecule.info["qm9_index"] for molecule in atoms] == INDICES
    assert [molecule.info["qm9_smiles"] for molecule in atoms][:2] == ["C", "O"]


@pytest.mark.parametrize("form", BY_ASE)
def test_what_ase_reads_gives_the_same_atoms(form: str, tmp_path: Path) -> None:
    source = BY_ASE[form](tmp_path)
    assert_same(qm9.load(source), qm9.load(RAW), atol=1e-8)  # extxyz writes eight decimals
    assert [atoms.info["qm9_index"] for atoms in qm9.load(source, split="train")] == [1, 212]


@needs_shared
def test_raw_files_agree_with_the_compact_file() -> None:
    compacted = {atoms.info["qm9_index"]: atoms for atoms in qm9.load(SHARED / "qm9.npz")}
    raw = qm9.load(SHARED / "raw")
    assert len(raw) == 212
    assert_same(raw, [compacted[atoms.info["qm9_index"]] for atoms in raw])


def test_n_atoms_selects(tmp_path: Path) -> None:
    everything = qm9.load(SAMPLE)
    positional = qm9.load(SAMPLE, n_atoms=19)
    assert 0 < len(positional) < len(everything) == 600
    assert_same(positional, [atoms for atoms in everything if len(atoms) == 19])
    assert [len(atoms) for atoms in qm9.load(RAW, n_atoms=5)] == [5]
    assert [len(atoms) for atoms in qm9.load(BY_ASE["extxyz"](tmp_path), n_atoms=5)] == [5]
    assert qm9.load(SAMPLE, n_atoms=1) == []


def test_any_atoms_can_be_saved(tmp_path: Path) -> None:
    atoms = [molecule("SiH4"), molecule("H2O")]
    qm9.save_npz(atoms, tmp_path / "mine.npz", split=[0, 2])
    (water,) = qm9.load(tmp_path / "mine.npz", split="test")
    assert str(water.symbols) == "OH2" and water.info == {}
    np.testing.assert_allclose(water.positions, atoms[1].positions, atol=1e-6)


def test_particles_without_an_element_can_be_saved(tmp_path: Path) -> None:
    qm9.save_npz([Atoms("X4", np.eye(4)[:, :3])], tmp_path / "dw4.npz")
    assert [str(atoms.symbols) for atoms in qm9.load(tmp_path / "dw4.npz")] == ["X4"]


def test_saving_is_refused_where_something_would_be_lost(tmp_path: Path) -> None:
    for atoms, split, message in [
        ([bulk("Si")], None, "molecule 0 .* is periodic"),
        ([molecule("H2O"), Atoms(numbers=[256])], None, "molecule 1: numbers holds 256, which is no element"),
        ([molecule("H2O")], "training", "'training' is none of train, valid, test"),
        ([molecule("H2O")], [0, 1], "each of the 1 molecules"),
        ([molecule("H2O")], [7], "0 to 3"),
    ]:
        with pytest.raises(DataError, match=message):
            qm9.save_npz(atoms, tmp_path / "refused.npz", split=split)
    assert list(tmp_path.iterdir()) == []


def test_the_default_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"ASE_ENF_QM9.*download\(\)"):
        qm9.load()
    (tmp_path / "cache").mkdir()
    pack(tmp_path / "cache" / "dsgdb9nsd.xyz.tar.bz2", "w:bz2")
    assert len(qm9.load()) == 5
    monkeypatch.setenv(qm9.ENVIRONMENT, str(SAMPLE))
    assert len(qm9.load()) == 600
    monkeypatch.setenv(qm9.ENVIRONMENT, str(tmp_path / "gone.npz"))
    with pytest.raises(FileNotFoundError, match="gone.npz: no such file"):
        qm9.load()


# The split


@needs_shared
def test_the_split_is_the_one_published() -> None:
    table, split = compact.read_npz(SHARED / "qm9.npz"), qm9.published_split()
    np.testing.assert_array_equal(split["train"], table.gdb_index[table.split == 0])
    np.testing.assert_array_equal(split["test"], table.gdb_index[table.split == 2])
    valid = table.gdb_index[table.split == 1]  # the file holds 15,000 of the 17,748
    assert len(valid) == 15_000 and np.isin(valid, split["valid"]).all()
    np.testing.assert_array_equal(qm9.read_excluded(SHARED / "qm9.npz"), qm9.read_excluded(package_list()))


def package_list() -> Path:
    return Path(qm9.__file__).with_name("qm9_excluded.txt")


def test_the_split_divides_the_molecules_kept() -> None:
    split, excluded = qm9.published_split(), qm9.read_excluded(package_list())
    assert [len(part) for part in split.values()] == [qm9.N_TRAIN, qm9.N_VALID, qm9.N_TEST]
    together = np.sort(np.concatenate([*split.values(), excluded]))
    np.testing.assert_array_equal(together, np.arange(1, qm9.N_MOLECULES + 1))


def test_the_split_of_the_sample_is_the_published_one() -> None:
    for name, n in [("train", 400), ("valid", 100), ("test", 100)]:
        stored = qm9.load(SAMPLE, split=name)
        assert len(stored) == n
        assert_same(stored, qm9.load(SAMPLE, split=name, excluded=package_list()))


@pytest.mark.filterwarnings("ignore:.*holds . of the")
def test_the_split_of_raw_files_leaves_the_excluded_out() -> None:
    found = [[atoms.info["qm9_index"] for atoms in qm9.load(RAW, split=name)] for name in compact.SPLITS]
    assert found == [[1, 212], [3], [11]]


def test_a_split_that_is_not_all_there_is_announced() -> None:
    with pytest.warns(UserWarning, match="holds 2 of the 100,000 train molecules"):
        qm9.load(RAW, split="train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qm9.load(RAW)


def test_the_published_list_of_excluded_molecules_is_read(tmp_path: Path) -> None:
    listed = tmp_path / "uncharacterized.txt"
    rows = "".join(f"{index:8d}   NC(=N)C#N   NC(=N)C#N   6.036217\n" for index in qm9.read_excluded(package_list()))
    listed.write_text(f"\n\nList of molecules among the 133885\n=====\n#   Index   SMILES   D_IJ\n=====\n{rows}=====\n")
    np.testing.assert_array_equal(qm9.read_excluded(listed), qm9.read_excluded(package_list()))
    assert_same(qm9.load(SAMPLE, split="test", excluded=listed), qm9.load(SAMPLE, split="test"))
    listed.write_text(rows[:1000])
    with pytest.raises(DataError, match="different indices, but the published split leaves out 3,054"):
        qm9.load(SAMPLE, split="test", excluded=listed)
    with pytest.raises(DataError, match="excluded: holds 2 different indices"):
        qm9.published_split([5, 6, 6])
    with pytest.raises(DataNotFoundError, match="gone.txt"):
        qm9.published_split(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="no split and gdb_index"):
        qm9.read_excluded(save(tmp_path / "plain.npz"))


def test_the_split_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)
    qm9.published_split()
    after = np.random.rand()
    np.random.seed(3)
    assert after == np.random.rand()


# Errors


def test_unknown_splits_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'validation' is none of train, valid, test"):
        qm9.load(SAMPLE, split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match="empty: holds no raw QM9 files"):
        qm9.load(tmp_path / "empty")
    with tarfile.open(tmp_path / "empty.tar.bz2", "w:bz2") as archive:
        archive.add(SAMPLE, arcname="sample.npz")
    with pytest.raises(DataNotFoundError, match="empty.tar.bz2: holds no raw QM9 files"):
        qm9.load(tmp_path / "empty.tar.bz2")


def test_a_split_needs_the_index(tmp_path: Path) -> None:
    write(tmp_path / "mine.extxyz", [molecule("H2O")])
    with pytest.raises(DataError, match=r"structure 1 \(OH2\) has no info\['qm9_index'\].*leave the split out"):
        qm9.load(tmp_path / "mine.extxyz", split="train")
    assert len(qm9.load(tmp_path / "mine.extxyz")) == 1
    qm9.save_npz([molecule("H2O")], tmp_path / "mine.npz")
    with pytest.raises(DataError, match="neither split nor gdb_index.*leave it out"):
        qm9.load(tmp_path / "mine.npz", split="train")


# Damage at which ASE would stop, or which it would skip


def compress(path: Path, text: str) -> Path:
    """Writes a text, compressed if the path says so."""
    with open_with_compression(str(path), "w") as handle:
        handle.write(text)
    return path


@pytest.mark.parametrize("name", ["m.xyz", "m.extxyz", "m.XYZ", "m.xyz.gz", "m.extxyz.bz2"])
@pytest.mark.parametrize("blank", ["\n", " \n\t\n"])
def test_structures_after_a_blank_line_are_read(name: str, blank: str, tmp_path: Path) -> None:
    frames = []
    for formula in ("H2O", "CH4", "CH3OH"):
        write(buffer := io.StringIO(), molecule(formula), format="extxyz")
        frames.append(buffer.getvalue())
    frames[1] = frames[1].replace(frames[1].splitlines()[1], "")  # a comment may be blank
    found = qm9.load(compress(tmp_path / name, blank + blank.join(frames) + blank))
    assert [str(atoms.symbols) for atoms in found] == ["OH2", "CH4", "COH4"]
    assert found[2] == molecule("CH3OH")


def test_an_xyz_file_of_vectors_of_the_cell_is_read(tmp_path: Path) -> None:
    frame = "1\nan argon\nAr 0 0 0\nVEC1 5 0 0\nVEC2 0 5 0\nVEC3 0 0 5\n"
    (tmp_path / "m.xyz").write_text(frame + "\n" + frame)
    assert [atoms.cell.lengths().tolist() for atoms in qm9.load(tmp_path / "m.xyz")] == [[5, 5, 5]] * 2


def test_what_is_no_structure_of_an_xyz_file_is_named(tmp_path: Path) -> None:
    write(buffer := io.StringIO(), molecule("H2O"), format="extxyz")
    for rest, found in [("H 0 0 0\n", "H 0 0 0"), ("\nthe end\n", "the end"), ("-1\n\n", "-1")]:
        (tmp_path / "m.xyz").write_text(buffer.getvalue() + rest)
        with pytest.raises(DataError, match=f"m.xyz: structure 1 must open with its number of atoms, found '{found}'"):
            qm9.load(tmp_path / "m.xyz")


def records(ending: str, *formulas: str) -> str:
    """Molecules as ASE writes them in SDF, one after the other."""
    texts = []
    for formula in formulas:
        write(buffer := io.StringIO(), molecule(formula), format=ending)
        texts.append(buffer.getvalue())
    return "".join(texts)


@pytest.mark.parametrize("name", ["m.sdf", "m.SDF", "m.sdf.gz", "m.sdf.xz", "m.mol", "m.MOL", "m.mol.bz2"])
def test_all_records_are_read(name: str, tmp_path: Path) -> None:
    source = compress(tmp_path / name, records("sdf", "H2O", "CH4", "CH3OH"))
    assert [str(atoms.symbols) for atoms in qm9.load(source)] == ["OH2", "CH4", "COH4"]
    assert len(qm9.load(compress(tmp_path / name, records("mol", "H2O")))) == 1


def test_records_that_would_be_passed_over_are_named(tmp_path: Path) -> None:
    source = compress(tmp_path / "m.mol", records("mol", "H2O", "CH4"))
    with pytest.raises(DataError, match=r"m.mol: record 1 holds several molecules; divide them by lines of \$\$\$\$"):
        qm9.load(source)
    counts = "  0  0  0     0  0            999 V3000"
    compress(source, f"name\n\n\n{counts}\nM  V30 BEGIN CTAB\nM  END\n")
    with pytest.raises(DataError, match="m.mol: record 1 holds no atoms that ASE reads; write it as V2000"):
        qm9.load(source)


def test_names_are_taken_at_their_word(tmp_path: Path) -> None:
    write(tmp_path / "run", molecule("CH4"), format="traj")
    write(tmp_path / "run@2", molecule("H2O"), format="traj")
    assert [str(atoms.symbols) for atoms in qm9.load(tmp_path / "run@2")] == ["OH2"]


@pytest.mark.parametrize("form", ["tar", "tar.bz2", "tar.gz", "tar.xz", "npz", "joined"])
def test_a_file_cut_anywhere_is_refused(form: str, tmp_path: Path) -> None:
    source = EXACT[form](tmp_path)
    whole = source.read_bytes()
    # Cut at these ends, the file lacks only padding zeros or a letter of the last InChI.
    end = {"tar": len(whole.rstrip(b"\0")), "joined": whole.rindex(b"\t")}.get(form, len(whole))
    # At a whole block, a reader may take the end of the file for the end of the archive.
    cuts = {0, 1, 100, *range(512, end, 512), *(end * k // 10 for k in range(1, 10)), end - 20}
    for cut in sorted(cuts - {end}):
        source.write_bytes(whole[:cut])
        with pytest.raises(DataError) as caught:
            qm9.load(source)
        assert str(source) in str(caught.value) and "\n" not in str(caught.value), cut


def test_a_compressed_archive_cut_between_streams_is_refused(tmp_path: Path) -> None:
    plain = pack(tmp_path / "raw.tar", "w").read_bytes()
    source = tmp_path / "raw.tar.bz2"
    source.write_bytes(bz2.compress(plain[:2048]) + bz2.compress(plain[2048:]))
    assert len(qm9.load(source)) == 5
    source.write_bytes(bz2.compress(plain[:2048]))
    with pytest.raises(DataError, match="truncated"):
        qm9.load(source)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    text = (RAW / "dsgdb9nsd_000001.xyz").read_text()
    (folder / "dsgdb9nsd_000001.xyz").write_text(text)
    (folder / "dsgdb9nsd_000002.xyz").write_text(text)
    with pytest.raises(DataError, match="holds molecule 1 more than once"):
        qm9.load(folder)
    (folder / "dsgdb9nsd_000002.xyz").write_text(text[:300])
    with pytest.raises(DataError, match="dsgdb9nsd_000002.xyz: ends after"):
        qm9.load(folder)
    (folder / "dsgdb9nsd_000002.xyz").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="damaged"):
        qm9.load(folder)
    extended = tmp_path / "mine.extxyz"
    write(extended, [molecule("H2O"), molecule("CH4")])
    extended.write_text(extended.read_text()[:-70])
    with pytest.raises(DataError, match="mine.extxyz: ASE cannot read it to the end"):
        qm9.load(extended)
    (tmp_path / "mine.db").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match="mine.db: is no ASE database"):
        qm9.load(tmp_path / "mine.db")
    (tmp_path / "mine.db").write_bytes(SQLITE + b"no more" * 100)
    with pytest.raises(DataError, match="mine.db: cannot be read as an ASE database"):
        qm9.load(tmp_path / "mine.db")
    (tmp_path / "mine.weird").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="mine.weird: ASE cannot read it"):
        qm9.load(tmp_path / "mine.weird")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": None}, "holds no numbers"),
        ({"numbers": np.array([1, 1, 1])}, r"numbers has shape \(3,\)"),
        ({"numbers": np.array([1.0, 1.0])}, "numbers holds float64"),
        ({"numbers": np.array([1, 200])}, r"bad.npz: numbers holds 200, which is no element; give 1 to 118"),
        ({"numbers": np.array([-112, 1])}, "numbers holds -112, which is no element"),
        ({"numbers": np.array([1, -1])}, "numbers holds -1, which is no element"),
        ({"positions": np.array([[0, 0, 0], [0, 0, np.nan]])}, "not finite"),
        ({"n_atoms": np.array([2, 0])}, "n_atoms holds 0"),
        ({"split": np.array([0, 0])}, r"split has shape \(2,\)"),
        ({"smiles": np.array([None])}, "cannot be read"),
    ],
)
def test_inconsistent_compact_files_are_refused(
    changes: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    arrays = {"numbers": np.array([1, 1]), "positions": np.eye(3)[:2], "n_atoms": np.array([2])} | changes
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message):
        qm9.load(tmp_path / "bad.npz")


def test_an_array_under_the_name_of_a_compact_file_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(3))
    (tmp_path / "bare.npz").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="bare.npz: cannot be read as .npz"):
        qm9.load(tmp_path / "bare.npz")


# The cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records the raw sources that are actually read."""
    seen: list[Path] = []
    original = qm9.read_raw
    monkeypatch.setattr(qm9, "read_raw", lambda source, progress: seen.append(source) or original(source, progress))
    return seen


def test_the_cache_is_used_until_the_source_changes(tmp_path: Path, reads: list[Path]) -> None:
    source, cache = pack(tmp_path / "raw.tar.bz2", "w:bz2"), tmp_path / "mine"
    first = qm9.load(source, cache=cache)
    assert_same(qm9.load(source, cache=cache), first)
    assert len(reads) == 1 and len(list(cache.iterdir())) == 1
    with tarfile.open(source, "w:bz2") as archive:
        archive.add(RAW / "dsgdb9nsd_000001.xyz", arcname="dsgdb9nsd_000001.xyz")
    assert len(qm9.load(source, cache=cache)) == 1
    assert len(qm9.load(source, cache=cache)) == 1
    assert len(reads) == 2 and len(list(cache.iterdir())) == 1
    qm9.load(source, cache=False)
    assert len(reads) == 3


def test_the_cache_of_a_folder_sees_a_changed_file(tmp_path: Path, reads: list[Path]) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for file in RAW.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    qm9.load(folder, cache=True)
    qm9.load(folder, cache=True)
    assert len(reads) == 1
    (folder / "dsgdb9nsd_000003.xyz").unlink()
    assert len(qm9.load(folder, cache=True)) == 4


def test_a_damaged_copy_is_made_again(tmp_path: Path, reads: list[Path]) -> None:
    cache = tmp_path / "mine"
    qm9.load(RAW, cache=cache)
    (copy,) = cache.iterdir()
    copy.write_bytes(copy.read_bytes()[:-500])
    assert len(qm9.load(RAW, cache=cache)) == len(qm9.load(RAW, cache=cache)) == 5
    assert len(reads) == 2


def test_only_large_sources_are_kept_unasked(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    qm9.load(RAW)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(qm9, "AUTO_CACHE_MINIMUM", 5)
    qm9.load(RAW)
    qm9.load(RAW)
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    with pytest.raises(DataError, match="could not be kept"):
        qm9.load(RAW, cache=blocked)
    monkeypatch.setenv("ASE_ENF_CACHE", str(blocked))
    monkeypatch.setattr(qm9, "AUTO_CACHE_MINIMUM", 5)
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(qm9.load(RAW)) == 5


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "kept"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(target) as handle:
        handle.write(b"half of the new")
        raise RuntimeError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    qm9.load(RAW)
    assert capsys.readouterr().err == ""
    qm9.load(RAW, progress=True)
    assert "reading raw" in capsys.readouterr().err


# The download


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local file in place of the one on the server."""
    published = tmp_path / "published"
    published.write_bytes(b"the published bytes")
    remote = fetch.Remote(published.as_uri(), "a.txt", 19, hashlib.md5(b"the published bytes").hexdigest())
    monkeypatch.setitem(fetch.REMOTES, "archive", remote)
    return published


def test_a_download_arrives_once(server: Path, tmp_path: Path) -> None:
    target = qm9.download()
    assert target == tmp_path / "cache" / "a.txt" and target.read_bytes() == server.read_bytes()
    server.unlink()
    assert qm9.download() == target


@pytest.mark.parametrize("content", [b"", b"the published byte", b"the published bytez"])
def test_a_wrong_download_is_refused(server: Path, tmp_path: Path, content: bytes) -> None:
    server.write_bytes(content)
    with pytest.raises(DataError, match=f"got {len(content)} bytes.*expected 19.*a local file always works"):
        qm9.download(folder=tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_server_that_does_not_answer(server: Path, tmp_path: Path) -> None:
    server.unlink()
    with pytest.raises(DataError, match="failed .*a local file always works"):
        qm9.download(folder=tmp_path / "here")
    with pytest.raises(DataError, match="'tarball' is none of the published files archive, excluded"):
        qm9.download("tarball")
