"""Every example of README.md runs; only ``SMALLER`` makes numbers smaller. See ``documents``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from documents import PYTHON, ROOT, SHELL, blocks, commands, run_all

README = ROOT / "README.md"
SAMPLE = Path(__file__).parent / "data" / "qm9_sample.npz"

# Code of the README → what is run instead, so that the test is fast.
SMALLER = [
    ("-n 100 ", "-n 3 "),
    ("-n 10 ", "-n 2 "),
    ("-n 20 ", "-n 2 "),
    ("generate(flow, 10,", "generate(flow, 2,"),
    (
        'score(scorer, read("isomers.extxyz", index=":3"))',
        'score(scorer, read("isomers.extxyz", index=":1"), steps=4, max_stderr=1e3)',
    ),
    ("--epochs 2 --hidden 16", "--steps 3 --hidden 16 --validation-size 4"),
    ("steps=20, hidden=16", "steps=2, hidden=16, validation_size=4"),
]


def shipped() -> bool:
    return (ROOT / "ase_enf" / "pretrained" / "qm9.safetensors").is_file()


@pytest.mark.skipif(not README.is_file(), reason="an installed package has no README.md")
@pytest.mark.skipif(not shipped(), reason="the model qm9 is not there yet")
def test_the_readme_runs(tmp_path, monkeypatch):
    from ase.io import write

    from ase_enf.data import qm9

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASE_ENF_QM9", raising=False)
    # Files of a user.
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
