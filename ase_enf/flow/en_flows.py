"""Converts the weights published with the paper (github.com/vgsatorras/en_flows) to a flow of this package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ase_enf.atoms.files import brief
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.loading import build_empty
from ase_enf.flow.model import ENF

# Number of QM9 training molecules (100,000) of each size: the published p_M.
QM9_SIZES = {
    3: 1, 4: 4, 5: 5, 6: 9, 7: 16, 8: 49, 9: 124, 10: 362, 11: 807, 12: 1689, 13: 3060, 14: 5136, 15: 7796, 16: 10644,
    17: 13025, 18: 13364, 19: 13832, 20: 9482, 21: 9970, 22: 3393, 23: 4848, 24: 539, 25: 1506, 26: 48, 27: 266, 29: 25,
}  # fmt: skip
SPECIES = ("H", "C", "N", "O", "F")

# The two files of a published run: how the names in each begin, and the prefix that a joint checkpoint adds.
_PARTS = {"flow.npy": ("transformations.", "flow."), "dequantizer.npy": ("net_fn.", "dequantizer.")}
_ACTNORM = "flow.transformations.0."
_DYNAMICS = "flow.transformations.1.odefunc.dynamics.egnn."
_DEQUANTIZER = "dequantizer.net_fn.egnn."
# Published module → ours, inside one layer.
_LAYER = {
    "edge_mlp.0": "messages.edge_in",
    "edge_mlp.2": "messages.edge_out",
    "att_mlp.0": "messages.gate",
    "node_mlp.0": "node.node_in",
    "node_mlp.2": "node.node_out",
    "coord_mlp.0": "position_in",
    "coord_mlp.2": "position_out",
}


def convert_en_flows(path: str | os.PathLike[str]) -> ENF:
    """Reads a checkpoint of the published code (QM9, E-NF with argmax-variational dequantisation) as an ``ENF``.

    The scaling layer (ActNorm) becomes ``position_scale`` and the standardisation of the features. The output of the
    dynamics for the time is left out, as the published code ignores it. The volume of the positional scale is counted
    on the subspace of (M − 1) n dimensions, where the published code counts M n.

    Args:
        path: The folder of the published ``flow.npy`` and ``dequantizer.npy``, or one of these two files beside the
            other; or an ``.npz`` or a torch checkpoint of all arrays, named as in the published modules.

    Returns:
        A float32 flow in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file, or only one of the two.
        ValueError: If the file is damaged or holds other modules.

    Example:
        >>> convert_en_flows("published_run").save("published.safetensors")  # doctest: +SKIP
    """
    arrays = read_arrays(path)
    try:
        model = build_empty(_config(arrays), {"source": "published with Satorras et al. 2021", "file": Path(path).name})
        model.load_state_dict(_state(arrays, model.state_dict()), strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path}: is no checkpoint of the published QM9 E-NF ({brief(error)}); convert one with argmax_variational "
            "dequantisation, attention and tanh"
        ) from None
    model.name = Path(path).stem
    return model.eval().requires_grad_(False)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the arrays of a published checkpoint without executing anything in it.

    Args:
        path: As in :func:`convert_en_flows`.

    Returns:
        Arrays by their names in a joint checkpoint.

    Raises:
        FileNotFoundError: If there is no such file, or only one of the two.
        ValueError: If the file is not a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        return {name: value for part in _PARTS for name, value in _read_file(path / part).items()}
    arrays = _read_file(path)
    missing = [part for part, (_, prefix) in _PARTS.items() if not any(name.startswith(prefix) for name in arrays)]
    if len(missing) == 1:  # this is one of the two files, and the other lies beside it
        arrays |= _read_file(path.with_name(missing[0]))
    return arrays


def _read_file(path: Path) -> dict[str, Tensor]:
    """Returns the arrays of one file by their names in a joint checkpoint."""
    if not path.is_file():
        pair = f"; the published weights are {' and '.join(_PARTS)} in one folder" if path.name in _PARTS else ""
        raise FileNotFoundError(f"{path}: no such checkpoint{pair}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(np.array(file[name])) for name in file.files}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{path}: neither an .npz nor a torch checkpoint ({brief(error)}); fetch it again") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no plain state dict; save model.state_dict() with the published code")
    return {_joint_name(name.removeprefix("module.")): value for name, value in state.items()}


def _joint_name(name: str) -> str:
    """Returns the name in a joint checkpoint of an array from a single file."""
    return next((prefix + name for begin, prefix in _PARTS.values() if name.startswith(begin)), name)


def _config(arrays: Mapping[str, Tensor]) -> ENFConfig:
    hidden = arrays[_DYNAMICS + "embedding.bias"].shape[0]
    found = [re.match(re.escape(_DYNAMICS) + r"gcl_(\d+)\.", name) for name in arrays]
    shift = arrays[_ACTNORM + "h_t"].double().flatten()
    scale = torch.exp(-arrays[_ACTNORM + "h_log_s"].double().flatten())
    return ENFConfig(
        features="joint",
        species=SPECIES,
        sizes=QM9_SIZES,
        hidden=hidden,
        layers=1 + max(int(match.group(1)) for match in found if match),
        dequantizer="learned",
        position_scale=float(torch.exp(arrays[_ACTNORM + "x_log_s"].double())),
        feature_shift=tuple(shift.tolist()),
        feature_scale=tuple(scale.tolist()),
    )


def _state(arrays: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the published arrays under our names, each cut to our shape."""
    state = {}
    for theirs, network in ((_DYNAMICS, "dynamics.network."), (_DEQUANTIZER, "q.network.")):
        for name, value in arrays.items():
            if not name.startswith(theirs):
                continue
            target = network + _our_name(name.removeprefix(theirs))
            if target in ours:  # else it is the last φ_x of the dequantiser, whose positions are not used
                state[target] = value[: ours[target].shape[0]]
    return state


def _our_name(name: str) -> str:
    layer = re.match(r"gcl_(\d+)\.(\w+\.\d)\.(weight|bias)$", name)
    if layer:
        return f"layers.{layer.group(1)}.{_LAYER[layer.group(2)]}.{layer.group(3)}"
    return name.replace("embedding_out.", "out.").replace("embedding.", "embed.")
