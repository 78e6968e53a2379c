"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

# Names of the temporary files of this package: machine, process, a random number.
_PART = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part")


# Errors of a disk that is full, of a quota that is used up, and of a file that is too large.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_folder(path: str | os.PathLike[str]) -> Path:
    """Returns ``path`` if a file can be written there: its folder exists and is writable.

    A symbolic link stands for the file it points to.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If the path is a folder itself.
        PermissionError: If nothing can be written to the folder.
        OSError: If the path is a device or a pipe, which no file can replace, or no file can be created in its folder.

    Example:
        >>> require_folder("nowhere/m.extxyz")
        Traceback (most recent call last):
        FileNotFoundError: nowhere/m.extxyz: the folder nowhere does not exist; create it first
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file, in it or elsewhere")
    if not _regular(path):
        raise OSError(f"{path}: is a device or a pipe, and results are written to a file; name one")
    folder = real_path(path).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: points into the folder {folder}, which does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: the folder {folder} is not writable; allow it, or name another one")
    _try_folder(path, folder)
    return path


def _try_folder(path: Path, folder: Path) -> None:
    """Raises ``OSError`` for a folder such as ``/proc``, which claims to be writable but accepts no files."""
    probe = part_of(folder / "probe")
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"{path}: the folder {folder} takes no files ({brief(error, probe)}); name another one") from None
    finally:
        with suppress(OSError):
            probe.unlink()


def _regular(path: Path) -> bool:
    """Whether a path does not exist yet, or is an ordinary file."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # nothing there
        return True


def check_source(path: str | os.PathLike[str]) -> None:
    """Refuses pipes and devices: the beginning of a file is read twice, first to recognise its format.

    Raises:
        ValueError: If the path is a pipe or a device.

    Example:
        >>> check_source("/dev/null")
        Traceback (most recent call last):
        ValueError: /dev/null: is a pipe or a device, which cannot be read twice; save it to a file and name that
    """
    if not (Path(path).is_dir() or _regular(Path(path))):
        raise ValueError(f"{path}: is a pipe or a device, which cannot be read twice; save it to a file and name that")


def real_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path where content is or would be written: for a symbolic link, that of the file it points to.

    Example:
        >>> real_path("README.md").name
        'README.md'
    """
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Creates a folder and its parents if they do not exist, and returns its path.

    Raises:
        ValueError: If it is a file.

    Example:
        >>> make_folder("README.md")
        Traceback (most recent call last):
        ValueError: README.md: is a file; name the folder of the run
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: is a file; name the folder of the run")
    path.mkdir(parents=True, exist_ok=True)
    return path


def part_of(path: Path, suffix: str = "") -> Path:
    """Returns a temporary path for unfinished content, in the same folder.

    It identifies the process that writes it, so that a file left by a killed process can be distinguished from work in
    progress.

    Args:
        path: The final file.
        suffix: Ending that the name must have.

    Example:
        >>> part_of(Path("m.extxyz"), ".extxyz").suffix
        '.extxyz'
    """
    token = f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name[:150]}.{token}.part{suffix}")


def remove_abandoned(folder: Path) -> None:
    """Removes the unfinished files that killed processes of this machine left in a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     remove_abandoned(Path(folder))
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries]:
            found = _PART.match(name)
            if found and found.group(1) == _machine() and not _alive(int(found.group(2))):
                with suppress(OSError):
                    (folder / name).unlink()


def _machine() -> str:
    """Returns text that identifies this machine or container."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{socket.gethostname()}|{space}".encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 would interrupt it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # a process of another user
        pass
    return True


@contextmanager
def replaced(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """Yields a temporary path that replaces a file at the end, or is removed if anything fails.

    Args:
        path: The file to write or replace, or a symbolic link to it.
        suffix: Ending that the temporary path must have.

    Yields:
        The temporary path. Files whose names begin with it, such as a library's journal, are removed with it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replaced(f"{folder}/a") as part:
        ...         _ = part.write_text("whole")
        ...     Path(folder, "a").read_text()
        'whole'
    """
    target = real_path(path)
    remove_abandoned(target.parent)
    part = part_of(target, suffix)
    try:
        yield part
        os.replace(part, target)
    finally:
        for left in target.parent.glob(glob.escape(part.name) + "*"):
            left.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file that appears under its name only when it is complete (write, fsync, rename).

    Args:
        path: The file to write or replace; missing folders are created.

    Yields:
        A binary handle on a temporary file in the same folder, which is removed if anything fails.

    Raises:
        OSError: If it cannot be written; the message names the file and not the temporary one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/a") as handle:
        ...         _ = handle.write(b"whole")
        ...     Path(folder, "a").read_bytes()
        b'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        try:
            handle = part.open("xb")
        except OSError as error:
            raise type(error)(f"{path}: cannot be written ({brief(error, part)}); name another folder") from error
        with room_for(path), handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())


@contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Names the file in the error of a disk that is full, which the system itself does not.

    Example:
        >>> with room_for("m.extxyz"):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        OSError: m.extxyz: cannot be written (OSError: No space left on device); make room there, or name another folder
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        reason = f"OSError: {error.strerror}"
        raise OSError(f"{path}: cannot be written ({reason}); make room there, or name another folder") from error


def ends_line(path: Path) -> bool:
    """Whether the last line of a file that is not empty is complete.

    Example:
        >>> ends_line(Path("README.md"))
        True
    """
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"


def write_whole(handle: FileIO, content: bytes) -> None:
    """Writes all content to an unbuffered file, in a single system call if possible.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, open(f"{folder}/a", "wb", buffering=0) as handle:
        ...     write_whole(handle, b"all of it")
        ...     handle.tell()
        9
    """
    rest = memoryview(content)
    while rest:
        rest = rest[handle.write(rest) :]


def brief(error: Exception, hidden: Path | None = None) -> str:
    """Returns the class of an error with the first line of its message, for messages of one line.

    Args:
        error: Any error.
        hidden: A temporary path to leave out of the message of an ``OSError``.

    Returns:
        ``"Kind: message"``.

    Example:
        >>> brief(EOFError("cut"))
        'EOFError: cut'
    """
    if hidden is not None and isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
