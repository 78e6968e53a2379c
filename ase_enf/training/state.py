"""The state of a run on disk: written atomically, read without pickle, checked, and migrated from earlier versions."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ase_enf.atoms.files import atomic_write
from ase_enf.flow.config import ENFConfig
from ase_enf.training.config import RESUME_MAY_CHANGE, TrainConfig, migrated, model_fields
from ase_enf.training.folder import BEST_FILE, CONFIG_FILE, STATE_FILE
from ase_enf.training.optimizers import Clipper
from ase_enf.training.run import Run
from ase_enf.training.validation import NLL_RULE, validation_set

# Names of the averages, the longer one second.
AVERAGES = ("ema", "long_ema")
# Relative difference; between machines, sums over the same data differ by less.
SAME = 1e-9
# Settings that runs of earlier versions had but did not record.
EARLIER_SETTINGS = {
    "optimizer": "adamw", "init_from": None, "schedule": "cosine", "long_ema_decay": None,
    "parameterisation": "velocity", "times": "power",
}  # fmt: skip


def save_state(run: Run) -> None:
    """Writes ``state.pt``, whole or not at all; a run without a folder has none."""
    if not (run.out and run.ranks.main):
        return
    state = {
        "config": json.dumps(dataclasses.asdict(run.config)),
        "model_config": json.dumps(dataclasses.asdict(run.model.config)),
        "world": run.ranks.world,
        "step": run.step,
        "noted": run.noted,
        "skipped": run.skipped,
        "consecutive_skips": run.consecutive_skips,
        "best": run.best,
        "validated": list(run.validated),
        "nll_rule": NLL_RULE,
        "validation_set": validation_set(run),
        "elapsed": run.elapsed,
        "norms": list(run.clip.norms),
        "window": run.window,
        "best_weights": run.best_weights,
        "best_provenance": json.dumps(run.best_provenance),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    state |= {name: average.state_dict() for name, average in zip(AVERAGES, run.averages, strict=False)}
    with atomic_write(run.out / STATE_FILE) as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:
            # What ends the writing, such as Control-C or a full disk, ends in an error of torch about its archive.
            if isinstance(error.__context__, KeyboardInterrupt | OSError):
                raise error.__context__ from None
            raise


def save_config(run: Run, **changes: Any) -> None:
    """Writes the settings with which a run is to be resumed: its own, with the changes."""
    with atomic_write(run.out / CONFIG_FILE) as handle:
        handle.write(f"{json.dumps(dataclasses.asdict(run.config) | changes, indent=2)}\n".encode())


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the state of the run in a folder, checked and decoded, with its settings under their present names.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume there; start the run without resume")
    content = io.BytesIO(path.read_bytes())  # so that an OSError below is about the content of the file
    try:
        # Optimizers move their tensors to the GPU themselves, except step counters, which belong on the CPU.
        state = dict(torch.load(content, map_location="cpu", weights_only=True))
        for name in ("config", "model_config", "best_provenance"):
            state[name] = dict(json.loads(state[name]))
        state["config"] = migrated(state["config"])
        path = "linear" if state["config"].get("objective") == "flow_matching" else None  # older states lack it
        state["model_config"] = ENFConfig(**{"path": path} | state["model_config"])
        # Earlier versions did not record these; with few exceptions they validated before their last save.
        state = {"noted": state["step"], "validated": [state["step"], math.nan]} | state
        whole = all(name in state and holds(state[name]) for name, holds in _KINDS.items())
    except Exception:  # anything that the unpickler may raise; its own message would advise to load the file unsafely
        whole = False
    if not whole:
        raise damaged(folder)
    return state


def damaged(folder: Path) -> ValueError:
    """Returns the error for a state that cannot be read or does not fit together."""
    return ValueError(
        f"{folder / STATE_FILE}: is damaged or no training state; start a new run in another folder, whose init_from "
        f"may be the {BEST_FILE} of this one"
    )


def resumed_config(config: TrainConfig, state: Mapping[str, Any], world: int) -> TrainConfig:
    """Returns the settings with which a run is resumed: the given ones, checked against its own.

    Raises:
        ValueError: If a setting that decides which numbers come next differs.
    """
    before = EARLIER_SETTINGS | state["config"]
    config = dataclasses.replace(config, init_from=before["init_from"])
    if config.init_from:
        before |= model_fields(state["model_config"])
        config = dataclasses.replace(config, **model_fields(state["model_config"]))
    if state["world"] != world:
        raise ValueError(
            f"{config.out}: the run was made by {state['world']} process(es), not {world}; resume it with as many"
        )
    now = dataclasses.asdict(config)
    for name, value in before.items():
        if name not in RESUME_MAY_CHANGE and value != now.get(name):
            raise ValueError(
                f"{config.out}: the run was made with {name}={value!r}, not {now.get(name)!r}; "
                "resume it with its own settings"
            )
    return config


def restore(run: Run, state: Mapping[str, Any]) -> None:
    """Sets a run to its saved state.

    Raises:
        ValueError: If the state does not fit together, or has more steps than the run is to have.
    """
    if run.total_steps is not None and state["step"] > run.total_steps:
        raise ValueError(
            f"{run.out}: the run has done {state['step']} steps, more than the {run.total_steps} it should end at; "
            "ask for more steps or epochs, or leave them as they were"
        )
    try:
        if state["best_weights"] is not None:
            run.model.load_state_dict(state["best_weights"])  # checks that they fit
        run.model.load_state_dict(state["model"])
        for name, average in zip(AVERAGES, run.averages, strict=False):
            average.load_state_dict(state[name])
        run.optimizer.load_state_dict(state["optimizer"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise damaged(run.out) from None
    run.clip = Clipper(state["norms"])
    run.validated = tuple(state["validated"])
    for name in (
        "step", "noted", "skipped", "consecutive_skips", "best", "elapsed", "window", "best_weights", "best_provenance",
    ):  # fmt: skip
        setattr(run, name, state[name])
    scored = validation_set(run)
    if state.get("nll_rule") != NLL_RULE or not agree(tuple(state.get("validation_set", scored)), tuple(scored)):
        # The best value so far was measured in another way, so that the next validation starts anew.
        run.best, run.validated = math.inf, (run.step, *(math.nan for _ in run.averages))


def agree(a: Any, b: Any) -> bool:
    """Whether two configurations are equal, up to the last digits of sums.

    Example:
        >>> agree({"scale": 1.0}, {"scale": 1.0 + 1e-12}), agree((1, 2.0), (1, 2.1))
        (True, False)
    """
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(agree(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(agree, a, b))
    return math.isclose(a, b, rel_tol=SAME) if isinstance(a, float) else a == b


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int | float) for item in value)


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, Tensor) for item in value.values())


# What a state must contain, and the types of its entries.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: bool(value),
    "model_config": lambda value: True,
    "best_provenance": lambda value: True,
    "world": _count,
    "step": _count,
    "noted": _count,
    "skipped": _count,
    "consecutive_skips": _count,
    "best": lambda value: isinstance(value, float),
    "validated": lambda value: _numbers(value) and len(value) > 1,
    "elapsed": lambda value: isinstance(value, float),
    "norms": _numbers,
    "window": lambda value: isinstance(value, list) and all(_numbers(row) and len(row) == 3 for row in value),
    "best_weights": lambda value: value is None or _tensors(value),
    "model": _tensors,
    "ema": _tensors,
    "optimizer": lambda value: isinstance(value, list | dict),
}
