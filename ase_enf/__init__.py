"""E(n) equivariant normalizing flows for ``ase.Atoms``: generate, score and train.

Names are loaded on first use: ``import ase_enf`` imports neither torch nor RDKit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase_enf import data as data
    from ase_enf import metrics as metrics
    from ase_enf.atoms import batch as molecules  # noqa: F401 (the public name of that module)
    from ase_enf.ensemble.study import boltzmann as boltzmann
    from ase_enf.flow.config import ENFConfig as ENFConfig
    from ase_enf.flow.continuous import Solver as Solver
    from ase_enf.flow.loading import load as load
    from ase_enf.flow.model import ENF as ENF
    from ase_enf.flow.stochastic import StochasticSampler as StochasticSampler
    from ase_enf.sampling.generate import generate as generate
    from ase_enf.sampling.generate import igenerate as igenerate
    from ase_enf.scoring.calculator import ENFCalculator as ENFCalculator
    from ase_enf.scoring.reweight import reweight as reweight
    from ase_enf.scoring.score import annotate as annotate
    from ase_enf.scoring.score import score as score
    from ase_enf.training.config import TrainConfig as TrainConfig
    from ase_enf.training.loop import train as train

# Public name → module that defines it.
_PUBLIC = {
    "ENF": "flow.model",
    "ENFCalculator": "scoring.calculator",
    "ENFConfig": "flow.config",
    "Solver": "flow.continuous",
    "StochasticSampler": "flow.stochastic",
    "TrainConfig": "training.config",
    "annotate": "scoring.score",
    "boltzmann": "ensemble.study",
    "generate": "sampling.generate",
    "igenerate": "sampling.generate",
    "load": "flow.loading",
    "reweight": "scoring.reweight",
    "score": "scoring.score",
    "train": "training.loop",
}
# Public name → module it stands for.
_MODULES = {"data": "data", "metrics": "metrics", "molecules": "atoms.batch"}

__all__ = [*_PUBLIC, *_MODULES]  # noqa: PLE0604 (names are strings of the tables above)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"ase_enf.{_PUBLIC[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"ase_enf.{_MODULES[name]}")
    elif name == "__version__":
        from importlib import metadata

        try:
            value = metadata.version("ase-enf")
        except metadata.PackageNotFoundError:  # an uninstalled source tree
            value = "unknown"
    else:
        raise AttributeError(f"module 'ase_enf' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
