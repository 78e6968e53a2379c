"""What the commands share: a parser with one-line errors, and the arguments that several commands take."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

USAGE = 2
"""Exit code for bad input."""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints one line on standard error and exits with 2."""
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Reports unknown arguments, and the option that the first of them resembles, if any."""
        known = re.findall(r"--[\w-]+", self.format_help())
        close = difflib.get_close_matches(words[0].partition("=")[0], known, n=1, cutoff=0.8)
        self.error(f"unrecognized arguments: {' '.join(words)}" + "".join(f"; did you mean {name}?" for name in close))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False  # 0 == False, but 0 is a default to show
        return action.help if silent else super()._get_help_string(action)


def add_command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser.

    Args:
        commands: Where to add it, the result of ``ArgumentParser.add_subparsers``.
        name: Name of the command.
        text: What the command does, in one sentence.
        run: Runs the command with its parsed options.
    """
    command = commands.add_parser(name, help=text, description=text, formatter_class=_Formatter)
    command.set_defaults(run=run, parser=command)
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """Adds the model, its device, floating type and backend."""
    command.add_argument("model", help="name of a shipped model, such as qm9, or path of a .safetensors file")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    command.add_argument("--dtype", default="float32", help="float32 or float64")
    command.add_argument(
        "--backend",
        default="auto",
        help="code for the pairs of an EGNN: compiled (C++, on a CPU), triton (on a GPU), torch, or auto",
    )
    add_renamed(command, "--kernel", "--backend")


def add_renamed(command: Any, old: str, new: str) -> None:
    """Adds an option under its name in earlier versions; using it is an error that gives the current name.

    Args:
        command: Parser of the command, or a group of its arguments.
        old: Earlier name.
        new: Current name.
    """
    command.add_argument(old, action=_Renamed, const=new, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is now called {self.const}")


def add_sampling(command: argparse.ArgumentParser, what: str, batch_size: int | Mapping[str, int]) -> None:
    """Adds seed, solver and batch size.

    Args:
        command: Parser of the command.
        what: What the seed determines, for the help.
        batch_size: Default batch size; or the defaults for "cpu" and "cuda", which the command chooses from.
    """
    command.add_argument("--seed", type=int, default=0, help=f"seed of the {what}")
    command.add_argument(
        "--solver", default=None, help="dopri5, rk4, midpoint or euler; by default fixed steps that suit the model"
    )
    command.add_argument("--steps", type=int, default=None, help="number of fixed steps")
    size, text = batch_size, "number of structures computed together"
    if not isinstance(batch_size, int):
        size, text = None, f"{text} (default: {batch_size['cpu']} on a CPU, {batch_size['cuda']} on a GPU)"
    command.add_argument("--batch-size", type=int, default=size, help=text)


def add_property(command: argparse.ArgumentParser, form: str, text: str) -> None:
    """Adds --property, which can be repeated.

    Args:
        command: Parser of the command.
        form: Form of the argument, such as ``NAME=VALUE``.
        text: What the property does, for the help.
    """
    command.add_argument(
        "--property", action="append", default=None, metavar=form.split()[0], help=f"{form}: {text}; can be repeated"
    )


def add_replacing(command: argparse.ArgumentParser, append: str | None = None) -> None:
    """Adds --overwrite and, for the file endings in ``append``, --append."""
    command.add_argument("--overwrite", action="store_true", help="replace existing files")
    if append:
        command.add_argument("--append", action="store_true", help=f"add to an existing file ({append})")


def flag(name: str) -> str:
    """Returns the command-line option that sets a field of ``TrainConfig``.

    Example:
        >>> flag("learning_rate")
        '--learning-rate'
    """
    return f"--{name.replace('_', '-')}"
