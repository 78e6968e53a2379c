"""A branch: starts from a run of constant learning rate and lets the rate fall to zero; the run itself can continue."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ase import Atoms

from ase_enf.training.build import restored, start_folder
from ase_enf.training.config import TrainConfig
from ase_enf.training.distributed import Ranks
from ase_enf.training.folder import FolderLock, check_new_run
from ase_enf.training.run import Run
from ase_enf.training.state import read_state

# The fields that decide the learning rate at a step; a run may change them when it is resumed.
SCHEDULE_FIELDS = ("schedule", "cool_down", "epochs", "steps")


def branch(
    config: TrainConfig,
    train_atoms: list[Atoms],
    valid_atoms: list[Atoms],
    ranks: Ranks,
    source: str | None,
    lock: FolderLock,
    trunk: Path,
) -> Run:
    """Returns a new run in ``config.out`` that starts from the last save of another, the trunk, which is only read.

    Weights, averages and optimizer are those of the trunk; the log and the best weights are its own. After that it is a
    run like any other.

    Raises:
        ValueError: If settings or data are not those of the trunk, or the learning rate of the trunk is not constant
            there.
    """
    if config.out:
        check_new_run(config.out)
    state = read_state(trunk)
    run = restored(dataclasses.replace(config, out=str(trunk)), state, train_atoms, valid_atoms, ranks, source)
    saved = {name: state["config"][name] for name in SCHEDULE_FIELDS if name in state["config"]}
    run.config = dataclasses.replace(run.config, **saved)
    _check_plateau(run)
    steps = branch_steps(run.step, run.config.warmup, config.cool_down)
    cooling = {"schedule": "cosine", "cool_down": config.cool_down, "steps": steps}
    run.config = dataclasses.replace(run.config, **cooling, out=config.out)
    run.best, run.best_weights, run.best_provenance, run.validated = math.inf, None, {}, (-1, math.nan)
    start_folder(run, lock)
    return run


def branch_steps(step: int, warmup: int, cool_down: float) -> int:
    """Returns the total number of steps T of a branch that leaves its trunk at step S.

    T = S + ⌈c (S − w) / (1 − c)⌉, so that the rate falls from step S on, over the fraction c of the T − w steps after
    the warm-up.

    Raises:
        ValueError: For c = 1, which leaves no steps to the trunk.

    Example:
        >>> branch_steps(850, 0, 0.15)
        1000
    """
    if cool_down == 1:
        raise ValueError("cool_down=1.0: a branch cools down over a part of the steps; give for example 0.15")
    return step + math.ceil(round(cool_down * (step - warmup) / (1 - cool_down), 6))


def _check_plateau(trunk: Run) -> None:
    """Makes sure that the learning rate was at its constant value when the trunk was saved."""
    step, warmup = trunk.step, trunk.config.warmup
    if step < max(2 * warmup, 1):
        raise ValueError(
            f"{trunk.out}: the run has done {step} steps, and its warm-up takes {warmup}; start the branch "
            f"from at least {max(2 * warmup, 1)} steps"
        )
    if trunk.rate(step) != 1:
        raise ValueError(
            f"{trunk.out}: the learning rate of the run is falling already at step {step}; a branch needs a run "
            "whose rate is constant"
        )
