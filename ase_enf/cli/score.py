"""``ase-enf score``: log-likelihoods of structures, written batch by batch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase_enf.cli import progress
from ase_enf.cli.arguments import add_command, add_model, add_property, add_replacing, add_sampling
from ase_enf.cli.inputs import read_structures
from ase_enf.cli.outputs import TABLES, GrowingTable, check_free
from ase_enf.cli.progress import counted, kept, say

if TYPE_CHECKING:
    import pandas as pd
    from ase import Atoms

    from ase_enf.atoms.io import GrowingFile
    from ase_enf.flow.model import ENF


def add_score(commands: Any) -> None:
    """Adds the command ``score``."""
    command = add_command(commands, "score", "Log-likelihood of structures, nats.", run_score)
    add_model(command)
    command.add_argument("structures", help="any file ASE reads, or a pipe of xyz; all its images are scored")
    command.add_argument(
        "-o", "--output", default=None, help=".csv for the table, .extxyz or .db for annotated structures"
    )
    add_replacing(command, ".csv, .extxyz, .xyz, .db, .traj")
    command.add_argument(
        "--start", type=int, default=0, metavar="K", help="leave out the first K structures; work can be done in parts"
    )
    command.add_argument("--trace", default="auto", help="auto, exact or hutchinson")
    command.add_argument("--probes", type=int, default=4, help="probes of hutchinson")
    command.add_argument("--draws", type=int, default=2, help="of a bound: points that the dequantiser draws, K")
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.2,
        help="refine (at most three times) where the integration error exceeds this, nats",
    )
    add_property(command, "NAME=VALUE", "of all structures, instead of what each has in its info")
    add_sampling(command, "noise", batch_size=32)


def run_score(options: argparse.Namespace) -> None:
    """Scores the structures of a file."""
    from ase_enf.atoms.io import check_structures
    from ase_enf.flow.loading import load
    from ase_enf.sampling.properties import read_properties
    from ase_enf.scoring.score import check_request, with_scores

    check_free(options, options.output)
    file = _score_output(options)
    atoms = read_structures(options.structures)
    total = len(atoms) - options.start
    if not (options.start >= 0 and total > 0):
        raise ValueError(f"--start {options.start}: {options.structures} holds {counted(len(atoms), 'structure')}")
    as_table = isinstance(file, GrowingTable)
    if not as_table:
        check_structures(file.path, atoms)
    flow = load(options.model, device=options.device, dtype=options.dtype)
    flow.use_backend(options.backend)
    checked = ("trace", "probes", "draws", "batch_size", "tolerance")
    request = {name: getattr(options, name) for name in (*checked, "seed", "solver", "steps")}
    properties = read_properties(options.property) or None
    request["properties"] = properties
    seeds = [options.seed] * len(atoms)
    check_request(flow, atoms, seeds=seeds, properties=properties, **{name: request[name] for name in checked})
    finite = True
    with kept(file, "score", total, options.start, by_number=False), file:
        for first, table in _scored(flow, atoms, options.start, request):
            part = atoms[first : first + len(table)]
            rows = [_identified(table, part, first, options.structures)]
            for item in rows if as_table else with_scores(part, table, flow.name):
                file.add(item)
            finite = finite and table.log_likelihood.notna().all()
    if options.output:
        say(f"wrote {counted(file.count, 'score')} to {options.output}")
    if not finite:
        raise ValueError("not every structure could be scored; see the warning above")


def _score_output(options: argparse.Namespace) -> GrowingFile | GrowingTable:
    """Returns where scores go, if they can go there."""
    from ase_enf.atoms.files import require_folder
    from ase_enf.atoms.io import KEEP_INFO, GrowingFile, keeps_info

    if not options.output:
        if options.append:
            raise ValueError("--append adds to a file; name it by -o")
        return GrowingTable(None)
    if Path(options.output).suffix in TABLES:
        require_folder(options.output)
        return GrowingTable(options.output, options.append)
    file = GrowingFile(options.output, options.append, whole=_same_file(options.output, options.structures))
    if not keeps_info(options.output):
        raise ValueError(
            f"{options.output}: that format keeps no scores; use {', '.join(TABLES)} for a table or "
            f"{', '.join(KEEP_INFO)} for structures"
        )
    if options.start and not options.append and _same_file(options.output, options.structures):
        raise ValueError(f"--start {options.start}: would leave the first structures of {options.output} out of it")
    return file


def _same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _scored(flow: ENF, atoms: list[Atoms], start: int, request: dict[str, Any]) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yields the place of the first structure of every batch and the scores of it, in order."""
    from tqdm import tqdm

    from ase_enf.scoring.score import score

    total, size, said = len(atoms) - start, request["batch_size"], time.monotonic()
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="structure", dynamic_ncols=True) as bar:
        for place in range(start, len(atoms), size):
            table = score(flow, atoms[place : place + size], **request, progress=False, first=place)
            yield place, table
            bar.update(len(table))
            done = place - start + len(table)
            if bar.disable and time.monotonic() - said >= progress.QUIET_SECONDS and done < total:
                say(f"{done} of {counted(total, 'structure')}")
                said = time.monotonic()


def _identified(table: pd.DataFrame, atoms: list[Atoms], first: int, file: str) -> pd.DataFrame:
    """Returns a table with the place of each structure in its file, the file and the SMILES by the distance table."""
    from ase_enf.chem import to_smiles

    try:
        smiles = [to_smiles(item) or "" for item in atoms]
    except ImportError:  # a machine that only scores needs no RDKit
        smiles = [""] * len(atoms)
    return table.assign(index=range(first, first + len(table)), file=file, smiles=smiles)
