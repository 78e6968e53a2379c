"""Trains and measures the small flows of DW4, LJ13 and LJ55.

python -m benchmarks.models.particle_models dw4 --work FOLDER

Samples and the truth (entropy and ln Z, by quadrature for DW4 and by replica exchange for the others) are computed
once. A second run continues training and measuring. ``results/model_NAME`` compares the test NLL and the reweighted
samples of the flow with the truth. ``--model`` measures any weights, and ``--device cuda`` does so on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.cluster import Icosahedron

import ase_enf
from ase_enf.data import mcmc, particles, samples
from ase_enf.data.samples import Samples
from ase_enf.flow.continuous import INTERVALS
from ase_enf.flow.model import ENF
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import STATE_FILE
from ase_enf.training.loop import train
from benchmarks.models.particle_measures import measure
from benchmarks.tables.table1.cells import SWEEPS
from benchmarks.tables.table1.runs import ground


class Budget(NamedTuple):
    """How large a flow is and how long it is trained."""

    hidden: int
    layers: int
    steps: int
    batch: int
    recipe: Mapping[str, Any] = {}  # further fields of TrainConfig


# The best levers of DW4 (``benchmarks.tables.levers``).
ENDPOINT = {"parameterisation": "endpoint", "times": "beta", "time_power": 1.8, "long_ema_decay": 0.9998}
# Wider than in the paper (32 x 3), to raise the effective sample size.
BUDGETS = {
    "dw4": Budget(64, 3, 24_000, 512, ENDPOINT),
    "lj13": Budget(64, 4, 12_000, 128),
    "lj13-factor2": Budget(64, 4, 12_000, 128),
    "lj55-factor2": Budget(64, 4, 12_000, 32),
}
SETS = {"train": 100_000, "valid": 2000, "test": 2000}
# Sweeps and ladders of the truth by replica exchange.
TRUTH = {"lj13": (SWEEPS, mcmc.LADDERS), "lj13-factor2": (SWEEPS, mcmc.LADDERS), "lj55-factor2": (1500, 8)}
CHAINS, SEED = {"train": 56, "valid": 4, "test": 4}, (1, 55)  # of LJ55


def main() -> None:
    """Trains the flow if necessary and writes ``results/model_NAME``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=list(BUDGETS))
    parser.add_argument("--work", type=Path, required=True, help="folder for samples, runs and pieces")
    parser.add_argument("--model", default=None, help="measure this shipped name or path, and train nothing")
    parser.add_argument("--steps", type=int, default=None, help="training steps; by default the budget of the system")
    parser.add_argument("-n", type=int, default=10_000, help="samples to reweight")
    parser.add_argument("--test", type=int, default=1000, help="test samples to score")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and reweighting")
    parser.add_argument("--piece", type=int, default=1000, help="samples reweighted between two saves (default: 1000)")
    parser.add_argument("--batch", type=int, default=64, help="samples integrated together (default: 64)")
    parser.add_argument(
        "--intervals", type=int, default=INTERVALS, help=f"of the quadrature of the trace (default: {INTERVALS})"
    )
    parser.add_argument("--device", default="cpu", help="where to measure (default: cpu)")
    options = parser.parse_args()
    if min(options.n, options.test, options.piece) < 2 or options.batch < 1:
        parser.error(f"-n {options.n}, --test {options.test}, --piece {options.piece}: must be 2 at least, --batch 1")
    torch.set_num_threads(1)
    sets = drawn(options.system, options.work)
    flow = ase_enf.load(options.model, options.device) if options.model else trained(options, sets)
    flow.to(options.device).use_backend("auto")
    sweeps, ladders = TRUTH.get(options.system, (0, 0))
    truth = ground(options.system, options.work, 1.0, sweeps, ladders)
    how = f"replica exchange and BAR, {sweeps} sweeps of {ladders} ladders" if sweeps else "quadrature"
    measure(flow, sets["test"], truth, how, options)


def drawn(system: str, work: Path) -> dict[str, Samples]:
    """Returns the sets of samples, which are drawn once."""
    path = work / f"{system}_models.npz"
    if not path.exists():
        samples.save(path, of_liquid(system) if system.startswith("lj55") else samples.dataset(system, SETS, seed=1))
    return samples.load(path)


def of_liquid(system: str) -> dict[str, Samples]:
    """Returns sets of LJ55, each from its own chains, which start from the icosahedron.

    At kT = 1 and factor 2 the cluster is a liquid, in which chains mix with a single hotter replica; the 48 replicas up
    to the harmonic gas are not needed. All chains start from the crystal and must melt. They have if their <U> is that
    of replica exchange from hot starts.
    """
    near = replace(particles.resolve(system), rungs=2, power=0.1)
    crystal = Icosahedron("Ar", 3, latticeconstant=2**0.5).positions
    settings = {"sweeps": 4000, "ladders": sum(CHAINS.values()), "burn_in": 1500, "thin": 20}
    run = mcmc.run(near, SEED, **settings, start=crystal - crystal.mean(axis=0))
    return split_chains(system, run, settings)


def split_chains(system: str, run: mcmc.Run, settings: dict[str, int]) -> dict[str, Samples]:
    """Returns the chains of a run as sets in random order."""
    resolved, sets, first = particles.resolve(system), {}, 0
    diagnostics = run.diagnostics()
    if trouble := diagnostics.trouble(resolved.degrees_of_freedom):
        raise SystemExit(f"{system}: {trouble}; these are no samples of exp(-U)")
    for name, count in CHAINS.items():
        chains = np.tile(np.arange(first, first + count), len(run.positions))
        positions = run.positions[:, first : first + count].reshape(-1, resolved.n_atoms, resolved.dimension)
        order = np.random.default_rng(first).permutation(len(positions))
        info = {"system": resolved.name, "sha256": samples.fingerprint(positions[order]), "seed": SEED} | settings
        info["diagnostics"] = diagnostics._asdict()
        sets[name] = Samples(positions[order], resolved.evaluate(positions[order]).energy, chains[order], info)
        first += count
    return sets


def trained(options: argparse.Namespace, sets: dict[str, Samples]) -> ENF:
    """Returns the trained flow; starts or resumes the training if it is not finished."""
    budget = BUDGETS[options.system]
    steps = options.steps or budget.steps
    folder = options.work / f"{options.system}_{budget.hidden}x{budget.layers}_{steps}_seed{options.seed}"
    config = TrainConfig(
        features="none",
        dimension=particles.resolve(options.system).dimension,
        hidden=budget.hidden,
        layers=budget.layers,
        steps=steps,
        batch_size=budget.batch,
        muon_weight_decay=0.0,  # there are enough samples
        validate_every=max(steps // 4, 1),
        validation_size=512,
        seed=options.seed,
        out=str(folder),
        device="cpu",
        **budget.recipe,
    )
    source = f"{len(sets['train'])} samples of {options.system}, sha256 {sets['train'].info['sha256'][:16]}"
    atoms, valid = sets["train"].to_atoms(), sets["valid"].to_atoms()
    return train(config, atoms, valid, resume=(folder / STATE_FILE).exists(), source=source)


if __name__ == "__main__":
    main()
