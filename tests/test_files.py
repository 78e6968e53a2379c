"""A file appears only when it is complete, and a failure leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ase_enf
from ase_enf.atoms.files import atomic_write, part_of, require_folder
from ase_enf.atoms.io import GrowingFile
from ase_enf.cli.outputs import GrowingTable

ROOT = str(Path(ase_enf.__file__).parents[1])


def test_a_file_appears_when_it_is_written_to_the_end(tmp_path):
    with atomic_write(tmp_path / "a") as handle:
        handle.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_interruption_leaves_what_was_there(tmp_path, old, error):
    if old is not None:
        (tmp_path / "a").write_bytes(old)
    with pytest.raises(error), atomic_write(tmp_path / "a") as handle:
        handle.write(b"half")
        raise error
    assert os.listdir(tmp_path) == ([] if old is None else ["a"])
    assert old is None or (tmp_path / "a").read_bytes() == old


def test_an_old_file_is_replaced_only_at_the_end(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with atomic_write(tmp_path / "a") as handle:
        handle.write(b"new")
        handle.flush()
        assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_two_writers_do_not_mix(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write(b"1" * 1000)
        second.write(b"2" * 1000)
    assert (tmp_path / "a").read_bytes() in (b"1" * 1000, b"2" * 1000)


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names))[1])
    with atomic_write(tmp_path / "a") as handle:
        handle.write(b"whole")
    assert calls == ["fsync", "replace"]


def test_missing_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "b" / "c" / "a") as handle:
        handle.write(b"whole")
    assert (tmp_path / "b" / "c" / "a").read_bytes() == b"whole"


def test_require_folder(tmp_path, monkeypatch):
    assert require_folder(str(tmp_path / "a")) == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    assert str(require_folder("a")) == "a"
    (tmp_path / "file").write_text("")
    for missing in ("no", "file"):  # a file is not a folder
        with pytest.raises(FileNotFoundError, match=f"^{missing}/a: the folder {missing} does not exist") as caught:
            require_folder(f"{missing}/a")
        assert "\n" not in str(caught.value)


def test_paths_that_cannot_be_written_are_refused_beforehand(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path}: is a folder; name a file") as caught:
        require_folder(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "access", lambda path, mode: not (str(path) == str(tmp_path) and mode & os.W_OK))
    with pytest.raises(PermissionError, match=f"^{tmp_path}/a: the folder {tmp_path} is not writable; .* another one$"):
        require_folder(tmp_path / "a")


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to("real/target")
    for content in (b"new", b"newer"):
        with atomic_write(tmp_path / "a") as handle:
            handle.write(content)
        assert (tmp_path / "a").is_symlink() and (tmp_path / "real" / "target").read_bytes() == content
    assert os.listdir(tmp_path / "real") == ["target"]
    (tmp_path / "b").symlink_to("nowhere/target")
    with pytest.raises(FileNotFoundError, match="/b: points into the folder .*/nowhere, which does not exist; create"):
        require_folder(tmp_path / "b")


def test_what_a_killed_process_left_goes_with_the_next_file_of_its_folder(tmp_path):
    code = (
        "import os, sys; from ase_enf.atoms.files import atomic_write, replaced\n"
        "with replaced(sys.argv[1] + '/m.db', '.db') as part, atomic_write(sys.argv[1] + '/state.pt') as handle:\n"
        "    for end in ('', '-journal'): open(str(part) + end, 'w').close()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": ROOT})
    assert len(os.listdir(tmp_path)) == 3
    mine = [".bashrc", ".m.db.part", "m.db", ".notes.part.txt"]
    for name in mine:
        (tmp_path / name).write_text("of a user")
    with atomic_write(tmp_path / "a") as first:  # a file that is being written is left alone
        with atomic_write(tmp_path / "b"):
            pass
        first.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "a", "b"]) and (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("ending", ["extxyz", "db", "traj", "csv"])
def test_what_a_killed_process_left_goes_when_results_are_begun(tmp_path, ending):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = part_of(tmp_path / "m.extxyz")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
    left.write_text("half")
    if ending == "csv":
        GrowingTable(str(tmp_path / "s.csv"))
    else:
        GrowingFile(tmp_path / f"m.{ending}")
    assert not os.listdir(tmp_path)


def test_the_end_of_a_full_disk_names_the_file(tmp_path):
    """Where the last of a file is written as it is closed, too."""
    with pytest.raises(OSError, match=r"a: cannot be written \(OSError: No space left on device\); make room there"):
        with atomic_write(tmp_path / "a"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="^of a user"), atomic_write(tmp_path / "a"):
        raise OSError("of a user")
    assert not os.listdir(tmp_path)


def test_unfinished_files_of_another_machine_are_left_alone(tmp_path):
    name = f".a.{'0' * 8}-{2**22 + 1}-{'1' * 8}.part"
    (tmp_path / name).write_text("")
    with atomic_write(tmp_path / "b"):
        pass
    assert sorted(os.listdir(tmp_path)) == [name, "b"]


def test_devices_and_pipes_are_no_files_to_write(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match=f"^{path}: is a device or a pipe, .*; name one$"):
            require_folder(path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="this system has no /proc")
def test_a_folder_that_takes_no_files_is_named_without_hidden_names():
    with pytest.raises(OSError, match=r"^/proc/x: the folder /proc takes no files \(.*\); name another one$") as caught:
        require_folder("/proc/x")
    assert ".part" not in str(caught.value)
    with pytest.raises(OSError, match=r"^/proc/x: cannot be written ") as caught, atomic_write("/proc/x"):
        pass
    assert ".part" not in str(caught.value)
