"""Results of some minutes on one GPU: ``python -m benchmarks.speed.gpu --data FOLDER --out FOLDER --seconds qm9=300``.

The stages run in this order, and each result is written at once: (check) loss, gradient, velocity, exact likelihood and
a sample against the CPU in float64; (speed) molecules per second in training; (profile) where a step spends its time;
(recipe) short trainings that differ in one setting; (train) the models; (use) molecules per second generated and
scored; (user) the package itself. Needs torch, torchdiffeq, numpy, safetensors, tqdm and ase. ``--rehearse`` runs all
stages with small sizes on a CPU; ``python -m benchmarks.speed.gpu --table FOLDER`` adds results to ``results/gpu``.

A folder of data holds ``qm9.npz`` in the compact format of the package with, for models that need them, ``bonds`` (the
matrices of all molecules, concatenated), ``bonds_known`` and the properties; and for flows of positions ``NAME.npz``
with ``train`` and ``valid``, shape (N, M, n).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.units import Hartree
from safetensors.torch import save_file
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.chem.bonds import bond_orders, stable_atoms
from ase_enf.data.properties import HARTREE, UNITS
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import Condition
from ase_enf.flow.continuous import Solver
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF, STOCHASTIC_SAMPLER
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.geometry import center
from ase_enf.training.build import widened
from ase_enf.training.captured import CapturedSteps, DeviceSet, FlatOptimizer
from ase_enf.training.objectives import FlowMatching
from benchmarks.speed.as_a_user import as_a_user

SPECIES = ("H", "C", "N", "O", "F")
NUMBERS = np.array([1, 6, 7, 8, 9])
SAMPLERS: dict[str, Solver | StochasticSampler] = {
    "stochastic": STOCHASTIC_SAMPLER,
    "flow": Solver("midpoint", steps=64, warp=1.75),
}
# A validation loss is the mean over so many draws of noise.
DRAWS = 8
PROPERTIES = ("alpha", "gap", "homo", "lumo", "mu", "Cv")


@dataclass(frozen=True)
class Recipe:
    """A model to train, and its settings."""

    source: str = "qm9"
    features: str = "joint"
    hidden: int = 128
    layers: int = 9
    parameterisation: str = "denoising"
    times: str = "beta"
    time_power: float = 1.8
    type_scale: float = 0.3
    conditions: tuple[str, ...] = ()
    graph: bool = False
    batch_size: int = 256
    learning_rate: float = 1e-3
    matrix_rate: float = 1e-2
    matrix_decay: float = 0.1
    warmup: int = 300
    cool_down: float = 0.9  # nine layers learned little at the peak rate, where losses of a thousand come and go
    products: str = "bf16"
    backend: str = "triton"
    init: str = ""  # weights of a flow of the same network, from which training goes on
    seed: int = 0


def read_split(folder: Path, recipe: Recipe, code: int) -> MoleculeSet:
    """Reads the training (0) or the validation set (1) of a recipe."""
    with np.load(folder if folder.is_file() else folder / f"{recipe.source}.npz") as table:
        if "train" in table:
            positions = table[("train", "valid")[code]].astype(np.float64)
            count, atoms, n = positions.shape
            numbers = np.ones(count * atoms, dtype=np.int64)
            return MoleculeSet.from_arrays(np.full(count, atoms), numbers, positions.reshape(-1, n), ())
        chosen = table["split"] == code
        if recipe.graph:
            chosen &= table["bonds_known"]
        sizes = table["n_atoms"].astype(np.int64)
        atoms = np.repeat(chosen, sizes)
        data = MoleculeSet.from_arrays(sizes[chosen], table["numbers"][atoms], table["positions"][atoms], SPECIES)
        if recipe.graph:
            data.bonds = torch.from_numpy(table["bonds"][np.repeat(chosen, sizes**2)])
            data.bond_starts = data.sizes.square().cumsum(0) - data.sizes.square()
        if recipe.conditions:
            in_unit = [
                Hartree if name in HARTREE else 1.0 for name in recipe.conditions
            ]  # the file's are published ones
            values = np.stack([table[name][chosen] for name in recipe.conditions], axis=1) * in_unit
            data.conditions = torch.from_numpy(values).float()
        return data


def build(recipe: Recipe, data: MoleculeSet) -> ENF:
    """Builds a flow for a data set, with new weights that depend only on the seed of the recipe, or those of a file."""
    known: dict[str, Any] = {
        "sizes": dict(sorted(Counter(data.sizes.tolist()).items())),
        "compositions": dict(sorted(data.compositions.items()))
        if recipe.features == "given" and not recipe.init
        else {},
        "conditions": tuple(
            Condition.of(name, UNITS.get(name, ""), values, data.sizes.numpy())
            for name, values in zip(recipe.conditions, data.conditions.double().numpy().T, strict=True)
        )
        if recipe.conditions
        else (),
        "graph": recipe.graph,
        "path": "linear",
    }
    provenance = {"objective": "flow_matching", "recipe": vars(recipe)}
    if recipe.init:
        start = load(recipe.init)  # whose counts of sizes and compositions stay
        known |= {"sizes": start.config.sizes, "compositions": start.config.compositions}
        config = replace(start.config, **known)
        model = ENF(config, provenance | {"init_from": start.name})
        model.load_state_dict(widened(start.state_dict(), start.config, config))
        return model
    joint = recipe.features == "joint"
    shift, scale = data.feature_standardisation(recipe.type_scale) if joint else ((), ())
    config = ENFConfig(
        features=recipe.features,
        species=() if recipe.features == "none" else SPECIES,
        dimension=data.positions.shape[-1],
        hidden=recipe.hidden,
        layers=recipe.layers,
        radial=16,
        position_scale=data.position_scale(),
        feature_shift=shift,
        feature_scale=scale,
        parameterisation=recipe.parameterisation,
        feature_std=data.feature_std(scale) if recipe.parameterisation == "denoising" and scale else 1.0,
        **known,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        return ENF(config, provenance)


class Report:
    """Writes every result at once to a file of JSON lines and to the terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def __call__(self, **row: Any) -> None:
        """Adds a row."""
        row = {"at": round(self.elapsed, 1)} | {
            key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def use_products(model: ENF, products: str, backend: str) -> None:
    """Sets the precision of the products of pairs, "bf16", "tf32" or "float32", and their backend."""
    torch.set_float32_matmul_precision("highest" if products == "float32" else "high")
    model.dynamics.network.multiply_in(torch.bfloat16 if products == "bf16" else None)
    if model.device.type == "cuda":
        model.use_backend(backend)


def copy_of(model: ENF, optimizer: FlatOptimizer | None = None, vector: Tensor | None = None) -> ENF:
    """Returns a copy of a flow on the CPU, with the same weights or those of a flat vector."""
    own = ENF(model.config, model.provenance)
    own.load_state_dict(model.state_dict() if optimizer is None else optimizer.state(vector))
    return own.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
def check(data: MoleculeSet, recipe: Recipe, device: torch.device, report: Report) -> None:
    """Compares the device with the CPU in float64, with the same noise, on an untrained network."""
    reference = build(recipe, data).double()
    for layer in reference.dynamics.network.layers:  # fresh weights hardly move the positions
        torch.nn.init.xavier_uniform_(layer.position_out.weight, gain=0.05)
    generator = torch.Generator().manual_seed(1)
    batch = data.batch(torch.arange(0, 4 * 97, 97)).to(dtype=torch.float64)
    width = reference.config.flow_features
    noise = torch.randn(*batch.mask.shape, width, generator=generator, dtype=torch.float64)
    encoded = reference.encode(batch, noise)
    z_x = center(torch.randn(encoded.x.shape, generator=generator, dtype=torch.float64), batch.mask)
    z_h = torch.randn(encoded.h.shape, generator=generator, dtype=torch.float64) * batch.mask.unsqueeze(-1)
    t = torch.tensor([0.02, 0.1, 0.3, 0.9], dtype=torch.float64)
    along = t[:, None, None]
    x, h = torch.lerp(encoded.x, z_x, along), torch.lerp(encoded.h, z_h, along)
    solver = Solver("rk4", steps=4, warp=2.0)

    def gradient(model: ENF) -> Tensor:
        model.requires_grad_(True)
        here = Batch(
            *(part.to(device=model.device, dtype=model.dtype) for part in batch[:3]), batch.mask.to(model.device)
        )
        loss = FlowMatching(recipe.times, recipe.time_power)(model, here, torch.Generator().manual_seed(2)).loss
        pieces = torch.autograd.grad(loss, list(model.dynamics.parameters()))
        model.requires_grad_(False)
        return torch.cat([piece.flatten() for piece in pieces])

    def measure(model: ENF) -> dict[str, Tensor]:
        here = dict(device=model.device, dtype=model.dtype)
        mask = batch.mask.to(model.device)
        out = {"gradient": gradient(model)}
        with torch.no_grad():
            out["dx"], out["dh"] = model.velocity(mask)(t.to(**here), x.to(**here), h.to(**here))
            if model.dynamics.network.layers[0].messages.products is None:
                moved = Batch(*(part.to(**here) for part in batch[:3]), mask)
                out["log_prob"] = model.log_prob(moved, noise.to(**here), solver=solver, intervals=16).log_prob
                out["sample"] = model.sample(z_x.to(**here), z_h.to(**here), mask, solver=SAMPLERS["flow"]).positions
        return {key: value.detach().double().cpu() for key, value in out.items()}

    expected = measure(reference)
    for backend in ("torch", "triton") if device.type == "cuda" else ("torch",):
        for products in ("float32", "tf32", "bf16"):
            model = copy_of(reference).float().to(device)
            use_products(model, products, backend)
            found = measure(model)
            errors = {
                f"{key}_error": float((found[key] - expected[key]).norm() / expected[key].norm())
                for key in found
                if key != "log_prob"
            }
            if "log_prob" in found:
                errors["log_prob_error_nats"] = float((found["log_prob"] - expected["log_prob"]).abs().max())
            report(stage="check", backend=backend, products=products, **errors)


# ---------------------------------------------------------------------------------------------------------------------
class Run:
    """One training: the model, its steps and its progress."""

    def __init__(self, recipe: Recipe, data: MoleculeSet, device_set: DeviceSet, device: torch.device) -> None:
        self.recipe, self.device_set, self.device = recipe, device_set, device
        self.model = build(recipe, data).to(device)
        use_products(self.model, recipe.products, recipe.backend)
        self.optimizer = FlatOptimizer(
            self.model, recipe.learning_rate, recipe.matrix_rate, recipe.matrix_decay, (0.999, 0.9998)
        )
        on_gpu = device.type == "cuda"
        objective = FlowMatching(recipe.times, recipe.time_power)
        start = time.perf_counter()
        self.steps = CapturedSteps(
            self.model, device_set, objective, self.optimizer, recipe.batch_size, compile=on_gpu, capture=on_gpu
        )
        if on_gpu:
            self.steps.prepare()
        synchronise(device)
        self.preparation = time.perf_counter() - start
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.done = 0
        self.plan: list[tuple[int, Tensor]] = []

    def advance(self, count: int) -> None:
        """Takes steps."""
        for _ in range(count):
            if not self.plan:
                self.plan = self.device_set.epoch(self.recipe.batch_size, self.generator)
            self.steps(*self.plan.pop())
            self.done += 1

    def train(self, seconds: float, report: Report, name: str, save: Callable[[str], None] | None = None) -> float:
        """Trains for some seconds: warm-up, constant rate, and half a cosine to zero; returns molecules per second."""
        recipe, start, last, saved = self.recipe, time.perf_counter(), 0.0, 0.0
        rate = 0.0
        while (elapsed := time.perf_counter() - start) < seconds:
            left = 1.0 - elapsed / seconds
            rate = min(1.0, (self.done + 1) / recipe.warmup)
            rate *= 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / recipe.cool_down))
            self.optimizer.rate.fill_(rate)
            self.advance(10)
            if self.done % 50 == 0:
                synchronise(self.device)
            if elapsed - last > max(seconds / 40, 2.0):
                last = elapsed
                self.log(report, name, elapsed, rate)
            if save and elapsed - saved > 60.0:
                saved = elapsed
                save(name)
        synchronise(self.device)
        elapsed = time.perf_counter() - start
        self.log(report, name, elapsed, rate)
        return self.done * recipe.batch_size / elapsed

    def log(self, report: Report, name: str, elapsed: float, rate: float) -> None:
        """Reports the progress of the run; the loss is the mean since the last report."""
        before = getattr(self, "_logged", 0)
        loss = float(self.steps.loss_sum) / max(self.done - before, 1)
        self._logged = self.done
        self.steps.loss_sum.zero_()
        report(
            stage="log",
            name=name,
            step=self.done,
            seconds=elapsed,
            loss=loss,
            rate=rate,
            norm=float(self.optimizer.norm),
            skipped=int(self.optimizer.skipped),
        )


def validation_loss(model: ENF, valid: DeviceSet) -> float:
    """Returns the mean squared error of the velocity on validation molecules, always with the same times and noise."""
    objective = FlowMatching("beta", 1.8)
    total, count = 0.0, 0
    with torch.no_grad():
        for k, width in enumerate(valid.widths):
            index = valid.members[k]
            batch = valid.batch(index, width)
            for draw in range(DRAWS):
                generator = torch.Generator().manual_seed(1000 * k + draw)
                total += float(objective(model, batch, generator).value) * len(index)
                count += len(index)
    return total / count


def use(model: ENF, data: DeviceSet, n: int, device: torch.device) -> dict[str, float]:
    """Draws n molecules with the sizes of a set by both samplers, batched by padded width; counts the stable ones."""
    known = model.config.species and model.config.dimension == 3
    if not known or model.config.conditions:
        return {}
    generator = torch.Generator(device).manual_seed(0)
    chosen = torch.from_numpy(np.random.default_rng(0).choice(len(data.sizes), n)).to(device)
    out: dict[str, float] = {}
    for name, solver in SAMPLERS.items():
        atoms = molecules = odd = total = 0
        seconds = 0.0
        low = 0
        for width in data.widths:
            index = chosen[(data.sizes[chosen] > low) & (data.sizes[chosen] <= width)]
            low = width
            if not len(index):
                continue
            batch = data.batch(index, width)
            mask, context = batch.mask, model.context(batch)

            def latent(mask: Tensor = mask) -> tuple[Tensor, Tensor]:
                x = torch.randn(*mask.shape, 3, generator=generator, device=device)
                h = torch.randn(*mask.shape, model.config.flow_features, generator=generator, device=device)
                return center(x, mask), h * mask.unsqueeze(-1)

            synchronise(device)
            start = time.perf_counter()
            drawn = model.sample(*latent(), mask, context, solver, latent)
            synchronise(device)
            seconds += time.perf_counter() - start
            real = mask.cpu().numpy()
            finite = torch.isfinite(drawn.positions).all(dim=2).all(dim=1).cpu().numpy()
            numbers = np.where(real, NUMBERS[drawn.types.argmax(dim=-1).cpu().numpy()], 0)
            positions = torch.nan_to_num(drawn.positions).double().cpu().numpy()
            stable = stable_atoms(numbers, bond_orders(numbers, positions)) & finite[:, None]
            odd += int((numbers.sum(axis=1) % 2).sum())
            molecules += int((stable | ~real).all(axis=1).sum())
            atoms, total = atoms + int((stable & real).sum()), total + int(real.sum())
        out |= {
            f"{name}_atoms": atoms / total,
            f"{name}_molecules": molecules / n,
            f"{name}_odd": odd / n,
            f"{name}_molecules_per_s": n / seconds,
        }
    return out


def score_speed(model: ENF, data: DeviceSet, device: torch.device, n: int) -> dict[str, float]:
    """Times exact scores of molecules of one padded size by the flow's own solver."""
    middle = len(data.widths) // 2
    batch = data.batch(data.members[middle][:n], data.widths[middle])
    out = {}
    for attempt in ("first", "second"):
        synchronise(device)
        start = time.perf_counter()
        with torch.no_grad():
            model.log_prob(batch)
        synchronise(device)
        out[f"{attempt}_score_ms_a_molecule"] = (time.perf_counter() - start) / len(batch.mask) * 1000
    return out


def finish(run: Run, name: str, valid: DeviceSet, report: Report, n: int, speed: float, kept: bool) -> None:
    """Measures the averaged weights of a run, and keeps those with the best validation loss."""
    losses, models = {}, {}
    vectors = {"last": run.optimizer.weights, "ema_0.999": run.optimizer.averages[0]}
    vectors |= {"ema_0.9998": run.optimizer.averages[1]}
    for which, vector in vectors.items():
        models[which] = copy_of(run.model, run.optimizer, vector).to(run.device)
        use_products(models[which], "tf32", run.recipe.backend)
        losses[which] = validation_loss(models[which], valid)
    best = min(losses, key=losses.__getitem__)
    model = models[best]
    count = int(run.device_set.sizes.numel())
    if kept:
        model.provenance |= {
            "step": run.done,
            "epoch": round(run.done * run.recipe.batch_size / count, 2),
            "molecules": count,
            "molecules_per_s": round(speed),
            "weights": best,
            "validation_loss": losses[best],
            "device": device_name(run.device),
            "torch": torch.__version__,
        }
        copy_of(model).save(report.folder / f"{name}.safetensors")
    report(
        stage="result",
        name=name,
        **vars(run.recipe),
        preparation_s=run.preparation,
        steps=run.done,
        epochs=run.done * run.recipe.batch_size / count,
        molecules_per_s=speed,
        best=best,
        valid_loss=losses,
        n=n,
        **(use(model, run.device_set, n, run.device) if n else {}),
    )


def save_state(run: Run, folder: Path, name: str) -> None:
    """Writes the averaged weights so far, so that an interrupted run is not lost."""
    save_file(run.optimizer.state(run.optimizer.averages[0]), folder / f"{name}_so_far.safetensors")


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


RECIPES: dict[str, dict[str, Any]] = {
    "denoising, beta 1.8": {},
    "endpoint, beta 1.8": {"parameterisation": "endpoint"},
    "denoising, u^1.8": {"times": "power"},
    "weight decay / 10": {"matrix_decay": 0.01},
    "rates / 2": {"matrix_rate": 5e-3, "learning_rate": 5e-4},
    "rates x 2": {"matrix_rate": 2e-2, "learning_rate": 2e-3},
    "types x 2": {"type_scale": 0.6},
    "velocity, u^1.3": {"parameterisation": "velocity", "times": "power", "time_power": 1.3},
}
PARTICLES: dict[str, Any] = {
    "features": "none",
    "parameterisation": "velocity",
    "times": "power",
    "time_power": 1.3,
    "matrix_decay": 0.0,
    "hidden": 64,
    "layers": 4,
    "batch_size": 512,
    "products": "tf32",
    "cool_down": 1.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qm9": {},
    "qm9-conditional": {"features": "given", "layers": 6},
    "qm9-small": {"hidden": 64, "layers": 6},
    "qm9-conformers": {"features": "given", "layers": 6, "graph": True},
    "qm9-properties": {"layers": 6, "conditions": PROPERTIES},
    "qm9-thermal": {"source": "thermal", "features": "given", "layers": 6, "graph": True},
    "qm9-positional": {"source": "qm9_positional", "features": "none", "hidden": 64, "layers": 6},
    "dw4": {**PARTICLES, "source": "dw4", "hidden": 32, "layers": 3},
    "lj13": {**PARTICLES, "source": "lj13"},
    "lj13-factor2": {**PARTICLES, "source": "lj13-factor2"},
    "lj55": {**PARTICLES, "source": "lj55", "batch_size": 256},
}


def changed(recipe: Recipe, items: list[str]) -> Recipe:
    """Returns a recipe with ``key=value`` pairs read into it."""
    changes: dict[str, Any] = {}
    for item in items:
        key, value = item.split("=", 1)
        changes[key] = type(getattr(Recipe(), key))(value)
    return replace(recipe, **changes)


def plan_of(item: str) -> tuple[str, float, list[str]]:
    """Reads NAME=SECONDS,key=value,..."""
    first, *more = item.split(",")
    name, _, seconds = first.partition("=")
    return name, float(seconds), more


def main() -> None:
    """Runs the requested stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of data, or QM9 alone as one .npz")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--table", type=Path, help="add the results in this folder to the table, and nothing else")
    parser.add_argument("--stages", nargs="*", default=["check", "speed", "profile", "recipe", "train"])
    parser.add_argument("--models", nargs="*", default=["qm9"], help="models to time, as NAME or NAME:key=value,...")
    parser.add_argument("--recipe-seconds", type=float, default=12.0, help="length of each short training")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="which of the short trainings")
    parser.add_argument("--seconds", nargs="*", default=["qm9=300"], help="NAME=SECONDS[,key=value...] of training")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after which no training goes on")
    parser.add_argument("--set", nargs="*", default=[], help="changes of every recipe, as matrix_decay=0.01")
    parser.add_argument("-n", type=int, default=1000, help="molecules drawn for the stability of a final model")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args()
    if options.table:
        write_table(options.table / "results.jsonl")
        return
    if not (options.data and options.out):
        parser.error("--data and --out are needed")
    device = torch.device("cpu" if options.rehearse else "cuda")
    report = Report(options.out)
    report(stage="start", device=device_name(device), torch=torch.__version__)
    small = {"hidden": 16, "layers": 2, "batch_size": 16, "warmup": 5} if options.rehearse else {}
    sets: dict[tuple[Any, ...], tuple[MoleculeSet, DeviceSet, DeviceSet]] = {}

    def recipe_of(name: str, more: list[str] = []) -> Recipe:  # noqa: B006 (never changed)
        return replace(changed(replace(Recipe(), **MODELS[name]), [*options.set, *more]), **small)

    def data_of(recipe: Recipe) -> tuple[MoleculeSet, DeviceSet, DeviceSet]:
        key = (recipe.source, recipe.graph, recipe.conditions, recipe.features == "none")
        if key not in sets:
            data, valid = (read_split(options.data, recipe, code) for code in (0, 1))
            chosen = np.random.default_rng(1).permutation(len(valid))[: 64 if options.rehearse else 2048]
            sets[key] = (data, DeviceSet(data, device), DeviceSet(_subset(valid, chosen), device))
        return sets[key]

    def made(name: str) -> tuple[Recipe, ENF]:
        recipe = recipe_of(name)
        model = load(report.folder / f"{name}.safetensors" if "train" in options.stages else name).to(device)
        use_products(model, "tf32", recipe.backend)
        return recipe, model

    qm9 = recipe_of("qm9")
    if "check" in options.stages:
        check(data_of(qm9)[0], replace(qm9, hidden=min(qm9.hidden, 64), layers=4), device, report)
    if "speed" in options.stages:
        for item in options.models:
            name, _, more = item.partition(":")
            recipe = recipe_of(name, more.split(",") if more else [])
            data, device_set, _ = data_of(recipe)
            speed_of(item, recipe, data, device_set, device, report)
    if "profile" in options.stages:
        data, device_set, _ = data_of(qm9)
        profile(qm9, data, device_set, device, report)
    if "recipe" in options.stages:
        for name in options.recipes:
            recipe = replace(qm9, **RECIPES[name])
            data, device_set, valid = data_of(recipe)
            run = Run(recipe, data, device_set, device)
            speed = run.train(options.recipe_seconds, report, name)
            finish(run, name, valid, report, min(options.n, 512), speed, kept=False)
    if "train" in options.stages:
        planned = [plan_of(item) for item in options.seconds]
        with ThreadPoolExecutor(1) as reader:  # the next set is read while a model learns
            ready = reader.submit(data_of, recipe_of(planned[0][0], planned[0][2]))
            for k, (name, asked, more) in enumerate(planned):
                recipe = recipe_of(name, more)
                try:
                    data, device_set, valid = ready.result()
                    run = Run(recipe, data, device_set, device)
                    if k + 1 < len(planned):
                        ready = reader.submit(data_of, recipe_of(planned[k + 1][0], planned[k + 1][2]))
                    seconds = min(asked, options.until - report.elapsed)
                    if seconds < 5.0 and not options.rehearse:
                        report(stage="skipped", name=name)
                        continue
                    save = lambda what, run=run: save_state(run, report.folder, what)  # noqa: E731
                    speed = run.train(seconds, report, name, save if seconds > 150 else None)
                    finish(run, name, valid, report, options.n, speed, kept=True)
                except (RuntimeError, ValueError, OSError) as error:  # the other models still have their turn
                    report(stage="failed", name=name, error=str(error)[:400])
                    if k + 1 < len(planned):
                        ready = reader.submit(data_of, recipe_of(planned[k + 1][0], planned[k + 1][2]))
    if "use" in options.stages:
        for name in options.models:
            recipe, model = made(name)
            _, device_set, _ = data_of(recipe)
            drawn = use(model, device_set, options.n, device)
            scored = score_speed(model, device_set, device, 2 if options.rehearse else 64)
            report(stage="use", name=name, n=options.n, **drawn, **scored)
    if "user" in options.stages:
        for name in options.models:
            recipe, model = made(name)
            as_a_user(name, model, data_of(recipe)[0], report, options.n, options.recipe_seconds, recipe.batch_size)


def speed_of(
    name: str,
    recipe: Recipe,
    data: MoleculeSet,
    device_set: DeviceSet,
    device: torch.device,
    report: Report,
    steps: int = 60,
) -> None:
    """Times training steps after everything is compiled and captured."""
    run = Run(recipe, data, device_set, device)
    steps = steps if device.type == "cuda" else 4
    run.advance(steps)
    synchronise(device)
    start = time.perf_counter()
    run.advance(steps)
    synchronise(device)
    seconds = time.perf_counter() - start
    speed = steps * recipe.batch_size / seconds
    report(
        stage="speed",
        name=name,
        hidden=recipe.hidden,
        layers=recipe.layers,
        batch_size=recipe.batch_size,
        products=recipe.products,
        backend=recipe.backend,
        preparation_s=run.preparation,
        molecules_per_s=speed,
        tflop_per_s=speed * pair_flop(recipe.hidden, recipe.layers) / 1e12,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
    )


def profile(recipe: Recipe, data: MoleculeSet, device_set: DeviceSet, device: torch.device, report: Report) -> None:
    """Reports where replayed steps spend their time."""
    run = Run(recipe, data, device_set, device)
    run.advance(5)
    synchronise(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as watched:
        run.advance(5)
        synchronise(device)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = watched.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)
    (report.folder / "profile.txt").write_text(table)
    print(table[:9000])


def pair_flop(hidden: int, layers: int) -> float:
    """Returns the operations in the products of pairs in a training step for one molecule of QM9 (333 pairs)."""
    return 3 * 2 * layers * 333.0 * (2 * hidden**2 + 34 * hidden)  # forwards, and twice backwards


def write_table(path: Path) -> None:
    """Adds the trainings in JSON lines to ``results/gpu`` and writes ``results/gpu_check``."""
    import pandas as pd  # the card's machine may lack it

    from benchmarks.report import RESULTS, write_results

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cards = ", ".join(
        sorted({f"{line['device']} (torch {line['torch']})" for line in lines if line["stage"] == "start"})
    )
    rows = []
    for line in (line for line in lines if line["stage"] == "result"):
        speed = line["molecules_per_s"]
        losses = [log["loss"] for log in lines if log["stage"] == "log" and log["name"] == line["name"]]
        rows.append(
            {
                "run": line["name"],
                "network": f"{line['layers']} x {line['hidden']}",
                "backend": "triton" if line.get("backend") == "triton" else "torch, compiled",
                "begins from": line.get("init") or "nothing",
                "steps": line["steps"],
                "batch": line["batch_size"],
                "epochs": f"{line['epochs']:.1f}",
                "molecules/s": f"{speed:,.0f}",
                "made ready in, s": f"{line['preparation_s']:.0f}",
                "validation loss": f"{line['valid_loss'][line['best']]:.4f}",
                "windows with a loss above 2": f"{sum(loss > 2 for loss in losses)} of {len(losses)}",
            }
        )
    notes = (
        f"Measured on one {cards}; flow matching, products of pairs in bf16 (TF32 for particles), a step one CUDA "
        "graph. The loss is the mean squared error of the velocity at Beta(1, 1.8) times on up to 2,048 validation "
        "molecules, the same noise for all: runs of one data set and kind of features can be compared. Rates and "
        "schedules are on the model cards; so is what the models draw. `torch, compiled` are torch's layers by "
        "`torch.compile`, which takes some 90 s the first time. `lj13-factor2`, `qm9` and `qm9 as positions of 19 "
        "atoms` were trained at the same time on one card, whose speed they shared."
    )
    table = pd.DataFrame(rows)
    if (earlier := RESULTS / "gpu.csv").exists():  # trainings of other days stay in the table
        known = pd.read_csv(earlier, comment="#", dtype=str)
        table = pd.concat([known[~known["run"].isin(table["run"])], table])
    write_results(table, "gpu", "Minutes of a GPU", notes)
    checks = [line for line in lines if line["stage"] == "check"]
    if checks:
        columns = {key: key.removesuffix("_error").replace("_", " ") for key in checks[0] if key.endswith("_error")}
        table = [
            {"backend": line.get("backend", "torch"), "products": line["products"]}
            | {name: f"{line[key]:.1e}" if key in line else "" for key, name in columns.items()}
            | {"log-likelihood, nats": f"{line['log_prob_error_nats']:.1e}" if "log_prob_error_nats" in line else ""}
            for line in checks
        ]
        text = (
            f"{cards} against the CPU in float64, the same noise, 4 layers of 64 features: relative error of the "
            "gradient of the loss, of the velocity, of positions drawn by 64 midpoint steps, and largest error of an "
            "exact log-likelihood. Products in TF32 and bf16 are those of training; scores are computed in float32."
        )
        write_results(pd.DataFrame(table), "gpu_check", "A GPU computes what a CPU does", text)


def _subset(molecules: MoleculeSet, index: np.ndarray) -> MoleculeSet:
    """Returns some molecules of a set."""
    sizes, starts = molecules.sizes.numpy(), molecules.starts.numpy()
    atoms = np.concatenate([np.arange(starts[k], starts[k] + sizes[k]) for k in index])
    numbers, positions = molecules.charges[:, 0].numpy()[atoms], molecules.positions.numpy()[atoms]
    part = MoleculeSet.from_arrays(sizes[index], numbers, positions, SPECIES if molecules.types.shape[-1] else ())
    if molecules.conditions is not None:
        part.conditions = molecules.conditions[index]
    if molecules.bonds is not None:
        first = molecules.bond_starts.numpy()
        places = np.concatenate([np.arange(first[k], first[k] + sizes[k] ** 2) for k in index])
        part.bonds = molecules.bonds[places]
        part.bond_starts = part.sizes.square().cumsum(0) - part.sizes.square()
    return part


if __name__ == "__main__":
    main()
