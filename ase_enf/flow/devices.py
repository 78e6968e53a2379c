"""Devices and floating types by name, and errors for lack of memory."""

from __future__ import annotations

import torch

from ase_enf.values import check_dtype, shown


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns a device by its name: "auto" is CUDA if available, otherwise the CPU.

    Raises:
        ValueError: If the device is unknown or not available.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if str(device) == "auto":
        return resolve_device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {shown(device)} is unknown; choose auto, cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} usable CUDA device(s); use cpu or auto"
        )
    # Tensors carry the number of their device, and "cuda" would not compare equal to it.
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns a torch dtype by its name, "float32" or "float64".

    Raises:
        ValueError: If it is any other.

    Example:
        >>> resolve_dtype("float64")
        torch.float64
    """
    return getattr(torch, check_dtype(dtype))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory: torch has an exception class for that on a GPU, but not on a CPU.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        True
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
