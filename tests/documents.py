"""Runs the code of Markdown pages in one folder: Python blocks in one namespace, shell blocks command by command.

A block is skipped only by a comment on the line before it: ``<!-- not run: reason -->``, or ``<!-- needs: module -->``
if that module is not installed. Commands in ``ENVIRONMENT``, which set up an environment, are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
# Commands that set up an environment, which the test already has.
ENVIRONMENT = re.compile(
    r"^(python3? -m (venv|pip|pytest)|pip install|git clone|cd |source \S*activate|\. \S*activate)\b"
)
PYTHON, SHELL = ("python", "py"), ("bash", "console", "sh", "shell")


class Block(NamedTuple):
    """One fenced block."""

    language: str
    code: str
    line: int  # of its first line of code, from 1
    left_out: str | None  # the reason


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text, in order."""
    found = []
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and re.match(r"```(\w*|\{[\w-]+\}.*)\s*$", line):
            start = number
        elif start is not None and line.rstrip() == "```":
            before = lines[start - 1] if start else ""
            code = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Block(lines[start][3:].strip(), code, start + 2, _reason(before.strip())))
            start = None
    assert start is None, f"line {start}: the block is not closed"
    return found


def _reason(comment: str) -> str | None:
    """Returns why the block after a line is skipped, or None."""
    if said := re.fullmatch(r"<!--\s*not run:\s*(.+?)\s*-->", comment):
        return said.group(1)
    needs = re.fullmatch(r"<!--\s*needs:\s*(\w+)\s*-->", comment)
    if needs and importlib.util.find_spec(needs.group(1)) is None:
        return f"{needs.group(1)} is not installed"
    return None


def commands(block: Block) -> list[str]:
    """The commands of a shell block that do not set up an environment."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":  # the others are output
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    parts = [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [part for part in parts if part and not ENVIRONMENT.match(part)]


def smaller(code: str, table: list[tuple[str, str]]) -> str:
    """Returns code with the substitutions of a table."""
    for said, done in table:
        code = code.replace(said, done)
    return code


def run_all(
    text: str,
    folder: Path,
    table: list[tuple[str, str]],
    name: str = "README.md",
    namespace: dict[str, Any] | None = None,
    timeout: float = 120,
) -> list[str]:
    """Runs the blocks of a Markdown text in a folder and returns what was run.

    Args:
        text: The page.
        folder: Where commands run; also the current folder of the test.
        table: Substitutions, see :func:`smaller`.
        name: Name of the page, for tracebacks.
        namespace: Namespace of the Python blocks, which several pages may share.
        timeout: Time limit of one command, seconds.
    """
    namespace = {} if namespace is None else namespace
    namespace.setdefault("__name__", "__page__")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = []
    for block in blocks(text):
        if block.left_out:
            continue
        small = block._replace(code=smaller(block.code, table))
        if block.language in PYTHON:
            source = "\n" * (block.line - 1) + small.code  # so that a traceback has the line of the page
            exec(compile(source, name, "exec"), namespace)
            log.append(small.code)
        elif block.language in SHELL:
            for command in commands(small):
                words = shlex.split(command)
                assert words[0] == "ase-enf", (
                    f"line {block.line}: cannot run {command!r}; mark it <!-- not run: reason -->"
                )
                words = [sys.executable, "-m", "ase_enf.cli", *words[1:]]
                done = subprocess.run(
                    words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
                )
                assert done.returncode == 0, f"line {block.line}: {command}\n{done.stderr}"
                log.append(command)
    return log
