"""Where the structures of a training run come from, saved so that a resumed run finds them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA_FILE = "data.json"
"""File in the folder of a run that records where its structures come from."""

_SOURCES = {"train": str, "valid": str, "split": bool, "n_atoms": int | None}  # keys and types in DATA_FILE


def new_sources(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the content of DATA_FILE for a new run.

    Raises:
        ValueError: If an option is missing, or two do not fit together.
        FileNotFoundError: If a file does not exist.
    """
    from ase_enf.atoms.files import check_source

    if not options.data or not (options.valid or options.qm9_split):
        raise ValueError("training needs --data and --valid (or --qm9-split), and --out; or --resume FOLDER")
    if options.qm9_split and options.valid:
        raise ValueError("--qm9-split takes both sets from --data; leave --valid out")
    paths = {"train": options.data, "valid": options.valid or options.data}
    for path in paths.values():
        check_source(Path(path).expanduser())  # not a pipe: a resumed run reads them again
    return _resolved(paths) | {"split": options.qm9_split, "n_atoms": options.n_atoms}


def moved_sources(sources: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the content of DATA_FILE for a resumed run, whose data may have moved to paths given as options.

    Args:
        sources: Content of DATA_FILE.
        options: Options of the command.

    Raises:
        ValueError: If ``--valid`` is given although the run takes both sets from one file.
    """
    if sources["split"] and options.valid:
        raise ValueError("this run takes both sets from --data; leave --valid out")
    paths = {"train": options.data, "valid": options.data if sources["split"] else options.valid}
    return sources | _resolved({name: path for name, path in paths.items() if path})


def _resolved(paths: dict[str, str]) -> dict[str, str]:
    return {name: str(Path(path).expanduser().resolve()) for name, path in paths.items()}


def saved_sources(path: Path) -> dict[str, Any]:
    """Reads DATA_FILE.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it holds anything else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the data of the run by --data and --valid")
    sources = read_json(path)
    if not is_sources(sources):
        raise ValueError(f"{path}: names no data of a run; remove it and give the data by --data and --valid")
    return sources


def is_sources(content: Any) -> bool:
    """Whether a JSON value is a content of DATA_FILE."""
    return (
        isinstance(content, dict)
        and content.keys() == _SOURCES.keys()
        and all(isinstance(content[name], kind) for name, kind in _SOURCES.items())
    )


def check_apart(sources: dict[str, Any], folder: Path) -> None:
    """Raises ``ValueError`` if the data of a run are a file that the run writes."""
    from ase_enf.training.folder import RUN_FILES

    for name in (*RUN_FILES, DATA_FILE):
        if str((folder / name).resolve()) in (sources["train"], sources["valid"]):
            raise ValueError(f"{folder / name}: the run would replace its own data; choose another folder for it")


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --resume takes the folder that an earlier --out named")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); start the run again in another folder") from None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file of a run, atomically."""
    from ase_enf.atoms.files import atomic_write

    with atomic_write(path) as handle:
        handle.write(f"{json.dumps(content, indent=2)}\n".encode())
