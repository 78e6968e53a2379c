"""Results as CSV and Markdown, with the command and the versions that wrote them."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"


def versions() -> str:
    """Returns the versions that a result depends on, in one line."""
    packages = ("torch", "torchdiffeq", "ase", "rdkit", "numpy")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {found}"


def machine() -> str:
    """Returns the machine that the results were measured on, in one line."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s), {cuda}"
    )


def command() -> str:
    """Returns the command line of this process as a user would type it, with the last part of each path only."""
    module = sys.modules["__main__"].__spec__.name if sys.modules["__main__"].__spec__ else sys.argv[0]
    return " ".join(["python -m", module.removesuffix(".__main__"), *(Path(word).name for word in sys.argv[1:])])


def write_results(table: pd.DataFrame, name: str, title: str, notes: str = "", folder: Path | None = None) -> None:
    """Writes ``results/NAME.csv`` and ``results/NAME.md`` and prints the table.

    Args:
        table: The results.
        name: File name without ending.
        title: Heading of the Markdown file.
        notes: What a reader must know, in Markdown.
        folder: Folder to write to instead of ``results``.
    """
    write_csv(table, name, folder)
    header = f"`{command()}` · {versions()} · {machine()}"
    rule = "|" + "---|" * len(table.columns)
    rows = [f"| {' | '.join(map(str, row))} |" for row in [tuple(table.columns), *table.itertuples(index=False)]]
    text = "\n".join([f"# {title}", "", header, "", *([notes, ""] if notes else []), rows[0], rule, *rows[1:], ""])
    ((folder or RESULTS) / f"{name}.md").write_text(text)
    print(text)


def write_csv(table: pd.DataFrame, name: str, folder: Path | None = None) -> None:
    """Writes only ``NAME.csv``, to ``results`` or another folder; its first line has the command and the versions."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    header = f"# {command()} · {versions()} · {machine()}\n"
    (folder / f"{name}.csv").write_text(header + table.to_csv(index=False))
