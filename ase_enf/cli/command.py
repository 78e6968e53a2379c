"""The command ``ase-enf``: parses, runs a verb, and says in one line what went wrong."""

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
        training = any(word == "train" or word.startswith("--completion") for word in words)
        options, unknown = _parser(training).parse_known_args(words)
        if unknown:  # by the command's own parser, which knows where its help is
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Runs a command and returns the exit code."""
    with warnings.catch_warnings(), _terminable():
        warnings.showwarning = show_warning
        try:
            options.run(options)
        except KeyboardInterrupt as end:
            terminated = isinstance(end, _Terminated)
            say("; ".join(["terminated" if terminated else "interrupted", *getattr(end, "__notes__", ())]))
            return _TERMINATED if terminated else _INTERRUPTED
        except BrokenPipeError:
            # The reader of a pipe has enough; flushing at exit would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            from ase_enf.flow.devices import out_of_memory

            full = out_of_memory(error)
            if not (full or isinstance(error, _user_errors())):
                raise
            say(f"error: {' '.join(str(error).split())}{'; lower --batch-size' if full else ''}")
            return USAGE
    return 0


def _parser(training: bool) -> argparse.ArgumentParser:
    """Builds the parser; the options of training are those of TrainConfig, which costs an import of torch."""
    parser = Parser(
        prog="ase-enf", description="Generate, score, evaluate and train E(n) equivariant flows of molecules."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a script by which Tab completes in this shell, and exit; for bash: ase-enf --completion bash > "
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
    """Prints the version; reads it only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ase_enf.flow.weights import package_version

        print(f"ase-enf {package_version()}")
        parser.exit()


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


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors that tell a user what to do; anything else is a defect and keeps its traceback."""
    from ase.calculators.calculator import CalculatorError

    from ase_enf.flow.continuous import SolverError
    from ase_enf.sampling.sampler import GenerationError
    from ase_enf.scoring.reweight import ReweightingError
    from ase_enf.training.loop import TrainingError

    return (
        ValueError,
        TypeError,
        OSError,
        CalculatorError,
        SolverError,
        GenerationError,
        ReweightingError,
        TrainingError,
    )
