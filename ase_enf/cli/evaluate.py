"""``ase-enf evaluate``: stability, validity, uniqueness and novelty of structures."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase_enf.cli.arguments import add_command, add_replacing
from ase_enf.cli.inputs import read_reference, read_structures
from ase_enf.cli.outputs import TABLES, check_apart, check_free, check_picture, draw_gallery, write_table

if TYPE_CHECKING:
    import pandas as pd


def add_evaluate(commands: Any) -> None:
    """Adds the command ``evaluate``."""
    command = add_command(
        commands, "evaluate", "Measure stability, validity, uniqueness and novelty of structures.", run_evaluate
    )
    command.add_argument("structures", help="any file that ASE reads")
    command.add_argument(
        "--reference", default=None, help="qm9, a file of SMILES (.smi, .txt), or a file of structures"
    )
    command.add_argument("-o", "--output", default=None, help="file for the report: .json, .csv or .md")
    add_replacing(command)
    command.add_argument("--gallery", default=None, metavar="PNG", help="draw the first 24 structures")
    command.add_argument(
        "--histogram", default=None, metavar="PNG", help="draw the distances and those of the reference"
    )
    command.add_argument(
        "--plot",
        default=None,
        metavar="PNG",
        help="draw the distances, with those of the reference if given, and stability by element",
    )


def run_evaluate(options: argparse.Namespace) -> None:
    """Evaluates the structures of a file and prints the report."""
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
    written = (options.output, options.gallery, options.histogram, options.plot)
    check_apart(written, [options.structures, options.reference])
    check_free(options, *written)
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
    _print_report(table)


def _print_report(table: pd.DataFrame) -> None:
    """Prints the values in the width of a terminal, and below them the definition of each."""
    print(f"{'metric':34s} {'value':>8s} ± {'stderr':6s}  of")
    for row in table.itertuples():
        print(f"{row.metric:34s} {row.value:8.4f} ± {row.stderr:6.4f}  {row.denominator}")
    print()
    for row in table.itertuples():
        print(textwrap.fill(f"{row.metric}: {row.definition}", 100, subsequent_indent="    "))
    print()
    print(textwrap.fill(", ".join(f"{key} {value}" for key, value in table.attrs.items()), 100))
