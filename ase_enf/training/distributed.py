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

# How gloo and NCCL say that a process does not answer any more.
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
        """Returns where this process computes: each on a GPU of its own."""
        device = resolve_device(name)
        if device.type == "cuda" and self.world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        return device

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.world > 1:
            dist.barrier()

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether something holds in one process at least, so that all decide alike."""
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
        """Gives all processes the weights of the first."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the process group of ``torchrun``, if there is one, and leaves it at the end.

    Raises:
        ConnectionError: In the processes that are left, when one of the group has ended or hangs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    owner = not dist.is_initialized()
    if owner:
        # Its functions keep the group of the time of their import as a default. DistributedDataParallel imports it, and
        # threads of a group that is kept run on after its end: now and then they abort the process at exit.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if resolve_device(device).type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if LOST.search(str(error)):
            raise ConnectionError(
                f"process {dist.get_rank()} of {dist.get_world_size()} lost another one, which has ended or hangs "
                f"({str(error).splitlines()[0]}); see the message of that one, then go on from the last save with "
                "--resume, or in Python with resume=True"
            ) from error
        raise
    finally:
        if owner:
            gc.collect()  # what else keeps the group
            dist.destroy_process_group()
