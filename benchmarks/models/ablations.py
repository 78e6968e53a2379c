"""Ablations of flow matching on QM9: short runs that each differ from the defaults in one setting.

python -m benchmarks.models.ablations --data QM9.npz --work FOLDER [--only VARIANT ...]

Runs with the same batch size see the same molecules in the same order. Finished runs are saved in the folder under a
name that depends on all their settings, and the table includes all that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import ase_enf
from ase_enf import metrics
from ase_enf.atoms.files import atomic_write
from ase_enf.data import qm9
from ase_enf.flow.model import SAMPLING_SOLVER
from ase_enf.training.config import TrainConfig
from ase_enf.training.loop import train
from benchmarks.common import percent
from benchmarks.report import write_results

VALIDATED = 128
VARIANTS = {
    "defaults": {},
    "AdamW": {"optimizer": "adamw"},
    "AdamW, squared distances alone": {"optimizer": "adamw", "radial": 0},
    "squared distances alone": {"radial": 0},
    "Muon's rate / 3": {"muon_learning_rate": 3.3e-3},
    "Muon's rate x 3": {"muon_learning_rate": 3e-2},
    "times uniform": {"time_power": 1.0},
    "times u^1.6": {"time_power": 1.6},
    "types as far apart as positions spread": {"type_scale": 1.0},
    "no weight decay of Muon": {"muon_weight_decay": 0.0},
    "weight decay of Muon x 3": {"muon_weight_decay": 0.3},
    "EMA 0.99": {"ema_decay": 0.99},
    "twice the steps of half the batch": {"batch_size": 32, "steps": 2.0, "warmup": 2.0},
    "width 128": {"hidden": 128},
    "width 128, a third of the steps (equal time)": {"hidden": 128, "steps": 1 / 3, "warmup": 1 / 3},
    "no soft edges": {"attention": False},
}


def main() -> None:
    """Runs the missing variants and writes ``results/ablations``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="QM9 in any form")
    parser.add_argument("--work", type=Path, required=True, help="folder for finished runs")
    parser.add_argument("--steps", type=int, default=800, help="batches of 64 molecules (default: 800)")
    parser.add_argument("-n", type=int, default=1024, help="molecules to draw (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), help="some of the variants"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the kernel computes the pairs, and runs side by side keep their speed
    options.work.mkdir(parents=True, exist_ok=True)
    train_atoms, valid_atoms = (qm9.load(options.data, split=split) for split in ("train", "valid"))
    rows = []
    for name, changes in VARIANTS.items():
        made_with = (name, changes, options.steps, options.n, options.seed, VALIDATED)
        path = options.work / f"{hashlib.sha256(repr(made_with).encode()).hexdigest()[:16]}.json"
        if name in options.only and not path.exists():
            row = measure(name, train_atoms, valid_atoms, options)
            with atomic_write(path) as handle:
                handle.write(json.dumps(row).encode())
        if path.exists():
            rows.append(json.loads(path.read_text()))
    notes = (
        f"{options.steps} batches of 64 molecules of the train split but where said otherwise, one thread, seed "
        f"{options.seed}, one run each. NLL: {VALIDATED} molecules of the validation split, the bound with one draw "
        f"and one probe each, error over molecules. Stability: {options.n} molecules drawn by the flow "
        f"itself ({SAMPLING_SOLVER}). Seconds are of the machine as it was, other work beside it."
    )
    write_results(pd.DataFrame(rows), "ablations", "Ablations: short runs on QM9", notes)


def measure(name: str, train_atoms: list, valid_atoms: list, options: argparse.Namespace) -> dict[str, str | int]:
    """Trains and measures one variant."""
    changes = dict(VARIANTS[name])
    scale = {key: changes.pop(key, 1.0) for key in ("steps", "warmup")}
    config = TrainConfig(
        parameterisation="velocity",
        times="power",
        time_power=1.3,
        steps=round(options.steps * scale["steps"]),
        warmup=round(200 * scale["warmup"]),
        ema_decay=0.998,
        validation_size=1,  # the likelihood is measured below
        validate_every=10**9,
        seed=options.seed,
        device="cpu",
    )
    start = time.perf_counter()
    flow = train(replace(config, **changes), train_atoms, valid_atoms)
    seconds = time.perf_counter() - start
    flow.use_backend("auto")
    how = {"trace": "hutchinson", "probes": 1, "importance_samples": 1, "max_stderr": math.inf, "batch_size": 64}
    nll = -ase_enf.score(flow, valid_atoms[:VALIDATED], seed=range(VALIDATED), **how).log_likelihood
    report = metrics.evaluate(ase_enf.generate(flow, options.n, seed=options.seed, solver=SAMPLING_SOLVER))
    return {
        "variant": name,
        "steps": config.steps,
        "NLL, nats": f"{nll.mean():.1f} ± {nll.sem():.1f}",
        "atoms stable, %": percent(report, "atom_stability", 1),
        "molecules stable, %": percent(report, "molecule_stability", 1),
        "training, s": f"{seconds:.0f}",
    }


if __name__ == "__main__":
    main()
