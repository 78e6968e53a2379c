"""E(n) equivariant normalizing flows for ``ase.Atoms``: generate, score and train.

Names are loaded when they are first used: ``import ase_enf`` imports neither torch nor rdkit.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase_enf import metrics as metrics
    from ase_enf.calculator import ENFCalculator as ENFCalculator
    from ase_enf.flow import Solver as Solver
    from ase_enf.generate import generate as generate
    from ase_enf.generate import igenerate as igenerate
    from ase_enf.model import ENF as ENF
    from ase_enf.model import ENFConfig as ENFConfig
    from ase_enf.model import load as load
    from ase_enf.reweight import reweight as reweight
    from ase_enf.score import annotate as annotate
    from ase_enf.score import score as score
    from ase_enf.training.config import TrainConfig as TrainConfig
    from ase_enf.training.loop import train as train

# Public name → module that defines it. `generate`, `reweight` and `score` are functions, though modules have those
# names.
_PUBLIC = {
    "ENF": "model",
    "ENFCalculator": "calculator",
    "ENFConfig": "model",
    "Solver": "flow",
    "TrainConfig": "training.config",
    "annotate": "score",
    "generate": "generate",
    "igenerate": "generate",
    "load": "model",
    "reweight": "reweight",
    "score": "score",
    "train": "training.loop",
}
_MODULES = ("data", "metrics", "molecules")

__all__ = [*_PUBLIC, *_MODULES]  # noqa: PLE0604 (names are strings of the table above)


class _Package(ModuleType):
    """This package, in which a function keeps its name when the module that defines it is imported.

    The import system binds every imported submodule as an attribute of its package, which would put the modules
    ``generate``, ``reweight`` and ``score`` over the functions of these names.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _PUBLIC):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"ase_enf.{_PUBLIC[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"ase_enf.{name}")
    elif name == "__version__":
        from importlib import metadata

        try:
            value = metadata.version("ase-enf")
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            value = "unknown"
    else:
        raise AttributeError(f"module 'ase_enf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
