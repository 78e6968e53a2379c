"""``ase-enf boltzmann``: free energies of a molecule by a calculator and a flow of its thermal ensemble."""

from __future__ import annotations

import argparse
from typing import Any

from ase_enf.cli.arguments import add_command
from ase_enf.cli.inputs import read_structures
from ase_enf.cli.progress import say


def add_boltzmann(commands: Any) -> None:
    """Adds the command ``boltzmann``."""
    text = "Sample a molecule at a temperature, train a flow on that, draw from it and reweight the draws."
    command = add_command(commands, "boltzmann", text, run_boltzmann)
    command.add_argument("structure", help="the molecule: any file ASE reads; its last image")
    command.add_argument("--calculator", default="mmff", help="gfn2 or gfn1 (tblite), or mmff (MMFF94, RDKit)")
    command.add_argument("--temperature", type=float, default=300.0, help="K")
    command.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="what is finished in this folder is not done again"
    )
    command.add_argument(
        "--torsion",
        type=int,
        nargs=4,
        action="append",
        default=None,
        metavar=("I", "J", "K", "L"),
        help="four atoms, counted from 0, whose torsion names the basins; once for each",
    )
    command.add_argument("-n", type=int, default=10_000, help="frames of the walkers")
    command.add_argument("--draws", type=int, default=10_000, help="draws of the flow")
    command.add_argument("--steps", type=int, default=6000, help="of the training")
    command.add_argument("--seed", type=int, default=0, help="seed of every stage")


def run_boltzmann(options: argparse.Namespace) -> None:
    """Runs or resumes a study."""
    from ase_enf.ensemble.calculators import calculator
    from ase_enf.ensemble.study import boltzmann, default_training, report

    atoms = read_structures(options.structure)[-1]
    study = boltzmann(
        atoms,
        calculator(options.calculator, atoms),
        options.temperature,
        options.output,
        n=options.n,
        draws=options.draws,
        torsions=options.torsion or (),
        training=default_training(options.steps),
        seed=options.seed,
    )
    print(report(study, atoms, options.temperature), end="")
    say(f"wrote report.md, tables and pictures to {options.output}")
