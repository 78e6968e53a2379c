"""What several benchmarks share: any model by its name, and folders that keep finished pieces."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ase_enf
from ase_enf.en_flows import convert_en_flows
from ase_enf.files import atomic_write
from ase_enf.model import ENF


def load_flow(model: str) -> ENF:
    """Loads a shipped name, a .safetensors, or the .npz of the weights published with the paper, on the CPU."""
    return convert_en_flows(model) if model.endswith(".npz") else ase_enf.load(model, "cpu")


def open_work(folder: Path, flow: ENF, **settings: object) -> Path:
    """Makes a folder for finished pieces, and refuses one that holds those of another model or other settings.

    Args:
        folder: The folder.
        flow: The model; its weights are told apart by a hash.
        settings: Whatever the pieces depend on.

    Returns:
        The folder.

    Raises:
        SystemExit: If the folder was used for something else.
    """
    weights = b"".join(value.cpu().numpy().tobytes() for value in flow.state_dict().values())
    mine = {"weights": hashlib.sha256(weights).hexdigest()[:16]} | {key: str(value) for key, value in settings.items()}
    path = folder / "settings.json"
    if path.exists() and (theirs := json.loads(path.read_text())) != mine:
        raise SystemExit(f"{folder}: holds pieces of other work ({theirs}, not {mine}); use another folder")
    with atomic_write(path) as handle:
        handle.write(json.dumps(mine).encode())
    return folder
