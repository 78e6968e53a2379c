"""The command ``ase-enf``: parse, call, write."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import pandas as pd
    from ase import Atoms

    from ase_enf.atoms.io import GrowingFile
    from ase_enf.flow.model import ENF
    from ase_enf.training.config import TrainConfig

DATA_FILE = "data.json"  # beside a run: where its structures come from, so that --resume finds them
TABLES = (".csv", ".json", ".md")
PICTURES = (".png", ".pdf", ".svg")
SMILES = (".smi", ".smiles", ".txt")
_SOURCES = {"train": str, "valid": str, "split": bool, "n_atoms": int | None}  # what DATA_FILE holds
_QUIET = 60.0  # seconds after which long work says how far it is where there is no terminal
_USAGE, _INTERRUPTED, _TERMINATED = 2, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 when the whole request was met; 2 with one line on standard error for bad input; 130 when interrupted, 143 when
    terminated.

    Args:
        arguments: Words of the command line, ``sys.argv[1:]`` when None.

    Example:
        >>> main(["generate", "no-such-model", "-n", "3"])
        2
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _speakable():
        options, unknown = _parser(training="train" in words).parse_known_args(words)
        if unknown:  # by the command's own parser, which knows where its help is
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Runs a command and returns the exit code."""
    with warnings.catch_warnings(), _terminable():
        warnings.showwarning = _show_warning
        try:
            options.run(options)
        except KeyboardInterrupt as end:
            terminated = isinstance(end, _Terminated)
            _say("; ".join(["terminated" if terminated else "interrupted", *getattr(end, "__notes__", ())]))
            return _TERMINATED if terminated else _INTERRUPTED
        except BrokenPipeError:
            # The reader of a pipe has enough; flushing at exit would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            full = _out_of_memory(error)
            if not (full or isinstance(error, _user_errors())):
                raise
            _say(f"error: {' '.join(str(error).split())}{'; lower --batch-size' if full else ''}")
            return _USAGE
    return 0


@contextlib.contextmanager
def _speakable() -> Iterator[None]:
    """Lets a terminal that knows ASCII alone show "?" for what it has no letter for, instead of an error."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a queue sends it at its time limit."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the work as Control-C does, so that what is half written is removed and a run is saved."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise _Terminated

    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:  # signals are for the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _out_of_memory(error: Exception) -> bool:
    """Whether memory was not enough; torch has a class of its own for that on a GPU, and only words on a CPU."""
    from torch import OutOfMemoryError

    return isinstance(error, MemoryError | OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors that tell a user what to do; anything else is a defect and keeps its traceback."""
    from ase.calculators.calculator import CalculatorError

    from ase_enf.flow.continuous import SolverError
    from ase_enf.sampling.generate import GenerationError
    from ase_enf.training.loop import TrainingError

    return (
        ValueError,
        TypeError,
        OSError,
        CalculatorError,
        SolverError,
        GenerationError,
        TrainingError,
    )


def _say(text: str) -> None:
    print(f"ase-enf: {text}", file=sys.stderr)


def _number(count: int, noun: str) -> str:
    """Returns a count with its noun.

    Example:
        >>> _number(1, "molecule"), _number(2, "molecule")
        ('1 molecule', '2 molecules')
    """
    return f"{count} {noun}" + "s" * (count != 1)


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"warning: {' '.join(str(message).split())}")


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2."""
        self.exit(_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser(training: bool) -> argparse.ArgumentParser:
    """Builds the parser; the options of training are those of TrainConfig, which costs an import of torch."""
    parser = _Parser(
        prog="ase-enf", description="Generate, score, evaluate and train E(n) equivariant flows of molecules."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands)
    _add_score(commands)
    _add_evaluate(commands)
    _add_train(commands, training)
    _add_info(commands)
    _add_convert(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version; reads it only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ase_enf.flow.weights import package_version

        print(f"ase-enf {package_version()}")
        parser.exit()


def _command(commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(run=run, parser=command)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a shipped name such as qm9, or a path to .safetensors")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    command.add_argument("--dtype", default="float32", help="float32 or float64")
    command.add_argument("--kernel", default="auto", help="on a CPU: fused (compiled), plain (torch), auto")


def _add_sampling(command: argparse.ArgumentParser, what: str, batch_size: int) -> None:
    command.add_argument("--seed", type=int, default=0, help=f"seed of the {what}")
    command.add_argument(
        "--solver", default=None, help="dopri5, rk4, midpoint, euler; a fixed-step default when left out"
    )
    command.add_argument("--steps", type=int, default=None, help="fixed steps")
    command.add_argument("--batch-size", type=int, default=batch_size, help="structures computed together")


def _add_property(command: argparse.ArgumentParser, form: str, text: str) -> None:
    command.add_argument(
        "--property", action="append", default=None, metavar=form.split()[0], help=f"{form}: {text}; once for each"
    )


def _add_replacing(command: argparse.ArgumentParser, append: str | None = None) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace files that are there")
    if append:
        command.add_argument("--append", action="store_true", help=f"add to a file that is there ({append})")


def _add_generate(commands: Any) -> None:
    command = _command(commands, "generate", "Draw molecules from a flow and write them.", _generate)
    _add_model(command)
    command.add_argument("-n", type=int, default=100, help="number of molecules")
    command.add_argument(
        "--start",
        type=int,
        default=0,
        metavar="K",
        help="the molecules are those from K to K + n - 1 of the seed; a request can be met in parts",
    )
    command.add_argument("-o", "--output", default="molecules.extxyz", help=".extxyz, .db or any ending ASE writes")
    _add_replacing(command, ".extxyz, .xyz, .db, .traj")
    command.add_argument("--n-atoms", type=int, default=None, help="atoms of every molecule")
    command.add_argument("--formula", default=None, help="composition such as C7H10O2, for models with given types")
    command.add_argument("--smiles", default=None, help="molecular graph such as CCO, for models of graphs")
    _add_property(command, "NAME=VALUE or NAME=LOW:HIGH", "what the molecules are to have, for models with conditions")
    command.add_argument("--closed-shell", action="store_true", help="draw odd numbers of electrons again")
    command.add_argument("--gallery", default=None, metavar="PNG", help="picture of the first 24 molecules")
    _add_sampling(command, "molecules", batch_size=64)
    command.add_argument(
        "--churn",
        type=float,
        default=None,
        help="how much noise is renewed on the way, for more stable molecules: 1 is the reverse diffusion, 0 draws from "
        "the flow itself, whose density score gives, and is all that is possible for a flow that flow matching did "
        "not train; when left out, 50 for molecules",
    )


def _add_score(commands: Any) -> None:
    command = _command(commands, "score", "Log-likelihood of structures, nats.", _score)
    _add_model(command)
    command.add_argument("structures", help="any file ASE reads; all its images are scored")
    command.add_argument(
        "-o", "--output", default=None, help=".csv for the table, .extxyz or .db for annotated structures"
    )
    _add_replacing(command, ".csv, .extxyz, .xyz, .db, .traj")
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
    _add_property(command, "NAME=VALUE", "of all structures, instead of what each has in its info")
    _add_sampling(command, "noise", batch_size=32)


def _add_evaluate(commands: Any) -> None:
    command = _command(commands, "evaluate", "Stability, validity, uniqueness and novelty of structures.", _evaluate)
    command.add_argument("structures", help="any file ASE reads")
    command.add_argument(
        "--reference", default=None, help="qm9, a file of SMILES (.smi, .txt), or a file of structures"
    )
    command.add_argument("-o", "--output", default=None, help=".json, .csv or .md")
    _add_replacing(command)
    command.add_argument("--gallery", default=None, metavar="PNG", help="picture of the first 24 structures")
    command.add_argument("--histogram", default=None, metavar="PNG", help="distances against the reference's")


def _add_train(commands: Any, complete: bool) -> None:
    command = _command(commands, "train", "Train a flow on structures of any elements.", _train)
    command.add_argument(
        "--resume",
        default=None,
        metavar="FOLDER",
        help="go on with the run in this folder; with --cool-down and --out, let a branch of it cool down there",
    )
    command.add_argument("--data", default=None, help="training structures: any file ASE reads, or QM9 in any form")
    command.add_argument("--valid", default=None, help="validation structures")
    command.add_argument("--qm9-split", action="store_true", help="take the published train and valid splits of --data")
    command.add_argument("--n-atoms", type=int, default=None, help="only structures of this many atoms")
    if not complete:
        return
    for name, kind, default, text in _train_fields():
        # What is absent was not typed: a run that is resumed must know.
        about = {"default": argparse.SUPPRESS, "help": f"{text} (default: {default})"}
        if kind is bool:
            command.add_argument(_flag(name), action=argparse.BooleanOptionalAction, **about)
        elif name == "condition":  # once for each
            command.add_argument(_flag(name), action="append", **about)
        else:
            command.add_argument(_flag(name), type=kind, **about)
    for old, new in _renamed_fields().items():
        command.add_argument(_flag(old), action=_Renamed, const=_flag(new), nargs="?", help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    """Says what an option of earlier versions is called today."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is now called {self.const}")


def _renamed_fields() -> dict[str, str]:
    from ase_enf.training.config import RENAMED

    return RENAMED


def _train_fields() -> list[tuple[str, type, Any, str]]:
    """Returns name, type, default and description of every field of TrainConfig."""
    from ase_enf.training.config import TrainConfig, field_help

    hints, texts = typing.get_type_hints(TrainConfig), field_help()
    return [
        (field.name, _plain_type(hints[field.name]), field.default, texts[field.name].replace("%", "%%"))
        for field in dataclasses.fields(TrainConfig)
    ]


def _plain_type(hint: Any) -> type:
    """Returns T of ``T | None``."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _add_info(commands: Any) -> None:
    command = _command(commands, "info", "What a model is and how it was trained.", _info)
    command.add_argument(
        "model", nargs="?", default=None, help="a shipped name or a path; a line on each shipped model when left out"
    )
    command.add_argument("--json", action="store_true", help="everything, as JSON")


def _add_convert(commands: Any) -> None:
    text = "Convert the QM9 weights published with the paper (en_flows) to this package's format."
    command = _command(commands, "convert-en-flows", text, _convert)
    command.add_argument("checkpoint", help=".npz of the arrays, or the torch checkpoint; read without pickle")
    command.add_argument("-o", "--output", required=True, help="the .safetensors to write")
    _add_replacing(command)


def _convert(options: argparse.Namespace) -> None:
    from ase_enf.atoms.files import require_folder
    from ase_enf.flow.en_flows import convert_en_flows

    if require_folder(options.output).suffix != ".safetensors":
        raise ValueError(f"{options.output}: weights are written as .safetensors; choose that ending")
    _check_free(options, options.output)
    convert_en_flows(options.checkpoint).save(options.output)
    _say(f"wrote {options.output}")


def _check_free(options: argparse.Namespace, *paths: str | None) -> None:
    """Raises ``FileExistsError`` for files that are there, unless they may be replaced or continued.

    The first path is what ``--append`` continues.
    """
    append = getattr(options, "append", None)
    if append and options.overwrite:
        raise ValueError("--append adds to a file and --overwrite replaces it; choose one")
    for path in paths:
        if path and Path(path).exists() and not (options.overwrite or (append and path == paths[0])):
            more = ", --append adds to it" if append is not None and path == paths[0] else ""
            raise FileExistsError(f"{path}: is there already; --overwrite replaces it{more}, or name another file")


def _generate(options: argparse.Namespace) -> None:
    from ase_enf.atoms.io import GrowingFile, check_append, check_output
    from ase_enf.flow.loading import load
    from ase_enf.sampling.generate import check_counts, igenerate
    from ase_enf.sampling.properties import read_properties

    check_output(options.output, options.n)
    if options.append:
        check_append(options.output)
    _check_picture(options.gallery)
    check_counts(options.n, options.seed, options.batch_size, options.start)
    _check_free(options, options.output, options.gallery)
    flow = load(options.model, device=_own_device(options.device), dtype=options.dtype)
    flow.use_kernel(options.kernel)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bounds = [options.n * k // world for k in range(world + 1)]
    start, count = bounds[rank], bounds[rank + 1] - bounds[rank]
    request = {
        "seed": options.seed,
        "n_atoms": options.n_atoms,
        "formula": options.formula,
        "solver": options.solver,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "churn": options.churn,
        "closed_shell": options.closed_shell,
        "properties": read_properties(options.property),
        "smiles": options.smiles,
    }
    stream = igenerate(flow, count, start=options.start + start, **request) if count else iter(())
    if rank:
        for _ in _gathered(stream, rank, world):
            pass
        return
    shown: list[Atoms] = []
    file = GrowingFile(options.output, options.append)
    with _kept(file, "molecule", options.n, options.start, by_number=True), file:
        for atoms in _minutely(_gathered(stream, rank, world), options.n, "molecule"):
            file.add(atoms)
            if len(shown) < 24:
                shown.append(atoms)
    if options.gallery:
        _draw_gallery(shown, options.gallery)
    _say(f"wrote {_number(file.count, 'molecule')} to {options.output}")


def _own_device(device: str) -> str:
    """Returns the GPU of this process among those that torchrun started on this machine."""
    import torch

    if device not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _gathered(stream: typing.Iterator[Atoms], rank: int, world: int) -> typing.Iterator[Atoms]:
    """Yields the molecules of all processes of torchrun, in order, on the first one."""
    if world == 1:
        yield from stream
        return
    import torch.distributed as dist

    # The first process waits for the last one, however long that takes.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        parts: list[list[Atoms]] | None = [[] for _ in range(world)] if rank == 0 else None
        dist.gather_object(list(stream), parts)
        for part in parts or []:
            yield from part
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _kept(file: GrowingFile | _GrowingTable, noun: str, total: int, start: int, by_number: bool) -> Iterator[None]:
    """Says what is kept of work that ends early, and how to go on."""
    try:
        yield
    except BaseException:
        if file.count:
            there = f"{file.count} of {_number(total, noun)} {'is' if file.count == 1 else 'are'} in {file.path}"
            rest = f" -n {total - file.count}" if by_number else ""
            output = "--append" if file.can_append else "-o ANOTHER"
            _say(f"{there}; go on with --start {start + file.count}{rest} {output}")
        raise


def _minutely(stream: Iterator[Atoms], total: int, noun: str) -> Iterator[Atoms]:
    """Yields what comes, and says once a minute how far that is where no terminal shows a bar."""
    said = time.monotonic()
    for count, item in enumerate(stream, start=1):
        yield item
        if not sys.stderr.isatty() and time.monotonic() - said >= _QUIET and count < total:
            _say(f"{count} of {_number(total, noun)}")
            said = time.monotonic()


class _GrowingTable:
    """A table in a file, or on standard output, that keeps what was added to it, whatever ends the work.

    CSV is written part by part; JSON and Markdown when the file is closed.
    """

    def __init__(self, path: str | None, append: bool = False) -> None:
        self.path = path
        self.count = 0  # rows that are in it
        self._append = append
        self._parts: list[pd.DataFrame] = []
        self.can_append = bool(path) and path.endswith(".csv")
        if append and not self.can_append:
            raise ValueError(f"{path}: nothing can be added to such a table; use .csv")

    def __enter__(self) -> _GrowingTable:
        return self

    def add(self, part: pd.DataFrame) -> None:
        """Adds rows."""
        if self.path is None:
            print(part.to_csv(index=False, header=not self.count), end="", flush=True)
        elif not self.can_append:
            self._parts.append(part)
            return
        else:
            going_on = bool(self.count) or (self._append and Path(self.path).exists())
            with open(self.path, "a" if going_on else "w", encoding="utf-8", newline="") as file:
                file.write(part.to_csv(index=False, header=not going_on))
        self.count += len(part)

    def __exit__(self, *_: object) -> None:
        if self._parts:
            _write_table(self.path, *self._parts)
            self.count = sum(map(len, self._parts))


def _score(options: argparse.Namespace) -> None:
    from ase_enf.atoms.io import check_structures
    from ase_enf.flow.loading import load
    from ase_enf.sampling.properties import read_properties
    from ase_enf.scoring.score import check_request, with_scores

    _check_free(options, options.output)
    file = _score_output(options)
    atoms = _read(options.structures)
    total = len(atoms) - options.start
    if not (options.start >= 0 and total > 0):
        raise ValueError(f"--start {options.start}: {options.structures} holds {_number(len(atoms), 'structure')}")
    as_table = isinstance(file, _GrowingTable)
    if not as_table:
        check_structures(file.path, atoms)
    flow = load(options.model, device=options.device, dtype=options.dtype)
    flow.use_kernel(options.kernel)
    checked = ("trace", "probes", "draws", "batch_size", "tolerance")
    request = {name: getattr(options, name) for name in (*checked, "seed", "solver", "steps")}
    properties = read_properties(options.property) or None
    request["properties"] = properties
    seeds = [options.seed] * len(atoms)
    check_request(flow, atoms, seeds=seeds, properties=properties, **{name: request[name] for name in checked})
    finite = True
    with _kept(file, "score", total, options.start, by_number=False), file:
        for first, table in _scored(flow, atoms, options.start, request):
            part = atoms[first : first + len(table)]
            rows = [_identified(table, part, first, options.structures)]
            for item in rows if as_table else with_scores(part, table, flow.name):
                file.add(item)
            finite = finite and table.log_likelihood.notna().all()
    if options.output:
        _say(f"wrote {_number(file.count, 'score')} to {options.output}")
    if not finite:
        raise ValueError("not every structure could be scored; see the warning above")


def _score_output(options: argparse.Namespace) -> GrowingFile | _GrowingTable:
    """Returns where scores go, if they can go there."""
    from ase_enf.atoms.files import require_folder
    from ase_enf.atoms.io import KEEP_INFO, GrowingFile, keeps_info

    if not options.output:
        if options.append:
            raise ValueError("--append adds to a file; name it by -o")
        return _GrowingTable(None)
    if Path(options.output).suffix in TABLES:
        require_folder(options.output)
        return _GrowingTable(options.output, options.append)
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
            if bar.disable and time.monotonic() - said >= _QUIET and done < total:
                _say(f"{done} of {_number(total, 'structure')}")
                said = time.monotonic()


def _identified(table: pd.DataFrame, atoms: list[Atoms], first: int, file: str) -> pd.DataFrame:
    """Returns a table with the place of each structure in its file, the file and the SMILES by the distance table."""
    from ase_enf.chem import to_smiles

    try:
        smiles = [to_smiles(item) or "" for item in atoms]
    except ImportError:  # a machine that only scores needs no RDKit
        smiles = [""] * len(atoms)
    return table.assign(index=range(first, first + len(table)), file=file, smiles=smiles)


def _evaluate(options: argparse.Namespace) -> None:
    import numpy as np

    from ase_enf import metrics, plot
    from ase_enf.atoms.files import require_folder

    if options.output:
        require_folder(options.output)
    for picture in (options.gallery, options.histogram):
        _check_picture(picture)
    if options.output and Path(options.output).suffix not in TABLES:
        raise ValueError(f"{options.output}: a report is written as {', '.join(TABLES)}; choose one of these endings")
    if options.histogram and not options.reference:
        raise ValueError("--histogram compares with a reference; add --reference qm9 or a file of structures")
    _check_free(options, options.output, options.gallery, options.histogram)
    atoms = _read(options.structures)
    reference = None if options.reference is None else metrics.as_reference(_reference(options.reference))
    seen = metrics.survey(atoms)
    table = metrics.evaluate(seen, reference)
    if options.output:
        _write_table(options.output, table)
    if options.histogram:
        plot.distance_histogram(seen, reference, options.histogram)
    if options.gallery:
        _draw_gallery([item for item in atoms if np.isfinite(item.positions).all()][:24], options.gallery)
    for row in table.itertuples():
        print(f"{row.metric:34s} {row.value:8.4f} ± {row.stderr:.4f}  of {row.denominator:<9d} {row.definition}")
    print(", ".join(f"{key} {value}" for key, value in table.attrs.items()))


def _reference(name: str) -> Any:
    """Returns what ``metrics.evaluate`` takes: a shipped name, SMILES, or structures."""
    from ase_enf.atoms.files import check_source
    from ase_enf.metrics import REFERENCES

    if name in REFERENCES:
        return name
    path = Path(name).expanduser()
    if not path.exists():
        shipped = [known for known in REFERENCES if known == name.lower()]
        other = f"name {', '.join(REFERENCES)}, a file of SMILES ({', '.join(SMILES)}) or one of structures"
        raise FileNotFoundError(
            f"--reference {name!r}: no such file; {f'write {shipped[0]} for the shipped one' if shipped else other}"
        )
    check_source(path)
    return _read_smiles(path) if path.suffix in SMILES else _read(name)


def _read_smiles(path: Path) -> list[str]:
    """Reads the first word of every line."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file of SMILES or of structures")
    try:
        smiles = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not smiles:
        raise ValueError(f"{path}: holds no SMILES; write one at the start of each line")
    return smiles


def _train(options: argparse.Namespace) -> None:
    from ase_enf.atoms.files import make_folder
    from ase_enf.training.folder import check_new_run, check_ours
    from ase_enf.training.loop import train

    typed = {name: value for name, *_ in _train_fields() if (value := getattr(options, name, None)) is not None}
    if "condition" in typed:
        typed["condition"] = ",".join(typed["condition"])
    config, sources = _resumed(options, typed) if options.resume else _new(options, typed)
    folder = Path(config.out)
    _check_apart(sources, folder)
    trunk = options.resume if "out" in typed else None  # a branch
    anew = bool(trunk) or not options.resume
    if anew:
        check_new_run(folder)
        check_ours(folder / DATA_FILE, lambda text: _is_sources(json.loads(text)))
    train_atoms, valid_atoms = (
        _read(sources[name], name if sources["split"] else None, sources["n_atoms"]) for name in ("train", "valid")
    )
    described = Path(sources["train"]).name + (" (published train split)" if sources["split"] else "")
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process and anew:
        _write_json(make_folder(folder) / DATA_FILE, sources)
    model = train(config, train_atoms, valid_atoms, resume=not anew, source=described, branch_of=trunk)
    if main_process:
        if not anew:  # only now is it known that data that moved are those of the run
            _write_json(folder / DATA_FILE, sources)
        _report_run(model, folder)


def _new(options: argparse.Namespace, typed: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Returns settings and data of a run that begins."""
    from ase_enf.flow.loading import load
    from ase_enf.training.config import TrainConfig, model_fields

    sources = _new_sources(options)
    if "out" not in typed:
        raise ValueError("--out is missing; name the folder of the run")
    config = TrainConfig(**typed)
    own = model_fields(load(config.init_from, device="cpu").config) if config.init_from else {}
    for name, value in own.items():
        if typed.get(name, value) != value:
            raise ValueError(
                f"{_flag(name)}={typed[name]}: the model of --init-from {config.init_from} has {value}; leave it out"
            )
    return config, sources


def _new_sources(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what DATA_FILE is to hold, as it was typed."""
    if not options.data or not (options.valid or options.qm9_split):
        raise ValueError("training needs --data and --valid (or --qm9-split), and --out; or --resume FOLDER")
    if options.qm9_split and options.valid:
        raise ValueError("--qm9-split takes both sets from --data; leave --valid out")
    paths = {"train": options.data, "valid": options.valid or options.data}
    return _resolved(paths) | {"split": options.qm9_split, "n_atoms": options.n_atoms}


def _resolved(paths: dict[str, str]) -> dict[str, str]:
    return {name: str(Path(path).expanduser().resolve()) for name, path in paths.items()}


def _resumed(options: argparse.Namespace, typed: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Returns settings and data of a run that goes on."""
    from ase_enf.training.config import RESUME_MAY_CHANGE
    from ase_enf.training.folder import CONFIG_FILE

    folder = Path(options.resume)
    if "out" in typed and "cool_down" not in typed:
        raise ValueError("--resume names the folder of the run; leave --out out, or add --cool-down for a branch")
    anew = bool(options.data) and not (folder / DATA_FILE).exists()  # as for a run that Python began
    if (options.qm9_split or options.n_atoms) and not anew:
        raise ValueError("--resume takes its part of the data from its folder; leave --qm9-split and --n-atoms out")
    saved = _saved_config(folder / CONFIG_FILE)
    may_change = set(RESUME_MAY_CHANGE) - {"init_from"}
    fixed = [name for name in typed if name not in may_change and typed[name] != getattr(saved, name)]
    if fixed:
        raise ValueError(f"{_flag(fixed[0])} cannot change when a run is resumed; leave it out")
    if saved.schedule == "constant" and "cool_down" in typed and "out" not in typed:
        raise ValueError("--cool-down of a run with a constant rate makes a branch; add --out, a folder for it")
    config = dataclasses.replace(saved, **({"out": str(folder)} | typed))
    sources = _new_sources(options) if anew else _moved(_saved_sources(folder / DATA_FILE), options)
    for name in ("train", "valid"):
        if not Path(sources[name]).exists():
            raise FileNotFoundError(f"{sources[name]}: no such file; say by --data and --valid where the data are now")
    return config, sources


def _moved(sources: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns where the data of a run are, some of them at another place."""
    if sources["split"] and options.valid:
        raise ValueError("this run takes both sets from --data; leave --valid out")
    paths = {"train": options.data, "valid": options.data if sources["split"] else options.valid}
    return sources | _resolved({name: path for name, path in paths.items() if path})


def _saved_config(path: Path) -> TrainConfig:
    from ase_enf.flow.weights import package_version
    from ase_enf.training.config import TrainConfig, migrated

    saved = _read_json(path)
    if not (isinstance(saved, dict) and saved):
        raise ValueError(f"{path}: holds no settings of a run; start the run again in another folder")
    saved = migrated(saved)
    if unknown := sorted(saved.keys() - {field.name for field in dataclasses.fields(TrainConfig)}):
        raise ValueError(
            f"{path}: {unknown[0]!r} is no setting of this ase-enf {package_version()}; take it out, or upgrade"
        )
    try:
        return TrainConfig(**saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _saved_sources(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; say by --data and --valid where the data of the run are")
    sources = _read_json(path)
    if not _is_sources(sources):
        raise ValueError(f"{path}: names no data of a run; remove it, and say by --data and --valid where they are")
    return sources


def _is_sources(content: Any) -> bool:
    """Whether a JSON value is what a run writes to DATA_FILE."""
    return (
        isinstance(content, dict)
        and content.keys() == _SOURCES.keys()
        and all(isinstance(content[name], kind) for name, kind in _SOURCES.items())
    )


def _check_apart(sources: dict[str, Any], folder: Path) -> None:
    """Raises ``ValueError`` for data that are a file which the run writes."""
    from ase_enf.training.folder import RUN_FILES

    for name in (*RUN_FILES, DATA_FILE):
        if str((folder / name).resolve()) in (sources["train"], sources["valid"]):
            raise ValueError(f"{folder / name}: the run would replace its own data; choose another folder for it")


def _report_run(model: ENF, folder: Path) -> None:
    """Says how far a run has come, and where its weights are."""
    from ase_enf.flow.weights import read_header
    from ase_enf.training.folder import BEST_FILE, LAST_FILE

    best, last = model.provenance, read_header(folder / LAST_FILE)["provenance"]
    total = last["total_steps"]
    stopped = total is None or last["step"] < total
    if stopped:
        done = f"step {last['step']}" + (f" of {total}" if total else "")
        _say(f"stopped by the time limit at {done}; go on with ase-enf train --resume {folder}")
    if best["validation_nll"] is not None:
        found = f"{best['validation_nll']:.3f} nats at step {best['step']}"
        _say(f"validation NLL {found}; weights in {folder}/{BEST_FILE}")
    elif stopped and not (folder / BEST_FILE).exists():
        _say(f"no validation yet; weights of now in {folder}/{LAST_FILE}")
    else:
        _say(f"the validation NLL is not finite; lower --learning-rate; weights of now in {folder}/{LAST_FILE}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _info(options: argparse.Namespace) -> None:
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
    """Returns one line on a shipped model: its name, elements, sizes, and what its card says in short."""
    from ase_enf.flow.weights import PRETRAINED

    config, card = header["config"], PRETRAINED / f"{name}.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    said = (line.removeprefix("In short: ").removesuffix(".") for line in text.splitlines() if "In short: " in line)
    purpose = next(said, f"features {config['features']}")
    sizes = sorted({int(size) for size in config["sizes"]})
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    return f"{name:16s} {' '.join(config['species']) or 'any elements'}, {span} atoms: {purpose}"


def _described(header: dict[str, Any]) -> str:
    """Returns what a weights file says of itself, a line each."""
    config = header["config"]
    sizes = sorted(int(size) for size in config["sizes"])
    lines = [
        f"E(n) equivariant normalizing flow, written by ase-enf {header['package']}",
        f"features       {config['features']}",
        f"species        {' '.join(config['species']) or 'any (positions only)'}",
        f"sizes          {min(sizes)} to {max(sizes)} atoms, {sum(config['sizes'].values())} molecules",
        f"network        {config['network']}, {config['layers']} layers x {config['hidden']}",
        f"position scale {config['position_scale']:.4f} Å",
    ]
    said = {key: value for key, value in header["provenance"].items() if not isinstance(value, dict)}
    return "\n".join([*lines, *(f"{key:14s} {value}" for key, value in said.items())])


def _read(path: str, split: str | None = None, n_atoms: int | None = None) -> list[Atoms]:
    """Reads structures from anything that ASE or the QM9 reader knows."""
    from ase_enf.data import qm9

    if not (path and Path(path).expanduser().exists()):
        raise FileNotFoundError(f"{path or repr(path)}: no such file; name one that holds structures")
    atoms = qm9.load(path, split=split, n_atoms=n_atoms)
    if not atoms:
        raise ValueError(f"{path}: holds no structure" + (f" of {n_atoms} atoms" if n_atoms else ""))
    return atoms


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --resume takes the folder that an earlier --out named")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); start the run again in another folder") from None


def _write_json(path: Path, content: Any) -> None:
    from ase_enf.atoms.files import atomic_write

    with atomic_write(path) as handle:
        handle.write(f"{json.dumps(content, indent=2)}\n".encode())


def _write_table(output: str, *parts: pd.DataFrame) -> None:
    """Writes the rows of one table or of parts of it in the format of the file's ending."""
    from ase_enf.atoms.files import atomic_write

    suffix, columns = Path(output).suffix, parts[0].columns
    if suffix == ".csv":
        text = "".join(part.to_csv(index=False, header=part is parts[0]) for part in parts)
    elif suffix == ".json":
        rows = [row for part in parts for row in json.loads(part.to_json(orient="records", double_precision=15))]
        text = json.dumps({"rows": rows, **parts[0].attrs}, indent=2) + "\n"
    else:
        rows = [row for part in parts for row in part.itertuples(index=False)]
        text = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        text += "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    with atomic_write(output) as handle:
        handle.write(text.encode())


def _check_picture(path: str | None) -> None:
    """Raises before any work if a picture could not be written there."""
    from ase_enf.atoms.files import require_folder

    if path and require_folder(path).suffix not in PICTURES:
        raise ValueError(f"{path}: a picture is written as {', '.join(PICTURES)}; choose one of these endings")


def _draw_gallery(atoms: Sequence[Atoms], path: str) -> None:
    from ase_enf.plot import gallery

    gallery(atoms, path)
    _say(f"drew {_number(len(atoms), 'molecule')} in {path}")


if __name__ == "__main__":
    sys.exit(main())
