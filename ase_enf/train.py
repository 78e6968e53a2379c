"""The trainer: one loop for every experiment, on CPU or GPU, resumable to the same numbers, alone or by torchrun."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ase_enf import divergence
from ase_enf.dataset import MoleculeSet
from ase_enf.dynamics import KERNELS
from ase_enf.files import atomic_write, make_folder
from ase_enf.flow import Solver, SolverError
from ase_enf.geometry import random_rotations
from ase_enf.model import ENF, ENFConfig, load, package_version, resolve_device
from ase_enf.molecules import Batch, check_whole, one_or_many, species_of
from ase_enf.objectives import OBJECTIVES, TIMES, FlowMatching, NegativeLogLikelihood, Objective
from ase_enf.optimizers import OPTIMIZERS, build_optimizers, resolve_optimizer
from ase_enf.parameterisation import PARAMETERISATIONS

STATE_FILE, BEST_FILE, LAST_FILE, CONFIG_FILE, LOG_FILE = (
    "state.pt", "model.safetensors", "last.safetensors", "config.json", "log.csv",
)  # fmt: skip
LOG_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "value",
    "valid_loss",
    "valid_nll",
    "lr",
    "grad_norm",
    "skipped",
    "examples_per_s",
    "elapsed_s",
)
BOARD_FOLDER = "tensorboard"
PRECISIONS = ("float32", "tf32", "bf16")
# A run that skips this many steps in a row does not recover by itself.
MAX_CONSECUTIVE_SKIPS = 20
GRADIENT_HISTORY = 50
# How validation likelihoods are integrated; values of different rules, or sets, are not compared.
NLL_RULE = "nodes of scores"
# A molecule's likelihood takes as long as flow matching on so many molecules (measured on QM9, one thread).
VALIDATION_COST = 110
VALIDATION_SHARE = 0.2  # of the time of training
# What may differ when a run is resumed; the rest decides which numbers come next.
RESUME_MAY_CHANGE = (
    "epochs", "steps", "validate_every", "validation_size", "checkpoint_every", "log_every", "time_limit", "initial",
    "out", "device", "precision", "compile", "kernel", "decay", "matrix_decay",
)  # fmt: skip
# What weights to start from bring with them.
MODEL_FIELDS = (
    "parameterisation",
    "features",
    "dimension",
    "network",
    "hidden",
    "layers",
    "attention",
    "radial",
    "dequantizer",
)
# Sums over the same data differ by less between machines.
SAME = 1e-9
STATE_KEYS = {
    "config", "model_config", "world", "step", "skipped", "consecutive_skips", "best", "elapsed", "norms", "window",
    "best_weights", "best_provenance", "model", "ema", "optimizer",
}  # fmt: skip


class TrainingError(RuntimeError):
    """Training cannot go on: the loss stays non-finite."""


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}: must be True or False")
    return bool(value)


def _whole(name: str, value: Any) -> int:
    return check_whole(name, value, 0 if name in ("warmup", "seed", "validate_every", "radial") else 1)


def _real(name: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}: must be a number")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={value!r}: must be a text")
    return os.fsdecode(value)


# What the fields of TrainConfig become, by annotation: plain values, which JSON takes at the end of a run as well.
PLAIN: dict[str, Callable[[str, Any], Any]] = {"bool": _flag, "int": _whole, "float": _real, "str": _text}


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, by which objective, how long; the defaults are those of the shipped models.

    Args:
        features: "joint", "given" or "none"; see ``ENFConfig``.
        dimension: 3, or 2 for structures in the xy plane.
        network: "egnn", "gnn" or, with ``features="none"``, "simple" or "kernel"; see ``ENFConfig``.
        hidden: Width of the network.
        layers: Layers.
        attention: Soft edges.
        radial: Radial functions of each distance beside its square, in an EGNN; 0 for the paper's.
        dequantizer: "fixed", or "learned" (with ``objective="nll"`` only).
        feature_spread: Separation of one-hot types (and spread of charges) inside the flow, where positions have unit
            variance; below one the positions are decided first on the way from noise to data.
        objective: "flow_matching" or "nll".
        parameterisation: How the network's output becomes a velocity; see ``ENFConfig``.
        times: How flow matching draws t from a uniform u: "power", t = u^time_power, or "beta", t = 1 − u^(1/time_power).
        time_power: See ``times``.
        decay: Part of the steps at the end over which the learning rate falls to zero, by half a cosine; 1 for all.
        regularisation: λ of the kinetic and Jacobian terms of "nll".
        tolerance: rtol and atol of dopri5 for "nll".
        adjoint: Adjoint (constant memory) or back-propagation through the solver for "nll".
        epochs: Passes over the training set; ignored when ``steps`` is given.
        steps: Optimizer steps.
        batch_size: Molecules a step and process.
        optimizer: "adamw", "muon" (Muon for the hidden matrices, AdamW for the rest), or "auto": muon, where torch has
            it, for flow matching; AdamW with amsgrad, as in the paper, for "nll".
        learning_rate: Peak of AdamW's rate.
        matrix_rate: Peak of Muon's rate, in the scale of AdamW's.
        matrix_decay: Muon's decoupled weight decay.
        warmup: Steps of linear warm-up.
        weight_decay: AdamW's.
        ema: Decay of the weights' exponential moving average, which is what is validated and shipped.
        augment: Random rotations, for networks that are not equivariant.
        seed: Of initialisation, order, times and noise.
        validate_every: Steps between validations. 0 for one epoch, or more where the training set is so small that flow
            matching would spend more time on validations than a fifth of that on training.
        validation_size: Molecules of the validation set that are scored, always the same.
        checkpoint_every: Steps between saves of the training state.
        log_every: Steps between rows of the log.
        time_limit: Hours after which training stops as if interrupted, to be resumed; None for no limit.
        initial: Weights to start from, a path or a shipped name; the model's own fields then come from there, in the
            provenance too.
        out: Folder of weights, training state and log; None keeps everything in memory.
        device: "auto", "cpu", "cuda" …
        precision: "float32", "tf32" or "bf16" (autocast of the network).
        compile: Compile the network by ``torch.compile`` (flow matching only; needs a C++ compiler).
        kernel: "fused", "plain" or "auto", see ``ENF.use_kernel``; flow matching of an EGNN in float32 on a CPU by one
            thread takes about three quarters of the time with the fused one, which "auto" then uses (torchrun gives
            each process one thread); several threads in one process are faster with the plain one.

    Raises:
        ValueError: For a value outside its range or an unknown name.
    """

    features: str = "joint"
    dimension: int = 3
    network: str = "egnn"
    hidden: int = 64
    layers: int = 6
    attention: bool = True
    radial: int = 16
    dequantizer: str = "fixed"
    feature_spread: float = 0.3
    objective: str = "flow_matching"
    parameterisation: str = "velocity"
    times: str = "power"
    time_power: float = 1.3
    decay: float = 1.0
    regularisation: float = 1e-3
    tolerance: float = 1e-4
    adjoint: bool = True
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 64
    optimizer: str = "auto"
    learning_rate: float = 1e-3
    matrix_rate: float = 1e-2
    matrix_decay: float = 0.1
    warmup: int = 500
    weight_decay: float = 1e-12
    ema: float = 0.999
    augment: bool = False
    seed: int = 0
    validate_every: int = 0
    validation_size: int = 128
    checkpoint_every: int = 500
    log_every: int = 50
    time_limit: float | None = None
    initial: str | None = None
    out: str | None = None
    device: str = "auto"
    precision: str = "float32"
    compile: bool = False
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kind, *optional = field.type.split(" | ")
            if not (optional and getattr(self, field.name) is None):
                object.__setattr__(self, field.name, PLAIN[kind](field.name, getattr(self, field.name)))
        for name, known in (
            ("objective", OBJECTIVES),
            ("optimizer", OPTIMIZERS),
            ("parameterisation", PARAMETERISATIONS),
            ("times", TIMES),
            ("precision", PRECISIONS),
            ("kernel", KERNELS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        for name in ("weight_decay", "matrix_decay", "regularisation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and not negative")
        if self.seed >= 2**64:
            raise ValueError(f"seed={self.seed}: must be below 2^64")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise ValueError(f"time_limit={self.time_limit}: must be a positive number of hours, or None for no limit")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}: must be in (0, 1]")
        for name in ("learning_rate", "matrix_rate", "tolerance", "time_power", "feature_spread"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive and finite")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: must be in [0, 1)")
        if self.objective == "flow_matching" and self.dequantizer == "learned" and self.features == "joint":
            raise ValueError(
                "dequantizer='learned' collapses under flow matching; use dequantizer='fixed' or objective='nll'"
            )
        resolve_optimizer(self.optimizer, self.objective)
        if self.compile and self.objective == "nll":
            raise ValueError("compile=True fails under the second derivatives of objective='nll'; use compile=False")
        if self.kernel == "fused" and (self.objective == "nll" or self.compile or self.precision != "float32"):
            raise ValueError(
                "kernel='fused' has no second derivatives (objective='nll'), no other precision than float32 and no "
                "compile=True; use kernel='plain'"
            )


class Clipper:
    """Clips gradients at 1.5 · mean + 2 · std of the recent norms, and recognises non-finite ones.

    Args:
        norms: Recent norms, to resume.
    """

    def __init__(self, norms: Sequence[float] = ()) -> None:
        self.norms: deque[float] = deque(norms, maxlen=GRADIENT_HISTORY)

    def __call__(self, parameters: Sequence[Tensor]) -> float:
        """Clips in place and returns the norm before; a non-finite norm leaves the history alone."""
        limit = 1.5 * float(np.mean(self.norms)) + 2.0 * float(np.std(self.norms)) if self.norms else math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit if math.isfinite(limit) else 1e9))
        if math.isfinite(norm) and norm > 0:  # a history of zeros would clip everything to zero
            self.norms.append(min(norm, limit))
        return norm


class _Step(nn.Module):
    """Objective as a module, so that DistributedDataParallel sees one forward."""

    def __init__(self, model: ENF, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tuple(self.objective(self.model, batch, generator))


class _Ranks(NamedTuple):
    """This process among those that ``torchrun`` started."""

    rank: int
    world: int

    @property
    def main(self) -> bool:
        return self.rank == 0


def train(
    config: TrainConfig,
    train_atoms: Atoms | Sequence[Atoms],
    valid_atoms: Atoms | Sequence[Atoms],
    resume: bool = False,
    progress: bool | None = None,
    source: str | None = None,
) -> ENF:
    """Trains a flow on ``Atoms`` of any elements and returns it at its best validation likelihood.

    Species, size prior and scales come from ``train_atoms``; with ``config.initial`` species and scales are those of
    that model. With ``config.out`` the folder receives ``model.safetensors`` (best), ``last.safetensors``,
    ``state.pt``, ``log.csv``, ``config.json`` and, where TensorBoard is installed, its events; a run killed at any
    moment goes on from its last save with ``resume=True``, to the same numbers on a CPU. Started by ``torchrun``, every
    process trains on its own share.

    On Linux the process keeps freed memory instead of returning it to the system at every step (``mallopt``), which
    makes training on a CPU up to twice as fast.

    Args:
        config: What and how.
        train_atoms: Training structures.
        valid_atoms: Validation structures.
        resume: Go on from ``config.out``; ``config.initial`` is not read again. With other structures to validate
            on, or more of them, the best weights are chosen anew.
        progress: Show a bar; by default on a terminal only.
        source: What the data are, in words, for the provenance in the weights file.

    Returns:
        The exponential moving average of the weights at the best validation NLL, in evaluation mode.

    Raises:
        ValueError: For bad structures; if ``resume`` is False and ``config.out`` already holds a run, or a file of
            yours under a name of ours; if it is True and data or settings are not those of the run.
        FileNotFoundError: If there is nothing to resume.
        TrainingError: If the loss stays non-finite.
    """
    with _distributed(config) as ranks, _float32_matmul(config.precision):
        keep_memory()
        return _Trainer(
            config, one_or_many(train_atoms), one_or_many(valid_atoms), resume, ranks, progress, source
        ).run()


class _Trainer:
    """State and steps of one run."""

    def __init__(
        self,
        config: TrainConfig,
        train_atoms: list[Atoms],
        valid_atoms: list[Atoms],
        resume: bool,
        ranks: _Ranks,
        progress: bool | None,
        source: str | None,
    ) -> None:
        self.source = source
        # What "auto" chose is part of the run: it is saved, and another torch must not choose anew.
        config = dataclasses.replace(config, optimizer=resolve_optimizer(config.optimizer, config.objective))
        self.config = config
        self.ranks = ranks
        self.out = Path(config.out) if config.out else None
        self.device = self._device()
        self.progress = (sys.stderr.isatty() if progress is None else progress) and ranks.main
        state = self._existing_state(resume)
        if not train_atoms:
            raise ValueError("no structures to train on; the training set is empty")
        if not valid_atoms:
            raise ValueError("no structures to validate on; the validation set is empty")
        initial = self._initial() if state is None else None
        known = state["model_config"] if state else initial.config if initial else None
        if state is not None:
            self.config = config = self._resumed_config(state)
        elif known is not None:
            self.config = config = dataclasses.replace(config, **model_fields(known))
        species = known.species if known else () if config.features == "none" else species_of(train_atoms)
        self.data = _molecules("training set", train_atoms, species, config.dimension)
        for index, item in enumerate(valid_atoms if species and not config.initial else ()):
            if foreign := sorted(set(item.symbols) - set(species)):
                raise ValueError(
                    f"validation set: structure {index} ({item.get_chemical_formula()}): element(s) "
                    f"{', '.join(foreign)} are not in the training set; add such structures to it, or take this one out"
                )
        self.valid = _molecules("validation set", valid_atoms, species, config.dimension)
        if state is not None:
            self._check_same_data(state)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay theirs
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would change those on GPUs too
            if state is not None:
                model = ENF(known)
            else:
                model = self._refitted(initial) if initial else ENF(self._model_config(species))
        self.model = model.to(self.device).requires_grad_(True).train()
        plain = config.objective == "nll" or config.compile or config.precision != "float32"
        # The threads of the kernel and those of torch's own operations get in each other's way.
        plain = plain or (config.kernel == "auto" and torch.get_num_threads() > 1)
        self.model.use_kernel("plain" if plain else config.kernel)
        self.objective = self._objective()
        self.ema = AveragedModel(self.model, multi_avg_fn=_ema_update(config.ema))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizers(
            self.model.dynamics.network,
            self.parameters,
            config.optimizer,
            config.learning_rate,
            config.matrix_rate,
            config.matrix_decay,
            config.weight_decay,
            amsgrad=config.objective == "nll",  # as in the paper; flow matching does better without
        )
        self.clip = Clipper()
        self.step, self.skipped, self.consecutive_skips = 0, 0, 0
        self.between_steps = True  # False while weights, history and step number disagree
        self.best, self.elapsed = math.inf, 0.0
        self.validated = (-1, math.nan)  # when last, with which NLL
        self.window: list[list[float]] = []
        self.best_weights: dict[str, Tensor] | None = None
        self.best_provenance: dict[str, Any] = {}
        if state is not None:
            self._restore(state)
        else:
            self._start_folder()
        self.board = _board(self.out, self.step + 1 if state else 0) if ranks.main else None
        self.stepper: nn.Module = _Step(self.model, self.objective)
        if config.compile:
            self.model.dynamics.network.compile()
        if ranks.world > 1:
            self.stepper = DistributedDataParallel(self.stepper)

    def run(self) -> ENF:
        """Trains to the end of the schedule or of the time limit."""
        started, before = time.monotonic(), self.elapsed
        total = self.total_steps
        bar = tqdm(total=total, initial=self.step, disable=not self.progress, unit="step", dynamic_ncols=True)
        try:
            while self.step < total:
                for index in self._remaining_batches():
                    self._train_step(index)
                    self.elapsed = before + time.monotonic() - started
                    bar.update(1)
                    self._periodic(bar)
                    self.between_steps = True
                    if self.step >= total or self._out_of_time(time.monotonic() - started):
                        break
                else:
                    continue
                break
        except KeyboardInterrupt:
            if self.between_steps and self.step < total:  # at the end, only what has been validated is saved
                self._save_state()
            raise
        finally:
            bar.close()
        if self.step >= total and self.validated[0] != self.step:  # one stopped by the time limit waits for its turn
            self._log(self._validate())
        self._save_state()
        return self._result()

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, the same in every epoch."""
        batches = len(self.data.epoch_plan(self.config.batch_size, (self.config.seed, 0)))
        return max(batches // self.ranks.world, 1)

    @functools.cached_property
    def validate_every(self) -> int:
        """Steps between validations."""
        if self.config.validate_every or self.config.objective != "flow_matching":
            return self.config.validate_every or self.steps_per_epoch
        worth = VALIDATION_COST * min(self.config.validation_size, len(self.valid))  # molecules to train on
        return max(self.steps_per_epoch, math.ceil(worth / self.config.batch_size / VALIDATION_SHARE))

    @property
    def total_steps(self) -> int:
        """Length of the schedule."""
        return self.config.steps or self.config.epochs * self.steps_per_epoch

    def _remaining_batches(self) -> Iterator[np.ndarray]:
        """Yields this rank's batches of the current epoch from the current step on."""
        per_epoch = self.steps_per_epoch
        epoch, done = divmod(self.step, per_epoch)
        plan = self.data.epoch_plan(self.config.batch_size, (self.config.seed, epoch))
        if len(plan) < self.ranks.world:  # fewer batches than processes: all train on the same
            yield from plan[done:per_epoch]
            return
        yield from plan[self.ranks.rank : per_epoch * self.ranks.world : self.ranks.world][done:]

    def _train_step(self, index: np.ndarray) -> None:
        config = self.config
        generator = _generator(config.seed, self.step, self.ranks.rank)
        batch = self.data.batch(index)
        if config.augment:
            rotations = random_rotations(len(index), batch.positions.shape[-1], generator, batch.positions.dtype)
            batch = batch._replace(positions=batch.positions @ rotations.mT)
        self.optimizer.set_rate(schedule(self.step, self.total_steps, config.warmup, config.decay))
        self.optimizer.zero_grad()
        try:
            with self._autocast():
                loss, value = self.stepper(batch.to(self.device), generator)
            finite = bool(torch.isfinite(loss))
            if finite or self.ranks.world > 1:  # every rank must take part in the reduction
                _backward(loss)
        except SolverError:
            if self.ranks.world > 1:  # the other ranks wait in a reduction that this one cannot join
                raise
            finite, loss, value = False, torch.tensor(math.nan), torch.tensor(math.nan)
        self.between_steps = False
        norm = self.clip(self.parameters) if finite or self.ranks.world > 1 else math.nan
        if math.isfinite(norm) and (finite or self.ranks.world > 1):  # the norm is the same on all ranks, the loss not
            self.optimizer.step()
            self.ema.update_parameters(self.model)
            self.consecutive_skips = 0
            self.window.append([float(loss.detach()), float(value.detach()), norm])
        else:
            self.skipped += 1
            self.consecutive_skips += 1
            if self.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
                raise TrainingError(
                    f"step {self.step}: {self.consecutive_skips} steps in a row gave a non-finite loss or gradient; "
                    f"lower learning_rate (now {config.learning_rate:g}) or check the structures"
                )
        self.step += 1

    def _periodic(self, bar: tqdm) -> None:
        if self.step >= self.total_steps:  # the last validation, row and save are those of run
            return
        config = self.config
        validated = self._validate() if self.step % self.validate_every == 0 else None
        if self.step % config.log_every == 0 or validated:
            self._log(validated, bar)
        if self.step % config.checkpoint_every == 0 or validated:  # no best weights without a state to resume
            self._save_state()

    def _log(self, validated: tuple[float, float] | None, bar: tqdm | None = None) -> None:
        if not self.ranks.main:
            self.window.clear()
            return
        rows = np.array(self.window) if self.window else np.full((1, 3), math.nan)
        loss, value, norm = rows.mean(axis=0)
        rate = self.config.learning_rate * schedule(self.step, self.total_steps, self.config.warmup, self.config.decay)
        speed = self.step * self.config.batch_size * self.ranks.world / max(self.elapsed, 1e-9)
        valid_loss, valid_nll = validated or ("", "")
        row = (
            self.step,
            self.step // self.steps_per_epoch,
            loss,
            value,
            valid_loss,
            valid_nll,
            rate,
            norm,
            self.skipped,
            speed,
            self.elapsed,
        )
        self.window.clear()
        if bar is not None:
            bar.set_postfix(loss=f"{loss:.4f}", **({"nll": f"{valid_nll:.2f}"} if validated else {}))
        if self.out:
            with open(self.out / LOG_FILE, "a", newline="") as file:
                csv.writer(file).writerow([f"{v:.8g}" if isinstance(v, float) else v for v in row])
        if self.board is not None:
            for name, value in zip(LOG_COLUMNS[1:], row[1:], strict=True):
                if value != "":
                    self.board.add_scalar(name, value, self.step)

    def _validate(self) -> tuple[float, float] | None:
        """Scores the fixed subset by the averaged weights; keeps them when they are the best so far."""
        if not self.ranks.main:
            return None
        model = self._averaged()
        index = torch.from_numpy(
            np.random.default_rng(self.config.seed).permutation(len(self.valid))[: self.config.validation_size]
        )
        index = index[self.valid.sizes[index].argsort(stable=True)]
        losses, nlls = [], []
        for k in range(0, len(index), self.config.batch_size):
            batch = self.valid.batch(index[k : k + self.config.batch_size]).to(self.device)
            generator = _generator(self.config.seed, k, 0, stream=1)
            try:
                with torch.no_grad():
                    losses.append(float(self.objective(model, batch, generator).value) * len(batch.mask))
                nlls.append(_validation_nll(model, batch, generator))
            except SolverError:  # too stiff at the moment, which training may mend
                self.validated = (self.step, math.nan)
                return math.nan, math.nan
        valid_loss, nll = sum(losses) / len(index), float(torch.cat(nlls).mean())
        self.validated = (self.step, nll)
        if self.best_weights is None or nll < self.best or not math.isfinite(self.best):
            self.best = nll
            self.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            self.best_provenance = model.provenance = self._provenance(nll)
            if self.out:
                model.save(self.out / BEST_FILE)
        return valid_loss, nll

    def _validation_set(self) -> list[float]:
        """Returns what tells validation sets apart: molecules, those that are scored, Σ‖x‖²."""
        squares = float(np.square(self.valid.positions.double().numpy()).sum())
        return [len(self.valid), min(self.config.validation_size, len(self.valid)), squares]

    def _averaged(self) -> ENF:
        return self.ema.module.eval()

    def _provenance(self, nll: float) -> dict[str, Any]:
        """Returns how the weights of now were made, and the validation NLL of just these, NaN for none."""
        training = dataclasses.asdict(self.config)
        del training["out"]  # weights are given to others, who need not know the folders of this machine
        if training["initial"]:
            training["initial"] = Path(training["initial"]).name
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
            "validation_nll": nll if math.isfinite(nll) else None,
            "skipped_steps": self.skipped,
            "ase_enf": package_version(),
            "torch": torch.__version__,
        }

    def _result(self) -> ENF:
        if self.ranks.world > 1:
            dist.barrier()
        if self.board is not None:
            self.board.close()
        model = self._averaged()
        if self.ranks.main and self.out:
            step, nll = self.validated
            model.provenance = self._provenance(nll if step == self.step else math.nan)
            model.save(self.out / LAST_FILE)
        if self.best_weights is not None:
            model.load_state_dict(self.best_weights)
            model.provenance = self.best_provenance
        if self.ranks.world > 1:  # only the first process has validated
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)
        model.use_kernel("plain")
        return model.requires_grad_(False).eval()

    def _save_state(self) -> None:
        if not (self.out and self.ranks.main):
            return
        state = {
            "config": json.dumps(dataclasses.asdict(self.config)),
            "model_config": json.dumps(dataclasses.asdict(self.model.config)),
            "world": self.ranks.world,
            "step": self.step,
            "skipped": self.skipped,
            "consecutive_skips": self.consecutive_skips,
            "best": self.best,
            "validated": list(self.validated),
            "nll_rule": NLL_RULE,
            "validation_set": self._validation_set(),
            "elapsed": self.elapsed,
            "norms": list(self.clip.norms),
            "window": self.window,
            "best_weights": self.best_weights,
            "best_provenance": json.dumps(self.best_provenance),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(self.out / STATE_FILE) as handle:
            torch.save(state, handle)

    def _existing_state(self, resume: bool) -> dict[str, Any] | None:
        """Reads the state that is there, or makes sure that nothing is."""
        if self.out is None:
            if resume:
                raise ValueError("resume=True needs config.out, the folder of the run")
            return None
        if resume:
            return _read_state(self.out / STATE_FILE)
        check_new_run(self.out)
        return None

    def _initial(self) -> ENF | None:
        """Loads the weights to start from."""
        if not self.config.initial:
            return None
        initial = load(self.config.initial, device="cpu")
        learned = initial.features == "joint" and initial.config.dequantizer == "learned"
        if learned and self.config.objective == "flow_matching":
            raise ValueError(
                f"initial={self.config.initial!r}: its learned q collapses under flow matching; train it with "
                "objective='nll'"
            )
        return initial

    def _start_folder(self) -> None:
        """Writes the first files of a run whose input has been found good."""
        if self.out is None:
            return
        if self.ranks.world > 1:
            dist.barrier()  # nobody writes before everybody has looked
        if self.ranks.main:
            make_folder(self.out)
            self._save_config()
            _truncate_log(self.out / LOG_FILE, -1)

    def _save_config(self) -> None:
        with atomic_write(self.out / CONFIG_FILE) as handle:
            handle.write(f"{json.dumps(dataclasses.asdict(self.config), indent=2)}\n".encode())

    def _resumed_config(self, state: dict[str, Any]) -> TrainConfig:
        """Returns the settings to go on with, in which what was fine-tuned stays that."""
        before = {"optimizer": "adamw", "initial": None, "parameterisation": "velocity", "times": "power"} | state[
            "config"
        ]  # runs of before there was a choice
        config = dataclasses.replace(self.config, initial=before["initial"])
        if config.initial:
            before |= model_fields(state["model_config"])
            config = dataclasses.replace(config, **model_fields(state["model_config"]))
        if state["world"] != self.ranks.world:
            raise ValueError(
                f"{self.out}: the run was made by {state['world']} process(es), not {self.ranks.world}; "
                "resume it with as many"
            )
        now = dataclasses.asdict(config)
        changed = [name for name in before if name not in RESUME_MAY_CHANGE and before[name] != now.get(name)]
        if changed:
            raise ValueError(
                f"{self.out}: the run was made with {changed[0]}={before[changed[0]]!r}, not {now.get(changed[0])!r}; "
                "resume it with its own settings"
            )
        return config

    def _check_same_data(self, state: dict[str, Any]) -> None:
        known = state["model_config"]
        counts = self._counts(known.features)
        expected = dataclasses.replace(known, **counts) if self.config.initial else self._model_config(known.species)
        if not _agree(dataclasses.asdict(expected), dataclasses.asdict(known)):
            raise ValueError(
                f"{self.out}: the run was made for another model or other data; resume with those of the run"
            )
        if state["step"] > self.total_steps:
            raise ValueError(
                f"{self.out}: the run has done {state['step']} steps, more than the {self.total_steps} it should end "
                "at; ask for more steps or epochs, or leave them as they were"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clip = Clipper(state["norms"])
        for name in ("step", "skipped", "consecutive_skips", "best", "elapsed", "window", "best_weights"):
            setattr(self, name, state[name])
        self.best_provenance = state["best_provenance"]
        # Runs of before did not say; they were saved at their end after the validation, with few exceptions.
        self.validated = tuple(state.get("validated", (self.step, math.nan)))
        scored = self._validation_set()
        if state.get("nll_rule") != NLL_RULE or not _agree(tuple(state.get("validation_set", scored)), tuple(scored)):
            # The best of then has another measure: the next validation starts anew.
            self.best, self.validated = math.inf, (self.step, math.nan)
        if self.ranks.main:
            _truncate_log(self.out / LOG_FILE, self.step)
            self._save_config()  # a longer run, interrupted, goes on as the longer run

    def _objective(self) -> Objective:
        if self.config.objective == "nll":
            solver = Solver("dopri5", rtol=self.config.tolerance, atol=self.config.tolerance)
            return NegativeLogLikelihood(solver, self.config.regularisation, self.config.adjoint)
        return FlowMatching(self.config.times, self.config.time_power)

    def _counts(self, features: str) -> dict[str, dict[Any, int]]:
        """Returns how many atoms, and which compositions, the training set has how often."""
        return {
            "sizes": dict(sorted(Counter(self.data.sizes.tolist()).items())),
            "compositions": dict(sorted(self.data.compositions.items())) if features == "given" else {},
        }

    def _refitted(self, initial: ENF) -> ENF:
        """Returns a trained flow with the sizes and compositions of these data; its weights and scales stay."""
        path = "linear" if self.config.objective == "flow_matching" else None
        config = dataclasses.replace(initial.config, path=path, **self._counts(initial.features))
        model = ENF(config, initial.provenance)
        model.load_state_dict(initial.state_dict())
        return model

    def _model_config(self, species: tuple[str, ...]) -> ENFConfig:
        config = self.config
        shift, scale = (
            self.data.feature_standardisation(config.feature_spread) if config.features == "joint" else ((), ())
        )
        return ENFConfig(
            features=config.features,
            species=species,
            **self._counts(config.features),
            dimension=config.dimension,
            network=config.network,
            hidden=config.hidden,
            layers=config.layers,
            attention=config.attention,
            radial=config.radial if config.network == "egnn" else 0,
            dequantizer=config.dequantizer,
            position_scale=self.data.position_scale(),
            feature_shift=shift,
            feature_scale=scale,
            parameterisation=config.parameterisation,
            feature_std=self.data.feature_std(scale) if config.parameterisation == "denoising" and scale else 1.0,
            path="linear" if config.objective == "flow_matching" else None,
        )

    def _device(self) -> torch.device:
        device = resolve_device(self.config.device)
        if device.type == "cuda" and self.ranks.world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        return device

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _out_of_time(self, seconds: float) -> bool:
        """Whether the time limit is over on any rank, so that all stop together."""
        if self.config.time_limit is None:
            return False
        late = seconds > 3600 * self.config.time_limit
        if self.ranks.world == 1:
            return late
        shared = torch.tensor(float(late), device=self.device)
        dist.all_reduce(shared)
        return bool(shared > 0)


def _molecules(name: str, atoms: list[Atoms], species: tuple[str, ...], dimension: int) -> MoleculeSet:
    """Returns a set of molecules; what is wrong with one of them says which set it is in."""
    try:
        return MoleculeSet(atoms, species, dimension)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_new_run(folder: str | os.PathLike[str]) -> None:
    """Makes sure that a new run replaces nothing in its folder but the beginnings of one that never saved.

    Raises:
        ValueError: If the folder holds a run, or a file of somebody else under a name that a run needs.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; name the folder of the run")
    if any((folder / name).exists() for name in (STATE_FILE, BEST_FILE, LAST_FILE)):
        raise ValueError(f"{folder}: already holds a run; resume it, or choose another folder")
    check_ours(folder / CONFIG_FILE, lambda text: {"objective", "features", "out"} <= dict(json.loads(text)).keys())
    check_ours(folder / LOG_FILE, lambda text: text.startswith(",".join(LOG_COLUMNS[:4])))


def check_ours(path: Path, recognise: Callable[[str], bool]) -> None:
    """Makes sure that a file, which is to be replaced, is not there, is empty, or has a text that is recognised.

    Raises:
        ValueError: If it is somebody else's.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError, ValueError, TypeError):  # no file, no text, no JSON
        if not (text := path.read_text()) or recognise(text):
            return
    raise ValueError(f"{path}: is no file of a run, and a run would replace it; move it away, or choose another folder")


def model_fields(config: ENFConfig) -> dict[str, Any]:
    """Returns the fields of TrainConfig that weights to start from decide, as their configuration has them.

    Example:
        >>> model_fields(ENFConfig(features="given", hidden=8))["hidden"]
        8
    """
    fields = {name: getattr(config, name) for name in MODEL_FIELDS}
    return fields | ({"feature_spread": config.feature_scale[0]} if config.features == "joint" else {})


def _read_state(path: Path) -> dict[str, Any]:
    """Returns a training state with what is JSON in it decoded."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume there; start the run without resume")
    try:
        # Optimizers move what belongs on a GPU; their counters of steps belong on the CPU, wherever they were saved.
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        whole = STATE_KEYS <= state.keys()
        for name in ("config", "model_config", "best_provenance"):
            state[name] = dict(json.loads(state[name]))
        path = "linear" if state["config"].get("objective") == "flow_matching" else None  # older states do not say it
        state["model_config"] = ENFConfig(**{"path": path} | state["model_config"])
    except OSError:
        raise
    except Exception:  # whatever the unpickler stumbles over; torch's own advice is to load it unsafely
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: is damaged or no training state; start a new run in another folder, whose initial may be the "
            f"{BEST_FILE} of this one"
        )
    return state


def _agree(a: Any, b: Any) -> bool:
    """Whether two configurations say the same, but for the last digits of what is summed."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_agree(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_agree, a, b))
    return math.isclose(a, b, rel_tol=SAME) if isinstance(a, float) else a == b


def _board(folder: Path | None, step: int) -> Any:
    """Returns a TensorBoard writer that forgets rows from ``step`` on, None where TensorBoard is not installed."""
    if folder is None or importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / BOARD_FOLDER, purge_step=step)


def schedule(step: int, total: int, warmup: int, decay: float = 1.0) -> float:
    """Linear warm-up, a plateau, then half a cosine to zero over the part ``decay`` of what follows the warm-up.

    Example:
        >>> [round(schedule(step, 110, 10), 3) for step in (0, 4, 9, 60, 110)]
        [0.1, 0.5, 1.0, 0.5, 0.0]
        >>> [round(schedule(step, 110, 10, decay=0.2), 3) for step in (60, 90, 100, 110)]
        [1.0, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup, max(total // 2, 1))
    if step < warmup:
        return (step + 1) / warmup
    falling = decay * max(total - warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(max(1.0 - (total - step) / falling, 0.0), 1.0)))


def _backward(loss: Tensor) -> None:
    """Back-propagates; the adjoint solves an ODE there, and torchdiffeq asserts where it cannot."""
    try:
        loss.backward()
    except AssertionError as error:
        reason = str(error).split(":")[0]
        raise SolverError(f"the adjoint failed ({reason}); lower tolerance or use adjoint=False") from None


def _validation_nll(model: ENF, batch: Batch, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood with one draw of q and one probe, nats, shape (B,); the same noise every time.

    On the nodes of scores, unrefined: a cheaper rule was wrong by more than what one set of weights gains on another.
    """
    shape = (*batch.mask.shape, model.config.flow_features)
    noise = torch.randn(shape, generator=generator).to(batch.positions)
    probes = divergence.draw_probes(batch.positions, noise, 1, generator)
    trace = functools.partial(divergence.hutchinson, probes=probes)
    result = model.log_prob(batch, noise, trace, model.likelihood_solver, estimate_path_error=False)
    # A size that training has not seen counts as seen once: at −inf no set of weights would be better than another.
    floor = -math.log(1 + sum(model.config.sizes.values()))
    return -(result.log_base + result.ladj - result.log_q + result.log_size.clamp(min=floor)).cpu()


def _generator(seed: int, step: int, rank: int, stream: int = 0) -> torch.Generator:
    """Returns the randomness of one step; it depends on nothing else, so a resumed run draws the same."""
    word = np.random.SeedSequence((seed, step, rank, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def _ema_update(decay: float):  # noqa: ANN202 (torch's own callback type)
    """Returns the update of AveragedModel, with a shorter memory in the first steps."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        now = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        torch._foreach_lerp_(averaged, current, 1.0 - now)

    return update


def _truncate_log(path: Path, step: int) -> None:
    """Drops rows written after the last save, so that a resumed log has every step once; begins a missing one."""
    rows = list(csv.reader(path.read_text().splitlines())) if path.is_file() else []
    whole = [row for row in rows[1:] if len(row) == len(LOG_COLUMNS) and row[0].isdigit()]
    kept = [LOG_COLUMNS, *(row for row in whole if int(row[0]) <= step)]
    with atomic_write(path) as handle:
        text = io.TextIOWrapper(handle, newline="", write_through=True)
        csv.writer(text).writerows(kept)
        text.detach()


def keep_memory() -> None:
    """Tells glibc to keep freed blocks of up to 32 MiB; returning pages at every step costs half the speed on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 * 2**20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def _distributed(config: TrainConfig) -> Iterator[_Ranks]:
    """Joins the process group of torchrun, if there is one, and leaves it at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield _Ranks(0, 1)
        return
    owner = not dist.is_initialized()
    if owner:
        # Its functions keep the group of the time of their import as a default. DistributedDataParallel imports it, and
        # threads of a group that is kept run on after its end: now and then they abort the process at exit.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if resolve_device(config.device).type == "cuda" else "gloo")
    try:
        yield _Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if owner:
            gc.collect()  # what else keeps the group
            dist.destroy_process_group()


@contextlib.contextmanager
def _float32_matmul(precision: str) -> Iterator[None]:
    """Allows TF32 while training, and only then."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
