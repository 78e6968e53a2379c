"""What commands write: tables that keep what was added to them, and pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ase_enf.cli.progress import counted, say

if TYPE_CHECKING:
    import pandas as pd
    from ase import Atoms

TABLES = (".csv", ".json", ".md")
PICTURES = (".png", ".pdf", ".svg")


def check_free(options: argparse.Namespace, *paths: str | None) -> None:
    """Raises ``FileExistsError`` for files that are there, unless they may be replaced or continued.

    The first path is what ``--append`` continues.
    """
    append = getattr(options, "append", None)
    if append and options.overwrite:
        raise ValueError("--append adds to a file and --overwrite replaces it; choose one")
    for path in paths:
        if path and Path(path).exists() and not (options.overwrite or (append and path == paths[0])):
            more = ", --append adds to it" if append is not None and path == paths[0] else ""
            raise FileExistsError(f"{path}: is there already; --overwrite replaces it{more}, or name another file")


def check_picture(path: str | None) -> None:
    """Raises before any work if a picture could not be written there."""
    from ase_enf.atoms.files import require_folder

    if path and require_folder(path).suffix not in PICTURES:
        raise ValueError(f"{path}: a picture is written as {', '.join(PICTURES)}; choose one of these endings")


def draw_gallery(atoms: Sequence[Atoms], path: str) -> None:
    """Draws structures as a gallery, and says so."""
    from ase_enf.plot import gallery

    gallery(atoms, path)
    say(f"drew {counted(len(atoms), 'molecule')} in {path}")


class GrowingTable:
    """A table in a file, or on standard output, that keeps what was added to it, whatever ends the work.

    CSV is written part by part; JSON and Markdown when the file is closed.
    """

    def __init__(self, path: str | None, append: bool = False) -> None:
        self.path = path
        self.count = 0  # rows that are in it
        self._append = append
        self._parts: list[pd.DataFrame] = []
        self.can_append = bool(path) and path.endswith(".csv")
        if append and not self.can_append:
            raise ValueError(f"{path}: nothing can be added to such a table; use .csv")

    def __enter__(self) -> GrowingTable:
        return self

    def add(self, part: pd.DataFrame) -> None:
        """Adds rows."""
        if self.path is None:
            print(part.to_csv(index=False, header=not self.count), end="", flush=True)
        elif not self.can_append:
            self._parts.append(part)
            return
        else:
            going_on = bool(self.count) or (self._append and Path(self.path).exists())
            with open(self.path, "a" if going_on else "w", encoding="utf-8", newline="") as file:
                file.write(part.to_csv(index=False, header=not going_on))
        self.count += len(part)

    def __exit__(self, *_: object) -> None:
        if self._parts:
            write_table(self.path, *self._parts)
            self.count = sum(map(len, self._parts))


def write_table(output: str, *parts: pd.DataFrame) -> None:
    """Writes the rows of one table or of parts of it in the format of the file's ending."""
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
