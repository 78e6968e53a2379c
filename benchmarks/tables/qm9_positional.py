"""QM9 Positional (§5.2, Figures 3 and 4): seven flows of the positions of 19-atom molecules, with the paper's split.

python -m benchmarks.tables.qm9_positional --data QM9.npz --work FOLDER

A row is trained in stages, first at a constant and then at a decreasing rate. The validation NLL and the divergence of
distances after each stage are points of its curves. At the end, the test NLL is computed by the exact trace, and the
divergence and the histogram from more samples. Everything is saved in the folder, so that a second run continues.
``--only ROW ... --no-table`` divides the work among processes, ``--likelihood`` adds the rows by maximum likelihood,
and ``--scale 10`` trains ten times as long.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ase import Atoms

import ase_enf
from ase_enf import metrics
from ase_enf.data import qm9
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import LAST_FILE, STATE_FILE
from ase_enf.training.log import LOG_FILE
from ase_enf.training.loop import train
from benchmarks.common import digest, draw_in_pieces, open_work, score_in_pieces
from benchmarks.report import RESULTS, write_csv, write_results
from benchmarks.tables.table1.runs import write_json

N_ATOMS = 19
BATCH = 64
DENOISING = "E-NF, denoising"
FROM_SMALL = "E-NF, denoising, from qm9-small"
ELSEWHERE = "E-NF, denoising, shipped"  # weights that another command has trained
LIKELIHOOD = " by likelihood"  # the ending of the rows of maximum likelihood
NLL = {"objective": "nll", "batch_size": 32, "adjoint": False}
METHODS: dict[str, dict[str, Any]] = {
    "Simple dynamics": {"network": "simple", "hidden": 50},
    "Kernel dynamics": {"network": "kernel", "hidden": 50, "layers": 10},
    "GNF": {"network": "gnn", "attention": False},
    "GNF-att": {"network": "gnn"},
    "GNF-att-aug": {"network": "gnn", "augment": True},
    "E-NF": {"radial": 0},  # the paper's network
    DENOISING: {"parameterisation": "denoising"},  # ours: 16 radial functions, and another parameterisation
    FROM_SMALL: {"parameterisation": "denoising"},  # the same network; it has seen all 100,000 molecules and elements
}
METHODS |= {
    f"Simple dynamics{LIKELIHOOD}": METHODS["Simple dynamics"] | NLL | {"learning_rate": 3e-3},
    f"Kernel dynamics{LIKELIHOOD}": METHODS["Kernel dynamics"] | NLL | {"learning_rate": 1e-2},
    f"E-NF{LIKELIHOOD}": METHODS["E-NF"] | NLL | {"learning_rate": 1e-3},
}
# Passes over the training set, of which the last part COOL_DOWN is at a falling rate.
EPOCHS = dict.fromkeys(METHODS, 5.0) | {DENOISING: 50.0, FROM_SMALL: 3.7016}
EPOCHS |= {name: 0.2 for name in METHODS if name.endswith(LIKELIHOOD)}
WARMUP, COOL_DOWN = 0.08, 0.222  # parts of the steps; the first is of 200 steps at most
SOLVER = Solver("midpoint", steps=48, warp=1.5)  # of samples, which are of the density that is scored
# Epochs after which a point of the curves is taken; further ones are where the rate begins to fall, and the end.
STAGES = (1, 5, 20)
POINT, SCORED = 64, 32  # molecules drawn for a point of the divergence, and validation molecules scored by one probe
PAPER = {
    "Simple dynamics": (73.0, 0.086),
    "Kernel dynamics": (38.6, 0.029),
    "GNF": (-0.9, 0.011),
    "GNF-att": (-26.6, 0.007),
    "GNF-att-aug": (-33.5, 0.006),
    "E-NF": (-70.2, 0.006),
}
NAME = "qm9_positional"
MISSING = "–"  # what has not been run


@dataclass(frozen=True)
class Split:
    """The 19-atom molecules of QM9's published split."""

    train: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]


@dataclass(frozen=True)
class Row:
    """One method, trained and measured."""

    name: str
    flow: ENF
    curve: pd.DataFrame  # step, epoch, valid_nll, js
    scores: pd.DataFrame
    atoms: list[Atoms]


def main() -> None:
    """Trains and measures the missing rows and writes ``results/qm9_positional*``."""
    options = parsed()
    torch.set_num_threads(1)
    data = Split(*(qm9.load(options.data, split=part, n_atoms=N_ATOMS) for part in ("train", "valid", "test")))
    rows = [measured(name, data, options) for name in wanted(options)]
    if options.model:
        rows.append(measured_weights(options.model, data, options))
    if not options.no_table:
        write_tables(rows, data, options)


def parsed() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="QM9 in any form")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and pieces")
    parser.add_argument("--only", nargs="*", choices=list(METHODS), help="some of the rows (default: all)")
    parser.add_argument("--model", help=f'weights to measure as the row "{ELSEWHERE}", a path or a shipped name')
    parser.add_argument("--likelihood", action="store_true", help="also the rows by maximum likelihood")
    parser.add_argument("--scale", type=float, default=1.0, help="times the epochs of every row (default: 1)")
    parser.add_argument("--test", type=int, default=64, help="test molecules to score, at random (default: 64)")
    parser.add_argument("-n", type=int, default=1024, help="molecules to draw (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="seed of training, samples and choice (default: 0)")
    parser.add_argument("--no-table", action="store_true", help="do the work and write no table")
    options = parser.parse_args()
    if not (0 < options.scale < math.inf and min(options.test, options.n) >= 2):
        parser.error(f"--scale {options.scale:g} must be positive, --test {options.test} and -n {options.n} at least 2")
    return options


def wanted(options: argparse.Namespace) -> list[str]:
    """Returns the requested rows."""
    if options.only:
        return [name for name in METHODS if name in options.only]
    return [name for name in METHODS if options.likelihood or not name.endswith(LIKELIHOOD)]


def measured(name: str, data: Split, options: argparse.Namespace) -> Row:
    """Returns a row, after training and measuring what is missing."""
    folder = place(name, options)
    return row_of(name, *trained(name, data, folder, options), folder, data, options)


def place(name: str, options: argparse.Namespace) -> Path:
    """Returns the folder of a row."""
    return options.work / f"{name.replace(', ', '-').replace(' ', '-')}_x{options.scale:g}_seed{options.seed}"


def measured_weights(model: str, data: Split, options: argparse.Namespace) -> Row:
    """Returns the row of weights that another command has trained; its curve is a single point."""
    flow = ase_enf.load(model, "cpu")
    folder = options.work / f"model_{digest(flow)}_seed{options.seed}"
    path = folder / "point.json"
    if not path.exists():
        # Those that validate the other rows.
        chosen = np.random.default_rng(options.seed).permutation(len(data.valid))[:SCORED]
        scores = ase_enf.score(flow, [data.valid[k] for k in chosen], trace="hutchinson", probes=1, seed=options.seed)
        write_json(path, point_of(flow, flow.provenance.get("step", 0), -scores.log_likelihood.mean(), data, options))
    return row_of(ELSEWHERE, flow, pd.DataFrame([json.loads(path.read_text())]), folder, data, options)


def row_of(name: str, flow: ENF, curve: pd.DataFrame, folder: Path, data: Split, options: argparse.Namespace) -> Row:
    """Returns the row of some weights, after measuring what is missing."""
    flow.use_backend("auto")
    pieces = open_work(folder / "pieces", flow, seed=options.seed, solver=SOLVER)
    order = np.random.default_rng(options.seed).permutation(len(data.test))[: options.test].tolist()
    scores = score_in_pieces(flow, data.test, order, options.seed, pieces, {"trace": "exact"}, piece=32)
    return Row(name, flow, curve, scores, draw_in_pieces(flow, options.n, options.seed, pieces, SOLVER))


def settings(name: str, molecules: int, options: argparse.Namespace, out: Path) -> TrainConfig:
    """Returns the training settings of a row."""
    fields: dict[str, Any] = {"features": "none", "batch_size": BATCH} | METHODS[name]
    steps = max(round(EPOCHS[name] * options.scale * molecules / fields["batch_size"]), 2)
    common = {"steps": steps, "warmup": min(200, round(WARMUP * steps)), "cool_down": COOL_DOWN, "seed": options.seed}
    if name == FROM_SMALL:
        fields["init_from"] = str(out.parent / "start.safetensors")
    # Validations are at the ends of stages.
    return TrainConfig(
        **common,
        **fields,
        validate_every=10**9,
        validation_size=SCORED,
        checkpoint_every=100,
        device="cpu",
        out=str(out),
    )


def positional(flow: ENF) -> ENF:
    """Returns a flow of positions with the network of one of types and positions; types are set to their mean, 0.

    Example:
        >>> positional(ase_enf.load("qm9-small")).features
        'none'
    """
    bare = {"features": "none", "species": (), "compositions": {}, "sizes": {N_ATOMS: 1}}
    bare |= {"feature_shift": (), "feature_scale": (), "feature_std": 1.0}
    alone, known = ENF(replace(flow.config, **bare)), flow.state_dict()
    known["dynamics.network.embed.weight"] = known["dynamics.network.embed.weight"][:, -1:]  # the column of t
    alone.load_state_dict({name: known[name] for name in alone.state_dict()})
    return alone


def trained(name: str, data: Split, folder: Path, options: argparse.Namespace) -> tuple[ENF, pd.DataFrame]:
    """Starts or resumes the training of a row by stages, and returns its last averaged weights and its curves."""
    config = settings(name, len(data.train), options, folder / "run")
    if config.init_from:
        folder.mkdir(parents=True, exist_ok=True)
        positional(ase_enf.load("qm9-small", "cpu")).save(config.init_from)
    curve: list[dict[str, float]] = []
    for steps in stage_steps(config, len(data.train)):
        path = folder / f"step{steps}.json"
        if not path.exists():
            _stage(config, steps, data, options)
            point = _point(folder / "run", steps, data, options)
            shutil.copyfile(folder / "run" / LAST_FILE, folder / f"step{steps}.safetensors")
            write_json(path, point)
        curve.append(json.loads(path.read_text()))
    return ase_enf.load(folder / "run" / LAST_FILE, "cpu"), pd.DataFrame(curve)


def stage_steps(config: TrainConfig, molecules: int) -> list[int]:
    """Returns the steps at which the stages end; at the last but one, the rate begins to fall.

    Example:
        >>> stage_steps(TrainConfig(steps=1000, warmup=0, batch_size=64), 12_800)
        [200, 778, 1000]
    """
    plateau = round((1 - COOL_DOWN) * config.steps)
    early = {round(epochs * molecules / config.batch_size) for epochs in STAGES}
    return sorted({steps for steps in early if steps < plateau} | {max(plateau, 1), config.steps})


def _stage(config: TrainConfig, steps: int, data: Split, options: argparse.Namespace) -> None:
    """Trains up to a step, at a constant rate except in the last stage."""
    resume = (Path(config.out) / STATE_FILE).exists()
    if steps < config.steps:
        config = replace(config, steps=steps, cool_down=1e-9)
    if not resume:
        shutil.rmtree(config.out, ignore_errors=True)  # killed before its first save
    source = f"QM9, molecules of {N_ATOMS} atoms, train split"
    train(config, data.train, data.valid, resume=resume, source=source)


def _point(run: Path, steps: int, data: Split, options: argparse.Namespace) -> dict[str, float]:
    """Returns a point of the curves for the averaged weights after a stage."""
    with (run / LOG_FILE).open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if int(row["step"]) == steps and row["valid_nll"])
    return point_of(ase_enf.load(run / LAST_FILE, "cpu"), steps, float(row["valid_nll"]), data, options)


def point_of(flow: ENF, steps: int, valid_nll: float, data: Split, options: argparse.Namespace) -> dict[str, float]:
    """Returns a point of the curves, with the divergence from few molecules."""
    flow.use_backend("auto")
    drawn = ase_enf.generate(flow, POINT, seed=options.seed + 1, solver=SOLVER, batch_size=POINT)
    about = {key: flow.provenance.get(key, math.nan) for key in ("epoch", "hours")}
    return {"step": steps, **about, "valid_nll": float(valid_nll), "js": divergence(drawn, data.train)}


def histogram(atoms: Sequence[Atoms]) -> np.ndarray:
    """Returns the counts (N, 100) of the distances of N molecules of one size."""
    return metrics.distance_counts(np.stack([item.positions for item in atoms]))


def divergence(atoms: Sequence[Atoms], others: Sequence[Atoms]) -> float:
    """Returns the Jensen-Shannon divergence of the distances of two sets, nats."""
    return metrics.js_divergence(histogram(atoms).sum(axis=0), histogram(others).sum(axis=0))


def write_tables(rows: Sequence[Row], data: Split, options: argparse.Namespace) -> None:
    """Writes our values and those of the paper, the curves, and the pictures of Figures 3 and 4."""
    known = histogram(data.train).sum(axis=0)
    found, lines = {row.name: row for row in rows}, []
    for name in [*METHODS, *({ELSEWHERE} & found.keys())]:
        paper = PAPER.get(name.removesuffix(LIKELIHOOD), (MISSING, MISSING))
        mine, spent = (MISSING, MISSING), (MISSING,) * 4
        if row := found.get(name):
            value = metrics.js_divergence(histogram(row.atoms).sum(axis=0), known)
            mine, spent = (nll_of(row.scores), f"{value:.4f}"), budget(row)
        lines.append((name, *mine, *map(str, paper), *spent))
    floor = divergence(data.test, data.train)
    lines.append(("test molecules themselves", "", f"{floor:.4f}", "", "", "", "", "", ""))
    lines.append(("CNF trained by diffusion, published (as remembered)", "-158", "", "", "", "", "", "", ""))
    columns = ["method", "NLL, nats", "JS", "NLL, paper", "JS, paper", "weights", "epochs", "hours", "valid NLL"]
    write_results(pd.DataFrame(lines, columns=columns), NAME, "QM9 Positional (§5.2)", notes(rows, data, options))
    curves = pd.concat([row.curve.assign(method=row.name) for row in rows], ignore_index=True)
    write_csv(curves[["method", *curves.columns.drop("method")]], f"{NAME}_curves")
    draw_curves(rows, RESULTS / f"{NAME}_curves.png")
    draw_histograms(rows, known, RESULTS / f"{NAME}_distances.png")


def so_far(name: str, data: Split, options: argparse.Namespace) -> str:
    """Returns, as text, the progress of an unfinished row; "" if it has not started."""
    folder = place(name, options)
    log = folder / "run" / LOG_FILE
    if not log.exists():
        return ""
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["value"]]
    if not rows:
        return ""
    last, steps = rows[-1], settings(name, len(data.train), options, folder / "run").steps
    what = "NLL" if name.endswith(LIKELIHOOD) else "loss"
    return f"{name}: not finished, {last['step']} of {steps} steps, {what} {float(last['value']):.3f}"


def nll_of(scores: pd.DataFrame) -> str:
    """Returns the mean NLL with its error over molecules, and the number of molecules without one."""
    finite = -scores.log_likelihood[np.isfinite(scores.log_likelihood)]
    lost = f" ({len(scores) - len(finite)} not finite)" if len(finite) < len(scores) else ""
    return f"{finite.mean():.1f} ± {finite.sem():.1f}{lost}"


def budget(row: Row) -> tuple[str, ...]:
    """Returns weights, epochs, hours and the last validation NLL of a row."""
    about, last = row.flow.provenance, row.curve.iloc[-1]
    weights = sum(parameter.numel() for parameter in row.flow.parameters())
    return f"{weights / 1000:.1f} k", f"{about['epoch']:.1f}", f"{about['hours']:.2f}", f"{last.valid_nll:.1f}"


def notes(rows: Sequence[Row], data: Split, options: argparse.Namespace) -> str:
    """Returns what a reader must know."""
    rough = max(float(row.scores.stderr.max()) for row in rows)
    measured = {row.name for row in rows}
    begun = [so_far(name, data, options) for name in METHODS if name not in measured]
    return (
        f"Molecules of {N_ATOMS} atoms, positions alone, {(N_ATOMS - 1) * 3} dimensions, Å: {len(data.train):,} / "
        f"{len(data.valid):,} / {len(data.test):,} for training, validation and test (the paper has 13,831 / 2,501 / "
        f"1,813).\n\nNLL: of {len(rows[0].scores)} test molecules at random, by the exact trace, error over molecules; "
        f"integration error of one score {rough:.2g} nats at most. JS: divergence of the histograms of "
        f"distances (100 bins on [0, 13] Å) of {len(rows[0].atoms):,} molecules drawn by the ODE and of the training "
        f"set; the paper's is averaged over its last 10 epochs. Curves: the NLL of {SCORED} validation molecules "
        f"by one probe, JS of {POINT} molecules, whose small number lifts it; all by the averaged weights.\n\n"
        f"One rule for the budgets: epochs times {options.scale:g} as in the table, batches of {BATCH} "
        f"({NLL['batch_size']} by likelihood), one thread, the last {COOL_DOWN:.0%} at a falling rate; the paper has "
        "160 epochs of maximum likelihood. Flow matching but where a row says otherwise. "
        f'"E-NF" has the paper\'s network; "{DENOISING}" has 16 radial functions of each distance beside its square, '
        "its output is the displacement towards the data of an input of unit variance, and times are drawn from "
        "Beta(1, 1.8); where it starts from `qm9-small`, it has seen the whole train split with its elements, and no "
        "test molecule: that row is no comparison with the paper's. Simple and kernel dynamics cannot follow the "
        "target of flow matching; likelihood is their fair row. "
        f'"{ELSEWHERE}" is `qm9-positional`, which starts from `qm9-small`, too, and was trained as its card says. '
        f'"{MISSING}": not run yet; the command goes on with it.'
        + "".join(f"\n\n* {words}" for words in begun if words)
    )


def _figure(width: float, panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draws NLL and divergence against epochs (Figure 4, right)."""
    figure, panels = _figure(10.5, 2)
    for k, row in enumerate(rows):
        style = {"color": f"C{k}", "marker": "o", "ms": 3, "label": row.name}
        panels[0].plot(row.curve.epoch, row.curve.valid_nll, **style)
        panels[1].plot(row.curve.epoch, row.curve.js, **style)
    panels[0].axhline(PAPER["E-NF"][0], color="black", lw=0.8, ls=":", label="E-NF in the paper, at its end")
    panels[1].axhline(PAPER["E-NF"][1], color="black", lw=0.8, ls=":")
    panels[0].set(xscale="log", xlabel="epochs", ylabel="validation NLL, nats")
    panels[1].set(xscale="log", yscale="log", xlabel="epochs", ylabel="JS of distances, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)


def draw_histograms(rows: Sequence[Row], known: np.ndarray, path: Path) -> None:
    """Draws the distances of every row over those of the training set (Figures 3 and 4)."""
    edges = np.linspace(0, metrics.MAX_DISTANCE, len(known) + 1)
    figure, panels = _figure(3.2 * len(rows), len(rows))
    for axes, row in zip(panels, rows, strict=True):
        counts = histogram(row.atoms).sum(axis=0)
        axes.stairs(known / known.sum(), edges, fill=True, color="#c9d3e0", label="training set")
        axes.stairs(counts / counts.sum(), edges, color="#c2410c", lw=1.2, label="drawn")
        axes.set(xlabel="distance / Å", xlim=(0, 9))
        axes.set_title(row.name, fontsize=9)
        axes.legend(frameon=False, fontsize=8, title=f"JS {metrics.js_divergence(counts, known):.4f}")
    panels[0].set_ylabel("part of the distances")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
