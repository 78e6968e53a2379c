"""Weights files: ``safetensors`` with configuration and provenance as JSON metadata; nothing in them is executed.

Headers are read without torch, whose import takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ase_enf.atoms.files import atomic_write, require_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ase_enf.flow.config import ENFConfig

FORMAT_VERSION = 2
METADATA_KEY = "ase_enf"
PRETRAINED = Path(__file__).parents[1] / "pretrained"


def write_weights(
    path: str | os.PathLike[str], config: ENFConfig, provenance: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Writes a weights file in the current format, atomically.

    Args:
        path: The file.
        config: Configuration of the flow.
        provenance: How the flow was trained (JSON values).
        state: Weights by name.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    from safetensors.torch import save

    path = require_folder(path)
    header = {
        "format": FORMAT_VERSION,
        "package": package_version(),
        "units": {"positions": "angstrom", "log_likelihood": "nat"},
        "config": dataclasses.asdict(config),
        "provenance": dict(provenance),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as handle:
        handle.write(save(tensors, metadata={METADATA_KEY: json.dumps(header)}))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads configuration and provenance of a weights file without loading the weights.

    Args:
        path: The file.

    Returns:
        The header, migrated to the current format.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder, such as that of a training run.
        ValueError: If the file is truncated, foreign, or in a newer format.

    Example:
        >>> read_header(shipped_path("dw4"))["config"]["features"]
        'none'
    """
    path = Path(path)
    if path.is_dir() and path != Path():
        inside = sorted(path.glob("*.safetensors"))
        raise IsADirectoryError(
            f"{path}: is a folder; name a weights file{f', such as {inside[-1]}' if inside else ' (.safetensors)'}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; shipped names are {', '.join(shipped()) or 'none'}")
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no readable .safetensors file ({error}); fetch or train it again") from None
    if text is None:
        raise ValueError(
            f"{path}: holds no ase-enf model (no {METADATA_KEY!r} metadata); pass a file written by ENF.save"
        )
    try:
        header = json.loads(text)
        newer = header.get("format", 0) > FORMAT_VERSION
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: has a damaged header ({error}); fetch or train it again") from None
    if newer:
        raise ValueError(
            f"{path}: was written by ase-enf {header.get('package')}, newer than this {package_version()}; upgrade"
        )
    return _migrated(header)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the weights of a file by their names, on the CPU.

    Raises:
        ValueError: If they cannot be read.

    Example:
        >>> "dynamics.network.embed.weight" in read_tensors(shipped_path("qm9-small"))
        True
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _migrated(header: dict[str, Any]) -> dict[str, Any]:
    """Returns a header in the current format; in format 1 only the training objective implies the path."""
    if header.get("format") == 1 and dict(header.get("provenance") or {}).get("objective") == "flow_matching":
        header = header | {"config": {"path": "linear"} | header["config"]}
    return header


def shipped() -> list[str]:
    """Returns the names of the models that come with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def shipped_path(name: str) -> Path | None:
    """Returns the weights file of a shipped model, or None if there is none of that name.

    Example:
        >>> shipped_path("qm9").name, shipped_path("qm99")
        ('qm9.safetensors', None)
    """
    path = PRETRAINED / f"{name}.safetensors"
    return path if path.is_file() else None


def weights_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the weights file of a shipped model by its name; anything else is taken for a path.

    Example:
        >>> weights_path("qm9").name, weights_path("runs/mine/model.safetensors").name
        ('qm9.safetensors', 'model.safetensors')
    """
    return shipped_path(str(name_or_path)) or Path(name_or_path)


def package_version() -> str:
    """Returns the installed version of ase-enf ("unknown" from a bare source tree)."""
    try:
        return metadata.version("ase-enf")
    except metadata.PackageNotFoundError:
        return "unknown"
