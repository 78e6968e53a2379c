"""Pinned results of the shipped weights; ``python -m tests.pinned NAME ...`` computes and writes them again.

Everything is computed in float64 by torch, so that it is the same on every machine. After weights were replaced
on purpose, the command writes ``data/pinned.json`` for the models named, or for all.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

import ase_enf
from ase_enf import metrics
from ase_enf.chem.convert import rdkit_version
from ase_enf.data import particles
from ase_enf.data.compact import read_npz
from ase_enf.flow.model import ENF
from ase_enf.flow.weights import PRETRAINED, shipped

FILE = Path(__file__).parent / "data" / "pinned.json"
# Small molecules of ASE's G2 set, whose exact scores are cheap.
SCORED = ("H2O", "NH3", "CH4", "HCN", "CH3OH")
MOLECULES = 3
SAMPLE, TEST = Path(__file__).parent / "data" / "qm9_sample.npz", 2  # a sample of QM9, and the number of its test split
# Scores that are pinned change by less, nats, when every coordinate moves by at most 1e-10 Å.
DISPLACED, CHANGED = 1e-10, 2e-5
# Numbers of molecules; in float64 a core draws two per second of qm9-small, and far fewer of wider flows.
COUNT = 200
COUNTED = {"qm9": 30, "qm9-conditional": 100, "lj13": 100, "lj13-factor2": 30}
SYSTEMS = {"dw4": particles.DW4(), "lj13": particles.LJ13(), "lj13-factor2": particles.LJ13(factor=2.0)}
KELVIN = 11604.518  # kT = 1 eV


def load(name: str) -> ENF:
    """Returns a shipped flow in float64."""
    return ase_enf.load(name, device="cpu", dtype="float64")


def digest(name: str) -> str:
    """Returns a hash of a file of weights."""
    return hashlib.sha256((PRETRAINED / f"{name}.safetensors").read_bytes()).hexdigest()[:16]


def molecules(flow: ENF, n: int) -> list[Atoms]:
    """Returns the first n molecules of seed 0, or of ethanol for a flow that needs a molecular graph."""
    asked = {"smiles": "CCO"} if getattr(flow.config, "graph", False) else {}
    return ase_enf.generate(flow, n, seed=0, **asked)


def drawn(flow: ENF) -> list[Atoms]:
    """Returns the first molecules of seed 0."""
    return molecules(flow, MOLECULES)


def structures(flow: ENF) -> list[Atoms]:
    """Returns the structures to score: molecules, with or without their elements, or configurations of particles.

    They are of the kind that the flow was trained on. Far from it the equations of the flow are stiff: rounding, which
    differs between processors, changes such scores by tens of nats.
    """
    if flow.features != "none":
        return [molecule(name) for name in SCORED]
    if flow.name not in SYSTEMS:
        table = read_npz(SAMPLE)
        rows = np.flatnonzero((table.split == TEST) & (table.n_atoms == max(flow.size_prior.counts)))[: len(SCORED)]
        return [Atoms(f"X{len(atoms)}", atoms.positions) for atoms in table.to_atoms(rows.tolist())]
    size, n = max(flow.size_prior.counts), flow.config.dimension
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * n, indexing="ij"), axis=-1).reshape(-1, n)[:size]
    spacing = 3.0 if n == 2 else 1.05
    found = []
    for seed in range(5):
        positions = np.zeros((size, 3))
        positions[:, :n] = spacing * grid + np.random.default_rng(seed).uniform(-0.05, 0.05, (size, n))
        found.append(Atoms(f"X{size}", positions=positions))
    return found


def scores(flow: ENF, scored: list[Atoms] | None = None) -> list[float]:
    """Returns their log-likelihoods, nats, by fixed steps without refinement."""
    return ase_enf.score(flow, structures(flow) if scored is None else scored, max_stderr=1e6).log_likelihood.tolist()


def steady_scores(flow: ENF) -> list[float]:
    """Returns the log-likelihoods, nats, refusing to pin any that rounding could change."""
    held, displaced = scores(flow), structures(flow)
    for atoms in displaced:
        axes = flow.config.dimension  # particles in two dimensions stay in the plane
        atoms.positions[:, :axes] += np.random.default_rng(0).uniform(-DISPLACED, DISPLACED, (len(atoms), axes))
    change = np.abs(np.subtract(scores(flow, displaced), held)).max()
    if not change < CHANGED:
        raise SystemExit(f"{flow.name}: scores change by {change:.1e} nats when atoms move by 1e-10 Å: choose others")
    return held


def counts(flow: ENF) -> dict[str, Any]:
    """Returns the numbers of stable and of valid molecules of seed 0.

    Of particles with a known energy it is the effective sample size instead, and of positions without elements the mean
    distance between atoms.
    """
    n = COUNTED.get(flow.name, COUNT)
    if flow.name in SYSTEMS:
        result = ase_enf.reweight(flow, SYSTEMS[flow.name], n=n, temperature=KELVIN, seed=0)
        return {"n": n, "effective": round(result.effective_sample_size, 4)}
    atoms = molecules(flow, n)
    if not flow.config.knows_types:
        distances = [item.get_all_distances()[np.triu_indices(len(item), 1)].mean() for item in atoms]
        return {"n": n, "distance": round(float(np.mean(distances)), 4)}
    stable = round(metrics.molecule_stability(atoms).value * n)
    valid = round(metrics.validity(atoms, "largest_fragment").value * n)
    return {"n": n, "stable": stable, "valid": valid, "rdkit": rdkit_version()}


def measure(name: str) -> dict[str, Any]:
    """Returns all pinned results of a shipped model."""
    flow = load(name)
    return {
        "weights": digest(name),
        "versions": {"torch": torch.__version__, "ase": ase.__version__},
        "scores": [round(value, 6) for value in steady_scores(flow)],
        "molecules": [
            {"symbols": str(atoms.symbols), "positions": atoms.positions.round(5).tolist()} for atoms in drawn(flow)
        ],
        "counts": counts(flow),
    }


def main(names: list[str]) -> None:
    """Measures the named models, or all, and writes the results."""
    for name in names or shipped():
        measured = measure(name)
        held = (json.loads(FILE.read_text()) if FILE.is_file() else {}) | {name: measured}
        print(f"{name}: {measured['counts']}", flush=True)
        lines = [f"{json.dumps(key)}: {json.dumps(held[key])}" for key in sorted(held) if key in shipped()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line a model


if __name__ == "__main__":
    main(sys.argv[1:])
