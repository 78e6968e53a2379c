"""The cells of Table 1: systems, methods, budgets, and the paper's values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase_enf.data import particles
from ase_enf.training.config import TrainConfig

FLOW_MATCHING, NLL = "flow_matching", "nll"
OBJECTIVES = {FLOW_MATCHING: "flow matching", NLL: "maximum likelihood"}
# Steps by the number of training samples, equal for every method; the weights of the best validation count.
STEPS = {
    ("dw4", FLOW_MATCHING): {100: 1000, 1000: 2000, 10_000: 4000, 100_000: 16_000},
    ("dw4", NLL): {100: 300, 1000: 500, 10_000: 500, 100_000: 500},
    ("lj13", FLOW_MATCHING): {10: 400, 100: 800, 1000: 1200, 10_000: 2000},
    ("lj13", NLL): {10: 100, 100: 200, 1000: 250, 10_000: 250},
}
BATCH = {("dw4", FLOW_MATCHING): 256, ("dw4", NLL): 100, ("lj13", FLOW_MATCHING): 128, ("lj13", NLL): 50}
# Of maximum likelihood, above the paper's because the runs are shorter; flow matching has the defaults.
RATES = {"Simple dynamics": 3e-3, "Kernel dynamics": 1e-2, "E-NF": 3e-3}
VALIDATIONS = 6  # in a run
# The paper's steps, batches and rate, by maximum likelihood; its epochs are 1000 / 300 / 50 / 6 of DW4 and 500 / 1000 /
# 300 / 50 of LJ13.
AS_PUBLISHED = "E-NF-as-published"
PUBLISHED_STEPS = {
    "dw4": {100: 1000, 1000: 3000, 10_000: 5000, 100_000: 6000},
    "lj13": {10: 500, 100: 1000, 1000: 3000, 10_000: 5000},
}
PUBLISHED_BATCH, PUBLISHED_RATE, PUBLISHED_VALIDATIONS = 100, 5e-4, 40
# Numbers of samples for validation, test and effective sample size: a likelihood of LJ13 costs ten times that of DW4.
VALID, TEST, REWEIGHTED = {"dw4": 256, "lj13": 64}, {"dw4": 1000, "lj13": 250}, {"dw4": 1000, "lj13": 500}
SWEEPS = 5000  # of the entropy of LJ13

WIDTH = {"features": "none", "hidden": 32, "layers": 3}  # the paper's
METHODS = {
    "GNF": {"network": "gnn", "attention": False},
    "GNF-att": {"network": "gnn"},
    "GNF-att-aug": {"network": "gnn", "augment": True},
    "GNF-att-aug-128": {"network": "gnn", "augment": True, "hidden": 128},  # not the paper's: what width does for it
    "Simple dynamics": {"network": "simple", "hidden": 50},
    "Kernel dynamics": {"network": "kernel", "hidden": 50, "layers": 10},  # as published
    AS_PUBLISHED: {"radial": 0},
    "E-NF-16-radial": {"radial": 16},  # ours: radial functions of each distance beside its square
    "E-NF": {"radial": 0},  # the paper's network
}
RATES |= {"E-NF-16-radial": RATES["E-NF"], AS_PUBLISHED: PUBLISHED_RATE}
BOTH = ("Simple dynamics", "Kernel dynamics", "E-NF-16-radial", "E-NF")  # trained by maximum likelihood too
ROWS = [(method, objective) for method in METHODS for objective in OBJECTIVES if objective != NLL or method in BOTH]
ROWS = [(method, NLL if method == AS_PUBLISHED else objective) for method, objective in ROWS]
PAPER = {  # DW4, then LJ13
    "GNF": (11.93, 11.31, 10.38, 7.95, 43.56, 42.84, 37.17, 36.49),
    "GNF-att": (11.65, 11.13, 9.34, 7.83, 43.32, 36.22, 33.84, 32.65),
    "GNF-att-aug": (8.81, 8.31, 7.90, 7.61, 41.09, 31.50, 30.74, 30.93),
    "Simple dynamics": (9.58, 9.51, 9.53, 9.47, 33.67, 33.10, 32.79, 32.99),
    "Kernel dynamics": (8.74, 8.67, 8.42, 8.26, 35.03, 31.49, 31.17, 31.25),
    "E-NF": (8.31, 8.15, 7.69, 7.48, 33.12, 30.99, 30.56, 30.41),
}
SIZES = {system: tuple(steps) for (system, objective), steps in STEPS.items() if objective == FLOW_MATCHING}
PAPER = {"dw4": {m: v[:4] for m, v in PAPER.items()}, "lj13": {m: v[4:] for m, v in PAPER.items()}}
GOALS = {"dw4": 0.05, "lj13": 0.5}  # nats that E-NF with all the data should come near the entropy
NOTHING = 0.25  # nats from the Gaussian: hardly anything was learned
KINDS = (set(SIZES), set(METHODS), set(OBJECTIVES), {str(size) for sizes in SIZES.values() for size in sizes})
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One training."""

    system: str
    method: str
    objective: str
    size: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.system}_{self.method.replace(' ', '-')}_{self.objective}_{self.size}_{self.seed}"

    @property
    def steps(self) -> int:
        """Number of training steps."""
        published = self.method == AS_PUBLISHED
        return (PUBLISHED_STEPS[self.system] if published else STEPS[self.system, self.objective])[self.size]

    @property
    def batch(self) -> int:
        """Number of samples in a step."""
        return PUBLISHED_BATCH if self.method == AS_PUBLISHED else BATCH[self.system, self.objective]

    @property
    def validations(self) -> int:
        """Number of validations."""
        return PUBLISHED_VALIDATIONS if self.method == AS_PUBLISHED else VALIDATIONS

    @property
    def largest(self) -> bool:
        """Whether it has all available samples."""
        return self.size == max(SIZES[self.system])

    @property
    def part(self) -> slice:
        """Its training samples; those of different seeds differ if there are enough for all."""
        start = self.seed * self.size
        start = start if start + self.size <= max(SIZES[self.system]) else 0
        return slice(start, start + self.size)

    @property
    def copies(self) -> int:
        """Copies of each sample in an epoch: flow matching fills its batches, and each copy has its own noise."""
        short = self.objective == FLOW_MATCHING and self.size < self.batch
        return math.lcm(self.size, self.batch) // self.size if short else 1

    def choices(self, scale: float, test: int) -> list[Any]:
        """Returns all settings of the cell; with other values it is a different experiment."""
        chosen = [scale, test, VALID[self.system], self.validations, WIDTH]
        chosen += [METHODS[self.method], self.steps, self.batch, self.copies]
        chosen += [RATES[self.method]] if self.objective == NLL else []
        return chosen + ([REWEIGHTED[self.system]] if self.largest else [])

    def scaled_steps(self, scale: float) -> int:
        """Returns the fraction ``scale`` of the steps, at least 2."""
        return max(round(self.steps * scale), 2)

    def config(self, scale: float, out: Path) -> TrainConfig:
        """Returns the training settings, with the fraction ``scale`` of the steps."""
        steps = self.scaled_steps(scale)
        every = -(-steps // self.validations)
        run = {"steps": steps, "warmup": steps // 10, "validate_every": every, "seed": self.seed}
        run |= {"batch_size": self.batch, "validation_size": VALID[self.system], "device": "cpu", "out": str(out)}
        run |= {"objective": self.objective, "dimension": particles.resolve(self.system).dimension}
        run |= {"adjoint": False}  # these batches fit into memory: the gradient in up to a quarter of the time
        run |= {"learning_rate": RATES[self.method]} if self.objective == NLL else {}
        return TrainConfig(**WIDTH | METHODS[self.method] | run)


def every_cell(seeds: int) -> list[Cell]:
    """Returns all cells, those of the first seed first, so that the table is soon complete with one run of each."""
    places = [(system, size) for system in SIZES for size in SIZES[system]]
    return [Cell(system, *row, size, seed) for seed in range(seeds) for system, size in places for row in ROWS]


def chosen(cell: Cell, only: Iterable[str]) -> bool:
    """Whether a cell is among the named systems, methods, objectives and sizes; a kind without names has no limit."""
    values, wanted = (cell.system, cell.method, cell.objective, str(cell.size)), set(only)
    return all(value in wanted or not wanted & kind for value, kind in zip(values, KINDS, strict=True))
