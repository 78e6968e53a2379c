"""``ase-enf convert-en-flows``: converts the weights published with the paper to the format of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ase_enf.cli.arguments import add_command, add_replacing
from ase_enf.cli.outputs import check_free
from ase_enf.cli.progress import say


def add_convert(commands: Any) -> None:
    """Adds the command ``convert-en-flows``."""
    text = "Convert the QM9 weights published with the paper (en_flows) to this package's format."
    command = add_command(commands, "convert-en-flows", text, run_convert)
    command.add_argument(
        "checkpoint", help="folder of flow.npy and dequantizer.npy, or an .npz or torch checkpoint; read without pickle"
    )
    command.add_argument("-o", "--output", required=True, help="the .safetensors file to write")
    add_replacing(command)


def run_convert(options: argparse.Namespace) -> None:
    """Writes published weights in the format of this package."""
    from ase_enf.atoms.files import require_folder

    if require_folder(options.output).suffix != ".safetensors":
        raise ValueError(f"{options.output}: weights are written as .safetensors; choose that ending")
    check_free(options, options.output)
    if not Path(options.checkpoint).exists():
        raise FileNotFoundError(
            f"{options.checkpoint}: no such checkpoint; name the folder of flow.npy and dequantizer.npy, or one file"
        )

    from ase_enf.flow.en_flows import convert_en_flows  # torch, which takes seconds to import

    convert_en_flows(options.checkpoint).save(options.output)
    say(f"wrote {options.output}")
