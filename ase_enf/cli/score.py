"""``ase-enf score``: computes log-likelihoods of structures and writes them batch by batch."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase_enf.cli.arguments import add_command, add_model, add_property, add_renamed, add_replacing, add_sampling
from ase_enf.cli.inplace import InPlaceFile
from ase_enf.cli.inputs import check_present, read_structures
from ase_enf.cli.outputs import TABLES, GrowingTable, check_free, same_file
from ase_enf.cli.progress import counted, kept, progress, say
from ase_enf.cli.requests import check_model, check_solver
from ase_enf.values import check_whole

if TYPE_CHECKING:
    import pandas as pd
    from ase import Atoms

    from ase_enf.atoms.io import GrowingFile
    from ase_enf.flow.model import ENF

# Options of a score that are checked together.
CHECKED = ("trace", "probes", "importance_samples", "batch_size", "max_stderr")

# Columns that identify the structure of a row.
IDENTITY = ("index", "file", "smiles")

# Structures that are scored, and saved, together. On a CPU a structure of 19 atoms takes some 20 seconds, in larger
# batches hardly less; with few together an interruption loses little and progress is seen early.
TOGETHER = {"cpu": 4, "cuda": 32}


def add_score(commands: Any) -> None:
    """Adds the command ``score``."""
    command = add_command(commands, "score", "Compute the log-likelihood of structures, in nats.", run_score)
    add_model(command)
    command.add_argument("structures", help="any file that ASE reads, or a pipe of xyz; all its images are scored")
    command.add_argument(
        "-o",
        "--output",
        default=None,
        help="file to write: .csv for a table, .extxyz or .db for annotated structures; with --overwrite, may be the "
        "file of the structures, which is replaced when all are scored; if interrupted, the same command continues",
    )
    add_replacing(command, ".csv, .extxyz, .xyz, .db, .traj")
    command.add_argument("-n", type=int, default=None, help="score n structures at most; all when left out")
    command.add_argument(
        "--start",
        type=int,
        default=0,
        metavar="K",
        help="begin with structure K, counted from 0",
    )
    command.add_argument("--trace", default="auto", help="auto, exact or hutchinson")
    command.add_argument("--probes", type=int, default=4, help="number of probes for hutchinson")
    command.add_argument(
        "--importance-samples",
        type=int,
        default=2,
        metavar="K",
        help="draws of the dequantiser, for a lower bound",
    )
    command.add_argument(
        "--max-stderr",
        type=float,
        default=0.2,
        help="refine, at most three times, where the integration error exceeds this, nats",
    )
    for old, new in (("--draws", "--importance-samples"), ("--tolerance", "--max-stderr")):
        add_renamed(command, old, new)
    add_property(command, "NAME=VALUE", "property of all structures, instead of the value in the info of each")
    add_sampling(command, "noise", batch_size=TOGETHER)


def run_score(options: argparse.Namespace) -> None:
    """Scores the structures of a file."""
    from ase_enf.sampling.properties import read_properties

    _check(options)
    properties = read_properties(options.property) or None
    in_place = _check_in_place(options)
    check_free(options, options.output)
    file = _score_output(options)
    as_table = isinstance(file, GrowingTable)
    atoms = _chosen(options, None if as_table else file.path)
    total = len(atoms) - options.start

    from ase_enf.flow.loading import load  # torch, which takes seconds to import
    from ase_enf.scoring.score import check_request, with_scores

    flow = load(options.model, device=options.device, dtype=options.dtype, backend=options.backend)
    if options.batch_size is None:
        options.batch_size = TOGETHER.get(flow.device.type, TOGETHER["cpu"])
    request = {name: getattr(options, name) for name in (*CHECKED, "seed", "solver", "steps")}
    request["properties"] = properties
    seeds = [options.seed] * len(atoms)
    check_request(flow, atoms, seeds=seeds, properties=properties, **{name: request[name] for name in CHECKED})
    start, finite = options.start, True
    if in_place:
        file = _in_place(options, request, flow.name)
        start, finite = file.start, file.finite
    with kept(file, "score", total, start, by_number=options.n is not None, again=in_place), file:
        for first, table in _scored(flow, atoms, start, request):
            part = atoms[first : first + len(table)]
            rows = [_identified(table, part, first, options.structures)]
            for item in rows if as_table else with_scores(part, table, flow.name):
                file.add(item)
            finite = finite and table.log_likelihood.notna().all()
    if options.output:
        say(f"wrote {counted(file.count, 'score')} to {options.output}")
    if not finite:
        raise ValueError("not every structure could be scored; see the warning above")


def _check(options: argparse.Namespace) -> None:
    """Raises an error for what is wrong whatever the structures are."""
    from ase_enf.scoring.options import check_options

    sized = options.batch_size is not None
    check_options(**{name: getattr(options, name) for name in CHECKED} | ({} if sized else {"batch_size": 1}))
    check_whole("seed", options.seed, 0)
    if options.n is not None:
        check_whole("n", options.n, 1)
    check_solver(options)
    check_present(options.structures)
    check_model(options)


def _chosen(options: argparse.Namespace, path: Path | None) -> list[Atoms]:
    """Returns the structures up to the last that is scored; ``path`` is where they are written, None for a table."""
    from ase_enf.atoms.io import check_structures

    atoms = read_structures(options.structures)
    if not 0 <= options.start < len(atoms):
        raise ValueError(f"--start {options.start}: {options.structures} holds {counted(len(atoms), 'structure')}")
    atoms = atoms if options.n is None else atoms[: options.start + options.n]
    if path is not None:
        check_structures(path, atoms)
    return atoms


def _score_output(options: argparse.Namespace) -> GrowingFile | GrowingTable:
    """Returns the file or table to write scores to; raises an error if it cannot hold them."""
    from ase_enf.atoms.files import require_folder
    from ase_enf.atoms.io import KEEP_INFO, GrowingFile, keeps_info
    from ase_enf.scoring.options import COLUMNS, RENAMED

    if not options.output:
        if options.append:
            raise ValueError("--append adds to a file; name it by -o")
        return GrowingTable(None)
    if Path(options.output).suffix in TABLES:
        require_folder(options.output)
        return GrowingTable(options.output, options.append, (*COLUMNS, *IDENTITY), RENAMED)
    file = GrowingFile(options.output, options.append)
    if not keeps_info(options.output):
        raise ValueError(
            f"{options.output}: that format keeps no scores; use {', '.join(TABLES)} for a table or "
            f"{', '.join(KEEP_INFO)} for structures"
        )
    return file


def _check_in_place(options: argparse.Namespace) -> bool:
    """Returns whether scores go into the file of the structures; raises ``ValueError`` if that would lose some."""
    path = options.output
    if not same_file(path, options.structures):
        return False
    if Path(path).suffix in TABLES:
        raise ValueError(f"-o {path}: a table would replace the structures that are scored; name another file")
    if not (options.overwrite or options.append):
        raise FileExistsError(
            f"-o {path}: is the file that is scored; --overwrite writes the scores into it, or name another file"
        )
    if options.append:
        raise ValueError(f"--append: {path} would hold its structures twice; use --overwrite, or another -o")
    if options.start:
        raise ValueError(f"--start {options.start}: would leave the first structures of {path} out of it; leave it out")
    if options.n is not None:
        raise ValueError(f"-n {options.n}: would leave the other structures of {path} out of it; leave it out")
    return True


def _in_place(options: argparse.Namespace, request: dict[str, Any], model: str) -> InPlaceFile:
    """Returns a file that will replace that of the structures, and reports what earlier processes have left."""
    file = InPlaceFile(options.output, _described(options, request, model))
    if file.start:
        say(f"{counted(file.start, 'score')} found in {file.path}; continues from there")
    for other in file.others:
        say(f"{other} holds scores of another command or of an earlier content of the file; it is removed at the end")
    return file


def _described(options: argparse.Namespace, request: dict[str, Any], model: str) -> str:
    """Returns, as text, everything besides the structures that scores depend on."""
    from ase_enf.flow.weights import package_version, shipped_path

    weights = (shipped_path(options.model) or Path(options.model)).read_bytes()
    named = {name: value for name, value in request.items() if name != "batch_size"}
    named |= {"version": package_version(), "model": model, "dtype": options.dtype}
    return json.dumps(named | {"weights": hashlib.sha256(weights).hexdigest()}, sort_keys=True)


def _scored(flow: ENF, atoms: list[Atoms], start: int, request: dict[str, Any]) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yields, batch by batch, the index of the first structure and the table of scores."""
    from ase_enf.bars import Bar
    from ase_enf.scoring.score import score

    size = request["batch_size"]
    with Bar(len(atoms) - start, progress("structure"), "structure") as bar:
        for place in range(start, len(atoms), size):
            table = score(flow, atoms[place : place + size], **request, progress=False, first=place)
            yield place, table
            bar.update(len(table))


def _identified(table: pd.DataFrame, atoms: list[Atoms], first: int, file: str) -> pd.DataFrame:
    """Adds to a table the index of each structure in its file, the file, and the SMILES by the distance table."""
    from ase_enf.chem import to_smiles

    try:
        smiles = [to_smiles(item) or "" for item in atoms]
    except ImportError:  # scoring does not need RDKit
        smiles = [""] * len(atoms)
    values = (range(first, first + len(table)), file, smiles)
    return table.assign(**dict(zip(IDENTITY, values, strict=True)))
