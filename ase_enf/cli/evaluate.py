"""``ase-enf evaluate``: stability, validity, uniqueness and novelty of structures."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase_enf.cli.arguments import add_command, add_replacing
from ase_enf.cli.inputs import check_present, check_reference, read_reference, read_structures
from ase_enf.cli.outputs import TABLES, check_apart, check_free, check_picture, draw_gallery, write_table
from ase_enf.cli.progress import counted
from ase_enf.values import check_whole

if TYPE_CHECKING:
    import pandas as pd

# Metrics that are always printed → what they are called there.
HEADLINES = {
    "molecule_stability": "molecules stable",
    "validity_largest_fragment": "valid",
    "atom_stability": "atoms stable",
    "connected": "in one piece",
    "uniqueness_largest_fragment": "unique",
    "novelty_largest_fragment": "new",
    "distance_js": "distances",
}
# Metric → what it is a fraction of, where that is not structures.
_OF = {"atom_stability": "atoms", "uniqueness_largest_fragment": "valid", "novelty_largest_fragment": "valid"}
WIDTH = 100


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
    command.add_argument("-n", type=int, default=None, help="evaluate the first n structures; all when left out")
    command.add_argument(
        "--all",
        action="store_true",
        help="print every metric, with the other definitions of valid and other denominators, as the report has them",
    )
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
    from ase_enf.atoms.files import require_folder

    check_present(options.structures)
    if options.reference is not None:
        check_reference(options.reference)
    if options.n is not None:
        check_whole("n", options.n, 1)
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

    import numpy as np

    from ase_enf import metrics, plot

    atoms = read_structures(options.structures)[: options.n]
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
    print(full_report(table) if options.all else short_report(table))


def short_report(table: pd.DataFrame) -> str:
    """Returns the metrics that tables of models give, in percent, and below them what each counts.

    Args:
        table: What ``metrics.evaluate`` returns.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.metrics import evaluate
        >>> print(short_report(evaluate([molecule("CH4"), molecule("CH3")])).splitlines()[2])
        molecules stable    50.0 ± 35.4 %  of 2 structures         molecule_stability
    """
    rows = {row.metric: row for row in table.itertuples() if row.metric in HEADLINES}
    shown = [(name, words, rows[name]) for name, words in HEADLINES.items() if name in rows]
    lines = [f"{counted(table.attrs['n_structures'], 'structure'):58s} in the report", ""]
    for name, words, row in shown:
        if name == "distance_js":
            said = f"{row.value:8.4f} ± {row.stderr:.4f} nats from reference"
        elif row.denominator:
            of = _OF.get(name) or ("structure" if row.denominator == 1 else "structures")
            error = f"{100 * row.stderr:4.1f}" if row.stderr == row.stderr else "   -"  # NaN where it is unknown
            said = f"{100 * row.value:6.1f} ± {error} %  of {row.denominator:,} {of}"
        else:
            said = f"{'-':>6s}           of 0 {_OF.get(name, 'structures')}"
        lines.append(f"{words:17s} {said:40s} {name}")
    lines.append("")
    lines += [_wrapped(f"{words}: {row.definition}") for _, words, row in shown]
    lines += ["", f"All {len(table)} metrics, with the other definitions of valid: --all, or in the file of -o."]
    return "\n".join([*lines, _sources(table)])


def full_report(table: pd.DataFrame) -> str:
    """Returns every metric by its name in the report, and below them the definition of each.

    Args:
        table: What ``metrics.evaluate`` returns.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.metrics import evaluate
        >>> print(full_report(evaluate(molecule("CH4"))).splitlines()[1])
        atom_stability                       1.0000 ±    nan  5
    """
    lines = [f"{'metric':34s} {'value':>8s} ± {'stderr':6s}  of"]
    lines += [f"{row.metric:34s} {row.value:8.4f} ± {row.stderr:6.4f}  {row.denominator}" for row in table.itertuples()]
    lines.append("")
    lines += [_wrapped(f"{row.metric}: {row.definition}") for row in table.itertuples()]
    return "\n".join([*lines, "", _sources(table)])


def _sources(table: pd.DataFrame) -> str:
    """Returns what should be quoted with the values: versions, bond table and reference."""
    return _wrapped(", ".join(f"{key} {value}" for key, value in table.attrs.items()))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ")
