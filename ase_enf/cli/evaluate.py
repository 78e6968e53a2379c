"""``ase-enf evaluate``: stability, validity, uniqueness and novelty of structures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ase_enf.cli.arguments import add_command, add_replacing
from ase_enf.cli.inputs import read_reference, read_structures
from ase_enf.cli.outputs import TABLES, check_free, check_picture, draw_gallery, write_table


def add_evaluate(commands: Any) -> None:
    """Adds the command ``evaluate``."""
    command = add_command(
        commands, "evaluate", "Stability, validity, uniqueness and novelty of structures.", run_evaluate
    )
    command.add_argument("structures", help="any file ASE reads")
    command.add_argument(
        "--reference", default=None, help="qm9, a file of SMILES (.smi, .txt), or a file of structures"
    )
    command.add_argument("-o", "--output", default=None, help=".json, .csv or .md")
    add_replacing(command)
    command.add_argument("--gallery", default=None, metavar="PNG", help="picture of the first 24 structures")
    command.add_argument("--histogram", default=None, metavar="PNG", help="distances against the reference's")
    command.add_argument(
        "--plot",
        default=None,
        metavar="PNG",
        help="distances, against the reference's if any, and stability by element",
    )


def run_evaluate(options: argparse.Namespace) -> None:
    """Reports on the structures of a file."""
    import numpy as np

    from ase_enf import metrics, plot
    from ase_enf.atoms.files import require_folder

    if options.output:
        require_folder(options.output)
    for picture in (options.gallery, options.histogram, options.plot):
        check_picture(picture)
    if options.output and Path(options.output).suffix not in TABLES:
        raise ValueError(f"{options.output}: a report is written as {', '.join(TABLES)}; choose one of these endings")
    if options.histogram and not options.reference:
        raise ValueError("--histogram compares with a reference; add --reference qm9 or a file of structures")
    check_free(options, options.output, options.gallery, options.histogram, options.plot)
    atoms = read_structures(options.structures)
    reference = None if options.reference is None else metrics.as_reference(read_reference(options.reference))
    seen = metrics.survey(atoms)
    table = metrics.evaluate(seen, reference)
    if options.output:
        write_table(options.output, table)
    if options.histogram:
        plot.distance_histogram(seen, reference, options.histogram)
    if options.plot:
        plot.evaluation(seen, options.plot, reference)
    if options.gallery:
        draw_gallery([item for item in atoms if np.isfinite(item.positions).all()][:24], options.gallery)
    for row in table.itertuples():
        print(f"{row.metric:34s} {row.value:8.4f} ± {row.stderr:.4f}  of {row.denominator:<9d} {row.definition}")
    print(", ".join(f"{key} {value}" for key, value in table.attrs.items()))
