"""Helpers of several benchmarks: loading any model, and folders that save finished pieces of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from ase.io import read
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.files import atomic_write
from ase_enf.atoms.io import write_structures
from ase_enf.flow.continuous import Solver
from ase_enf.flow.en_flows import convert_en_flows
from ase_enf.flow.model import ENF
from ase_enf.scoring.score import RENAMED

PIECE = 256


def load_flow(model: str) -> ENF:
    """Loads a shipped name, a .safetensors, or the .npz of the weights published with the paper, on the CPU."""
    return convert_en_flows(model) if model.endswith(".npz") else ase_enf.load(model, "cpu")


def digest(flow: ENF) -> str:
    """Returns a hash of the weights, 16 hexadecimal digits."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in flow.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


def open_work(folder: Path, flow: ENF, **settings: object) -> Path:
    """Creates a folder for finished pieces, or checks that an existing one is of the same model and settings.

    Args:
        folder: The folder.
        flow: The model, identified by a hash of its weights.
        settings: Everything else that the pieces depend on.

    Returns:
        The folder.

    Raises:
        SystemExit: If the folder holds pieces of another model or other settings.
    """
    mine = {"weights": digest(flow)} | {key: str(value) for key, value in settings.items()}
    path = folder / "settings.json"
    if path.exists() and (theirs := json.loads(path.read_text())) != mine:
        raise SystemExit(f"{folder}: holds pieces of other work ({theirs}, not {mine}); use another folder")
    with atomic_write(path) as handle:
        handle.write(json.dumps(mine).encode())
    return folder


def measured_molecules(
    folder: Path, molecules: Sequence[Atoms], count: int, seed: int, measure: Callable[[Atoms, int], dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """Measures molecules in a random order until some are found that can be measured; each is saved in a folder.

    Args:
        folder: The folder, see ``open_work``.
        molecules: The molecules to choose from.
        count: Number of results.
        seed: Seed of the order.
        measure: Returns what is measured of a molecule, given with its index; nothing if it cannot be measured.

    Returns:
        The results, fewer if the molecules do not suffice, and the number of molecules that were tried.
    """
    found: list[dict[str, Any]] = []
    tried, order = 0, np.random.default_rng(seed).permutation(len(molecules)).tolist()
    with tqdm(total=count, unit="molecule", disable=None, dynamic_ncols=True) as bar:
        for tried, k in enumerate(order, start=1):  # noqa: B007 (returned)
            path = folder / f"molecule_{k:05d}.json"
            if not path.exists():
                with atomic_write(path) as handle:
                    handle.write(json.dumps(measure(molecules[k], k)).encode())
            if entry := json.loads(path.read_text()):
                found.append(entry)
                bar.update()
            if len(found) == count:
                break
    return found, tried


def percent(report: pd.DataFrame, metric: str, digits: int = 2) -> str:
    """Returns a metric of ``metrics.evaluate`` and its standard error in per cent, as ``85.0 ± 0.3``."""
    value, stderr = report.set_index("metric").loc[metric, ["value", "stderr"]]
    return f"{100 * value:.{digits}f} ± {100 * stderr:.{digits}f}"


def draw_in_pieces(flow: ENF, n: int, seed: int, work: Path, solver: Solver | None = None) -> list[Atoms]:
    """Returns the first n molecules of a seed; draws the pieces that are missing in the folder."""
    drawn: list[Atoms] = []
    for start in tqdm(range(0, n, PIECE), desc="samples", unit="piece", dynamic_ncols=True):
        path = work / f"samples_{start:06d}.extxyz"
        if not path.exists():  # whole pieces, whatever n
            piece = list(ase_enf.igenerate(flow, PIECE, seed=seed, solver=solver, start=start, batch_size=PIECE))
            write_structures(path, piece)
        drawn += read(path, index=":")
    return drawn[:n]


def score_in_pieces(
    flow: ENF, atoms: Sequence[Atoms], rows: list[int], seed: int, work: Path, how: dict, piece: int | None = None
) -> pd.DataFrame:
    """Returns the scores of ``atoms[rows]``; computes the pieces that are missing in the folder.

    Args:
        flow: The model.
        atoms: All structures.
        rows: Indices of those to score, in an order in which the first pieces are a fair sample of all.
        seed: Seed. Every molecule has its own noise; with shared noise, the error of the mean would be that of a single
            draw.
        work: The folder.
        how: Arguments of ``score``.
        piece: Number of molecules in a piece, ``PIECE`` by default.
    """
    if not rows:
        raise SystemExit("no molecules to score; ask for at least one")
    size = piece or PIECE
    pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = []
    for k, members in enumerate(tqdm(pieces, desc="scores", unit="piece", dynamic_ncols=True)):
        path = work / f"scores_{how['trace']}_{k:03d}_{len(members)}.csv"
        if not path.exists():
            table = ase_enf.score(
                flow, [atoms[row] for row in members], seed=[seed * len(atoms) + row for row in members], **how
            )
            table.insert(0, "molecule", members)
            with atomic_write(path) as handle:
                handle.write(table.to_csv(index=False).encode())
        found.append(pd.read_csv(path).rename(columns=RENAMED))  # kept pieces may be those of an earlier version
    return pd.concat(found, ignore_index=True)
