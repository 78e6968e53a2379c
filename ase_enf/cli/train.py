"""``ase-enf train``: starts a training run or resumes one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase_enf.cli.arguments import add_command, flag
from ase_enf.cli.inputs import read_structures
from ase_enf.cli.progress import progress, say, show_warning
from ase_enf.cli.settings import add_groups, add_settings, typed_settings
from ase_enf.cli.sources import (
    DATA_FILE,
    check_apart,
    is_sources,
    moved_sources,
    new_sources,
    read_json,
    saved_sources,
    write_json,
)
from ase_enf.values import check_device

if TYPE_CHECKING:
    from ase_enf.flow.model import ENF
    from ase_enf.training.config import TrainConfig

CURVE_FILE = "learning_curve.png"
"""Picture of the losses in the folder of a run, drawn when the run ends."""


def add_train(commands: Any, complete: bool) -> None:
    """Adds the command ``train``.

    Args:
        commands: Where to add it, the result of ``ArgumentParser.add_subparsers``.
        complete: Whether to add the options for the fields of ``TrainConfig``, which is imported for them only.
    """
    command = add_command(commands, "train", "Train a flow on structures of any elements.", run_train)
    command.usage = (
        f"{command.prog} --data FILE --valid FILE --out FOLDER [options]\n"
        f"       {command.prog} --resume FOLDER [options]"
    )
    groups = add_groups(command)
    data, output = groups["data"], groups["output"]
    data.add_argument(
        "--data", default=None, metavar="FILE", help="training structures: any file that ASE reads, or QM9 in any form"
    )
    data.add_argument("--valid", default=None, metavar="FILE", help="validation structures")
    data.add_argument("--qm9-split", action="store_true", help="use the published train and valid splits of --data")
    data.add_argument("--n-atoms", type=int, default=None, metavar="N", help="use only structures of N atoms")
    output.add_argument(
        "--resume",
        default=None,
        metavar="FOLDER",
        help="resume the run in this folder; with --cool-down and --out, train a branch whose learning rate falls to 0",
    )
    if complete:
        add_settings(groups)


def run_train(options: argparse.Namespace) -> None:
    """Starts or resumes a run, and reports its result."""
    from ase_enf.atoms.files import make_folder
    from ase_enf.training.folder import check_new_run, check_ours

    typed = typed_settings(options)
    check_device(typed.get("device", "auto"))
    config, sources = _resumed(options, typed) if options.resume else _new(options, typed)
    folder = Path(config.out)
    check_apart(sources, folder)
    trunk = options.resume if "out" in typed else None  # the run that a branch starts from
    anew = bool(trunk) or not options.resume
    if anew:
        check_new_run(folder)
        check_ours(folder / DATA_FILE, lambda text: is_sources(json.loads(text)))
        check_ours(folder / CURVE_FILE, lambda _: False)  # without weights beside it, it is not of a run
    train_atoms, valid_atoms = (
        read_structures(sources[name], name if sources["split"] else None, sources["n_atoms"])
        for name in ("train", "valid")
    )
    described = Path(sources["train"]).name + (" (published train split)" if sources["split"] else "")
    from ase_enf.training.loop import train  # torch, which takes seconds to import

    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process and anew:
        write_json(make_folder(folder) / DATA_FILE, sources)
    model = train(
        config, train_atoms, valid_atoms, resume=not anew, progress=progress("step"), source=described, branch_of=trunk
    )
    if main_process:
        if not anew:  # train has checked that moved data are those of the run
            write_json(folder / DATA_FILE, sources)
        _report_run(model, folder)
        _draw_curve(folder)


def _new(options: argparse.Namespace, typed: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Returns settings and data of a new run."""
    from ase_enf.training.config import TrainConfig

    sources = new_sources(options)
    if "out" not in typed:
        raise ValueError("--out is missing; name the folder of the run")
    config = TrainConfig(**typed)
    if config.init_from:
        _check_initial(config.init_from, typed)
    return config, sources


def _check_initial(model: str, typed: dict[str, Any]) -> None:
    """Raises an error for weights to start from that are missing, or that differ from what was typed."""
    from ase_enf.flow.weights import read_header, weights_path

    read_header(weights_path(model))

    from ase_enf.flow.loading import load  # torch, which takes seconds to import
    from ase_enf.training.config import model_fields

    for name, value in model_fields(load(model, device="cpu", backend="torch").config).items():
        if typed.get(name, value) != value:
            raise ValueError(f"{flag(name)}={typed[name]}: the model of --init-from {model} has {value}; leave it out")


def _resumed(options: argparse.Namespace, typed: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Returns settings and data of a resumed run."""
    from ase_enf.training.config import RESUME_MAY_CHANGE
    from ase_enf.training.folder import CONFIG_FILE

    folder = Path(options.resume)
    if "out" in typed and "cool_down" not in typed:
        raise ValueError("--resume names the folder of the run; leave --out out, or add --cool-down for a branch")
    anew = bool(options.data) and not (folder / DATA_FILE).exists()  # a run started in Python has no DATA_FILE
    if (options.qm9_split or options.n_atoms) and not anew:
        raise ValueError("--resume takes its part of the data from its folder; leave --qm9-split and --n-atoms out")
    saved = _saved_config(folder / CONFIG_FILE)
    may_change = set(RESUME_MAY_CHANGE) - {"init_from"}
    fixed = [name for name in typed if name not in may_change and typed[name] != getattr(saved, name)]
    if fixed:
        raise ValueError(f"{flag(fixed[0])} cannot change when a run is resumed; leave it out")
    if saved.schedule == "constant" and "cool_down" in typed and "out" not in typed:
        raise ValueError("--cool-down of a run with a constant rate makes a branch; add --out, a folder for it")
    config = dataclasses.replace(saved, **({"out": str(folder)} | typed))
    sources = new_sources(options) if anew else moved_sources(saved_sources(folder / DATA_FILE), options)
    for name in ("train", "valid"):
        if not Path(sources[name]).exists():
            raise FileNotFoundError(f"{sources[name]}: no such file; give its new path by --data or --valid")
    return config, sources


def _saved_config(path: Path) -> TrainConfig:
    from ase_enf.flow.weights import package_version
    from ase_enf.training.config import TrainConfig, migrated

    saved = read_json(path)
    if not (isinstance(saved, dict) and saved):
        raise ValueError(f"{path}: holds no settings of a run; start the run again in another folder")
    saved = migrated(saved)
    if unknown := sorted(saved.keys() - {field.name for field in dataclasses.fields(TrainConfig)}):
        raise ValueError(
            f"{path}: {unknown[0]!r} is not a setting of ase-enf {package_version()}; remove it, or upgrade"
        )
    try:
        return TrainConfig(**saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _report_run(model: ENF, folder: Path) -> None:
    """Reports the progress of a run, and where its weights are."""
    from ase_enf.flow.weights import read_header
    from ase_enf.training.folder import BEST_FILE, LAST_FILE

    best, last = model.provenance, read_header(folder / LAST_FILE)["provenance"]
    total = last["total_steps"]
    stopped = total is None or last["step"] < total
    if stopped:
        done = f"step {last['step']}" + (f" of {total}" if total else "")
        say(f"stopped by the time limit at {done}; continue with ase-enf train --resume {folder}")
    if best["validation_nll"] is not None:
        found = f"{best['validation_nll']:.3f} nats a molecule at step {best['step']}"
        say(f"validation NLL {found} ({_compared(folder, best['step'])}); weights in {folder}/{BEST_FILE}")
    elif stopped and not (folder / BEST_FILE).exists():
        say(f"no validation yet; current weights in {folder}/{LAST_FILE}")
    else:
        say(f"the validation NLL is not finite; lower --learning-rate; current weights in {folder}/{LAST_FILE}")


def _compared(folder: Path, best: int) -> str:
    """Returns what to compare the lowest validation NLL with, which was found at step ``best``: the first one."""
    from ase_enf.training.folder import LOG_FILE
    from ase_enf.training.log import read_log

    log = read_log(folder / LOG_FILE)
    validations = [
        (int(step), nll) for step, nll in zip(log["step"], log["valid_nll"], strict=True) if math.isfinite(nll)
    ]
    if not validations or validations[-1][0] <= validations[0][0]:
        return "lower is better; the only validation, --validate-every N asks for more"
    (first, nll), (last, _) = validations[0], validations[-1]
    if first >= best:
        return f"lower is better; none of those until step {last} was lower"
    return f"lower is better; it was {nll:.3f} at step {first}"


def _draw_curve(folder: Path) -> None:
    """Draws the learning curve of a run; if that fails, it warns, as the run itself has succeeded."""
    try:
        from ase_enf.flow.weights import read_header
        from ase_enf.plot import learning_curve
        from ase_enf.training.folder import LAST_FILE, LOG_FILE
        from ase_enf.training.log import read_log

        last = read_header(folder / LAST_FILE)["provenance"]
        per_step = last["training"]["batch_size"] * last["processes"]
        learning_curve(read_log(folder / LOG_FILE), folder / CURVE_FILE, per_step)
    except Exception as error:
        show_warning(f"the learning curve could not be drawn: {' '.join(str(error).split())}")
