"""``ase-enf boltzmann``: free energies of a molecule from a calculator and a flow trained on its thermal ensemble."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ase_enf.cli.arguments import add_command
from ase_enf.cli.inputs import read_structures
from ase_enf.cli.outputs import check_apart
from ase_enf.cli.progress import Staged, say
from ase_enf.values import check_whole


def add_boltzmann(commands: Any) -> None:
    """Adds the command ``boltzmann``."""
    text = "Sample a molecule at a temperature, train a flow on the samples, draw from it and reweight the draws."
    command = add_command(commands, "boltzmann", text, run_boltzmann)
    command.add_argument("structure", help="the molecule: the last structure of any file that ASE reads")
    command.add_argument("--calculator", default="mmff", help="gfn2 or gfn1 (tblite), or mmff (MMFF94, RDKit)")
    command.add_argument("--temperature", type=float, default=300.0, help="temperature, K")
    command.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="folder for results; stages finished in it are kept"
    )
    command.add_argument(
        "--torsion",
        type=int,
        nargs=4,
        action="append",
        default=None,
        metavar=("I", "J", "K", "L"),
        help="torsion that defines basins: four atom indices, counted from 0; can be repeated",
    )
    command.add_argument(
        "--turn",
        type=int,
        nargs=2,
        action="append",
        default=None,
        metavar=("I", "J"),
        help="single bond about which walkers also attempt rotations, whatever the barrier: two atom indices, counted "
        "from 0; can be repeated",
    )
    command.add_argument("-n", type=int, default=10_000, help="number of frames of the walkers")
    command.add_argument("--draws", type=int, default=10_000, help="number of draws of the flow")
    command.add_argument("--steps", type=int, default=6000, help="number of training steps")
    command.add_argument("--seed", type=int, default=0, help="seed of every stage")


def run_boltzmann(options: argparse.Namespace) -> None:
    """Runs or resumes a study."""
    for name, least in (("n", 1), ("draws", 1), ("steps", 1), ("seed", 0)):
        check_whole(name, getattr(options, name), least)
    atoms = read_structures(options.structure)[-1]

    from ase_enf.ensemble.calculators import calculator  # torch, which takes seconds to import
    from ase_enf.ensemble.study import STRUCTURE_FILES, boltzmann, default_training, report

    check_apart([Path(options.output, name) for name in STRUCTURE_FILES], [options.structure])
    study = boltzmann(
        atoms,
        calculator(options.calculator, atoms),
        options.temperature,
        options.output,
        n=options.n,
        draws=options.draws,
        torsions=options.torsion or (),
        training=default_training(options.steps, atoms),
        sampling={"turn": options.turn} if options.turn else None,
        seed=options.seed,
        progress=None if sys.stderr.isatty() else Staged(),
    )
    print(report(study, atoms, options.temperature), end="")
    say(f"wrote report.md, tables and pictures to {options.output}")
