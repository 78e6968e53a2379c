"""How close a flow of particles is to exp(-U): excess NLL, effective sample size, ln Z, and entropy by two methods."""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase.units import kB
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from tqdm import tqdm

from ase_enf.atoms.batch import to_batch
from ase_enf.atoms.files import atomic_write
from ase_enf.data import particles
from ase_enf.data.samples import Samples
from ase_enf.flow.continuous import INTERVALS
from ase_enf.flow.model import ENF
from ase_enf.scoring.reweight import Reweighted, reweight
from benchmarks.common import digest, open_work, score_in_pieces
from benchmarks.report import write_results

Array = NDArray[np.float64]

CALCULATORS = {
    "dw4": particles.DW4,
    "lj13": particles.LJ13,
    "lj13-factor2": lambda: particles.LJ13(factor=2.0),
    "lj55-factor2": particles.LJ55,
}
FIELDS = ("log_weights", "energies", "log_prob", "log_prob_error")


def measure(flow: ENF, test: Samples, truth: dict[str, float], how: str, options: argparse.Namespace) -> None:
    """Scores test samples, reweights samples of the flow, compares both with the truth, and writes the table."""
    folder = options.work / f"{options.system}_pieces_{digest(flow)}_seed{options.seed}"
    pieces = open_work(folder, flow, seed=options.seed, piece=options.piece, intervals=options.intervals)
    log_q = scored(flow, test, pieces, options)
    gap = -test.energies[: len(log_q)] - log_q  # plus -ln Z: how far log q is from log p
    result, sizes, devices = reweighted(flow, pieces, options)
    table = pd.DataFrame(rows(log_q, gap, result, sizes, truth), columns=["what", "value", "samples"])
    about, used = flow.provenance, test.info["sha256"][:16]
    size = sum(parameter.numel() for parameter in flow.parameters())
    hours = f", {about['hours']:.2f} h" if "hours" in about else ""
    notes = (
        f"{size} parameters, {about.get('step', 0)} steps{hours}. kT = 1; truth by {how}. "
        f"Test samples: of chains of their own, sha256 {used}, the first {len(log_q)} scored. No clipping of weights; "
        f"{result.failed} energies failed, {result.redrawn} samples drawn again. ± of the effective sample size: over "
        f"{len(sizes)} repetitions of {options.piece} samples, and of all of them by leaving out one repetition after "
        f"the other; neither knows of weights that no sample met. Quadrature of the trace: {options.intervals} "
        f"intervals. Weights computed on: {', '.join(sorted(devices))}."
    )
    write_results(table, f"model_{options.system}", f"The model `{options.system}`", notes)


def scored(flow: ENF, test: Samples, pieces: Path, options: argparse.Namespace) -> Array:
    """Returns log-densities of the first test samples by the exact trace."""
    order = list(range(min(options.test, len(test))))
    if options.intervals != INTERVALS:
        return coarsely_scored(flow, test.positions[order], pieces, options)
    how = {"trace": "exact", "batch_size": min(options.batch, 64), "progress": False}
    table = score_in_pieces(flow, test.to_atoms(), order, options.seed, pieces, how)
    return table.log_likelihood.to_numpy()


def coarsely_scored(flow: ENF, positions: Array, pieces: Path, options: argparse.Namespace) -> Array:
    """Returns log-densities by a quadrature of fewer nodes, without the refinement of ``score``."""
    found = []
    for first in tqdm(range(0, len(positions), options.batch), desc="scores", unit="batch", dynamic_ncols=True):
        chosen = positions[first : first + options.batch]
        path = pieces / f"scores_{first:05d}_{len(chosen)}.npy"
        if not path.exists():
            atoms = particles.to_atoms(options.system, chosen)
            batch = to_batch(atoms, (), flow.config.dimension).to(flow.device, flow.dtype)
            terms = flow.log_prob(batch, intervals=options.intervals, estimate_path_error=False)
            with atomic_write(path) as handle:
                np.save(handle, terms.log_prob.double().cpu().numpy())
        found.append(np.load(path))
    return np.concatenate(found)


def reweighted(flow: ENF, pieces: Path, options: argparse.Namespace) -> tuple[Reweighted, Array, set[str]]:
    """Returns weighted samples of the flow, the ESS of each piece as a fraction, and the devices that computed them.

    Missing pieces are drawn. Each piece has its own seed, so that pieces are independent repetitions.
    """
    parts, failed, redrawn, devices = [], 0, 0, set()
    for k in tqdm(range(max(options.n // options.piece, 1)), desc="reweighting", unit="piece", dynamic_ncols=True):
        path = pieces / f"weights_{k:03d}_{min(options.piece, options.n)}.npz"
        if not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the table says how large the error is
                found = reweight(
                    flow,
                    CALCULATORS[options.system](),
                    min(options.piece, options.n),
                    1.0 / kB,
                    seed=1000 * options.seed + k,
                    batch_size=options.batch,
                    intervals=options.intervals,
                )
            arrays = {name: getattr(found, name) for name in FIELDS}
            with atomic_write(path) as handle:
                np.savez(
                    handle, **arrays, counts=np.array([found.failed, found.redrawn]), device=np.array(device_of(flow))
                )
        with np.load(path) as archive:
            parts.append([archive[name] for name in FIELDS])
            devices.add(str(archive["device"]))
            failed, redrawn = failed + int(archive["counts"][0]), redrawn + int(archive["counts"][1])
    joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    whole = Reweighted([], *joined, temperature=1.0 / kB, failed=failed, redrawn=redrawn)
    return whole, np.array([effective(part[0]) for part in parts]), devices


def device_of(flow: ENF) -> str:
    """Returns the name of the device that computes."""
    return torch.cuda.get_device_name() if flow.device.type == "cuda" else "CPU"


def effective(log_weights: Array) -> float:
    """Returns Kish's effective sample size as a fraction of the number of samples.

    Example:
        >>> effective(np.log([1.0, 1.0, 2.0]))
        0.8888888888888888
    """
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / np.square(weights).sum() / len(weights))


def jackknife(log_weights: Array, repetitions: int) -> float:
    """Returns the standard error of the effective sample size, leaving out each repetition in turn."""
    if repetitions < 2:
        return float("nan")
    parts = np.split(log_weights, repetitions)
    without = [effective(np.concatenate(parts[:k] + parts[k + 1 :])) for k in range(repetitions)]
    return float(np.sqrt((repetitions - 1) * np.var(without)))


def divergence(log_weights: Array) -> tuple[float, float]:
    """Returns KL(p‖q), how far the NLL of q lies above the entropy of p, from weights p/q of samples of q.

    With weights W of mean one it is ⟨W ln W⟩; its error is that of the contributions W (ln W − KL − 1) of the samples.

    Args:
        log_weights: ln p/q up to a constant.

    Returns:
        KL and its standard error, nats; the latter knows nothing of weights that no sample met.

    Example:
        >>> divergence(np.full(4, 2.0))
        (0.0, 0.0)
    """
    weights = np.exp(log_weights - log_weights.max())
    weights = weights / weights.mean()
    logs = np.log(np.where(weights > 0, weights, 1.0))
    value = float(np.mean(weights * logs))
    return value, sem(weights * (logs - value - 1.0))


def bennett(forward: Array, backward: Array) -> tuple[float, float]:
    """Returns ln Z from -U - log q of samples of the flow and of exp(-U), by Bennett's acceptance ratio.

    ln Z solves Σ_flow f(w - ln Z - r) = Σ_data f(ln Z - w + r), f(x) = 1 / (1 + e^-x), where r is the logarithm of the
    ratio of the numbers of samples. Of all combinations of both sets it has the smallest variance (J. Comput. Phys. 22,
    245 (1976)).

    Args:
        forward: w = -U - log q of samples of the flow.
        backward: w of samples of exp(-U).

    Returns:
        ln Z and its standard error to first order.

    Example:
        >>> log_z, stderr = bennett(np.full(4, 2.0), np.full(8, 2.0))  # q is exp(-U) / e²
        >>> round(log_z, 6), stderr
        (2.0, 0.0)
    """
    ratio = math.log(len(forward) / len(backward))

    def taken(log_z: float) -> tuple[Array, Array]:
        """Probabilities by which samples of one are taken for those of the other."""
        return expit(forward - log_z - ratio), expit(log_z - backward + ratio)

    def balance(log_z: float) -> float:
        up, down = taken(log_z)
        return float(up.sum() - down.sum())

    both = np.concatenate([forward, backward])
    root = brentq(balance, both.min() - 50, both.max() + 50, xtol=1e-10)
    up, down = taken(root)
    slope = (up * (1 - up)).sum() + (down * (1 - down)).sum()
    variance = len(up) * up.var() + len(down) * down.var()
    return float(root), float(np.sqrt(variance) / slope)


def rows(
    log_q: Array, gap: Array, result: Reweighted, sizes: Array, truth: dict[str, float]
) -> list[tuple[str, str, int | str]]:
    """Returns the rows of the table: quantity, value, number of samples."""
    n, good = len(result.log_weights), np.isfinite(result.log_weights)
    above = gap - truth["log_z"]
    log_z_bar, log_z_bar_stderr = bennett(result.log_weights[good], gap)
    # S = <U>/kT + ln Z, both by reweighting, is a second estimate of the entropy, independent of the first. The
    # contribution of one sample to both terms, w (U - <U>) + w - 1/n, gives the error of their sum.
    energy, log_z, log_z_stderr = result.average(result.energies), -result.free_energy, result.free_energy_stderr
    shares = result.weights * (result.energies - energy.value + 1.0) - 1.0 / n
    entropy_stderr = np.hypot(np.sqrt(np.square(shares).sum()), result.integration_error)
    share, share_stderr = result.effective_sample_size / n, jackknife(result.log_weights, len(sizes))
    return [
        ("NLL of test samples, nats", figure(-log_q.mean(), sem(log_q)), len(log_q)),
        ("entropy, nats", figure(truth["entropy"], truth["entropy_stderr"]), "truth"),
        ("NLL above the entropy, nats", figure(above.mean(), np.hypot(sem(above), truth["log_z_stderr"])), len(above)),
        ("effective sample size, %", f"{100 * share:.1f} ± {100 * share_stderr:.1f}", n),
        (f"the same of {n // len(sizes)}, %", f"{100 * sizes.mean():.1f} ± {100 * sem(sizes):.1f}", n),
        ("largest weight of all, %", f"{100 * result.weights.max():.2f}", n),
        ("ln Z", figure(truth["log_z"], truth["log_z_stderr"]), "truth"),
        ("ln Z by reweighting", figure(log_z, log_z_stderr), n),
        ("ln Z by BAR between flow and test samples", figure(log_z_bar, log_z_bar_stderr), n + len(gap)),
        ("NLL above the entropy by that ln Z, nats", figure(gap.mean() - log_z_bar, sem(gap)), len(gap)),
        ("NLL above the entropy by the weights, nats", figure(*divergence(result.log_weights)), n),
        ("entropy by reweighting, nats", figure(energy.value + log_z, entropy_stderr), n),
        ("integration error of log p, nats", f"{result.integration_error:.2g}", n),
    ]


def sem(values: Array) -> float:
    """Returns the standard error of a mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def figure(value: float, error: float) -> str:
    """Returns a value and its error as text.

    Example:
        >>> figure(1.0, 0.5)
        '1.0000 ± 0.5000'
    """
    return f"{value:.4f} ± {error:.4f}"
