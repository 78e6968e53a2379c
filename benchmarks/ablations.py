"""What makes flow matching learn QM9 quickly: one change at a time from the defaults, short runs.

python -m benchmarks.ablations --data QM9.npz --work FOLDER [--only VARIANT ...]

Every run sees the same molecules in the same order. Finished runs are kept in the folder; a table is written from all
that are there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import ase_enf
from ase_enf import metrics
from ase_enf.data import qm9
from ase_enf.files import atomic_write
from ase_enf.train import TrainConfig, train
from benchmarks.tables import write_results

VARIANTS = {
    "defaults": {},
    "AdamW": {"optimizer": "adamw"},
    "AdamW, squared distances alone": {"optimizer": "adamw", "radial": 0},
    "squared distances alone": {"radial": 0},
    "Muon's rate / 3": {"matrix_rate": 3.3e-3},
    "Muon's rate x 3": {"matrix_rate": 3e-2},
    "times uniform": {"time_power": 1.0},
    "times u^1.6": {"time_power": 1.6},
    "types as far apart as positions spread": {"feature_spread": 1.0},
    "EMA 0.99": {"ema": 0.99},
    "twice the steps of half the batch": {"batch_size": 32, "steps": 2.0, "warmup": 2.0},
    "width 128": {"hidden": 128},
    "width 128, a third of the steps (equal time)": {"hidden": 128, "steps": 1 / 3, "warmup": 1 / 3},
    "no soft edges": {"attention": False},
}


def main() -> None:
    """Runs what is missing and writes ``results/ablations``."""
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
    for number, name in enumerate(VARIANTS):
        path = options.work / f"{number:02d}_{options.steps}_{options.seed}.json"
        if name in options.only and not path.exists():
            row = measure(name, train_atoms, valid_atoms, options)
            with atomic_write(path) as handle:
                handle.write(json.dumps(row).encode())
    rows = [
        json.loads(path.read_text()) for path in sorted(options.work.glob(f"*_{options.steps}_{options.seed}.json"))
    ]
    notes = (
        f"{options.steps} batches of 64 molecules of the train split but where said otherwise, one thread, seed "
        f"{options.seed}, one run each. NLL: 512 molecules of the validation split, one draw, one probe, the same "
        f"noise for all variants. Stability: {options.n} molecules drawn by midpoint in 32 steps. Seconds are of the "
        "machine as it was, other work beside it."
    )
    write_results(pd.DataFrame(rows), "ablations", "Ablations: short runs on QM9", notes)


def measure(name: str, train_atoms: list, valid_atoms: list, options: argparse.Namespace) -> dict[str, str | int]:
    """Trains and measures one variant."""
    changes = dict(VARIANTS[name])
    scale = {key: changes.pop(key, 1.0) for key in ("steps", "warmup")}
    config = TrainConfig(
        steps=round(options.steps * scale["steps"]),
        warmup=round(200 * scale["warmup"]),
        ema=0.998,
        validation_size=512,
        validate_every=10**9,
        seed=options.seed,
        device="cpu",
    )
    flow = train(replace(config, **changes), train_atoms, valid_atoms)
    flow.use_kernel("auto")
    report = metrics.evaluate(ase_enf.generate(flow, options.n, seed=options.seed)).set_index("metric")

    def percent(metric: str) -> str:
        return f"{100 * report.value[metric]:.1f} ± {100 * report.stderr[metric]:.1f}"

    return {
        "variant": name,
        "steps": config.steps,
        "NLL, nats": f"{flow.provenance['validation_nll']:.1f}",
        "atoms stable, %": percent("atom_stability"),
        "molecules stable, %": percent("molecule_stability"),
        "training, s": f"{3600 * flow.provenance['hours']:.0f}",
    }


if __name__ == "__main__":
    main()
