"""Several processes that train together, each on its own share, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ase_enf.flow.devices import resolve_device

# How gloo and NCCL report that a process no longer answers.
LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out|remote process|nccl", re.IGNORECASE)


class Ranks(NamedTuple):
    """This process among those that ``torchrun`` started; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes, validates and shows progress."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Returns the device of this process; on GPUs each process has its own."""
        device = resolve_device(name)
        if device.type == "cuda" and self.world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        return device

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        if self.world > 1:
            dist.barrier()

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether a condition holds in at least one process, so that all of them decide alike."""
        if self.world == 1:
            return here
        shared = torch.tensor(float(here), device=device)
        dist.all_reduce(shared)
        return bool(shared > 0)

    def total(self, values: Tensor, device: torch.device) -> Tensor:
        """Returns the sum of a CPU tensor over all processes, the same in each; ``device`` is that of the run."""
        if self.world == 1:
            return values
        shared = values.to(device, copy=True)
        dist.all_reduce(shared)
        return shared.cpu()

    def share(self, model: nn.Module) -> None:
        """Copies the weights of the first process to all others."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)


def _loss(error: RuntimeError | KeyboardInterrupt) -> BaseException | None:
    """Returns the error by which the group reports a lost process, None if there is none or it has a note already."""
    if hasattr(error, "__notes__"):
        return None
    found: BaseException | None = error
    while found is not None and not (isinstance(found, RuntimeError) and LOST.search(str(found))):
        found = found.__context__
    return found


def _reason(loss: BaseException) -> str:
    """Returns what the group says of a loss, without the place in its source and its advice to programmers."""
    return re.sub(r"^\[[^]]*\]\s*", "", str(loss).splitlines()[0]).partition(". ")[0]


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the process group of ``torchrun``, if there is one, and leaves it at the end.

    Raises:
        ConnectionError: In the remaining processes, when one of the group has ended or hangs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    owner = not dist.is_initialized()
    if owner:
        # The functions of this module keep the group that exists when it is imported as their default, and
        # DistributedDataParallel imports it. The threads of a group that is kept outlive it and sometimes abort the
        # process at exit. So the module is imported before there is a group.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if resolve_device(device).type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except (RuntimeError, KeyboardInterrupt) as error:
        loss = _loss(error)
        if loss is None:
            raise
        said = (
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, which has ended or hangs "
            f"({_reason(loss)}); see the message of that one, then continue from the last save with "
            "--resume, or in Python with resume=True"
        )
        if isinstance(error, KeyboardInterrupt):  # the signal of torchrun, which comes with the loss
            error.add_note(said)
            raise
        raise ConnectionError(said) from error
    finally:
        if owner:
            gc.collect()  # cycles that still hold the group
            dist.destroy_process_group()
