"""Several processes that train together, each on its own share, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ase_enf.flow.model import resolve_device


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

    def share(self, model: nn.Module) -> None:
        """Gives all processes the weights of the first."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the process group of ``torchrun``, if there is one, and leaves it at the end."""
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
    finally:
        if owner:
            gc.collect()  # what else keeps the group
            dist.destroy_process_group()
