"""``ase-enf --completion SHELL``: a script for a shell to complete commands, options, models and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import ModuleType

SHELLS = ("bash", "zsh", "tcsh")
# Arguments that are files or folders, by name or by metavar.
_FILES = {"structures", "checkpoint", "output", "reference"}
_FILE_METAVARS, _FOLDER_METAVARS = {"FILE", "PNG", "GIF"}, {"FOLDER"}
_MODELS = {"model", "init_from"}
# Shell functions that complete a model: a shipped name or a file.
_PREAMBLE = {
    "bash": '_ase_enf_models() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_ase_enf_models() {{ _alternative 'models:model:({names})' 'files:file:_files' }}",
    "tcsh": "",
}


class PrintCompletion(argparse.Action):
    """Prints the completion script and exits."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> None:
        """Prints the script for ``shell``."""
        print(script(parser, str(shell)))
        parser.exit()


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the completion script for a shell.

    Args:
        parser: Parser of ``ase-enf`` with all its commands.
        shell: One of ``SHELLS``.

    Raises:
        SystemExit: With one line on standard error, if ``shtab``, which writes the script, is not installed.
    """
    from ase_enf.flow.weights import shipped

    try:
        import shtab
    except ImportError:
        parser.error("--completion needs the package shtab; pip install ase-enf[completion]")
    for action in _actions(parser):
        _describe(action, shtab)
    return shtab.complete(parser, shell, preamble={shell: _PREAMBLE[shell].format(names=" ".join(shipped()))})


def _describe(action: argparse.Action, shtab: ModuleType) -> None:
    """Tells ``shtab`` how to complete an argument."""
    if names := getattr(action, "names", None):
        action.choices = names
    elif action.dest in _MODELS:
        action.complete = {"bash": "_ase_enf_models", "zsh": "_ase_enf_models", "tcsh": "f"}
    elif action.metavar in _FOLDER_METAVARS:
        action.complete = shtab.DIRECTORY
    elif action.dest in _FILES or action.metavar in _FILE_METAVARS:
        action.complete = shtab.FILE


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments of a parser and of its commands."""
    for action in parser._actions:  # argparse offers no public access
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
