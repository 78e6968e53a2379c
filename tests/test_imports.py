"""The house: who may import whom, what an import may do, and that every public thing says what it is."""

from __future__ import annotations

import ast
import importlib
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

# Importer → what it may import from this package. A name stands for the module and everything below it.
_CORE = {
    "base", "dequantize", "divergence", "dynamics", "flow", "geometry", "molecules", "parameterisation", "quadrature",
}  # fmt: skip
ALLOWED = {
    "__init__": set(),  # lazy: by name, when asked
    # L0
    "geometry": set(),
    "quadrature": set(),
    "threads": set(),
    "files": set(),
    # L1
    "molecules": set(),
    "nn": {"geometry", "nn", "threads"},
    "base": {"geometry"},
    "divergence": set(),
    # L2
    "parameterisation": set(),
    "dynamics": {"geometry", "nn", "parameterisation"},
    "dequantize": {"geometry", "nn"},
    "flow": {"divergence", "quadrature", "threads"},
    "dataset": {"molecules"},
    "training.optimizers": set(),
    # L3
    "model": _CORE | {"files"},
    "training.objectives": _CORE | {"model"},
    # L4; `generate` holds what every request shares
    "generate": _CORE | {"model"},
    "score": _CORE | {"model"},
    "reweight": _CORE | {"generate", "model", "score"},  # draws as the one, integrates as the other
    "calculator": _CORE | {"model"},
    "training": _CORE | {"dataset", "files", "model", "training"},
    "captured": _CORE | {"dataset", "model", "training"},
    "io": {"files"},
    "en_flows": {"files", "model"},
    # L5
    "cli": {
        "chem",
        "data",
        "en_flows",
        "files",
        "flow",
        "generate",
        "io",
        "metrics",
        "model",
        "plot",
        "score",
        "training",
    },
    "__main__": {"cli"},
    # side: never torch
    "data": {"data", "files"},
    "chem": {"chem"},
    "metrics": {"chem"},
    "plot": {"chem", "metrics"},
}
TORCH_FREE = ("__init__", "files", "io", "data", "chem", "metrics", "plot")
# Third party → who may import it at all, and whether at the top of a file.
THIRD_PARTY = {
    "torchdiffeq": ({"flow"}, True),
    "safetensors": ({"model"}, True),
    "rdkit": ({"chem"}, False),
    "openbabel": ({"chem"}, False),
    "matplotlib": ({"plot"}, False),
    "pandas": ({"score", "metrics"}, True),
}


def room(module: str) -> str:
    """The entry of ``ALLOWED`` that a module falls under."""
    return module if module in ALLOWED else module.split(".")[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Names imported anywhere in a file but under TYPE_CHECKING, and whether at its top level."""
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
    """Rooms of this package that a file imports."""
    rooms = set()
    for name, _ in imports(path):
        if name == "ase_enf" or name.startswith("ase_enf."):
            rooms.add(name.split(".")[1] if "." in name else "__init__")
    return rooms


def test_every_module_has_its_place():
    unknown = {module for module in MODULES if room(module) not in ALLOWED}
    assert not unknown, f"say in ALLOWED what {unknown} may import"
    assert not {name for name in ALLOWED if not any(room(module) == name for module in MODULES)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_downwards(module):
    assert local_imports(MODULES[module]) <= ALLOWED[room(module)]


def test_the_rule_has_no_circles():
    order: list[str] = []
    waiting = {name: below - {name} for name, below in ALLOWED.items()}
    while waiting:
        free = [name for name, below in waiting.items() if below <= set(order)]
        assert free, f"a circle among {sorted(waiting)}"
        order += free
        for name in free:
            del waiting[name]


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in TORCH_FREE])
def test_the_side_never_imports_torch(module):
    names = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    assert not names & {"torch", "torchdiffeq", "safetensors"}


def test_the_side_is_free_of_what_imports_torch():
    def reachable(name: str, seen: set[str]) -> set[str]:
        for below in ALLOWED[name] - seen:
            reachable(below, seen | {name})
            seen.add(below)
        return seen

    for name in TORCH_FREE:
        assert reachable(name, set()) <= set(TORCH_FREE)


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_parties_come_in_by_one_door(package):
    doors, at_top = THIRD_PARTY[package]
    for module, path in MODULES.items():
        for name, top in imports(path):
            if name.split(".")[0] == package:
                assert room(module) in doors, f"{module} imports {package}"
                assert at_top or not top, f"{module} imports {package} before it is used"


@pytest.mark.parametrize(
    "module", ["nn", "base", "divergence", "dynamics", "dequantize", "flow", "model", "training.objectives"]
)
def test_the_mathematics_sees_tensors_only(module):
    for name, path in MODULES.items():
        if room(name) == module:
            names = [imported for imported, _ in imports(path) if imported.split(".")[0] == "ase"]
            assert all(imported.startswith("ase.data.") for imported in names)  # constants, never Atoms


def run(code: str, *options: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
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
    names = ["ase_enf" if module == "__init__" else f"ase_enf.{module}" for module in MODULES]
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
    names = [f"ase_enf.{module}" for module in MODULES if room(module) in TORCH_FREE and module != "__init__"]
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


@pytest.mark.parametrize("name", [name for name in ase_enf.__all__ if name not in ("data", "metrics", "molecules")])
def test_public_names_are_the_things_themselves(name):
    module = importlib.import_module(f"ase_enf.{ase_enf._PUBLIC[name]}")
    assert getattr(ase_enf, name) is getattr(module, name)
    assert callable(getattr(ase_enf, name)) and name in dir(ase_enf)


@pytest.mark.parametrize("name", ["data", "metrics", "molecules"])
def test_public_modules(name):
    assert getattr(ase_enf, name) is importlib.import_module(f"ase_enf.{name}")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = ase_enf.nonsense
    assert not hasattr(ase_enf, "nonsense")


@pytest.mark.parametrize("first", ["reweight", "score", "training"])
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
    """Public functions, classes and methods of a file."""
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
