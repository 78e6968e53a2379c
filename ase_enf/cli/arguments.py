"""What the commands' parsers share: a parser that complains in one line, and arguments of several commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

USAGE = 2
"""Exit code for bad input."""


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2."""
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False  # 0 is a default like another
        return action.help if silent else super()._get_help_string(action)


def add_command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Returns the parser of a new command.

    Args:
        commands: Where it is added, see ``ArgumentParser.add_subparsers``.
        name: Of the command.
        text: What it does, in one sentence.
        run: What it does with its options.
    """
    command = commands.add_parser(name, help=text, description=text, formatter_class=_Formatter)
    command.set_defaults(run=run, parser=command)
    return command


def add_model(command: argparse.ArgumentParser) -> None:
    """Adds the model, and where and how it computes."""
    command.add_argument("model", help="a shipped name such as qm9, or a path to .safetensors")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    command.add_argument("--dtype", default="float32", help="float32 or float64")
    command.add_argument(
        "--backend",
        default="auto",
        help="of an EGNN's pairs: compiled (a C++ kernel, on a CPU), triton (on a GPU), torch, or auto",
    )
    add_renamed(command, "--kernel", "--backend")


def add_renamed(command: Any, old: str, new: str) -> None:
    """Adds the name of an option in earlier versions, which says what it is called today."""
    command.add_argument(old, action=_Renamed, const=new, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error(f"{self.option_strings[0]} is now called {self.const}")


def add_sampling(command: argparse.ArgumentParser, what: str, batch_size: int) -> None:
    """Adds seed, solver and batch size."""
    command.add_argument("--seed", type=int, default=0, help=f"seed of the {what}")
    command.add_argument(
        "--solver", default=None, help="dopri5, rk4, midpoint, euler; a fixed-step default when left out"
    )
    command.add_argument("--steps", type=int, default=None, help="fixed steps")
    command.add_argument("--batch-size", type=int, default=batch_size, help="structures computed together")


def add_property(command: argparse.ArgumentParser, form: str, text: str) -> None:
    """Adds --property, once for each condition."""
    command.add_argument(
        "--property", action="append", default=None, metavar=form.split()[0], help=f"{form}: {text}; once for each"
    )


def add_replacing(command: argparse.ArgumentParser, append: str | None = None) -> None:
    """Adds --overwrite and, for the endings named by ``append``, --append."""
    command.add_argument("--overwrite", action="store_true", help="replace files that are there")
    if append:
        command.add_argument("--append", action="store_true", help=f"add to a file that is there ({append})")


def flag(name: str) -> str:
    """Returns the option that sets a field.

    Example:
        >>> flag("learning_rate")
        '--learning-rate'
    """
    return f"--{name.replace('_', '-')}"
