"""How many structures a flow needs: the same training of a conditional model on increasing numbers of QM9 molecules.

python -m benchmarks.models.data_size --data QM9.npz --work FOLDER [--only 300 1000]

All runs take the same number of steps, so that fewer structures are seen more often. A run is judged by its averaged
weights of the best validation NLL, as ``ase-enf train`` keeps them; the NLL at its end is given as well. Runs and
results are saved in the folder, so that a second run continues.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ase import Atoms

import ase_enf
from ase_enf import metrics
from ase_enf.atoms.files import atomic_write
from ase_enf.chem.convert import to_smiles
from ase_enf.data import qm9
from ase_enf.flow.model import ENF
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import LAST_FILE, STATE_FILE
from ase_enf.training.loop import train
from benchmarks.common import percent
from benchmarks.report import write_results

SIZES = (300, 1000, 10_000, 100_000)
BATCH = 64
# Validation molecules: the first choose the weights, the next ones measure.
CHOOSING, MEASURED = 64, 128
VALIDATIONS = 8


def main() -> None:
    """Trains and measures what is missing and writes ``results/data_size``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="QM9 in any form")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and figures")
    parser.add_argument("--steps", type=int, default=3200, help=f"batches of {BATCH} molecules (default: 3200)")
    parser.add_argument("-n", type=int, default=500, help="molecules to draw (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of choice, training and samples (default: 0)")
    parser.add_argument("--only", nargs="*", type=int, choices=SIZES, default=SIZES, help="some of the sizes")
    parser.add_argument("--no-table", action="store_true", help="do the work and write no table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known, valid = (qm9.load(options.data, split=split) for split in ("train", "valid"))
    order = np.random.default_rng(options.seed).permutation(len(known))
    rows = [row_of(size, [known[k] for k in order[:size]], valid, options) for size in sorted(options.only)]
    if not options.no_table:
        write_results(pd.DataFrame(rows), "data_size", "How many structures a flow needs", notes(options))


def row_of(size: int, structures: list[Atoms], valid: list[Atoms], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a size, from the folder if it is finished."""
    folder = options.work / f"{size}_x{options.steps}_seed{options.seed}"
    path = folder / f"row_n{options.n}.json"
    if not path.exists():
        best = trained(folder / "run", structures, valid, options)
        row = measured(best, ase_enf.load(folder / "run" / LAST_FILE, "cpu"), structures, valid, options)
        with atomic_write(path) as handle:
            handle.write(json.dumps(row).encode())
    passes = options.steps / math.ceil(size / BATCH)  # the last batch of a pass may be smaller
    return {"structures": size, "passes over them": f"{passes:.0f}"} | json.loads(path.read_text())


def trained(out: Path, structures: list[Atoms], valid: list[Atoms], options: argparse.Namespace) -> ENF:
    """Returns the averaged weights with the best NLL of the first validation molecules."""
    config = TrainConfig(
        features="given",
        steps=options.steps,
        batch_size=BATCH,
        ema_decay=0.998,
        validate_every=max(1, options.steps // VALIDATIONS),
        validation_size=CHOOSING,
        seed=options.seed,
        out=str(out),
        device="cpu",
    )
    return train(config, structures, valid[:CHOOSING], resume=(out / STATE_FILE).exists())


def measured(
    best: ENF, last: ENF, structures: list[Atoms], valid: list[Atoms], options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the results of a run."""
    known = [smiles for smiles in map(to_smiles, structures) if smiles is not None]
    best.use_backend("auto")
    drawn = ase_enf.generate(best, options.n, seed=options.seed, progress=False)
    plain = ase_enf.generate(best, options.n, seed=options.seed, solver=best.ode_solver, progress=False)
    report = metrics.evaluate(drawn, reference=known)
    return {
        "NLL, nats": nll(best, valid, options.seed),
        "NLL at the end, nats": nll(last, valid, options.seed),
        "best after, steps": best.provenance["step"],
        "atoms stable, %": percent(report, "atom_stability", 1),
        "molecules stable, %": percent(report, "molecule_stability", 1),
        "stable by the flow itself, %": percent(metrics.evaluate(plain), "molecule_stability", 1),
        "stable ones that are new, %": percent(report, "novelty_stable", 1),
        "training, minutes": f"{60 * best.provenance['hours']:.0f}",
    }


def nll(flow: ENF, valid: list[Atoms], seed: int) -> str:
    """Returns the mean NLL, with its error over molecules, of validation molecules not used to choose weights."""
    flow.use_backend("auto")
    chosen = valid[CHOOSING : CHOOSING + MEASURED]
    seeds = range(MEASURED * seed, MEASURED * (seed + 1))
    how = {"trace": "hutchinson", "probes": 1, "max_stderr": math.inf, "progress": False}
    scores = -ase_enf.score(flow, chosen, seed=seeds, **how).log_likelihood
    return f"{scores.mean():.1f} ± {scores.sem():.1f}"


def notes(options: argparse.Namespace) -> str:
    """Returns what a reader must know."""
    return (
        f"Flow of positions given the elements, default network and recipe, {options.steps} batches of up to {BATCH}, "
        f"one training each, seed {options.seed}; the structures of a row are among those of the next. NLL of "
        f"positions: {MEASURED} molecules of the validation split by one probe each, none of which chose the weights; "
        f"error over molecules. {options.n} molecules are drawn by the default sampler and by the flow itself; their "
        "compositions are those of the training structures of the row. New: a SMILES that none of these structures "
        "has. A training counts by the weights of its best validation, and in one column by those of its end. "
        "Minutes: of one thread, beside other work."
    )


if __name__ == "__main__":
    main()
