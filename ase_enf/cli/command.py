"""The command ``ase-enf``: parses its arguments, runs a verb, and reports an error in one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ase_enf.cli.arguments import USAGE, Parser
from ase_enf.cli.boltzmann import add_boltzmann
from ase_enf.cli.completion import SHELLS, PrintCompletion
from ase_enf.cli.convert import add_convert
from ase_enf.cli.evaluate import add_evaluate
from ase_enf.cli.generate import add_generate
from ase_enf.cli.info import add_info
from ase_enf.cli.progress import say, show_warning
from ase_enf.cli.score import add_score
from ase_enf.cli.train import add_train

_INTERRUPTED, _TERMINATED = 130, 143
# Commands that several processes of torchrun may run: they divide the work, or only print.
_OF_MANY = ("generate", "train", "info")
# Exceptions beside those of Python that tell a user what to do: module and name.
_ERRORS = (
    ("ase.calculators.calculator", "CalculatorError"),
    ("ase_enf.flow.continuous", "SolverError"),
    ("ase_enf.sampling.sampler", "GenerationError"),
    ("ase_enf.scoring.reweight", "ReweightingError"),
    ("ase_enf.training.loop", "TrainingError"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words of the command line; ``sys.argv[1:]`` when None.

    Returns:
        The exit code: 0 if the whole request was met, 2 for bad input, which is reported in one line on standard error,
        130 if interrupted and 143 if terminated.

    Example:
        >>> main(["generate", "no-such-model", "-n", "3"])
        2
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _speakable():
        training = any(word == "train" or word.startswith("--completion") for word in words)
        try:
            options, unknown = _parser(training).parse_known_args(words)
        except BrokenPipeError:  # of help or a script for completion
            return _closed_pipe()
        if unknown:  # reported by the parser of the command, which refers to the command's own help
            options.parser.refuse_unknown(unknown)
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Runs a command and returns the exit code."""
    with warnings.catch_warnings(), _terminable():
        warnings.showwarning = show_warning
        try:
            return _tried(options)
        except KeyboardInterrupt as end:
            terminated = isinstance(end, _Terminated)
            say("; ".join(["terminated" if terminated else "interrupted", *_remarks(end)]))
            return _TERMINATED if terminated else _INTERRUPTED


def _tried(options: argparse.Namespace) -> int:
    """Runs a command, reports an error that ends it, and returns the exit code."""
    try:
        _check_alone(options.command)
        options.run(options)
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as error:
        full = _out_of_memory(error)
        if not (full or isinstance(error, _user_errors())):
            raise
        say(f"error: {' '.join(str(error).split())}{'; lower --batch-size' if full else ''}")
        return USAGE
    return 0


def _closed_pipe() -> int:
    """Returns the exit code where the reader of a pipe has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushing at exit would raise the error again
    return 0


def _check_alone(command: str) -> None:
    """Raises ``ValueError`` if every process of torchrun would do all the work and write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in _OF_MANY:
        raise ValueError(f"{command} is for one process; leave torchrun out, and start one command for each part")


def _remarks(end: KeyboardInterrupt) -> list[str]:
    """Returns the notes of an interruption, such as how to continue, or else the error whose clean-up it cut short."""
    errors, before = _user_errors(), end.__context__
    while before is not None and not isinstance(before, errors):
        before = before.__context__
    cut = [] if before is None else [" ".join(str(before).split())]
    return [*getattr(end, "__notes__", cut)]


def _parser(training: bool) -> argparse.ArgumentParser:
    """Builds the parser; the options of ``train`` come from ``TrainConfig``, which is imported for them only."""
    parser = Parser(
        prog="ase-enf", description="Generate, score, evaluate and train E(n) equivariant flows of molecules."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script for Tab completion in this shell and exit; for bash: ase-enf --completion bash > "
        "~/.local/share/bash-completion/completions/ase-enf",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add_generate(commands)
    add_score(commands)
    add_evaluate(commands)
    add_train(commands, training)
    add_info(commands)
    add_convert(commands)
    add_boltzmann(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version, which is read only on request."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ase_enf.flow.weights import package_version

        print(f"ase-enf {package_version()}")
        parser.exit()


@contextlib.contextmanager
def _speakable() -> Iterator[None]:
    """Prints "?" for characters that a terminal cannot encode, instead of raising an error."""
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
    """SIGTERM, which a queueing system sends at the time limit."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM end the work as Control-C does, so that partial files are removed and a training run is saved."""

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the clean-up
        raise _Terminated

    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread can handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _out_of_memory(error: Exception) -> bool:
    """Whether an error means too little memory."""
    if "torch" not in sys.modules:  # its import takes seconds, and nothing that needs much memory goes without it
        return isinstance(error, MemoryError)
    from ase_enf.flow.devices import out_of_memory

    return out_of_memory(error)


def _user_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that tell a user what to do; any other is a defect and keeps its traceback.

    An exception of a module that has not been imported cannot have been raised.
    """
    loaded = [(sys.modules[module], name) for module, name in _ERRORS if module in sys.modules]
    return (ValueError, TypeError, OSError, *(getattr(module, name) for module, name in loaded))
