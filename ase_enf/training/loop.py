"""The training loop, one for every experiment: on CPU or GPU, alone or by torchrun, resumable to the same numbers."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_enf.atoms.batch import one_or_many
from ase_enf.bars import Progress
from ase_enf.flow.continuous import SolverError
from ase_enf.flow.model import ENF
from ase_enf.geometry import random_rotations
from ase_enf.training import build
from ase_enf.training.branch import branch
from ase_enf.training.config import TrainConfig
from ase_enf.training.distributed import process_group
from ase_enf.training.environment import training_environment
from ase_enf.training.folder import LAST_FILE, LONG_FILE, STATE_FILE, FolderLock
from ase_enf.training.log import Log
from ase_enf.training.run import Run, StepsElsewhere
from ase_enf.training.state import save_config, save_state
from ase_enf.training.validation import Validation, steps_between_validations, validate

# A run that skips this many steps in a row will not recover by itself.
MAX_CONSECUTIVE_SKIPS = 20


class TrainingError(RuntimeError):
    """Training cannot continue: the loss stays non-finite."""


def train(
    config: TrainConfig,
    train_atoms: Atoms | Sequence[Atoms],
    valid_atoms: Atoms | Sequence[Atoms],
    resume: bool = False,
    progress: Progress = None,
    source: str | None = None,
    branch_of: str | os.PathLike[str] | None = None,
) -> ENF:
    """Trains a flow on ``Atoms`` of any elements and returns it with the weights of the best validation likelihood.

    Species, size prior and scales come from ``train_atoms``; with ``config.init_from`` species and scales are those of
    that model. With ``config.out`` the folder receives ``model.safetensors`` (best), ``last.safetensors``,
    ``state.pt``, ``log.csv``, ``config.json`` and, where TensorBoard is installed, its events; a run killed at any
    moment continues from its last save with ``resume=True``, on a CPU to the same numbers. Under ``torchrun``, every
    process trains on its own share of the data.

    Weights are float32, whatever torch's default is. On Linux the process keeps freed memory instead of returning it
    to the system at every step (``mallopt``), which makes training on a CPU up to twice as fast.

    Args:
        config: The settings.
        train_atoms: Training structures.
        valid_atoms: Validation structures.
        resume: Whether to continue the run in ``config.out``; ``config.init_from`` is not read again. With other or
            more validation structures, the best weights are chosen anew.
        progress: Whether to show a progress bar, by default on a terminal only; or a function that is told, after each
            step, how many steps are taken and of how many (None for no end).
        source: A description of the data, for the provenance in the weights file.
        branch_of: Folder of a run with constant learning rate, the trunk. The new run starts from its last save, and
            its rate falls to zero over the last fraction ``config.cool_down`` of its steps; the trunk is only read, and
            can be continued.

    Returns:
        The exponential moving average of the weights at the best validation NLL, in evaluation mode.

    Raises:
        ValueError: For bad structures; if ``resume`` is False and ``config.out`` already holds a run, or another file
            under a name that a run needs; if it is True and data or settings are not those of the run, or its state is
            damaged; if a run is in progress in that folder.
        FileNotFoundError: If there is nothing to resume.
        ConnectionError: If another process of ``torchrun`` has ended or hangs.
        KeyboardInterrupt: After Ctrl-C, when the state is saved; its note says how to resume the run.
        RuntimeError: Inside ``torch.no_grad`` or ``torch.inference_mode``.
        TrainingError: If the loss stays non-finite.
    """
    if resume and branch_of is not None:
        raise ValueError("resume=True continues a run, and branch_of starts another from it; choose one of them")
    if not isinstance(config, TrainConfig):
        raise TypeError(f"expected a TrainConfig, got {type(config).__name__}; ase_enf.TrainConfig(steps=1000) is one")
    config = config.resolved()
    with training_environment(config.precision), process_group(config.device) as ranks, FolderLock() as lock:
        prepare = build.resume if resume else build.begin
        if branch_of is not None:
            prepare = functools.partial(branch, trunk=Path(branch_of))
        # No local name refers to the run: it would keep the process group alive, which ends with this block.
        structures = one_or_many(train_atoms), one_or_many(valid_atoms)
        return complete(prepare(config, *structures, ranks, source, lock), progress)


def complete(run: Run, progress: Progress) -> ENF:
    """Trains to the end, with a log, and returns the flow with its best weights."""
    main = run.ranks.main
    log = Log(run.out if main else None, run.step, run.total_steps, progress if main else False)
    try:
        try:
            loop(run, log)
        finally:
            log.close()
    except KeyboardInterrupt as interrupt:  # closing is included: a signal that waited for a lost process arrives there
        if run.whole:
            settle(run)
            save_state(run)
        interrupt.add_note(how_to_resume(run))
        raise
    try:
        return finish(run)
    except KeyboardInterrupt as interrupt:  # the loop has saved, and the weights may be the best by now: no other save
        interrupt.add_note(how_to_resume(run))
        raise


def loop(run: Run, log: Log) -> None:
    """Takes steps, each with the bookkeeping that is due, until the schedule or the time limit ends."""
    started, first, before = time.monotonic(), run.step, run.elapsed
    for index in run.batches():
        if run.noted < run.step:
            keep_books(run, log)
        if run.ended or (run.step > first and out_of_time(run, time.monotonic() - started)):
            break
        train_step(run, index)
        run.elapsed = before + time.monotonic() - started
        log.bar.update(1)
    settle(run)
    if run.ended and run.validated[0] != run.step:  # after the time limit, validation waits until it is due
        write_row(run, log, validate(run))
    run.noted = run.step
    save_state(run)
    if not run.ended and run.out and run.ranks.main:
        save_config(run, time_limit=None)  # it is used up, and would stop the resumed run


def how_to_resume(run: Run) -> str:
    """Says what an interrupted run has saved, and how to resume it."""
    if run.out is None:
        return f"{run.step} steps are lost, as the run has no folder; name one by out"
    if not (run.whole or (run.out / STATE_FILE).exists()):
        return f"nothing was saved yet in {run.out}; start again"
    saved = f"at step {run.step}" if run.whole else "as it was at its last save"
    return f"the run is saved {saved}; continue with ase-enf train --resume {run.out}, or in Python with resume=True"


def train_step(run: Run, index: np.ndarray) -> None:
    """Takes one step on the molecules ``index``, or skips it if loss or gradient are not finite."""
    if run.device_steps is not None:
        return start_step(run, run.device_steps, index)
    config, alone = run.config, run.ranks.world == 1
    generator = run.generator(run.step)
    batch = run.data.batch(index)
    if config.augment:
        rotations = random_rotations(len(index), batch.positions.shape[-1], generator, batch.positions.dtype)
        batch = batch._replace(positions=batch.positions @ rotations.mT)
    run.optimizer.set_rate(run.rate(run.step))
    run.optimizer.zero_grad()
    try:
        loss, value = run.stepper(batch.to(run.device), generator)
        finite = bool(torch.isfinite(loss))
        if finite or not alone:  # every rank must take part in the reduction
            backward(loss)
    except SolverError:
        if not alone:  # the other ranks wait in a reduction that this one cannot join
            raise
        finite, loss, value = False, torch.tensor(math.nan), torch.tensor(math.nan)
    run.whole = False
    norm = run.clip(run.parameters) if finite or not alone else math.nan
    if math.isfinite(norm) and (finite or not alone):  # the norm is the same on all ranks, the loss is not
        run.optimizer.step()
        for average in run.averages:
            average.update_parameters(run.model)
        run.consecutive_skips = 0
        run.window.append([float(loss.detach()), float(value.detach()), norm])
    else:
        skip(run)
    run.step += 1
    run.whole = True


def start_step(run: Run, steps: StepsElsewhere, index: np.ndarray) -> None:
    """Starts one step on the device."""
    run.whole = False
    steps(run, index)
    run.step += 1
    run.whole = True
    if steps.full:
        settle(run)


def settle(run: Run) -> None:
    """Reads what came of the steps that were started on the device."""
    for row in run.device_steps.read(run) if run.device_steps is not None else ():
        if math.isfinite(row[-1]):
            run.consecutive_skips = 0
            run.window.append(row)
        else:
            skip(run)


def backward(loss: Tensor) -> None:
    """Back-propagates; the adjoint solves another ODE here, and torchdiffeq raises an AssertionError if it fails."""
    try:
        loss.backward()
    except AssertionError as error:
        reason = str(error).split(":")[0]
        raise SolverError(f"the adjoint failed ({reason}); lower ode_tolerance or use adjoint=False") from None


def skip(run: Run) -> None:
    """Counts a step without an update.

    Raises:
        TrainingError: If there are too many in a row.
    """
    run.skipped += 1
    run.consecutive_skips += 1
    if run.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        raise TrainingError(
            f"step {run.step}: {run.consecutive_skips} steps in a row gave a non-finite loss or gradient; "
            f"lower learning_rate (now {run.config.learning_rate:g}) or check the structures"
        )


def keep_books(run: Run, log: Log) -> None:
    """Validates, writes a row and saves if that is due after the latest step; at the very end, the loop does so."""
    if run.ended:
        return
    config = run.config
    validates, writes, saves = (
        run.step % every == 0 for every in (steps_between_validations(run), config.log_every, config.checkpoint_every)
    )
    if validates or writes or saves:
        settle(run)
    found = validate(run) if validates else None
    if writes or validates:
        write_row(run, log, found)
    run.noted = run.step
    if saves or validates:  # best weights never come without a state to resume
        save_state(run)


def write_row(run: Run, log: Log, found: Validation | None) -> None:
    """Writes the means since the last row, and the learning rate of the latest step, to the log."""
    rows = np.array(run.window) if run.window else np.full((1, 3), math.nan)
    loss, value, norm = rows.mean(axis=0)
    speed = run.step * run.config.batch_size * run.ranks.world / max(run.elapsed, 1e-9)
    rate = run.config.learning_rate * run.rate(max(run.step - 1, 0))
    epoch = run.step // run.steps_per_epoch
    if run.ranks.main:
        log.write((run.step, epoch, loss, value, *(found or ("", "")), rate, norm, run.skipped, speed, run.elapsed))
    run.window.clear()


def out_of_time(run: Run, seconds: float) -> bool:
    """Whether the time is over in any process, so that all of them stop together."""
    limit = run.config.time_limit
    return limit is not None and run.ranks.any(seconds > 3600 * limit, run.device)


def finish(run: Run) -> ENF:
    """Writes the last weights, and returns the flow with the best, the same in every process."""
    run.ranks.wait()
    model = run.averages[0].module.eval()
    if run.ranks.main and run.out:
        step, *nlls = run.validated
        for k, (average, file) in enumerate(zip(run.averages, (LAST_FILE, LONG_FILE), strict=False)):
            average.module.provenance = run.provenance(k, nlls[k] if step == run.step else math.nan)
            average.module.save(run.out / file)
    if run.best_weights is not None:
        model.load_state_dict(run.best_weights)
        model.provenance = run.best_provenance
    run.ranks.share(model)  # only the first has validated
    model.use_backend("torch")
    return model.requires_grad_(False).eval()
