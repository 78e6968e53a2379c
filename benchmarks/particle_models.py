"""Trains and measures the small shipped flows of DW4 and LJ13.

python -m benchmarks.particle_models dw4 --work FOLDER

Samples and the truth (entropy and ln Z by quadrature for DW4, by replica exchange for LJ13) are found once, training
goes on where it stopped, and ``results/model_NAME`` compares with the truth: the test NLL, and the reweighting of the
flow's samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase.units import kB

import ase_enf
from ase_enf.data import particles, samples
from ase_enf.data.samples import Samples
from ase_enf.flow.model import ENF
from ase_enf.scoring.reweight import reweight
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import STATE_FILE
from ase_enf.training.loop import train
from benchmarks.report import write_results
from benchmarks.tables.table1.cells import SWEEPS
from benchmarks.tables.table1.runs import ground

# Width, layers, steps and batch; larger for LJ13 than the paper's 32 x 3, which its effective sample size needs.
BUDGETS = {"dw4": (32, 3, 16_000, 512), "lj13": (64, 4, 12_000, 128), "lj13-factor2": (64, 4, 12_000, 128)}
SETS = {"train": 100_000, "valid": 2000, "test": 2000}
CALCULATORS = {"dw4": particles.DW4, "lj13": particles.LJ13, "lj13-factor2": lambda: particles.LJ13(factor=2.0)}


def main() -> None:
    """Trains what is missing and writes ``results/model_NAME``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=list(BUDGETS))
    parser.add_argument("--work", type=Path, required=True, help="folder for samples and runs")
    parser.add_argument("--model", default=None, help="measure this shipped name or path, and train nothing")
    parser.add_argument("--steps", type=int, default=None, help="training steps; by default the budget of the system")
    parser.add_argument("-n", type=int, default=10_000, help="samples to reweight")
    parser.add_argument("--test", type=int, default=1000, help="test samples to score")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and reweighting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = drawn(options.system, options.work)
    flow = ase_enf.load(options.model, "cpu") if options.model else trained(options, sets)
    flow.use_backend("auto")
    measure(flow, sets["test"], ground(options.system, options.work, 1.0), options)


def drawn(system: str, work: Path) -> dict[str, Samples]:
    """Returns the sets of samples, drawn once."""
    path = work / f"{system}_models.npz"
    if not path.exists():
        samples.save(path, samples.dataset(system, SETS, seed=1))
    return samples.load(path)


def trained(options: argparse.Namespace, sets: dict[str, Samples]) -> ENF:
    """Trains, or goes on, or reads what is finished."""
    hidden, layers, steps, batch = BUDGETS[options.system]
    steps = options.steps or steps
    folder = options.work / f"{options.system}_{hidden}x{layers}_{steps}_seed{options.seed}"
    config = TrainConfig(
        features="none",
        dimension=particles.resolve(options.system).dimension,
        hidden=hidden,
        layers=layers,
        steps=steps,
        batch_size=batch,
        muon_weight_decay=0.0,  # there are enough samples
        validate_every=max(steps // 4, 1),
        validation_size=512,
        seed=options.seed,
        out=str(folder),
        device="cpu",
    )
    source = f"{SETS['train']} samples of {options.system}, sha256 {sets['train'].info['sha256'][:16]}"
    atoms, valid = sets["train"].to_atoms(), sets["valid"].to_atoms()
    return train(config, atoms, valid, resume=(folder / STATE_FILE).exists(), source=source)


def measure(flow: ENF, test: Samples, truth: dict[str, float], options: argparse.Namespace) -> None:
    """Scores test samples and reweights the flow's own, both against the truth."""
    chosen = slice(options.test)
    atoms = particles.to_atoms(options.system, test.positions[chosen])
    log_q = ase_enf.score(flow, atoms, trace="exact").log_likelihood.to_numpy()
    gap = -test.energies[chosen] - truth["log_z"] - log_q
    result = reweight(flow, CALCULATORS[options.system](), options.n, 1.0 / kB, seed=options.seed)
    effective = result.effective_sample_size / options.n
    # S = <U>/kT + ln Z, both by reweighting: a second way to the entropy, independent of the first. What one sample
    # adds to both, w (U - <U>) + w - 1/n, gives the error of their sum.
    energy, log_z, log_z_stderr = result.average(result.energies), -result.free_energy, result.free_energy_stderr
    shares = result.weights * (result.energies - energy.value + 1.0) - 1.0 / options.n
    entropy = _figure(energy.value + log_z, np.hypot(np.sqrt(np.square(shares).sum()), result.integration_error))
    rows = [
        ("NLL of test samples, nats", _figure(-log_q.mean(), _sem(log_q)), len(log_q)),
        ("entropy, nats", _figure(truth["entropy"], truth["entropy_stderr"]), "truth"),
        ("NLL above the entropy, nats", _figure(gap.mean(), np.hypot(_sem(gap), truth["log_z_stderr"])), len(gap)),
        ("effective sample size, %", f"{100 * effective:.1f}", options.n),
        ("largest weight of all, %", f"{100 * result.weights.max():.2f}", options.n),
        ("ln Z", _figure(truth["log_z"], truth["log_z_stderr"]), "truth"),
        ("ln Z by reweighting", _figure(log_z, log_z_stderr), options.n),
        ("entropy by reweighting, nats", entropy, options.n),
        ("integration error of log p, nats", f"{result.integration_error:.2g}", options.n),
    ]
    about = flow.provenance
    how = "quadrature" if options.system == "dw4" else f"replica exchange and BAR, {SWEEPS} sweeps of 64 ladders"
    size, used = sum(parameter.numel() for parameter in flow.parameters()), test.info["sha256"][:16]
    notes = (
        f"{size} parameters, {about['step']} steps, {about['hours']:.2f} h. kT = 1; truth by {how}. Test samples: of "
        f"chains of their own, sha256 {used}, the first {len(log_q)} scored. No clipping of weights; {result.failed} "
        f"energies failed, {result.redrawn} samples drawn again."
    )
    table = pd.DataFrame(rows, columns=["what", "value", "samples"])
    write_results(table, f"model_{options.system}", f"The model `{options.system}`", notes)


def _sem(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _figure(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
