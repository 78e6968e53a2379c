"""From a weights file to a flow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ase_enf.flow.config import ENFConfig
from ase_enf.flow.devices import resolve_device, resolve_dtype
from ase_enf.flow.model import ENF
from ase_enf.flow.weights import read_header, read_tensors, shipped_path


def load(
    name_or_path: str | os.PathLike[str], device: str | torch.device = "auto", dtype: str | torch.dtype = "float32"
) -> ENF:
    """Loads a flow: a shipped name such as ``"qm9"``, or a path to ``.safetensors``.

    Nothing in the file is executed: tensors and JSON only.

    Args:
        name_or_path: Name or path.
        device: "auto", "cpu", "cuda", "cuda:1" …
        dtype: "float32" or "float64".

    Raises:
        FileNotFoundError: If there is neither a shipped model nor a file of that name.
        ValueError: If the file is truncated, foreign or does not fit its configuration, or the device is missing.
    """
    chosen, floating = resolve_device(device), resolve_dtype(dtype)
    path = shipped_path(str(name_or_path)) or Path(name_or_path)
    header = read_header(path)
    try:
        config = ENFConfig(**header["config"])
        state = read_tensors(path)
        check_extent(config, state)
        model = build_empty(config, header.get("provenance"))
        model.load_state_dict(state, strict=True, assign=True)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: weights do not fit their configuration ({reason}); fetch or train the file again"
        ) from None
    model.name = _model_name(path)
    return model.to(device=chosen, dtype=floating).eval().requires_grad_(False)


def build_empty(config: ENFConfig, provenance: Mapping[str, Any] | None = None) -> ENF:
    """Returns a flow without weights, for ``load_state_dict(..., assign=True)``.

    It takes no memory, and no number from torch's generator.

    Example:
        >>> build_empty(ENFConfig(hidden=8, layers=1)).device
        device(type='meta')
    """
    with torch.device("meta"):
        return ENF(config, provenance)


def check_extent(config: ENFConfig, state: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a network larger than the weights that are there for it, before it is built.

    Args:
        config: What the flow is to be.
        state: Its weights by name.

    Example:
        >>> check_extent(ENFConfig(layers=10**9), {"weight": torch.zeros(3)})
        Traceback (most recent call last):
        ValueError: hidden=64, layers=1000000000, radial=0: there are only 3 weights in 1 tensors
    """
    weights = sum(value.numel() for value in state.values())
    tensors = config.layers if config.network == "kernel" else len(state)  # all others have several tensors a layer
    if config.hidden * config.layers > weights or config.layers > tensors or config.radial > weights:
        raise ValueError(
            f"hidden={config.hidden}, layers={config.layers}, radial={config.radial}: there are only {weights} weights "
            f"in {len(state)} tensors"
        )


def _model_name(path: Path) -> str:
    """Returns what provenance calls a model: every run names its files alike, so that its folder tells them apart."""
    if path.stem not in ("model", "last"):
        return path.stem
    folder = path.resolve().parent.name
    return folder if path.stem == "model" else f"{folder}-last"
