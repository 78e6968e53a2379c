"""Speed of training, sampling, scoring and metrics: ``python -m benchmarks.speed.throughput``.

Every result is a rate over at least ``--seconds`` of work after a warm-up, in one process with the given threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import pandas as pd
import torch
from ase import Atoms

import ase_enf
from ase_enf import metrics
from ase_enf.atoms.batch import to_batch
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.devices import resolve_device
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import generate
from ase_enf.scoring.score import score
from ase_enf.training.environment import keep_memory
from ase_enf.training.objectives import FlowMatching
from ase_enf.training.optimizers import build_optimizers, resolve_optimizer
from benchmarks.report import write_results

N_ATOMS = 18  # the mean of QM9


def main() -> None:
    """Measures and writes ``results/speed``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of work behind each figure")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves torch's choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="qm9", help="shipped name or path, for samples and scores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_memory()
    device = resolve_device(options.device)
    flow = ase_enf.load(options.model, device=device)
    backends = ("torch", "compiled") if flow.use_backend("auto") == "compiled" else ("torch",)
    molecules = generate(flow, 64, seed=0, n_atoms=N_ATOMS)
    seconds, few, some = options.seconds, molecules[:1], molecules[:8]
    measured = {
        ("matrix multiply, 20736 x 64 x 64, float32", "GFLOP/s"): _matmul(device, seconds),
        **{
            (f"flow-matching step, 6 x {hidden}{named}, {backend}, 18 atoms, batch 64", "molecules/s"): _training(
                6, hidden, radial, backend, device, seconds
            )
            for hidden, radial, named in ((64, 0, ""), (64, 16, ", 16 radial"), (128, 0, ""), (128, 16, ", 16 radial"))
            for backend in backends
        },
        ("generate, default solver, 18 atoms, batch 64", "molecules/s"): _rate(
            lambda: len(generate(flow, 64, seed=1, n_atoms=N_ATOMS)), seconds
        ),
        ("generate, the flow itself in 16 steps, 18 atoms, batch 64", "molecules/s"): _rate(
            lambda: len(generate(flow, 64, seed=1, n_atoms=N_ATOMS, solver="midpoint", steps=16)), seconds
        ),
        ("score, exact trace, 1 draw, 18 atoms", "molecules/s"): _rate(
            lambda: len(score(flow, few, trace="exact", importance_samples=1)), seconds
        ),
        ("score, 8 Hutchinson probes, 1 draw, 18 atoms", "molecules/s"): _rate(
            lambda: len(score(flow, some, trace="hutchinson", probes=8, importance_samples=1)), seconds
        ),
        ("stability by the distance table, 18 atoms", "molecules/s"): _stability(molecules, seconds),
        ("metrics.evaluate, reference qm9, 18 atoms", "molecules/s"): _evaluate(molecules, seconds),
    }
    rows = [(*what, *figures) for what, figures in measured.items()]
    table = pd.DataFrame(rows, columns=["what", "unit", "rate", "items", "seconds"])
    table["rate"] = [f"{rate:.4g}" for rate in table["rate"]]
    table["seconds"] = [f"{seconds:.2f}" for seconds in table["seconds"]]
    shares = [
        f"{100 * _pair_flops(6, 64) * float(rate) / (1e9 * float(table.rate[0])):.0f} % ({backend})"
        for backend, rate in zip(backends, table.rate[1:], strict=False)
    ]
    notes = (
        f"Model `{options.model}`, backend {backends[-1]} where none is named. The pair products of the 6 x 64 "
        f"training step (forward and backward, {_pair_flops(6, 64) / 1e6:.0f} MFLOP a molecule) run at "
        f"{', '.join(shares)} of the matrix-multiply rate of the same run."
    )
    where = "_cuda" if device.type == "cuda" else "_one_thread" if torch.get_num_threads() == 1 else ""
    write_results(table, f"speed{where}", f"Speed{where.replace('_', ', ', 1).replace('_', ' ')}", notes)


def _rate(work: Callable[[], int], seconds: float) -> tuple[float, int, float]:
    """Returns items per second, number of items and seconds of repeated work, after one warm-up."""
    work()
    items, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not items:
        items += work()
    return items / elapsed, items, elapsed


def _matmul(device: torch.device, seconds: float) -> tuple[float, int, float]:
    a = torch.randn(64 * N_ATOMS**2, 64, device=device)
    b, out = torch.randn(64, 64, device=device), torch.empty_like(a)

    def work() -> int:
        for _ in range(20):
            torch.mm(a, b, out=out)
        _synchronise(device)
        return 20

    rate, items, elapsed = _rate(work, seconds)
    return rate * 2 * a.numel() * 64 / 1e9, items, elapsed


def _training(
    layers: int, hidden: int, radial: int, backend: str, device: torch.device, seconds: float
) -> tuple[float, int, float]:
    model = ENF(ENFConfig(layers=layers, hidden=hidden, radial=radial)).to(device).train()
    model.use_backend(backend)
    name = resolve_optimizer("auto", "flow_matching")
    optimizer = build_optimizers(model.dynamics.network, list(model.parameters()), name, rate=1e-4, matrix_rate=1e-4)
    positions = torch.randn(64, N_ATOMS, 3, generator=torch.Generator().manual_seed(0)).numpy() * 1.5
    batch = to_batch([Atoms("C" * N_ATOMS, positions=p) for p in positions], model.species).to(device)
    objective = FlowMatching()

    def work() -> int:
        optimizer.zero_grad()
        objective(model, batch).loss.backward()
        optimizer.step()
        _synchronise(device)
        return len(batch.mask)

    return _rate(work, seconds)


def _pair_flops(layers: int, hidden: int) -> float:
    """Returns floating-point operations per molecule of the two F x F products on all pairs, forward and backward."""
    return 3 * layers * 2 * (2 * hidden**2) * N_ATOMS * N_ATOMS


def _stability(molecules: list[Atoms], seconds: float) -> tuple[float, int, float]:
    from ase_enf.chem.bonds import stability

    many = molecules * 40
    return _rate(lambda: len(stability(many).n_atoms), seconds)


def _evaluate(molecules: list[Atoms], seconds: float) -> tuple[float, int, float]:
    reference = metrics.load_reference("qm9")
    return _rate(lambda: len(molecules) if len(metrics.evaluate(molecules, reference)) else 0, seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
