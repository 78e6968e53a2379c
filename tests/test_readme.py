"""Every example of README.md runs: python blocks in one namespace, shell blocks command by command, in one folder.

A block is left out only by a comment ``<!-- not run: reason -->`` on the line before it; commands that set up an
environment are left out by ``ENVIRONMENT``. Numbers are made small by ``SMALLER``, and by nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SAMPLE = Path(__file__).parent / "data" / "qm9_sample.npz"

# What the README says → what is run, so that the test is fast.
SMALLER = [
    ("-n 100 ", "-n 3 "),
    ("-n 10 ", "-n 2 "),
    ("-n 20 ", "-n 2 "),
    ("generate(flow, 10,", "generate(flow, 2,"),
    ("ase-enf score qm9-conditional", "ase-enf score qm9-conditional --steps 4 --probes 2 --tolerance 1000"),
    (
        'score(scorer, read("molecules.extxyz", index=":"))',
        'score(scorer, read("molecules.extxyz", index=":1"), steps=4, tolerance=1e3)',
    ),
    ("annotate(scorer, atoms[0])", "annotate(scorer, atoms[0], steps=4, probes=2, tolerance=1e3)"),
    ("--epochs 2 --hidden 16", "--steps 3 --hidden 16 --validation-size 4"),
    ('{"train": 20000, "valid": 1000}', '{"train": 20, "valid": 8}, ladders=4, burn_in=20'),
    ("steps=2000, batch_size=256", "steps=2, batch_size=8, validation_size=4"),
    ("n=1000, temperature", "n=4, intervals=8, temperature"),
    ("steps=20, hidden=16", "steps=2, hidden=16, validation_size=4"),
]
# Commands that make an environment; the environment of this test is there already.
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
        if start is None and re.match(r"```\w*\s*$", line):
            start = number
        elif start is not None and line.rstrip() == "```":
            before = lines[start - 1] if start else ""
            comment = re.fullmatch(r"<!--\s*not run:\s*(.+?)\s*-->", before.strip())
            code = "\n".join(lines[start + 1 : number]) + "\n"
            found.append(Block(lines[start][3:].strip(), code, start + 2, comment and comment.group(1)))
            start = None
    assert start is None, f"line {start}: the block is not closed"
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block that do not set up an environment."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":  # the others are output
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    parts = [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [part for part in parts if part and not ENVIRONMENT.match(part)]


def smaller(code: str, table: list[tuple[str, str]]) -> str:
    """The code with the substitutions of a table."""
    for said, done in table:
        code = code.replace(said, done)
    return code


def run_all(text: str, folder: Path, table: list[tuple[str, str]]) -> list[str]:
    """Runs the blocks of a Markdown text in a folder and returns what was run."""
    namespace: dict[str, object] = {"__name__": "__readme__"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = []
    for block in blocks(text):
        if block.left_out:
            continue
        small = block._replace(code=smaller(block.code, table))
        if block.language in PYTHON:
            source = "\n" * (block.line - 1) + small.code  # so that a traceback has the line of the README
            exec(compile(source, "README.md", "exec"), namespace)
            log.append(small.code)
        elif block.language in SHELL:
            for command in commands(small):
                words = shlex.split(command)
                assert words[0] == "ase-enf", (
                    f"line {block.line}: cannot run {command!r}; mark it <!-- not run: reason -->"
                )
                words = [sys.executable, "-m", "ase_enf.cli", *words[1:]]
                done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, f"line {block.line}: {command}\n{done.stderr}"
                log.append(command)
    return log


def shipped() -> bool:
    return (ROOT / "ase_enf" / "pretrained" / "qm9.safetensors").is_file()


@pytest.mark.skipif(not README.is_file(), reason="an installed package has no README.md")
@pytest.mark.skipif(not shipped(), reason="the model qm9 is not there yet")
def test_the_readme_runs(tmp_path, monkeypatch):
    from ase.io import write

    from ase_enf.data import qm9

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASE_ENF_QM9", raising=False)
    # What a user brings along.
    write("train.extxyz", qm9.load(SAMPLE, split="train")[:32])
    write("valid.extxyz", qm9.load(SAMPLE, split="valid")[:8])
    log = run_all(README.read_text(), tmp_path, SMALLER)
    assert len(log) > 5


@pytest.mark.skipif(not README.is_file(), reason="an installed package has no README.md")
def test_the_readme_says_why_it_leaves_something_out():
    found = blocks(README.read_text())
    assert sum(block.language in PYTHON for block in found) >= 3
    assert sum(block.language in SHELL and bool(commands(block)) for block in found) >= 3
    for block in found:
        if block.language in PYTHON:
            compile(block.code, "README.md", "exec")
        assert block.left_out is None or len(block.left_out) > 5
    assert len(re.findall("not run:", README.read_text())) == sum(block.left_out is not None for block in found)


@pytest.mark.skipif(not README.is_file(), reason="an installed package has no README.md")
def test_what_the_readme_points_to_is_there():
    text = README.read_text()
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []
    models = {path.stem for path in (ROOT / "ase_enf" / "pretrained").glob("*.safetensors")}
    assert all((ROOT / "ase_enf" / "pretrained" / f"{name}.md").is_file() for name in models)
    named = re.findall(r"load\(\"([\w-]+)\"", text) + re.findall(r"`(qm9[\w-]*|dw4|lj13[\w-]*)`", text)
    assert set(named) <= models


FAKE = """
# A title

```bash
git clone https://example.org/a && cd a
python3 -m venv .venv && pip install -c constraints.txt '.[test]' && ase-enf --help
python -m pytest   # the tests
```

```python
count = 100
print(f"{count}")
```

Words between, `ase-enf fail` among them.

```console
$ ase-enf info \\
    --json nothing.safetensors || true
output that is no command
```

<!-- not run: needs a machine that nobody has -->
```python
raise AssertionError
```

```python
assert count == 3, count
with open("made.txt", "w") as file:
    file.write("by the second block")
```

```
neither python nor shell
```
"""


def test_blocks_are_found_with_language_line_and_reason():
    found = blocks(FAKE)
    assert [block.language for block in found] == ["bash", "python", "console", "python", "python", ""]
    assert [block.left_out for block in found] == [None, None, None, "needs a machine that nobody has", None, None]
    assert all(FAKE.splitlines()[block.line - 1] == block.code.splitlines()[0] for block in found)
    with pytest.raises(AssertionError, match="not closed"):
        blocks("```python\n1 + 1\n")


def test_commands_leave_out_what_sets_up_an_environment():
    found = blocks(FAKE)
    assert commands(found[0]) == ["ase-enf --help"]
    assert [shlex.split(command) for command in commands(found[2])] == [
        ["ase-enf", "info", "--json", "nothing.safetensors", "||", "true"]
    ]


def test_a_fake_readme_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = FAKE.replace("info \\\n    --json nothing.safetensors || true", "info \\\n    --json")
    log = run_all(text, tmp_path, [("count = 100", "count = 3")])
    assert [entry.split()[0] for entry in log] == ["ase-enf", "count", "ase-enf", "assert"]
    assert capsys.readouterr().out == "3\n"
    assert (tmp_path / "made.txt").read_text() == "by the second block"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\ncount = 2\nassert count == 1, count\n```\n", "^2"),
        (
            "```bash\nase-enf info no-such-model\n```\n",
            r"line 2: ase-enf info no-such-model\n\s*ase-enf: error: no-such-model",
        ),
        ("```bash\ncurl https://example.org\n```\n", "line 2: cannot run 'curl https://example.org'"),
    ],
)
def test_a_broken_readme_fails(tmp_path, monkeypatch, text, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=error):
        run_all(text, tmp_path, [])
