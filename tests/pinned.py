"""What the shipped weights give, held for years; ``python -m tests.pinned NAME ...`` measures anew and writes it.

Everything is computed in float64 by torch alone, so that it is the same on every machine. After weights were replaced
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
from ase_enf.flow.model import ENF
from ase_enf.flow.weights import PRETRAINED, shipped

FILE = Path(__file__).parent / "data" / "pinned.json"
# Small molecules of ASE's G2 set, whose exact scores are cheap.
SCORED = ("H2O", "NH3", "CH4", "HCN", "CH3OH")
MOLECULES = 3
# Molecules counted; in float64 a core draws two a second of qm9-small, and far fewer of the wider flows.
COUNT = 200
COUNTED = {"qm9": 30, "qm9-conditional": 100, "lj13": 100, "lj13-factor2": 100}
SYSTEMS = {"dw4": particles.DW4(), "lj13": particles.LJ13(), "lj13-factor2": particles.LJ13(factor=2.0)}
KELVIN = 11604.518  # kT = 1 eV


def load(name: str) -> ENF:
    """Returns a shipped flow in float64."""
    return ase_enf.load(name, device="cpu", dtype="float64")


def digest(name: str) -> str:
    """Returns what tells one file of weights from another."""
    return hashlib.sha256((PRETRAINED / f"{name}.safetensors").read_bytes()).hexdigest()[:16]


def molecules(flow: ENF, n: int) -> list[Atoms]:
    """Returns the first n molecules of seed 0; of a flow that needs a molecular graph, those of ethanol."""
    asked = {"smiles": "CCO"} if getattr(flow.config, "graph", False) else {}
    return ase_enf.generate(flow, n, seed=0, **asked)


def drawn(flow: ENF) -> list[Atoms]:
    """Returns the first molecules of seed 0."""
    return molecules(flow, MOLECULES)


def structures(flow: ENF) -> list[Atoms]:
    """Returns what is scored: molecules, or configurations of particles that depend on nothing but this line."""
    if flow.features != "none":
        return [molecule(name) for name in SCORED]
    size, n = max(flow.size_prior.counts), flow.config.dimension
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * n, indexing="ij"), axis=-1).reshape(-1, n)[:size]
    spacing = 3.0 if n == 2 else 1.05
    found = []
    for seed in range(5):
        positions = np.zeros((size, 3))
        positions[:, :n] = spacing * grid + np.random.default_rng(seed).uniform(-0.05, 0.05, (size, n))
        found.append(Atoms(f"X{size}", positions=positions))
    return found


def scores(flow: ENF) -> list[float]:
    """Returns their log-likelihoods, nats, by fixed steps without refinement."""
    return ase_enf.score(flow, structures(flow), tolerance=1e6).log_likelihood.tolist()


def counts(flow: ENF) -> dict[str, Any]:
    """Returns how many molecules of seed 0 are stable and valid; of particles, the effective sample size."""
    n = COUNTED.get(flow.name, COUNT)
    if flow.name in SYSTEMS:
        result = ase_enf.reweight(flow, SYSTEMS[flow.name], n=n, temperature=KELVIN, seed=0)
        return {"n": n, "effective": round(result.effective_sample_size, 4)}
    atoms = molecules(flow, n)
    stable = round(metrics.molecule_stability(atoms).value * n)
    valid = round(metrics.validity(atoms, "largest_fragment").value * n)
    return {"n": n, "stable": stable, "valid": valid, "rdkit": rdkit_version()}


def measure(name: str) -> dict[str, Any]:
    """Returns everything that is held of a shipped model."""
    flow = load(name)
    return {
        "weights": digest(name),
        "versions": {"torch": torch.__version__, "ase": ase.__version__},
        "scores": [round(value, 6) for value in scores(flow)],
        "molecules": [
            {"symbols": str(atoms.symbols), "positions": atoms.positions.round(5).tolist()} for atoms in drawn(flow)
        ],
        "counts": counts(flow),
    }


def main(names: list[str]) -> None:
    """Measures the models named, or all, and writes what they give."""
    for name in names or shipped():
        measured = measure(name)
        held = (json.loads(FILE.read_text()) if FILE.is_file() else {}) | {name: measured}
        print(f"{name}: {measured['counts']}", flush=True)
        lines = [f"{json.dumps(key)}: {json.dumps(held[key])}" for key in sorted(held) if key in shipped()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line a model


if __name__ == "__main__":
    main(sys.argv[1:])
