"""Time that the public functions ``generate``, ``score`` and ``train`` take on a device.

A stage of ``benchmarks.speed.gpu`` (``--stages user``). Each call is reported separately, so that a package missing on
the machine affects only the call that needs it.
"""

from __future__ import annotations

import importlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from ase_enf.atoms.batch import to_atoms
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.chem.bonds import stability
from ase_enf.flow.model import ENF

Call = Callable[[], dict[str, Any]]
# Molecules to learn from, scored at most, drawn together.
LEARNED, SCORED, BATCH = 2000, 64, 512


def as_a_user(
    name: str, flow: ENF, data: MoleculeSet, report: Callable[..., None], n: int, seconds: float, batch_size: int
) -> None:
    """Times the three calls with a flow on its device, and reports each.

    Args:
        name: Name of the flow.
        flow: The flow, on the device.
        data: Molecules to score and to train on.
        report: Receives the results of a call.
        n: Number of molecules to draw.
        seconds: Duration of the training.
        batch_size: Batch size of the training.
    """
    molecules = atoms_of(flow, data, LEARNED)
    calls: dict[str, Call] = {
        "generate": lambda: generated(flow, n),
        "score": lambda: scored(flow, molecules[: min(n, SCORED)]),
        "train": lambda: trained(flow, molecules, seconds, batch_size),
    }
    for what, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of single molecules
                report(stage="user", name=name, what=what, device=str(flow.device), **call())
        except (ImportError, RuntimeError, ValueError, OSError) as error:
            report(stage="failed", name=name, what=what, error=str(error)[:400])


def atoms_of(flow: ENF, data: MoleculeSet, n: int) -> list[Atoms]:
    """Returns the first molecules of a set."""
    index = torch.arange(min(n, len(data.sizes)))
    batch = data.batch(index)
    return to_atoms(batch, flow.species)


def generated(flow: ENF, n: int) -> dict[str, Any]:
    """Times the default sampler and the flow itself on two equal calls; before the second, everything is compiled."""
    generate, found = importlib.import_module("ase_enf.sampling.generate").generate, {}
    for what, churn in (("stochastic", None), ("flow", 0.0)):
        for call in ("first_", ""):
            start = time.perf_counter()
            molecules = generate(flow, n, seed=0, churn=churn, batch_size=BATCH, progress=False)
            found[f"{call}{what}_molecules_per_s"] = n / (time.perf_counter() - start)
        if flow.config.knows_types:
            found[f"{what}_stable"] = float(stability(molecules).stable.mean())
    return found


def scored(flow: ENF, molecules: list[Atoms]) -> dict[str, Any]:
    """Times scores by the exact trace, and compares two of them with those on the CPU."""
    score = importlib.import_module("ase_enf.scoring.score").score
    options: dict[str, Any] = {"trace": "exact", "progress": False}
    score(flow, molecules[:2], **options)
    start = time.perf_counter()
    table = score(flow, molecules, batch_size=len(molecules), **options)
    seconds = time.perf_counter() - start
    own = ENF(flow.config, flow.provenance)
    own.load_state_dict({key: value.cpu() for key, value in flow.state_dict().items()})
    there = score(own, molecules[:2], **options)
    apart = (table.log_likelihood[:2] - there.log_likelihood).abs().max()
    return {"score_ms_a_molecule": 1000 * seconds / len(molecules), "score_off_the_cpu_nats": float(apart)}


def trained(flow: ENF, molecules: list[Atoms], seconds: float, batch_size: int) -> dict[str, Any]:
    """Trains from the weights of the flow for some seconds."""
    train = importlib.import_module("ase_enf.training.loop").train
    config_of = importlib.import_module("ase_enf.training.config").TrainConfig
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.safetensors"
        flow.save(start)
        config = config_of(
            init_from=str(start), out=str(Path(folder) / "run"), device=str(flow.device), batch_size=batch_size,
            steps=1_000_000, time_limit=seconds / 3600.0, validate_every=1_000_000, validation_size=32, log_every=50,
        )  # fmt: skip
        before = time.perf_counter()
        end = train(config, molecules, molecules[-32:], progress=False)
        took, steps = time.perf_counter() - before, end.provenance["step"]
    return {"train_steps": steps, "train_seconds": took, "train_molecules_per_s": steps * batch_size / took}
