"""How the pages of this folder become a website: ``sphinx-build -W docs site``.

Beside the pages that are written, some are made at every build from what they describe: the modules of the package, the
results of the benchmarks, the cards of the models, and the help of the commands. Git ignores those.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

import ase_enf.cli

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGE = ROOT / "ase_enf"
# Folders of Markdown outside of docs/ → where under reference/ their pages are made.
COPIED = {ROOT / "benchmarks" / "results": "results", PACKAGE / "pretrained": "cards"}
AUTOMODULE = """# {name}

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :show-inheritance:
   :ignore-module-all:
```
"""

project = "ase-enf"
author = "the ase-enf developers"
release = version = metadata.version("ase-enf")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"ase-enf {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
suppress_warnings = ["ref.python"]  # a class has two names, that of its module and the one at top level
autodoc_mock_imports = ["triton"]  # comes with torch for CUDA only
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def make_pages(_: Sphinx) -> None:
    """Writes the pages of modules, results, cards and commands."""
    modules = _emptied("modules")
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] != "__main__" and name != "ase_enf":  # the names of the package have a page that is written
            (modules / f"{name}.md").write_text(AUTOMODULE.format(name=name))
    for source, name in COPIED.items():
        folder = _emptied(name)
        for path in [*source.glob("*.md"), *source.glob("*.png")]:
            (folder / path.name).write_bytes(path.read_bytes())
    lines = ["# Commands", "", "What `ase-enf COMMAND --help` prints.", ""]
    for command in commands():
        lines += [f"## ase-enf {command}", "", "```text", _help(command), "```", ""]
    (HERE / "reference" / "cli.md").write_text("\n".join(lines))


def _emptied(name: str) -> Path:
    """Returns a folder of made pages without those of the last build."""
    folder = HERE / "reference" / name
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


def commands() -> list[str]:
    """Returns the names of the commands that ``ase-enf --help`` lists."""
    return re.findall(r"^ {4}([a-z][a-z-]*)(?: |$)", _help(), flags=re.MULTILINE)


def _help(*command: str) -> str:
    """Returns the help of a command, or that which lists them all, a hundred columns wide."""
    os.environ["COLUMNS"] = "100"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        ase_enf.cli.main([*command, "--help"])
    return said.getvalue().rstrip()


def link_inside(_: Sphinx, page: str, text: list[str]) -> None:
    """Lets links to files outside of docs/, as the repository needs them, lead to the pages made of those files."""
    up = "../" * page.count("/")
    for source, name in COPIED.items():
        outside = source.relative_to(ROOT).as_posix()
        text[0] = re.sub(rf"\]\((\.\./)+{outside}/", f"]({up}reference/{name}/", text[0])


def plain_text(_: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keeps words from being read as markup, before the sections of a docstring are.

    The first line of a property, such as "How samples are drawn: by the flow", has no type before its colon, and an
    argument that is explained by its unit, "temperature: K.", is no list with the item K.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment, which takes the place of the line with a type
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"^(\s+\w+: )([A-Za-z]\.)$", r"\1\\\2", line)


def plain_bars(_: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escapes | in docstrings, where it stands for absolute values and conditions, not for substitutions."""
    for number, line in enumerate(lines):
        parts = line.split("``")  # every other one is code, where it stands for itself
        lines[number] = "``".join(part if k % 2 else part.replace("|", r"\|") for k, part in enumerate(parts))


def setup(app: Sphinx) -> None:
    """Connects the above."""
    app.connect("builder-inited", make_pages)
    app.connect("source-read", link_inside)
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon, which has 500
    app.connect("autodoc-process-docstring", plain_bars)
