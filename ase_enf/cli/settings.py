"""Options of ``ase-enf train`` for the fields of ``TrainConfig``, in groups; the fields supply the help texts."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

from ase_enf.cli.arguments import add_renamed, flag

# Title of a group in the help → its fields, in order. Fields in no group are advanced.
GROUPS = {
    "data": (),
    "model": (
        "features", "condition", "graph", "dimension", "network", "hidden", "layers", "attention", "radial",
        "dequantizer", "type_scale", "parameterisation", "init_from",
    ),
    "time and steps": ("epochs", "steps", "batch_size", "time_limit", "schedule", "cool_down", "warmup"),
    "optimisation": (
        "objective", "optimizer", "learning_rate", "muon_learning_rate", "weight_decay", "muon_weight_decay",
        "ema_decay", "long_ema_decay", "augment", "seed",
    ),
    "output": ("out", "validate_every", "validation_size", "checkpoint_every", "log_every"),
    "advanced": (),
}  # fmt: skip
_METAVARS = {int: "N", float: "X", str: "NAME", "out": "FOLDER", "init_from": "MODEL", "device": "DEVICE"}


class Setting(typing.NamedTuple):
    """A field of ``TrainConfig``.

    Attributes:
        name: Name of the field.
        kind: Type of its values.
        default: Default value.
        text: Help text.
        one_of: Allowed names, for a field of type str; None for any.
    """

    name: str
    kind: type
    default: Any
    text: str
    one_of: tuple[str, ...] | None


def settings() -> list[Setting]:
    """Returns every field of ``TrainConfig``.

    Example:
        >>> next(field.text for field in settings() if field.name == "warmup")
        'steps of linear warm-up'
    """
    from ase_enf.training.config import TrainConfig

    hints = typing.get_type_hints(TrainConfig)
    return [
        Setting(field.name, _plain_type(hints[field.name]), field.default, *_metadata(field))
        for field in dataclasses.fields(TrainConfig)
    ]


def _metadata(field: dataclasses.Field[Any]) -> tuple[str, tuple[str, ...] | None]:
    names = field.metadata["one_of"]
    return field.metadata["help"], None if names is None else tuple(names)


def _plain_type(hint: Any) -> type:
    """Returns T of ``T | None``."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def add_groups(command: argparse.ArgumentParser) -> dict[str, Any]:
    """Adds the groups of the help and returns them by title."""
    return {title: command.add_argument_group(title) for title in GROUPS}


def add_settings(groups: dict[str, Any]) -> None:
    """Adds an option for every field of ``TrainConfig`` to its group."""
    from ase_enf.training.config import RENAMED

    fields = {field.name: field for field in settings()}
    grouped = {name for names in GROUPS.values() for name in names}
    rest = [name for name in fields if name not in grouped]
    for title, names in GROUPS.items():
        for name in names or (rest if title == "advanced" else ()):
            _add_setting(groups[title], fields[name])
    for old, new in RENAMED.items():
        add_renamed(groups["advanced"], flag(old), flag(new))


def _add_setting(group: Any, field: Setting) -> None:
    # An option that is not given stays absent: a resumed run must know which were given.
    default = "" if field.default in (None, "") else f" (default: {field.default})"
    about = {"default": argparse.SUPPRESS, "help": f"{field.text}{default}".replace("%", "%%")}
    if field.kind is bool:
        about |= {"action": argparse.BooleanOptionalAction}
    else:
        about |= {"type": field.kind, "metavar": _METAVARS.get(field.name, _METAVARS[field.kind])}
    if field.name == "condition":  # can be repeated
        about |= {"action": "append"}
    action = group.add_argument(flag(field.name), **about)
    action.names = field.one_of  # not choices: TrainConfig itself checks the value, with the same message in Python


def typed_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the fields given on the command line, by name."""
    typed = {field.name: getattr(options, field.name, None) for field in settings()}
    typed = {name: value for name, value in typed.items() if value is not None}
    if "condition" in typed:
        typed["condition"] = ",".join(typed["condition"])
    return typed
