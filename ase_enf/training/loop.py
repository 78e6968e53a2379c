"""The training loop: one for every experiment, on CPU or GPU, resumable to the same numbers, alone or by torchrun."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_enf.atoms.batch import one_or_many
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
from ase_enf.training.run import Run
from ase_enf.training.state import save_config, save_state
from ase_enf.training.validation import Validation, steps_between_validations, validate

# A run that skips this many steps in a row does not recover by itself.
MAX_CONSECUTIVE_SKIPS = 20


class TrainingError(RuntimeError):
    """Training cannot go on: the loss stays non-finite."""


def train(
    config: TrainConfig,
    train_atoms: Atoms | Sequence[Atoms],
    valid_atoms: Atoms | Sequence[Atoms],
    resume: bool = False,
    progress: bool | None = None,
    source: str | None = None,
    branch_of: str | os.PathLike[str] | None = None,
) -> ENF:
    """Trains a flow on ``Atoms`` of any elements and returns it at its best validation likelihood.

    Species, size prior and scales come from ``train_atoms``; with ``config.init_from`` species and scales are those of
    that model. With ``config.out`` the folder receives ``model.safetensors`` (best), ``last.safetensors``,
    ``state.pt``, ``log.csv``, ``config.json`` and, where TensorBoard is installed, its events; a run killed at any
    moment goes on from its last save with ``resume=True``, to the same numbers on a CPU. Started by ``torchrun``, every
    process trains on its own share.

    Weights are float32, whatever torch's default is. On Linux the process keeps freed memory instead of returning it
    to the system at every step (``mallopt``), which makes training on a CPU up to twice as fast.

    Args:
        config: What and how.
        train_atoms: Training structures.
        valid_atoms: Validation structures.
        resume: Go on from ``config.out``; ``config.init_from`` is not read again. With other structures to validate
            on, or more of them, the best weights are chosen anew.
        progress: Show a bar; by default on a terminal only.
        source: What the data are, in words, for the provenance in the weights file.
        branch_of: Folder of a run whose learning rate is constant, the trunk. The new run leaves it where it was saved
            last, and its rate falls to zero over the last part ``config.cool_down`` of its steps; the trunk is only
            read, and can go on.

    Returns:
        The exponential moving average of the weights at the best validation NLL, in evaluation mode.

    Raises:
        ValueError: For bad structures; if ``resume`` is False and ``config.out`` already holds a run, or a file of
            yours under a name of ours; if it is True and data or settings are not those of the run, or its state is
            damaged; if a run is going on in that folder.
        FileNotFoundError: If there is nothing to resume.
        ConnectionError: If another process of ``torchrun`` has ended or hangs.
        KeyboardInterrupt: By Ctrl-C, after the state is saved; its note says how to go on.
        RuntimeError: Inside ``torch.no_grad`` or ``torch.inference_mode``.
        TrainingError: If the loss stays non-finite.
    """
    if resume and branch_of is not None:
        raise ValueError("resume=True goes on with a run, branch_of leaves one; choose one of them")
    config = config.resolved()
    with training_environment(config.precision), process_group(config.device) as ranks, FolderLock() as lock:
        prepare = build.resume if resume else build.begin
        if branch_of is not None:
            prepare = functools.partial(branch, trunk=Path(branch_of))
        # No name here keeps the run, which keeps the process group that ends with this block.
        structures = one_or_many(train_atoms), one_or_many(valid_atoms)
        return complete(prepare(config, *structures, ranks, source, lock), progress)


def complete(run: Run, progress: bool | None) -> ENF:
    """Trains to the end, with a log, and returns the best weights."""
    show = (sys.stderr.isatty() if progress is None else progress) and run.ranks.main
    log = Log(run.out if run.ranks.main else None, run.step, run.total_steps, show)
    try:
        loop(run, log)
    finally:
        log.close()
    return finish(run)


def loop(run: Run, log: Log) -> None:
    """Takes steps, and does what is due after each, to the end of the schedule or of the time limit."""
    started, first, before = time.monotonic(), run.step, run.elapsed
    try:
        for index in run.batches():
            if run.noted < run.step:
                keep_books(run, log)
            if run.ended or (run.step > first and out_of_time(run, time.monotonic() - started)):
                break
            train_step(run, index)
            run.elapsed = before + time.monotonic() - started
            log.bar.update(1)
        if run.ended and run.validated[0] != run.step:  # one stopped by the time limit waits for its turn
            write_row(run, log, validate(run))
        run.noted = run.step
        save_state(run)
        if not run.ended and run.out and run.ranks.main:
            save_config(run, time_limit=None)  # it is used up; one that is not is kept when the run goes on
    except KeyboardInterrupt as interrupt:
        if run.whole:
            save_state(run)
        interrupt.add_note(how_to_go_on(run))
        raise


def how_to_go_on(run: Run) -> str:
    """Returns what is left of a run that was interrupted, and what to do with it."""
    if run.out is None:
        return f"{run.step} steps are lost, as the run has no folder; name one by out"
    if not (run.whole or (run.out / STATE_FILE).exists()):
        return f"nothing was saved yet in {run.out}; start again"
    saved = f"at step {run.step}" if run.whole else "as it was at its last save"
    return f"the run is saved {saved}; go on with ase-enf train --resume {run.out}, or in Python with resume=True"


def train_step(run: Run, index: np.ndarray) -> None:
    """Takes one step on the molecules ``index``, or skips it where loss or gradient are not finite."""
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
    if math.isfinite(norm) and (finite or not alone):  # the norm is the same on all ranks, the loss not
        run.optimizer.step()
        for average in run.averages:
            average.update_parameters(run.model)
        run.consecutive_skips = 0
        run.window.append([float(loss.detach()), float(value.detach()), norm])
    else:
        skip(run)
    run.step += 1
    run.whole = True


def backward(loss: Tensor) -> None:
    """Back-propagates; the adjoint solves an ODE there, and torchdiffeq asserts where it cannot."""
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
    """Validates, writes a row and saves where the last step makes that due; the last of all are those of the loop."""
    if run.ended:
        return
    config = run.config
    found = validate(run) if run.step % steps_between_validations(run) == 0 else None
    if run.step % config.log_every == 0 or found:
        write_row(run, log, found)
    run.noted = run.step
    if run.step % config.checkpoint_every == 0 or found:  # no best weights without a state to resume
        save_state(run)


def write_row(run: Run, log: Log, found: Validation | None) -> None:
    """Writes means since the last row, and the learning rate of the last step, to the log."""
    rows = np.array(run.window) if run.window else np.full((1, 3), math.nan)
    loss, value, norm = rows.mean(axis=0)
    speed = run.step * run.config.batch_size * run.ranks.world / max(run.elapsed, 1e-9)
    rate = run.config.learning_rate * run.rate(max(run.step - 1, 0))
    epoch = run.step // run.steps_per_epoch
    if run.ranks.main:
        log.write((run.step, epoch, loss, value, *(found or ("", "")), rate, norm, run.skipped, speed, run.elapsed))
    run.window.clear()


def out_of_time(run: Run, seconds: float) -> bool:
    """Whether the time limit is over in any process, so that all stop together."""
    limit = run.config.time_limit
    return limit is not None and run.ranks.any(seconds > 3600 * limit, run.device)


def finish(run: Run) -> ENF:
    """Writes the last weights and returns the best, the same in every process."""
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
