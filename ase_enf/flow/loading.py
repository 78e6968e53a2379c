"""Loading a flow from a weights file."""

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
from ase_enf.flow.weights import read_header, read_tensors, weights_path


@torch.inference_mode(False)  # weights created in inference mode could not be used for forces
def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    backend: str = "auto",
) -> ENF:
    """Loads a flow by the name of a shipped model, such as ``"qm9"``, or from a ``.safetensors`` file.

    Nothing in the file is executed: it holds tensors and JSON only.

    Args:
        name_or_path: Name or path.
        device: "auto", "cpu", "cuda", "cuda:1" …
        dtype: "float32" or "float64".
        backend: What computes the pairs of an EGNN: "compiled", "triton", "torch", or "auto" for the first of them that
            can be used; on a CPU, a kernel that the system's C++ compiler builds on first use. Other networks have no
            pairs to compute. ``flow.use_backend`` changes it later.

    Returns:
        The flow, in evaluation mode and without gradients for its weights.

    Raises:
        FileNotFoundError: If there is neither a shipped model nor a file of that name.
        ValueError: If the file is truncated, foreign or does not fit its configuration, or device or backend cannot be
            used.

    Example:
        >>> load("qm9-small").species
        ('H', 'C', 'N', 'O', 'F')
    """
    chosen, floating = resolve_device(device), resolve_dtype(dtype)
    path = weights_path(name_or_path)
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
    model = model.to(device=chosen, dtype=floating).eval().requires_grad_(False)
    model.use_backend(backend)
    return model


def build_empty(config: ENFConfig, provenance: Mapping[str, Any] | None = None) -> ENF:
    """Returns a flow without weights, for ``load_state_dict(..., assign=True)``.

    It takes no memory and draws no random numbers.

    Example:
        >>> build_empty(ENFConfig(hidden=8, layers=1)).device
        device(type='meta')
    """
    with torch.device("meta"):
        return ENF(config, provenance)


def check_extent(config: ENFConfig, state: Mapping[str, Tensor]) -> None:
    """Checks, before a network is built, that it is no larger than the weights in the file.

    Args:
        config: Configuration of the flow.
        state: Weights by name.

    Raises:
        ValueError: If there are too few weights.

    Example:
        >>> check_extent(ENFConfig(layers=10**9), {"weight": torch.zeros(3)})
        Traceback (most recent call last):
        ValueError: hidden=64, layers=1000000000, radial=0: there are only 3 weights in 1 tensors
    """
    weights = sum(value.numel() for value in state.values())
    # Every network but "kernel" has several tensors in each layer.
    tensors = config.layers if config.network == "kernel" else len(state)
    if config.hidden * config.layers > weights or config.layers > tensors or config.radial > weights:
        raise ValueError(
            f"hidden={config.hidden}, layers={config.layers}, radial={config.radial}: there are only {weights} weights "
            f"in {len(state)} tensors"
        )


def _model_name(path: Path) -> str:
    """Returns the name of a model for provenance: that of its folder where a training run chose that of the file."""
    if path.stem not in ("model", "last"):
        return path.stem
    folder = path.resolve().parent.name
    return folder if path.stem == "model" else f"{folder}-last"
