"""Stability against the number of evaluations: ``python -m benchmarks.accuracy.samplers MODEL -n 2000``.

MODEL is a shipped name, a .safetensors file, or the .npz of the weights published with the paper. Every solver
integrates the same latent molecules; the last two do so once more with the compiled kernel, if it is available. A flow
whose default is the ``StochasticSampler`` is measured with and without fresh noise, with the compiled kernel if it is
available, and all samplers use the same streams of noise.

``--one-at-a-time 50`` adds the method of the published script: dopri5 at 1e-7, one molecule at a time. With
``--work FOLDER``, results of finished solvers are saved and reused.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import ase_enf
from ase_enf import metrics
from ase_enf.atoms.files import atomic_write
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler
from benchmarks.common import load_flow, open_work
from benchmarks.report import RESULTS, write_results

SOLVERS = (
    *(Solver("dopri5", rtol=tolerance, atol=tolerance) for tolerance in (1e-2, 1e-3, 1e-5, 1e-7)),
    *(Solver("rk4", steps=steps) for steps in (4, 8, 16)),
    *(Solver("midpoint", steps=steps) for steps in (8, 16, 32)),
    Solver("rk4", steps=10, warp=1.2),
    Solver("midpoint", steps=16, warp=1.5),
)
FASTEST = SOLVERS[-2:]
RENEWING = (
    *(Solver("midpoint", steps=steps, warp=1.75) for steps in (16, 64)),
    *(StochasticSampler(churn=churn) for churn in (0.0, 1.0, 4.0, 12.0, 25.0, 50.0, 100.0, 1000.0)),
    StochasticSampler(warp=3.0),
    *(StochasticSampler(steps=steps) for steps in (32, 64, 256)),
)
PUBLISHED = Solver("dopri5", rtol=1e-7, atol=1e-7)
BATCH = 64


def main() -> None:
    """Measures and writes ``results/samplers_NAME``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name, .safetensors, or .npz of the published weights")
    parser.add_argument("-n", type=int, default=2000, help="molecules a solver (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-at-a-time", type=int, default=50, metavar="N", help="drawn singly (default: 50)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves torch's choice")
    parser.add_argument("--work", type=Path, help="folder that keeps the figures of finished solvers")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    flow = load_flow(options.model)
    if options.work:
        open_work(options.work, flow, seed=options.seed, threads=torch.get_num_threads())
    backend = flow.use_backend("auto")
    if isinstance(flow.sampling_solver, StochasticSampler):
        plans = [(solver, options.n, BATCH, backend) for solver in RENEWING]
    else:
        plans = [(solver, options.n, BATCH, "torch") for solver in SOLVERS]
        plans += [(solver, options.n, BATCH, backend) for solver in FASTEST if backend == "compiled"]
    if options.one_at_a_time:
        plans.insert(0, (PUBLISHED, options.one_at_a_time, 1, "torch"))
    rows = [_measure(flow, *plan, options) for plan in tqdm(plans, unit="solver", dynamic_ncols=True)]
    table = pd.DataFrame(rows)
    _write(flow, table, options)


def _measure(
    flow: ENF, solver: Solver | StochasticSampler, n: int, batch: int, backend: str, options: argparse.Namespace
) -> dict[str, float | str]:
    """Returns stability, evaluations per molecule and molecules per second of one solver."""
    flow.use_backend(backend)
    name, method = _names(solver)
    name += ", compiled kernel" if backend == "compiled" else ""
    key = name.replace(" steps", "").replace(", ", "_").replace(" ", "_")
    path = options.work / f"{key}_{n}_{batch}.json" if options.work else None
    if path and path.exists():
        return json.loads(path.read_text())
    evaluations = 0

    def count(module: torch.nn.Module, arguments: tuple, output: object) -> None:
        nonlocal evaluations
        evaluations += len(arguments[1])

    hook = flow.dynamics.register_forward_hook(count)
    ase_enf.generate(flow, min(n, batch), seed=options.seed + 1, solver=Solver("euler", steps=2))  # a warm-up
    evaluations, start = 0, time.perf_counter()
    atoms = ase_enf.generate(flow, n, seed=options.seed, solver=solver, batch_size=batch)
    seconds = time.perf_counter() - start
    hook.remove()
    report = metrics.evaluate(atoms, reference="qm9").set_index("metric")
    row = {
        "solver": name,
        "method": method,
        "batch": batch,
        "n": n,
        "evaluations": evaluations / n,
        "rate": n / seconds,
        "atoms": float(report.value["atom_stability"]),
        "atoms_error": float(report.stderr["atom_stability"]),
        "molecules": float(report.value["molecule_stability"]),
        "molecules_error": float(report.stderr["molecule_stability"]),
        "js": float(report.value["distance_js"]),
    }
    if path:
        with atomic_write(path) as handle:
            handle.write(json.dumps(row).encode())
    return row


def _names(solver: Solver | StochasticSampler) -> tuple[str, str]:
    """Returns the names of a solver in the table and in the picture: with its steps, and without."""
    if isinstance(solver, StochasticSampler):
        return str(solver), f"stochastic, warp {solver.warp:g}, churn {solver.churn:g}"
    grid = "" if solver.warp == 1 else f", warp {solver.warp:g}"
    steps = f"{solver.rtol:g}" if solver.adaptive else f"{solver.steps} steps{grid}"
    return f"{solver.method}, {steps}", solver.method + grid


def _write(flow: ENF, table: pd.DataFrame, options: argparse.Namespace) -> None:
    printed = pd.DataFrame(
        {
            "solver": table.solver,
            "batch": table.batch,
            "molecules": table.n,
            "evaluations": [f"{value:.0f}" for value in table.evaluations],
            "atoms stable": [f"{a:.4f} ± {e:.4f}" for a, e in zip(table.atoms, table.atoms_error, strict=True)],
            "molecules stable": [
                f"{a:.4f} ± {e:.4f}" for a, e in zip(table.molecules, table.molecules_error, strict=True)
            ],
            "JS of distances": [f"{value:.4f}" for value in table.js],
            "molecules/s": [f"{value:.2f}" for value in table.rate],
        }
    )
    notes = f"`{flow.name}`, seed {options.seed}, the same seeds of all noise. `generate` uses {flow.sampling_solver}."
    single, batched = table[table.batch == 1], table[table.batch > 1]
    if len(single):
        rate = single.rate.iloc[0]
        printed["times one at a time"] = [f"{value / rate:.1f}" for value in table.rate]
        notes += f" The first row is how the published script samples, in this code: {rate:.2f} molecules/s."
    write_results(printed, f"samplers_{flow.name}", f"Samplers of {flow.name}", notes)
    _plot(
        batched
        if isinstance(flow.sampling_solver, StochasticSampler)
        else batched[~batched.solver.str.endswith("kernel")],
        flow.name,
    )


def _plot(table: pd.DataFrame, name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2), ("atoms", "molecules"), strict=True)
    for axes, what in panels:
        for method, part in table.groupby("method", sort=False):
            rows = part.sort_values("evaluations")
            axes.errorbar(
                rows.evaluations, 100 * rows[what], 100 * rows[f"{what}_error"], marker="o", capsize=3, label=method
            )
        axes.set(xscale="log", xlabel="evaluations of the dynamics a molecule", ylabel=f"{what} stable, %")
        axes.set_xticks([16, 32, 64, 128, 256, 512], labels=["16", "32", "64", "128", "256", "512"])
        axes.set_xticks([], minor=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Samplers of {name}, {int(table.n.iloc[0])} molecules each")
    figure.savefig(RESULTS / f"samplers_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
