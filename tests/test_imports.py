"""The structure of the package: allowed imports, no side effects on import, and documentation of all public names."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ase_enf

PACKAGE = Path(ase_enf.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# The layers of the package, from the lowest. A subpackage imports from itself and from lower layers; there are no
# cycles, within a subpackage either. A name stands for a module and everything in it.
FLOORS = (
    {"__init__"},  # lazy: its names are imported on first use
    {"geometry", "threads", "folders", "renamed", "values", "bars"},
    {"atoms", "chem", "nn"},
    {"flow", "data", "metrics"},
    {"sampling", "training", "plot"},
    {"scoring"},
    {"ensemble"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Modules that run without torch.
TORCH_FREE = (
    "__init__", "atoms.extxyz", "atoms.files", "atoms.formula", "atoms.io", "bars", "chem", "data", "metrics", "plot",
    "values",
)  # fmt: skip
# Modules that use tensors and constants of the elements, but no structures.
TENSORS_ONLY = ("geometry", "nn", "flow", "training.objectives")
# Third-party package → modules that may import it, and whether at the top of a file.
THIRD_PARTY = {
    "torchdiffeq": (("flow.continuous",), True),
    "safetensors": (("flow.weights",), True),
    "rdkit": (("chem",), False),
    "openbabel": (("chem",), False),
    "matplotlib": (("plot",), False),
    "pandas": (("scoring", "metrics", "ensemble"), True),
}


# Code outside the package that uses it.
BESIDE = {
    ".".join(path.relative_to(folder.parent).with_suffix("").parts): path
    for folder in (Path(__file__).parent, Path(__file__).parents[1] / "benchmarks")
    for path in sorted(folder.rglob("*.py"))
}
MAX_LINES = 450
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public despite their names


def room(module: str) -> str:
    """Returns the subpackage of a module."""
    return module.split(".")[0]


def within(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of these names or below one."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Yields names imported anywhere in a file except under TYPE_CHECKING, and whether at its top level."""
    tree = ast.parse(path.read_text())
    found = []

    def walk(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.extend((f"{node.module}.{alias.name}", top) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    walk(tree, True)
    return found


def local_imports(path: Path) -> set[str]:
    """Returns the modules of this package that a file imports."""
    modules = set()
    for name, _ in imports(path):
        if name == "ase_enf" or name.startswith("ase_enf."):
            words = name.split(".")[1:]
            while words and ".".join(words) not in MODULES:
                words.pop()
            modules.add(".".join(words) or "__init__")
    return modules


IMPORTS = {module: local_imports(path) - {module} for module, path in MODULES.items()}


def reachable(module: str) -> set[str]:
    """Returns the modules that a module imports, directly or indirectly."""
    seen, waiting = set(), [module]
    while waiting:
        below = IMPORTS[waiting.pop()] - seen
        seen |= below
        waiting += below
    return seen


def test_every_module_has_its_place():
    assert {room(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_downwards(module):
    upward = {
        below for below in IMPORTS[module] if room(below) != room(module) and LEVEL[room(below)] >= LEVEL[room(module)]
    }
    assert not upward


@pytest.mark.parametrize("module", MODULES)
def test_the_rule_has_no_circles(module):
    assert module not in reachable(module)


@pytest.mark.parametrize("module", [module for module in MODULES if within(module, TORCH_FREE)])
def test_the_side_never_imports_torch(module):
    for below in {module} | reachable(module):
        names = {name.split(".")[0] for name, _ in imports(MODULES[below])}
        assert not names & {"torch", "torchdiffeq", "safetensors"}, below


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_parties_come_in_by_one_door(package):
    doors, at_top = THIRD_PARTY[package]
    for module, path in MODULES.items():
        for name, top in imports(path):
            if name.split(".")[0] == package:
                assert within(module, doors), f"{module} imports {package}"
                assert at_top or not top, f"{module} imports {package} before it is used"


@pytest.mark.parametrize("module", [module for module in MODULES if within(module, TENSORS_ONLY)])
def test_the_mathematics_sees_tensors_only(module):
    names = [name for name, _ in imports(MODULES[module]) if name.split(".")[0] == "ase"]
    assert all(name.startswith("ase.data.") for name in names)  # constants, never Atoms


def test_no_module_bears_the_name_of_what_its_room_offers():
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            package = importlib.import_module("ase_enf" if module == "__init__" else f"ase_enf.{module}")
            for entry in path.parent.iterdir():
                if (entry.suffix == ".py" and entry != path) or (entry / "__init__.py").exists():
                    found = getattr(package, entry.stem, None)
                    assert found is None or inspect.ismodule(found), f"{module}.{entry.stem}"


def is_private(name: object) -> bool:
    """Whether a value is the private name of a module."""
    return isinstance(name, str) and name[:1] == "_" and name[1:2] not in ("", "_") and name not in NAMED_TUPLE


def private_definitions(tree: ast.AST) -> set[str]:
    """Returns the private names that a file defines: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def private_uses(tree: ast.AST) -> set[str]:
    """Returns private names that a file imports, reads as attributes, or passes as text to ``setattr`` and the like."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("attr"):
            texts = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
            found |= {text.split(".")[-1] for text in texts if isinstance(text, str)}
    return {name for name in found if is_private(name)}


TREES = {module: ast.parse(path.read_text()) for module, path in (MODULES | BESIDE).items()}
PRIVATE = set().union(*map(private_definitions, TREES.values()))


def prying(tree: ast.AST) -> set[str]:
    """Returns the private names of other files of this repository that a file uses."""
    return (private_uses(tree) & PRIVATE) - private_definitions(tree)


def test_no_file_is_a_program():
    longer = {module for module, path in MODULES.items() if len(path.read_text().splitlines()) > MAX_LINES}
    assert not longer


def test_private_names_stay_at_home():
    found = {module: names for module, tree in TREES.items() if (names := prying(tree))}
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "from ase_enf.plot.canvas import _put",
        "from ase_enf import plot\nplot.canvas._put()",
        "monkeypatch.setattr('ase_enf.plot.canvas._put', None)",
        "monkeypatch.setattr(canvas, '_put', None)",
        "getattr(canvas, '_put')",
    ],
)
def test_prying_is_noticed(code):
    assert prying(ast.parse(code)) == {"_put"}
    assert not prying(ast.parse(code.replace("_put", "_replace")))


def run(code: str, *options: str, **environment: str) -> str:
    """Runs code in a fresh interpreter and returns its standard output."""
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env=env | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_does_nothing():
    code = """
import os, random, socket, sys
before, state = dict(os.environ), random.getstate()
events, watching = [], True
def watch(event, args):
    if watching and event.split(".")[0] in ("open", "os", "socket", "subprocess", "shutil", "tempfile"):
        events.append((event, args))
sys.addaudithook(watch)
import ase_enf
dir(ase_enf), ase_enf.__all__
watching = False
touched = [e for e in events if not (e[0] in ("open", "os.listdir", "os.scandir"))]
opened = [e[1][0] for e in events if e[0] == "open"]
assert not touched, touched
assert all(str(name).endswith((".py", ".pyc")) for name in opened), opened
assert dict(os.environ) == before and random.getstate() == state
heavy = {"torch", "rdkit", "ase", "numpy", "pandas", "scipy", "openbabel"} & set(sys.modules)
assert not heavy, heavy
assert sorted(m for m in sys.modules if m.startswith("ase_enf")) == ["ase_enf"]
"""
    run(code, "-W", "error")


def test_importing_every_module_changes_no_setting():
    # Needs a package that comes with torch for CUDA only, and is loaded on a GPU only.
    here = [module for module in MODULES if not module.startswith("nn.backends.triton_")]
    names = ["ase_enf" if module == "__init__" else f"ase_enf.{module}" for module in here]
    code = f"""
import importlib, os, warnings
import ase, ase.io, numpy as np, pandas, safetensors.torch, scipy, torch, torchdiffeq, torch.distributed, tqdm
from torch.optim import swa_utils
def settings():
    return (dict(os.environ), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state().sum().item(),
            np.random.get_state()[1].tolist(), np.geterr(), warnings.filters[:])
before = settings()
for name in {names!r}:
    importlib.import_module(name)
assert settings() == before
"""
    run(code)


def test_the_torch_free_side_runs_without_torch():
    names = [f"ase_enf.{module}" for module in MODULES if within(module, TORCH_FREE) and module != "__init__"]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
assert not {{"torch", "rdkit", "openbabel"}} & set(sys.modules)
"""
    run(code)


def test_training_works_without_rdkit_and_openbabel(tmp_path):
    sample = Path(__file__).parent / "data" / "qm9_sample.npz"
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rdkit", "openbabel"):
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Blocker())
import ase_enf
from ase_enf.data import qm9
atoms = qm9.load({str(sample)!r}, split="train", n_atoms=12)
small = dict(hidden=4, layers=1, batch_size=2, validation_size=1)
config = ase_enf.TrainConfig(steps=1, **small, out={str(tmp_path / "run")!r})
model = ase_enf.train(config, atoms, atoms)
ase_enf.load({str(tmp_path / "run" / "model.safetensors")!r})
assert len(ase_enf.generate(model, 1, steps=2)) == 1
assert not [name for name in sys.modules if name.split(".")[0] in ("rdkit", "openbabel")]
"""
    run(code)


def declared() -> dict[str, tuple[str, str]]:
    """Returns public names → module and name there, as the package declares them to type checkers."""
    block = next(node for node in TREES["__init__"].body if isinstance(node, ast.If))
    return {
        alias.asname: (node.module, alias.name)
        for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip


def test_type_checkers_see_every_public_name():
    assert set(declared()) == set(ase_enf.__all__)


@pytest.mark.parametrize("name", [name for name in ase_enf.__all__ if name not in ("data", "metrics", "molecules")])
def test_public_names_are_the_things_themselves(name):
    module, original = declared()[name]
    assert getattr(ase_enf, name) is getattr(importlib.import_module(module), original)
    assert callable(getattr(ase_enf, name)) and name in dir(ase_enf)


@pytest.mark.parametrize("name", ["data", "metrics", "molecules"])
def test_public_modules(name):
    assert getattr(ase_enf, name) is importlib.import_module(".".join(declared()[name]))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ase_enf.nonsense
    assert not hasattr(ase_enf, "nonsense")


@pytest.mark.parametrize("first", ["scoring.reweight", "scoring.score", "sampling.generate", "training.loop"])
def test_functions_keep_their_names_whatever_is_imported_first(first):
    code = f"""
import ase_enf.{first}
import ase_enf, inspect
from ase_enf import generate, reweight, score, train
for function in (generate, reweight, score, train, ase_enf.generate, ase_enf.reweight, ase_enf.score, ase_enf.train):
    assert inspect.isfunction(function), function
from ase_enf.{first} import __name__ as module
assert module == "ase_enf.{first}"
"""
    run(code)


def test_a_verb_of_a_room_is_a_function_and_no_module_has_its_name():
    code = """
import ase_enf.training.loop, ase_enf, inspect
assert inspect.isfunction(ase_enf.train) and inspect.ismodule(ase_enf.training)
assert ase_enf.train is ase_enf.training.loop.train
"""
    run(code)
    assert not {module for module in MODULES if module.split(".")[0] == "train"}


def public_definitions(path: Path) -> list[tuple[str, ast.AST]]:
    """Returns the public functions, classes and methods of a file."""
    found = []

    def walk(body: list[ast.stmt], prefix: str, inside_class: bool) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            magic = inside_class and node.name in ("__init__", "__call__")
            if node.name.startswith("_") and not magic:
                continue
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.", True)

    walk(ast.parse(path.read_text()).body, "", False)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented_and_annotated(module):
    path = MODULES[module]
    assert ast.get_docstring(ast.parse(path.read_text())), f"{module} has no docstring"
    for name, node in public_definitions(path):
        assert name.endswith("__init__") or ast.get_docstring(node), f"{module}.{name} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        assert node.returns is not None, f"{module}.{name} has no return annotation"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{module}.{name}: {bare} have no annotation"
