"""Devices and floating types by their names, and memory that is full."""

from __future__ import annotations

import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """Turns "auto" into CUDA where there is one, and checks an explicit choice.

    Raises:
        ValueError: If the device is not there.
    """
    if str(device) == "auto":
        return resolve_device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; choose auto, cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} usable CUDA device(s); use cpu or auto"
        )
    # With its number it compares equal to the device of tensors.
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Turns "float32" or "float64" into a torch dtype.

    Raises:
        ValueError: For any other.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32 or float64")
    return known[name]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough; torch has a class of its own for that on a GPU, and only words on a CPU.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        True
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
