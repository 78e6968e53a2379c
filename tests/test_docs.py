"""The code of the pages under docs/ runs: with small numbers by default, and as written under ``slow``.

Claims of a page about its results are asserted where it runs as written.
"""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import numpy as np
import pytest
from documents import PYTHON, ROOT, SHELL, blocks, commands, run_all, smaller

import ase_enf

DOCS = ROOT / "docs"
MADE = re.compile(r"reference/(modules|cards|results)/|reference/cli\.md")  # by the build
PAGES = [
    page for page in sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")) if not MADE.match(page)
]
# Pages to run; those of one row run in order, in one folder and one namespace.
RUNS = (
    ("tutorials/generate.md",),
    ("tutorials/train.md", "howto/out_of_distribution.md"),
    ("tutorials/likelihood.md",),
    ("howto/files.md",),
    ("howto/conditions.md",),
    ("howto/fragments.md",),
    ("howto/several_gpus.md",),
    ("howto/calculator.md",),
    ("howto/reweight.md",),
)
# Pages whose many commands, each tested in test_cli_*.py, run only as written.
COMMANDS_ONLY = (("howto/files.md",),)
# Code of a page → what is run by default.
SMALLER = [
    ("generate(flow, 12, formula", "generate(flow, 2, formula"),
    ("(flow, 5, fragment", "(flow, 1, steps=8, fragment"),
    ("steps=300)", "steps=30)"),
    ("n=800, seed", "n=40, seed"),
    ("n=100, seed", "n=8, seed"),
    ("dynamics.run(400)", "dynamics.run(4)"),
    ("dynamics.run(20)", "dynamics.run(2)"),
    ("--layers 3 --steps 600 --warmup 50", "--layers 1 --steps 3 --validation-size 4"),
    ('index=":20"), max_stderr=1)', 'index=":2"), max_stderr=1e3)'),
    ("n=10, seed=5), max_stderr=1)", "n=2, seed=5), max_stderr=1e3)"),
    ("--layers 2 --steps 400", "--layers 1 --steps 3 --validation-size 4"),
    ("-n 20 ", "-n 2 "),
    ("-n 5 ", "-n 1 "),
    ("score(flow, [ethanol, stretched])", "score(flow, [ethanol, stretched], max_stderr=1e3)"),
    ("score(small, waters, ", "score(small, waters, max_stderr=1e3, "),
    ("kT=0.0257)", "kT=0.0257, steps=8)"),
    ("(96, 48, 24)", "(16, 8)"),
    ('{"train": 20000, "valid": 1000}', '{"train": 20, "valid": 8}, ladders=4, burn_in=20'),
    ("steps=2000, batch_size=256", "steps=2, batch_size=8, validation_size=4"),
    ("n=1000, temperature", "n=4, intervals=8, temperature"),
]  # fmt: skip


@pytest.mark.parametrize("pages", [run for run in RUNS if run not in COMMANDS_ONLY], ids=lambda pages: pages[0])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_pages_run(pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for page in pages:
        assert run_all((DOCS / page).read_text(), tmp_path, SMALLER, page, namespace)


@pytest.mark.parametrize("pages", RUNS, ids=lambda pages: pages[0])
@pytest.mark.slow
def test_pages_run_as_written(pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for page in pages:
        run_all((DOCS / page).read_text(), tmp_path, [], page, namespace, timeout=1800)
        if page in CLAIMS:
            CLAIMS[page](namespace)


def the_best_isomer_is_butanone(names: dict) -> None:
    if "best" in names:  # with tblite
        assert next(iter(names["best"])) == "CCC(C)=O"


def the_flow_itself_is_too_hot(names: dict) -> None:
    energies = {
        name: names["energies"](names["read"](f"{name}.extxyz", index=":")) for name in ("valid", "drawn", "drawn0")
    }
    assert abs(np.median(energies["drawn"]) - np.median(energies["valid"])) < 0.1  # eV; the dynamics spread by 0.11
    assert np.median(energies["drawn0"]) > np.median(energies["valid"]) + 0.3


def hotter_frames_are_outside(names: dict) -> None:
    assert names["outside"] == 1.0  # at the last temperature, 1000 K


def a_stretched_bond_is_less_likely(names: dict) -> None:
    first, second = names["table"].log_likelihood
    assert second < first - 10


CLAIMS = {
    "tutorials/generate.md": the_best_isomer_is_butanone,
    "tutorials/train.md": the_flow_itself_is_too_hot,
    "howto/out_of_distribution.md": hotter_frames_are_outside,
    "tutorials/likelihood.md": a_stretched_bond_is_less_likely,
}


def test_every_page_with_code_runs():
    for page in PAGES:
        code = [block for block in blocks((DOCS / page).read_text()) if block.language in (*PYTHON, *SHELL)]
        left = [block for block in code if block.left_out is None]
        assert bool(left) == any(page in pages for pages in RUNS), page


def test_every_substitution_is_of_something():
    pages = "".join((DOCS / page).read_text() for pages in RUNS for page in pages)
    assert [said for said, _ in SMALLER if said not in pages] == []


def test_python_compiles_and_commands_are_known():
    for page in PAGES:
        for block in blocks((DOCS / page).read_text()):
            if block.language in PYTHON:
                compile(smaller(block.code, SMALLER), page, "exec")
            elif block.language in SHELL:
                words = " ".join(commands(block)).split()
                assert words[0] in ("ase-enf", "python", "torchrun"), page


def test_links_lead_somewhere():
    wrong = []
    for path in (*(DOCS / page for page in PAGES), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            made = "reference/" in f"{path.parent.name}/{target}"  # pages that the build makes
            if not made and not (path.parent / target).exists():
                wrong.append((path.name, target))
    assert wrong == []


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    assert set(PAGES) - {"index.md"} == {f"{name}.md" for name in listed} - {"reference/cli.md"}
    assert np.unique(listed).size == len(listed)


def docs_conf() -> ModuleType:
    """The settings of Sphinx for this documentation."""
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return conf


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference/python.md").read_text()
    assert [name for name in ase_enf.__all__ if not re.search(rf"\base_enf\.{name}\b", text)] == []


def test_every_command_has_its_help():
    pytest.importorskip("sphinx")
    conf = docs_conf()
    made = {"generate", "score", "evaluate", "train", "boltzmann", "info", "convert-en-flows"}
    assert set(conf.commands()) == made


def test_docstrings_are_shown_as_they_are_written():
    pytest.importorskip("sphinx")
    from sphinx.ext.napoleon import GoogleDocstring

    def shown(what: str, *lines: str) -> str:
        passed = list(lines)
        docs_conf().plain_text(None, what, "name", None, None, passed)
        return str(GoogleDocstring(passed, what=what, name="name", obj=None))

    assert ":type:" not in shown("property", "Whether to draw: always, or never.")
    assert "Whether to draw: always, or never." in shown("property", "Whether to draw: always, or never.")
    assert r"temperature: \K." in shown("function", "Args:", "    temperature: K.")


def test_no_word_is_taken_for_a_tag():
    made = [*(ROOT / "benchmarks/results").glob("*.md"), *(ROOT / "ase_enf/pretrained").glob("*.md")]
    tag = re.compile(r"</?[a-zA-Z][\w-]*(\s[^<>]*)?/?>")  # an average such as <U> would not be shown
    said = {}
    for path in (*(DOCS / page for page in PAGES), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *made):
        text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
        if found := tag.search(text):
            said[path.name] = found.group()
    assert said == {}


def test_benchmarks_are_called_by_their_names():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / page for page in PAGES)]
    named = {
        (path.name, name) for path in pages for name in re.findall(r"python -m (benchmarks[\w.]+)", path.read_text())
    }
    places = {name: ROOT / name.replace(".", "/") for _, name in named}
    runs = {
        name for name, path in places.items() if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    }
    assert [(page, name) for page, name in named if name not in runs] == []
