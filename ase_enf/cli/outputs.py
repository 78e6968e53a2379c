"""Output of the commands: tables that are saved as they grow, and pictures."""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ase_enf.cli.progress import counted, say

if TYPE_CHECKING:
    import pandas as pd
    from ase import Atoms

TABLES = (".csv", ".json", ".md")
PICTURES = (".png", ".pdf", ".svg")


def check_free(options: argparse.Namespace, *paths: str | None) -> None:
    """Checks that files do not exist, unless ``--overwrite`` or ``--append`` is given.

    Args:
        options: Options of the command.
        paths: Files to write, the first of which ``--append`` continues; None is ignored.

    Raises:
        FileExistsError: If one of them exists.
        ValueError: If both options are given.
    """
    append = getattr(options, "append", None)
    if append and options.overwrite:
        raise ValueError("--append adds to a file and --overwrite replaces it; choose one")
    for path in paths:
        if path and Path(path).exists() and not (options.overwrite or (append and path == paths[0])):
            continued = append is not None and path == paths[0] and _can_continue(path)
            more, how = (", --append adds to it", _going_on(options, path)) if continued else ("", "")
            raise FileExistsError(f"{path}: already exists; --overwrite replaces it{more}, or name another file{how}")


def _can_continue(path: str) -> bool:
    from ase_enf.atoms.io import KEEP_INFO

    return Path(path).suffix in (".csv", *KEEP_INFO)


def _going_on(options: argparse.Namespace, path: str) -> str:
    """Returns how to continue the command if it was killed and left this file."""
    done, wanted = count_in(Path(path)), getattr(options, "n", None)
    if not done or (wanted is not None and done >= wanted):
        return ""
    rest = "" if wanted is None else f" -n {wanted - done}"
    what = counted(done, "molecule" if options.command == "generate" else "score")
    more = f"--append --start {options.start + done}{rest}"
    return f"; if this command wrote it and ended after {what}, {more} continues it"


def count_in(path: Path) -> int | None:
    """Returns the number of rows or structures in a file that can be continued, or None if it cannot be determined.

    Example:
        >>> count_in(Path("README.md")) is None
        True
    """
    counters = {".csv": _csv_rows, ".db": _database_rows, ".traj": _frames}
    counter = (counters | dict.fromkeys((".extxyz", ".xyz"), _xyz_structures)).get(path.suffix)
    try:
        return counter(path) if counter and path.stat().st_size else None
    except Exception:  # readers raise various errors for a file of another kind
        return None


def _csv_rows(path: Path) -> int:
    with path.open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def _database_rows(path: Path) -> int:
    from ase.db import connect

    return connect(path).count()


def _frames(path: Path) -> int:
    from ase.io.trajectory import TrajectoryReader

    with TrajectoryReader(path) as frames:
        return len(frames)


def _xyz_structures(path: Path) -> int:
    with path.open("rb") as file:
        last_lines = list(xyz_last_lines(file))
    if not all(last_lines):
        raise ValueError("cut off")
    return len(last_lines)


def xyz_last_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the last line of each structure in an xyz file, empty if the file ends before it.

    Example:
        >>> import io
        >>> list(xyz_last_lines(io.BytesIO(b"1\\n\\nH 0 0 0\\n1\\n")))
        [b'H 0 0 0\\n', b'']
    """
    while line := file.readline():
        lines = [file.readline() for _ in range(int(line) + 1)]
        yield lines[-1]


def same_file(path: str | Path | None, other: str | Path | None) -> bool:
    """Whether two paths lead to the same existing file.

    Example:
        >>> same_file("README.md", "./README.md"), same_file("README.md", None)
        (True, False)
    """
    return bool(path and other) and os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def check_apart(written: Iterable[str | Path | None], read: Iterable[str | Path | None]) -> None:
    """Checks that a command writes none of the files that it reads.

    Args:
        written: Files to write; None is ignored.
        read: Files to read; None is ignored.

    Raises:
        ValueError: If a file is in both.

    Example:
        >>> check_apart(["README.md"], ["./README.md"])
        Traceback (most recent call last):
        ValueError: README.md: is what this command reads, and it would be lost; name another file for what is written
    """
    read = list(read)
    for path in written:
        if any(same_file(path, source) for source in read):
            raise ValueError(
                f"{path}: is what this command reads, and it would be lost; name another file for what is written"
            )


def check_picture(path: str | None) -> None:
    """Raises an error, before any work, if a picture cannot be written to a path."""
    from ase_enf.atoms.files import require_folder

    if path and require_folder(path).suffix not in PICTURES:
        raise ValueError(f"{path}: a picture is written as {', '.join(PICTURES)}; choose one of these endings")


def draw_gallery(atoms: Sequence[Atoms], path: str) -> None:
    """Draws a gallery of structures and reports it."""
    from ase_enf.plot import gallery

    gallery(atoms, path)
    say(f"drew {counted(len(atoms), 'molecule')} in {path}")


class GrowingTable:
    """A table in a file, or on standard output, whose rows are saved as they come.

    CSV is written part by part; JSON and Markdown every half minute and when the file is closed.

    Args:
        path: The file; None for standard output.
        append: Whether to add rows to an existing table.
        columns: Names of the columns, which an existing table must share.
        renamed: Names of columns in earlier versions → current names.

    Raises:
        ValueError: If rows cannot be added to the existing table.
    """

    def __init__(
        self,
        path: str | None,
        append: bool = False,
        columns: Sequence[str] = (),
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        from ase_enf.atoms.files import remove_abandoned
        from ase_enf.atoms.io import FlushClock

        self.path = path
        self._clock = FlushClock()
        self.count = 0  # rows written by this object
        self._append = append
        self._parts: list[pd.DataFrame] = []
        self.can_append = bool(path) and path.endswith(".csv")
        if append and not self.can_append:
            raise ValueError(f"{path}: nothing can be added to such a table; use .csv")
        if path:
            remove_abandoned(Path(path).parent)
        if append and columns:
            _check_columns(path, list(columns), renamed or {})

    def __enter__(self) -> GrowingTable:
        return self

    def add(self, part: pd.DataFrame) -> None:
        """Adds rows."""
        from ase_enf.atoms.files import room_for, write_whole

        if self.path is None:
            print(part.to_csv(index=False, header=not self.count), end="", flush=True)
        elif not self.can_append:
            self._parts.append(part)
            if self._clock.due():
                self._write_parts()
            return
        else:
            going_on = bool(self.count) or (self._append and _has_rows(self.path))
            with room_for(self.path), open(self.path, "ab" if going_on else "wb", buffering=0) as file:
                write_whole(file, part.to_csv(index=False, header=not going_on).encode())
        self.count += len(part)

    def __exit__(self, *_: object) -> None:
        if self._parts:
            self._write_parts()

    def _write_parts(self) -> None:
        with self._clock.running():
            write_table(self.path, *self._parts)
        self.count = sum(map(len, self._parts))


def _has_rows(path: str) -> bool:
    """Whether a file holds a table; an empty file, as a shell may create it, does not."""
    return Path(path).is_file() and Path(path).stat().st_size > 0


def _check_columns(path: str, columns: list[str], renamed: Mapping[str, str]) -> None:
    """Raises ``ValueError`` if the columns of an existing table differ from those of the rows to add."""
    if not _has_rows(path):
        return
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    if header == columns:
        return
    earlier = [f"{old} is now called {renamed[old]}" for old in header if old in renamed]
    if [renamed.get(name, name) for name in header] == columns:
        raise ValueError(
            f"{path}: an earlier version wrote it: {', '.join(earlier)}; rename it there, or use another -o"
        )
    raise ValueError(f"{path}: its columns are {','.join(header)[:200]}, not {','.join(columns)}; use another -o")


def write_table(output: str, *parts: pd.DataFrame) -> None:
    """Writes a table, given as one or several parts, in the format of the file's ending."""
    from ase_enf.atoms.files import atomic_write

    suffix, columns = Path(output).suffix, parts[0].columns
    if suffix == ".csv":
        text = "".join(part.to_csv(index=False, header=part is parts[0]) for part in parts)
    elif suffix == ".json":
        rows = [row for part in parts for row in json.loads(part.to_json(orient="records", double_precision=15))]
        text = json.dumps({"rows": rows, **parts[0].attrs}, indent=2) + "\n"
    else:
        rows = [row for part in parts for row in part.itertuples(index=False)]
        text = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        text += "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    with atomic_write(output) as handle:
        handle.write(text.encode())
