"""Training steps that stay on the device: the host starts them, and reads their results only from time to time.

A step of ``loop`` reads three values from the device (whether the loss is finite, the norm of the gradient, and the
loss) and launches each kernel by itself; for networks of this size a GPU then waits for the host most of the time.
These steps decide on the device, and on a GPU each is one CUDA graph.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch

from ase_enf.flow.devices import out_of_memory
from ase_enf.training.captured import CapturedSteps, DeviceSet, FlatOptimizer
from ase_enf.training.config import TrainConfig
from ase_enf.training.distributed import Ranks
from ase_enf.training.optimizers import Clipper
from ase_enf.training.run import Run

WIDTHS = 6  # most padded sizes, each with its own graph
UNREAD = 50  # most steps whose results the host has not read yet


def stays_on_device(config: TrainConfig, ranks: Ranks, device: torch.device) -> bool:
    """Whether a run takes its steps on the device.

    Raises:
        ValueError: If ``config.capture`` is "always" and there are several processes, which average their gradients in
            each step.
    """
    if config.capture == "always" and ranks.world > 1:
        raise ValueError(
            f"capture='always' does not work with {ranks.world} processes, which average gradients; use capture='auto'"
        )
    if config.capture != "auto":
        return config.capture == "always"
    simple = config.objective == "flow_matching" and not config.augment
    return simple and ranks.world == 1 and device.type == "cuda"


def padded_widths(sizes: np.ndarray, count: int = WIDTHS) -> tuple[int, ...]:
    """Returns the padded sizes, ``count`` at most, with which Σ width² over all molecules is smallest.

    Args:
        sizes: Number of atoms of each molecule.
        count: Number of padded sizes.

    Returns:
        Sizes in ascending order; a molecule is padded to the first that is large enough.

    Example:
        >>> padded_widths(np.array([3, 3, 3, 17, 18, 19]), 2)
        (3, 19)
    """
    unique, counts = np.unique(sizes, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    n = len(unique)
    # best[j]: least cost of the molecules of the j smallest sizes; rows of ``last`` say where the last width begins.
    best = np.concatenate([[0.0], np.full(n, np.inf)])
    last = []
    for _ in range(min(count, n)):
        # cost[i, j]: of sizes i to j - 1 padded to the largest of them
        cost = (below[None, 1:] - below[:-1, None]) * unique.astype(float) ** 2
        cost = np.where(np.tri(n, k=-1, dtype=bool), np.inf, cost)
        total = best[:-1, None] + cost
        last.append(total.argmin(axis=0))
        best = np.concatenate([[0.0], total.min(axis=0)])
    widths, end = [], n
    for choice in reversed(last):
        if end:
            widths.append(int(unique[end - 1]))
            end = choice[end - 1]
    return tuple(reversed(widths))


class DeviceSteps:
    """The steps of a run on its device, set up at the first step, after the run is restored.

    Weights, averages and the state of the optimizers become views of the flat vectors that the steps change, so that
    the run is validated, saved and resumed like any other, on this or another device.

    Args:
        capture: Whether to capture steps as CUDA graphs.
    """

    def __init__(self, capture: bool) -> None:
        self.capture = capture
        self.unread = 0
        self.ready = False

    def _begin(self, run: Run) -> None:
        """Moves the data to the device, and takes over weights and state of the run."""
        config, device = run.config, run.device
        self.flat = FlatOptimizer(
            run.model,
            config.learning_rate,
            config.muon_learning_rate,
            config.muon_weight_decay,
            config.ema_decays,
            config.weight_decay,
            muon=config.optimizer == "muon",
        )
        self.flat.take_over(run.optimizer, run.averages, run.clip.norms)
        self.history = torch.zeros(UNREAD, 3, device=device)  # loss, value and norm of the steps that are unread
        self.sizes = run.data.sizes.numpy()
        self.steps = CapturedSteps(
            run.model,
            DeviceSet(run.data, device, padded_widths(self.sizes)),
            run.objective,
            self.flat,
            config.batch_size,
            compile=config.compile,
            capture=self.capture,
            generator=torch.Generator(device),
        )
        self.ready = True

    def __call__(self, run: Run, index: np.ndarray) -> None:
        """Starts the next step of a run, with the molecules ``index``, and does not wait for it."""
        if not self.ready:
            self._begin(run)
        widths = self.steps.data.widths
        k = int(np.searchsorted(widths, self.sizes[index].max()))
        self.flat.rate.fill_(run.rate(run.step))
        place = torch.from_numpy(index).to(run.device)
        take = functools.partial(self.steps, k, place, run.seed_of(run.step))
        try:
            take()
        except RuntimeError as error:
            if not self.capture or out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            warnings.warn(f"cannot capture steps as CUDA graphs ({reason}); trains without, more slowly", stacklevel=2)
            self.capture = self.steps.capture = False
            take()
        self.history[self.unread].copy_(self.steps.latest)
        self.unread += 1

    @property
    def full(self) -> bool:
        """Whether the host must read before the next step."""
        return self.unread == UNREAD

    def read(self, run: Run) -> list[list[float]]:
        """Waits for the steps started so far, and brings what the host keeps of a run up to date.

        Returns:
            Loss, value and gradient norm of each step since the last time; NaN in steps that were not taken.
        """
        if not self.unread:
            return []
        rows: list[list[float]] = self.history[: self.unread].tolist()
        count = int(self.flat.count)
        for average in run.averages:
            average.n_averaged.fill_(count)
        for step in self.flat.adam_steps:
            step.fill_(count)
        run.optimizer.set_rate(run.rate(run.step - 1))
        run.clip = Clipper(self.flat.recent_norms())
        self.unread = 0  # last, so that an interrupted reading is done again
        return rows
