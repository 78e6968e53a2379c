"""What one GPU gives in minutes: ``python -m benchmarks.gpu --data QM9.npz --out FOLDER --minutes 8``.

In this order, each result written at once: (check) loss, velocity, exact likelihood and a sample against the CPU in
float64; (speed) molecules a second in training; (recipe) short trainings that differ in one thing; (train) the models.
Needs torch, torchdiffeq, numpy, safetensors, tqdm and ase. ``--rehearse`` does all of it at small sizes on a CPU;
``python -m benchmarks.gpu --table FOLDER`` makes ``results/gpu`` of what came back.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.chem.bonds import bond_orders, stable_atoms
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF, STOCHASTIC_SAMPLER
from ase_enf.geometry import center
from ase_enf.training.captured import CapturedSteps, DeviceSet, FlatOptimizer
from ase_enf.training.objectives import FlowMatching

SPECIES = ("H", "C", "N", "O", "F")
NUMBERS = np.array([1, 6, 7, 8, 9])
SAMPLERS = {
    "stochastic": STOCHASTIC_SAMPLER,
    "flow": Solver("midpoint", steps=64, warp=1.75),
}
# A validation loss is the mean over so many draws of noise.
DRAWS = 8


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    features: str = "joint"
    hidden: int = 192
    layers: int = 9
    parameterisation: str = "denoising"
    times: str = "beta"
    time_power: float = 1.8
    type_scale: float = 0.3
    batch_size: int = 256
    learning_rate: float = 1e-3
    matrix_rate: float = 1e-2
    matrix_decay: float = 0.1
    warmup: int = 300
    cool_down: float = 0.9  # nine layers learned little at the peak rate, where losses of a thousand come and go
    products: str = "bf16"
    seed: int = 0


def read_split(path: Path, code: int) -> MoleculeSet:
    """Reads one split of QM9 in the package's compact form."""
    with np.load(path) as table:
        chosen = table["split"] == code
        sizes = table["n_atoms"].astype(np.int64)
        atoms = np.repeat(chosen, sizes)
        return MoleculeSet.from_arrays(sizes[chosen], table["numbers"][atoms], table["positions"][atoms], SPECIES)


def build(recipe: Recipe, data: MoleculeSet) -> ENF:
    """Builds a flow for a data set, with fresh weights that depend on the recipe's seed alone."""
    shift, scale = data.feature_standardisation(recipe.type_scale) if recipe.features == "joint" else ((), ())
    std = data.feature_std(scale) if recipe.parameterisation == "denoising" and scale else 1.0
    config = ENFConfig(
        features=recipe.features,
        species=SPECIES,
        sizes=dict(sorted(Counter(data.sizes.tolist()).items())),
        hidden=recipe.hidden,
        layers=recipe.layers,
        radial=16,
        position_scale=data.position_scale(),
        feature_shift=shift,
        feature_scale=scale,
        parameterisation=recipe.parameterisation,
        feature_std=std,
        path="linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        return ENF(config, {"objective": "flow_matching", "recipe": vars(recipe)})


class Report:
    """Writes every result to a file of lines of JSON at once, and to the terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.start = time.perf_counter()

    def __call__(self, **row: Any) -> None:
        """Adds a row."""
        row = {"at": round(time.perf_counter() - self.start, 1)} | {
            key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def use_products(model: ENF, products: str) -> None:
    """Sets the products of pairs: "bf16", "tf32" or "float32"."""
    torch.set_float32_matmul_precision("highest" if products == "float32" else "high")
    model.dynamics.network.multiply_in(torch.bfloat16 if products == "bf16" else None)


def copy_of(model: ENF, optimizer: FlatOptimizer | None = None, vector: Tensor | None = None) -> ENF:
    """Returns a flow of its own with the same weights, or those of a flat vector, on the CPU."""
    own = ENF(model.config, model.provenance)
    own.load_state_dict(model.state_dict() if optimizer is None else optimizer.state(vector))
    return own.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
def check(data: MoleculeSet, recipe: Recipe, device: torch.device, report: Report) -> None:
    """Compares the device with the CPU in float64, with the same noise, on a network that has learned nothing."""
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

    def measure(model: ENF) -> dict[str, Tensor]:
        here = dict(device=model.device, dtype=model.dtype)
        mask = batch.mask.to(model.device)
        dx, dh = model.velocity(mask)(t.to(**here), x.to(**here), h.to(**here))
        out = {"dx": dx, "dh": dh}
        if model.dynamics.network.layers[0].messages.products is None:
            moved = Batch(*(part.to(**here) for part in batch[:3]), mask)
            out["log_prob"] = model.log_prob(moved, noise.to(**here), solver=solver, intervals=16).log_prob
            out["sample"] = model.sample(z_x.to(**here), z_h.to(**here), mask, solver=SAMPLERS["flow"]).positions
        return {key: value.detach().double().cpu() for key, value in out.items()}

    with torch.no_grad():
        expected = measure(reference)
        for products in ("float32", "tf32", "bf16"):
            model = copy_of(reference).float().to(device)
            use_products(model, products)
            found = measure(model)
            errors = {
                f"{key}_error": float((found[key] - expected[key]).norm() / expected[key].norm())
                for key in found
                if key != "log_prob"
            }
            if "log_prob" in found:
                errors["log_prob_error_nats"] = float((found["log_prob"] - expected["log_prob"]).abs().max())
            report(stage="check", products=products, **errors)


# ---------------------------------------------------------------------------------------------------------------------
class Run:
    """One training: the model, its steps and where they stand."""

    def __init__(self, recipe: Recipe, data: MoleculeSet, device_set: DeviceSet, device: torch.device) -> None:
        self.recipe, self.device_set, self.device = recipe, device_set, device
        self.model = build(recipe, data).to(device)
        use_products(self.model, recipe.products)
        self.optimizer = FlatOptimizer(
            self.model, recipe.learning_rate, recipe.matrix_rate, recipe.matrix_decay, (0.999, 0.9998)
        )
        on_gpu = device.type == "cuda"
        objective = FlowMatching(recipe.times, recipe.time_power)
        start = time.perf_counter()
        self.steps = CapturedSteps(
            self.model, device_set, objective, self.optimizer, recipe.batch_size, compile=on_gpu, capture=on_gpu
        )
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
        """Trains for some seconds: warm-up, constant rate, and half a cosine to zero; returns molecules a second."""
        recipe, start, last, cooled = self.recipe, time.perf_counter(), 0.0, False
        rate = 0.0
        while (elapsed := time.perf_counter() - start) < seconds:
            left = 1.0 - elapsed / seconds
            if save and left < recipe.cool_down and not cooled:
                cooled = True
                save("trunk")
            rate = min(1.0, (self.done + 1) / recipe.warmup)
            rate *= 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / recipe.cool_down))
            self.optimizer.rate.fill_(rate)
            self.advance(10)
            if self.done % 50 == 0:
                synchronise(self.device)
            if elapsed - last > max(seconds / 40, 2.0):
                last = elapsed
                self.log(report, name, elapsed, rate)
        synchronise(self.device)
        elapsed = time.perf_counter() - start
        self.log(report, name, elapsed, rate)
        return self.done * recipe.batch_size / elapsed

    def log(self, report: Report, name: str, elapsed: float, rate: float) -> None:
        """Writes where the run stands; the loss is the mean since the last time."""
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
    """Mean squared error of the velocity on validation molecules, with times and noise that are always the same."""
    objective = FlowMatching("beta", 1.8)
    total, count = 0.0, 0
    with torch.no_grad():
        for k, width in enumerate(valid.widths):
            if not len(index := valid.members[k]):
                continue
            batch = valid.batch(index, width)
            for draw in range(DRAWS):
                generator = torch.Generator().manual_seed(1000 * k + draw)
                total += float(objective(model, batch, generator).value) * len(index)
                count += len(index)
    return total / count


def stability(
    model: ENF, n: int, sizes: np.ndarray, device: torch.device, kinds: Tensor | None = None
) -> dict[str, float]:
    """Draws n molecules by both samplers, in one padded batch, and counts stable atoms and molecules."""
    width, features = int(sizes.max()), model.config.flow_features
    generator = torch.Generator(device).manual_seed(0)
    mask = torch.from_numpy(np.arange(width) < sizes[:, None]).to(device)

    def latent() -> tuple[Tensor, Tensor]:
        x = torch.randn(n, width, 3, generator=generator, device=device)
        h = torch.randn(n, width, features, generator=generator, device=device)
        return center(x, mask), h * mask.unsqueeze(-1)

    out = {}
    for name, solver in SAMPLERS.items():
        drawn = model.sample(*latent(), mask, kinds, solver, latent)
        finite = torch.isfinite(drawn.positions).all(dim=2).all(dim=1).cpu().numpy()
        numbers = np.where(mask.cpu().numpy(), NUMBERS[drawn.types.argmax(dim=-1).cpu().numpy()], 0)
        positions = torch.nan_to_num(drawn.positions).double().cpu().numpy()
        stable = stable_atoms(numbers, bond_orders(numbers, positions)) & finite[:, None]
        odd = (numbers.sum(axis=1) % 2).mean()
        whole = (stable | (numbers == 0)).all(axis=1)
        out |= {
            f"{name}_atoms": float(stable.sum() / sizes.sum()),
            f"{name}_molecules": float(whole.mean()),
            f"{name}_odd": float(odd),
        }
    return out


def draw_sizes(data: MoleculeSet, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sizes of n molecules of a set chosen at random, and which."""
    index = np.random.default_rng(0).choice(len(data), n)
    return data.sizes.numpy()[index], index


def finish(
    run: Run, name: str, data: MoleculeSet, valid: DeviceSet, report: Report, n: int, speed: float, kept: bool
) -> None:
    """Measures the averaged weights of a run; keeps the best by validation loss."""
    losses, models = {}, {}
    vectors = {"last": run.optimizer.weights, "ema_0.999": run.optimizer.averages[0]}
    vectors |= {"ema_0.9998": run.optimizer.averages[1]}
    for which, vector in vectors.items():
        models[which] = copy_of(run.model, run.optimizer, vector)
        use_products(models[which], "tf32")
        losses[which] = validation_loss(models[which].to(run.device), valid)
    best = min(losses, key=losses.__getitem__)
    model = models[best]
    sizes, index = draw_sizes(data, n)
    kinds = None
    if model.features == "given":
        kinds = data.batch(torch.from_numpy(index)).types.to(run.device)
    start = time.perf_counter()
    found = stability(model, n, sizes, run.device, kinds)
    seconds = time.perf_counter() - start
    report(
        stage="result",
        name=name,
        **vars(run.recipe),
        preparation_s=run.preparation,
        steps=run.done,
        epochs=run.done * run.recipe.batch_size / len(data),
        molecules_per_s=speed,
        best=best,
        valid_loss=losses,
        n=n,
        sampling_s=seconds,
        **found,
    )
    if kept:
        model.provenance |= {
            "step": run.done,
            "epoch": round(run.done * run.recipe.batch_size / len(data), 2),
            "molecules": len(data),
            "molecules_per_s": round(speed),
            "weights": best,
            "validation_loss": losses[best],
            "device": device_name(run.device),
            "torch": torch.__version__,
        }
        model.cpu().save(report.folder / f"{name}.safetensors")


def save_state(run: Run, folder: Path, name: str) -> None:
    """Writes what the run needs to go on, in files of at most 16 MiB."""
    for key, value in run.optimizer.tensors().items():
        if value.numel() > 1 and key in ("weights", "momentum", "average_0"):
            save_file({key: value}, folder / f"{name}_{key}.safetensors")


def device_name(device: torch.device) -> str:
    """Names the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


RECIPES: dict[str, dict[str, Any]] = {
    "denoising, beta 1.8": {},
    "endpoint, beta 1.8": {"parameterisation": "endpoint"},
    "denoising, u^1.8": {"times": "power"},
    "weight decay / 10": {"matrix_decay": 0.01},
    "rates x 2": {"matrix_rate": 2e-2, "learning_rate": 2e-3},
    "types x 2": {"type_scale": 0.6},
    "velocity, u^1.3": {"parameterisation": "velocity", "times": "power", "time_power": 1.3},
}
MODELS: dict[str, dict[str, Any]] = {
    "qm9": {},
    "qm9-conditional": {"features": "given", "hidden": 128, "layers": 6},
    "qm9-small": {"hidden": 64, "layers": 6},
}


def main() -> None:
    """Runs the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="QM9 as .npz in the package's compact form")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--table", type=Path, help="write the table of the results in this folder, and nothing else")
    parser.add_argument("--stages", nargs="*", default=["check", "speed", "recipe", "train"])
    parser.add_argument("--sizes", nargs="*", default=["64x6", "128x6", "192x9"], help="widths x layers to time")
    parser.add_argument("--recipe-seconds", type=float, default=12.0, help="length of each short training")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="which of the short trainings")
    parser.add_argument("--seconds", nargs="*", default=["qm9=300"], help="models and seconds of training")
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe, as matrix_decay=0.01")
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
    data, valid_set = read_split(options.data, 0), read_split(options.data, 1)
    changes: dict[str, Any] = {}
    for item in options.set:
        key, value = item.split("=", 1)
        changes[key] = type(getattr(Recipe(), key))(value)
    recipe = replace(Recipe(), **changes)
    if options.rehearse:
        recipe = replace(recipe, hidden=16, layers=2, batch_size=16, warmup=5)
        MODELS["qm9-conditional"] |= {"hidden": 16, "layers": 2}
        MODELS["qm9-small"] |= {"hidden": 8, "layers": 2}
    device_set = DeviceSet(data, device)
    chosen = np.random.default_rng(1).permutation(len(valid_set))[: 64 if options.rehearse else 2048]
    valid = DeviceSet(_subset(valid_set, chosen), device)
    if "check" in options.stages:
        check(data, replace(recipe, hidden=min(recipe.hidden, 64), layers=4), device, report)
    if "speed" in options.stages:
        for size in options.sizes if not options.rehearse else ("8x2",):
            hidden, layers = map(int, size.split("x"))
            speed_of(replace(recipe, hidden=hidden, layers=layers), data, device_set, device, report)
    if "recipe" in options.stages:
        for name in options.recipes:
            run = Run(replace(recipe, **RECIPES[name]), data, device_set, device)
            speed = run.train(options.recipe_seconds, report, name)
            finish(run, name, data, valid, report, min(options.n, 512), speed, kept=False)
    if "train" in options.stages:
        for item in options.seconds:
            name, seconds = item.split("=")
            run = Run(replace(recipe, **MODELS[name]), data, device_set, device)
            save = lambda what, run=run, name=name: save_state(run, report.folder, f"{name}_{what}")  # noqa: E731
            speed = run.train(float(seconds), report, name, save if name == "qm9" else None)
            finish(run, name, data, valid, report, options.n, speed, kept=True)


def speed_of(
    recipe: Recipe, data: MoleculeSet, device_set: DeviceSet, device: torch.device, report: Report, steps: int = 60
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
        hidden=recipe.hidden,
        layers=recipe.layers,
        batch_size=recipe.batch_size,
        products=recipe.products,
        preparation_s=run.preparation,
        molecules_per_s=speed,
        tflop_per_s=speed * pair_flop(recipe.hidden, recipe.layers) / 1e12,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
    )


def pair_flop(hidden: int, layers: int) -> float:
    """Returns the operations of the pairs' products in a training step of one molecule of QM9, of 333 pairs."""
    return 3 * 2 * layers * 333.0 * (2 * hidden**2 + 34 * hidden)  # forwards, and twice backwards


def write_table(path: Path) -> None:
    """Writes ``results/gpu`` from lines of JSON."""
    import pandas as pd  # the card's machine may lack it

    from benchmarks.report import write_results

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cards = ", ".join(
        sorted({f"{line['device']} (torch {line['torch']})" for line in lines if line["stage"] == "start"})
    )
    rows = []
    for line in (line for line in lines if line["stage"] == "result"):
        speed = line["molecules_per_s"]
        spikes = [log["loss"] for log in lines if log["stage"] == "log" and log["name"] == line["name"]]
        rows.append(
            {
                "run": line["name"],
                "network": f"{line['layers']} x {line['hidden']}",
                "parameterisation": line["parameterisation"],
                "steps of 256": line["steps"],
                "epochs": f"{line['epochs']:.1f}",
                "molecules/s": f"{speed:,.0f}",
                "TFLOP/s": f"{speed * pair_flop(line['hidden'], line['layers']) / 1e12:.0f}",
                "validation loss": f"{line['valid_loss'][line['best']]:.4f}",
                "windows with a loss above 2": f"{sum(loss > 2 for loss in spikes)} of {len(spikes)}",
                "molecules stable, %": f"{100 * line['stochastic_molecules']:.1f}",
                "flow itself, %": f"{100 * line['flow_molecules']:.1f}",
                "drawn": line["n"],
            }
        )
    notes = (
        f"Measured on one {cards}; flow matching of QM9's train split, products of pairs in bf16, a step one CUDA "
        "graph; a constant rate, and half a cosine to zero over the last 30 % of the time. The loss is the mean "
        "squared error of the velocity at Beta(1, 1.8) times on 2,048 validation molecules, the same noise for all (of "
        f"another kind with given types). Molecules were drawn by {SAMPLERS['stochastic']}, and of the flow itself by "
        f"{SAMPLERS['flow']}, in TF32. TFLOP/s count the products of pairs alone."
    )
    write_results(pd.DataFrame(rows), "gpu", "Minutes of a GPU", notes)


def _subset(molecules: MoleculeSet, index: np.ndarray) -> MoleculeSet:
    sizes, starts = molecules.sizes.numpy(), molecules.starts.numpy()
    atoms = np.concatenate([np.arange(starts[k], starts[k] + sizes[k]) for k in index])
    numbers = molecules.charges[:, 0].numpy()[atoms]
    return MoleculeSet.from_arrays(sizes[index], numbers, molecules.positions.numpy()[atoms], SPECIES)


if __name__ == "__main__":
    main()
