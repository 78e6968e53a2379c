"""``ase-enf info``: describes a model and its training."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ase_enf.cli.arguments import add_command


def add_info(commands: Any) -> None:
    """Adds the command ``info``."""
    command = add_command(commands, "info", "Describe a model and its training.", run_info)
    command.add_argument(
        "model",
        nargs="?",
        default=None,
        help="name of a shipped model or path of a file; without it, one line for each shipped model",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def run_info(options: argparse.Namespace) -> None:
    """Describes a model, or lists the shipped models."""
    from ase_enf.atoms.files import brief
    from ase_enf.flow.weights import PRETRAINED, read_header, shipped

    if options.model is None:
        for name in shipped():
            print(_in_short(name, read_header(PRETRAINED / f"{name}.safetensors")))
        return
    named = PRETRAINED / f"{options.model}.safetensors"
    header = read_header(named if named.is_file() else options.model)
    if options.json:
        print(json.dumps(header, indent=2))
        return
    try:
        description = _described(header)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{options.model}: has a damaged header ({brief(error)}); fetch or train it again, or read it with --json"
        ) from None
    print(f"{options.model}: {description}")
    card = named.with_suffix(".md")
    if card.is_file():
        print("\n" + card.read_text(encoding="utf-8"), end="")


def _in_short(name: str, header: dict[str, Any]) -> str:
    """Returns one line about a shipped model: its name, elements, sizes, and the short description of its card."""
    from ase_enf.flow.weights import PRETRAINED

    config, card = header["config"], PRETRAINED / f"{name}.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    said = (line.removeprefix("In short: ").removesuffix(".") for line in text.splitlines() if "In short: " in line)
    purpose = next(said, f"features {config['features']}")
    sizes = sorted({int(size) for size in config["sizes"]})
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    return f"{name:16s} {' '.join(config['species']) or 'any elements'}, {span} atoms: {purpose}"


def _described(header: dict[str, Any]) -> str:
    """Returns the description in the header of a weights file, line by line."""
    from ase_enf.flow.modes import feature_mode

    config = header["config"]
    sizes = sorted(int(size) for size in config["sizes"])
    lines = [
        f"E(n) equivariant normalizing flow, written by ase-enf {header['package']}",
        f"features       {config['features']}",
        f"likelihood     {feature_mode(config['features']).density}",
        f"species        {' '.join(config['species']) or 'any (positions only)'}",
        f"sizes          {min(sizes)} to {max(sizes)} atoms, {sum(config['sizes'].values())} molecules",
        f"network        {config['network']}, {config['layers']} layers x {config['hidden']}",
        f"position scale {config['position_scale']:.4f} Å",
        *(["graph          the molecular graph conditions the flow"] if config.get("graph") else []),
        *(
            f"condition      {condition['name']}: {condition['low']:.4g} to {condition['high']:.4g} {condition['unit']}"
            for condition in config.get("conditions", ())
        ),
    ]
    said = {key: value for key, value in header["provenance"].items() if not isinstance(value, dict)}
    return "\n".join([*lines, *(f"{key:14s} {value}" for key, value in said.items())])
