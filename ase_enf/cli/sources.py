"""Where the structures of a run come from, so that a run that goes on finds them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA_FILE = "data.json"
"""Beside a run: where its structures come from."""

_SOURCES = {"train": str, "valid": str, "split": bool, "n_atoms": int | None}  # what DATA_FILE holds


def new_sources(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what DATA_FILE is to hold, as it was typed."""
    from ase_enf.atoms.files import check_source

    if not options.data or not (options.valid or options.qm9_split):
        raise ValueError("training needs --data and --valid (or --qm9-split), and --out; or --resume FOLDER")
    if options.qm9_split and options.valid:
        raise ValueError("--qm9-split takes both sets from --data; leave --valid out")
    paths = {"train": options.data, "valid": options.valid or options.data}
    for path in paths.values():
        check_source(Path(path).expanduser())  # a run that goes on reads them again
    return _resolved(paths) | {"split": options.qm9_split, "n_atoms": options.n_atoms}


def moved_sources(sources: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns where the data of a run are, some of them at another place."""
    if sources["split"] and options.valid:
        raise ValueError("this run takes both sets from --data; leave --valid out")
    paths = {"train": options.data, "valid": options.data if sources["split"] else options.valid}
    return sources | _resolved({name: path for name, path in paths.items() if path})


def _resolved(paths: dict[str, str]) -> dict[str, str]:
    return {name: str(Path(path).expanduser().resolve()) for name, path in paths.items()}


def saved_sources(path: Path) -> dict[str, Any]:
    """Reads what DATA_FILE holds."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; say by --data and --valid where the data of the run are")
    sources = read_json(path)
    if not is_sources(sources):
        raise ValueError(f"{path}: names no data of a run; remove it, and say by --data and --valid where they are")
    return sources


def is_sources(content: Any) -> bool:
    """Whether a JSON value is what a run writes to DATA_FILE."""
    return (
        isinstance(content, dict)
        and content.keys() == _SOURCES.keys()
        and all(isinstance(content[name], kind) for name, kind in _SOURCES.items())
    )


def check_apart(sources: dict[str, Any], folder: Path) -> None:
    """Raises ``ValueError`` for data that are a file which the run writes."""
    from ase_enf.training.folder import RUN_FILES

    for name in (*RUN_FILES, DATA_FILE):
        if str((folder / name).resolve()) in (sources["train"], sources["valid"]):
            raise ValueError(f"{folder / name}: the run would replace its own data; choose another folder for it")


def read_json(path: Path) -> Any:
    """Reads a file of a run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --resume takes the folder that an earlier --out named")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); start the run again in another folder") from None


def write_json(path: Path, content: Any) -> None:
    """Writes a file of a run, which is there when it is complete."""
    from ase_enf.atoms.files import atomic_write

    with atomic_write(path) as handle:
        handle.write(f"{json.dumps(content, indent=2)}\n".encode())
