"""A run: what stays fixed from its beginning, and what each step changes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ase_enf.atoms.batch import Batch
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.flow.model import ENF
from ase_enf.flow.weights import package_version
from ase_enf.training.config import TrainConfig
from ase_enf.training.distributed import Ranks
from ase_enf.training.objectives import Objective
from ase_enf.training.optimizers import Clipper, Optimizers, schedule


class Step(nn.Module):
    """The objective as a module, so that DistributedDataParallel sees a single forward pass."""

    def __init__(self, model: ENF, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns loss and value of a batch."""
        return tuple(self.objective(self.model, batch, generator))


class StepsElsewhere(Protocol):
    """Takes the steps of a run in place of the loop, which learns later what came of them."""

    def __call__(self, run: Run, index: np.ndarray) -> None:
        """Starts a step with the molecules ``index``, and does not wait for it."""

    @property
    def full(self) -> bool:
        """Whether :meth:`read` must come before the next step."""

    def read(self, run: Run) -> list[list[float]]:
        """Brings the run up to date, and returns loss, value and gradient norm of each step since the last time."""


@dataclass(kw_only=True)
class Run:
    """A training run. ``state.py`` saves the fields that change with its steps.

    Args:
        config: Settings, with every "auto" resolved.
        ranks: This process among those of ``torchrun``.
        device: Device of this process.
        source: Description of the data.
        data: Training set.
        valid: Validation set.
        model: The flow.
        objective: The loss that is minimised.
        stepper: Model and objective together.
        averages: Exponential moving averages of the model.
        optimizer: Takes the steps.
        clip: Clips the gradients by their recent norms.
        device_steps: Takes the steps on the device; by default the host takes them.
        step: Number of steps done.
        noted: The step up to which log, validation and saves are complete.
        whole: Whether weights, averages, optimizer and ``step`` agree; False only within a step.
        skipped: Number of steps without an update, because loss or gradient were not finite.
        consecutive_skips: Number of such steps in a row, up to the latest.
        elapsed: Seconds of training.
        window: Loss, value and gradient norm of each step since the last row of the log.
        validated: Step of the last validation, and the NLL of each average there.
        best: The best NLL.
        best_weights: The averaged weights that reached it.
        best_provenance: Their provenance.
    """

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    source: str | None
    data: MoleculeSet
    valid: MoleculeSet
    model: ENF
    objective: Objective
    stepper: nn.Module
    averages: tuple[AveragedModel, ...]
    optimizer: Optimizers
    clip: Clipper
    device_steps: StepsElsewhere | None = None
    step: int = 0
    noted: int = 0
    whole: bool = True
    skipped: int = 0
    consecutive_skips: int = 0
    elapsed: float = 0.0
    window: list[list[float]] = dataclasses.field(default_factory=list)
    validated: tuple[float, ...] = (-1, math.nan)
    best: float = math.inf
    best_weights: dict[str, Tensor] | None = None
    best_provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def out(self) -> Path | None:
        """The folder of the run."""
        return Path(self.config.out) if self.config.out else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, the same in every epoch."""
        batches = len(self.data.epoch_plan(self.config.batch_size, (self.config.seed, 0)))
        return max(batches // self.ranks.world, 1)

    @property
    def total_steps(self) -> int | None:
        """Total number of steps, None for a run without an end."""
        endless = self.config.schedule == "constant"
        return self.config.steps or (None if endless else self.config.epochs * self.steps_per_epoch)

    @property
    def ended(self) -> bool:
        """Whether all steps are done."""
        return self.total_steps is not None and self.step >= self.total_steps

    def rate(self, step: int) -> float:
        """Returns the fraction of the peak learning rate in the step that follows ``step`` steps."""
        config = self.config
        total = math.inf if config.schedule == "constant" else self.total_steps
        return schedule(step, total, config.warmup, config.cool_down)

    def batches(self) -> Iterator[np.ndarray]:
        """Yields this process's batches, as indices of molecules, from the current step on, without end."""
        config, rank, world, per_epoch = self.config, self.ranks.rank, self.ranks.world, self.steps_per_epoch
        while True:
            epoch, done = divmod(self.step, per_epoch)
            plan = self.data.epoch_plan(config.batch_size, (config.seed, epoch))
            if len(plan) >= world:  # with fewer batches than processes, all of them train on the same
                plan = plan[rank : per_epoch * world : world]
            yield from plan[done:per_epoch]

    def generator(self, step: int, stream: int = 0) -> torch.Generator:
        """Returns the generator of one step; it depends on nothing else, so that a resumed run draws the same numbers.

        Args:
            step: Number of steps before this one.
            stream: 0 for training, 1 for validation, which is the same in every process.
        """
        return torch.Generator().manual_seed(self.seed_of(step, stream))

    def seed_of(self, step: int, stream: int = 0) -> int:
        """Returns the seed of :meth:`generator`."""
        word = np.random.SeedSequence((self.config.seed, step, 0 if stream else self.ranks.rank, stream))
        return int(word.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def provenance(self, average: int, nll: float) -> dict[str, Any]:
        """Returns the provenance of the present weights of an average; ``nll`` is their validation NLL or NaN."""
        training = dataclasses.asdict(self.config)
        del training["out"]  # weights are shared, and need not tell the folders of this machine
        if training["init_from"]:
            training["init_from"] = Path(training["init_from"]).name
        return {
            "objective": self.config.objective,
            "training": training,
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": round(self.step / self.steps_per_epoch, 3),
            "data": self.source,
            "molecules": len(self.data),
            "processes": self.ranks.world,
            "hours": round(self.elapsed / 3600, 3),
            "ema_decay": self.config.ema_decays[average],
            "validation_nll": nll if math.isfinite(nll) else None,
            "skipped_steps": self.skipped,
            "ase_enf": package_version(),
            "torch": torch.__version__,
        }
