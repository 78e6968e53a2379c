"""Free energies of rotamers by a flow: ``python -m benchmarks.models.free_energies --work FOLDER [--only butane]``.

Each molecule is a study by ``ase_enf.boltzmann`` with GFN2-xTB at 300 K: walkers, a flow trained on their frames, draws
of the flow, and weights. The walkers also attempt rotations about the bonds of the torsions, which dynamics does not
have; with them they mix, and serve as a reference for the free energies. Shorter walks without such rotations
(``plain``) give the cost by molecular dynamics: calls of the calculator between two independent visits of a basin.

Everything is resumed from FOLDER; ``--draws`` can be raised later. Writes ``results/free_energies``. With
``--elements`` the flow is given the elements alone, without the molecular graph; use another FOLDER for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from rdkit import Chem
from rdkit.Chem import AllChem

from ase_enf.atoms.files import atomic_write
from ase_enf.chem.mmff import conformers
from ase_enf.data import thermal
from ase_enf.data.series import autocorrelation_time
from ase_enf.ensemble.basins import Torsions
from ase_enf.ensemble.calculators import calculator
from ase_enf.ensemble.study import Study, boltzmann, default_training
from benchmarks.report import write_results

TEMPERATURE, LEAPFROG, BURN_IN = 300.0, 16, 60
SAMPLING: dict[str, Any] = {"leapfrog": LEAPFROG, "burn_in": BURN_IN}


class Molecule(NamedTuple):
    """A molecule and the torsions that define its basins."""

    smiles: str
    torsions: tuple[str, ...]  # SMARTS of four atoms each, of which the first match counts


MOLECULES = {
    "ethanol": Molecule("CCO", ("CCO[#1]",)),
    "butane": Molecule("CCCC", ("CCCC",)),
    "ethylene glycol": Molecule("OCCO", ("OCCO",)),
    "1-propanol": Molecule("CCCO", ("CCCO", "CCO[#1]")),
}


class Reference(NamedTuple):
    """How well walkers sample one basin."""

    tau: float  # frames between independent ones, from the series of being in the basin
    visits: float  # effective frames in the basin
    calls: int


def main() -> None:
    """Runs what is missing and writes ``results/free_energies``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of all stages")
    parser.add_argument("--only", nargs="*", choices=list(MOLECULES), help="some of the molecules (default: all)")
    parser.add_argument("--frames", type=int, default=8000, help="of the walkers (default: 8000)")
    parser.add_argument("--plain", type=int, default=2000, help="frames of the plain walkers (default: 2000)")
    parser.add_argument("--draws", type=int, default=2000, help="of the flow (default: 2000)")
    parser.add_argument("--steps", type=int, default=6000, help="of the training (default: 6000)")
    parser.add_argument("--elements", action="store_true", help="give the flow the elements without the graph")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="another folder than results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[tuple[str, ...]] = []
    for name in options.only or MOLECULES:
        lines += measured(name, options)
    columns = ["molecule", "what", "value"]
    name = "free_energies_elements" if options.elements else "free_energies"
    write_results(pd.DataFrame(lines, columns=columns), name, TITLE, notes(options), options.out)


def measured(name: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Returns the rows of a molecule."""
    folder = folder_of(options.work, name)
    folder.mkdir(parents=True, exist_ok=True)
    atoms, torsions = built(MOLECULES[name])
    calc = calculator("gfn2", atoms)
    turning = SAMPLING | {"turn": sorted({four[1:3] for four in torsions})}
    start = conformers(atoms, 8, options.seed)
    walk = functools.partial(thermal.run, start, calc, TEMPERATURE, seed=options.seed, progress=True)
    with timed(folder, "walkers"):
        walk(options.frames, out=folder / "thermal.npz", **turning)
    with timed(folder, "plain walkers"):
        plain = walk(options.plain, out=folder / "plain.npz", **SAMPLING)
    with timed(folder, "training and draws"):
        study = boltzmann(
            atoms, calc, TEMPERATURE, folder, n=options.frames, draws=options.draws, torsions=torsions,
            training=default_training(options.steps, None if options.elements else atoms), sampling=turning,
            seed=options.seed, progress=True,
        )  # fmt: skip
    seconds = json.loads((folder / "seconds.json").read_text())
    return [(name, *row) for row in rows(study, plain, Torsions(torsions), len(atoms), seconds)]


def folder_of(work: Path, name: str) -> Path:
    """Returns the folder of a molecule's stages."""
    return work / name.replace(" ", "-")


def built(molecule: Molecule) -> tuple[Atoms, list[tuple[int, ...]]]:
    """Returns a structure of a molecule and its torsions."""
    mol = Chem.AddHs(Chem.MolFromSmiles(molecule.smiles))
    if AllChem.EmbedMolecule(mol, randomSeed=0) or AllChem.MMFFOptimizeMolecule(mol):
        raise SystemExit(f"{molecule.smiles}: RDKit makes no structure of it")
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    torsions = [tuple(mol.GetSubstructMatch(Chem.MolFromSmarts(smarts))) for smarts in molecule.torsions]
    return Atoms(numbers, mol.GetConformer().GetPositions()), torsions


@contextmanager
def timed(folder: Path, what: str) -> Iterator[None]:
    """Adds the processor seconds of a stage to those of earlier runs, unless it only read what was there."""
    path, start = folder / "seconds.json", time.process_time()
    yield
    seconds = json.loads(path.read_text()) if path.exists() else {}
    seconds[what] = seconds.get(what, 0.0) + time.process_time() - start
    with atomic_write(path) as handle:
        handle.write(json.dumps(seconds).encode())


def reference(ensemble: thermal.Ensemble, basin: Torsions, name: str) -> Reference:
    """Returns the number of independent visits of walkers to a basin."""
    whole = len(ensemble.frames) // ensemble.walkers * ensemble.walkers
    inside = np.array([basin(frame) == name for frame in ensemble.frames[:whole]], float)
    inside = inside.reshape(-1, ensemble.walkers)
    tau = float(autocorrelation_time(inside)) if 0 < inside.mean() < 1 else np.inf
    return Reference(tau, float(inside.sum()) / tau, ensemble.diagnostics.calls)


def rows(
    study: Study, plain: thermal.Ensemble, basin: Torsions, n_atoms: int, seconds: dict[str, float]
) -> list[tuple[str, str]]:
    """Returns the rows of the table for one molecule."""
    found, d, table = study.reweighted, study.ensemble.diagnostics, study.table
    effective = found.effective_sample_size
    lines = [
        ("atoms", f"{n_atoms}"),
        ("walkers with turns: frames, calls", f"{len(study.ensemble.frames)}, {d.calls}"),
        ("walkers with turns: ⟨U⟩, eV", f"{d.energy:.4f} ± {d.energy_stderr:.4f}"),
        ("walkers with turns: virial temperature, K; r_hat",
         f"{d.temperature:.0f} ± {d.temperature_stderr:.0f}; {d.r_hat:.3f}"),
        ("flow: effective sample size, unclipped",
         f"{effective:.0f} of {len(found.samples)} ({100 * effective / len(found.samples):.1f} %)"),
        ("flow: draws that are another molecule or fail", f"{found.failed}"),
        ("flow: integration error of log p, rms, nats", f"{found.integration_error:.3f}"),
    ]  # fmt: skip
    for row in table.to_dict("records"):
        lines.append(
            (f"share of {row['basin']}: walkers; flow; reweighted",
             f"{row['share_md']:.4f} ± {row['share_md_stderr']:.4f}; {row['share_flow']:.4f}; "
             f"{row['share_reweighted']:.4f} ± {row['share_reweighted_stderr']:.4f}")
        )  # fmt: skip
    for row in table.to_dict("records")[1:]:
        name = row["basin"]
        gap = row["free_energy_reweighted"] - row["free_energy_md"]
        error = float(np.hypot(row["free_energy_reweighted_stderr"], row["free_energy_md_stderr"]))
        turned, unaided = (reference(ensemble, basin, name) for ensemble in (study.ensemble, plain))
        lines += [
            (f"ΔF of {name}, kT: walkers; reweighted; difference",
             f"{row['free_energy_md']:.3f} ± {row['free_energy_md_stderr']:.3f}; "
             f"{row['free_energy_reweighted']:.3f} ± {row['free_energy_reweighted_stderr']:.3f}; "
             f"{gap:+.3f} ± {error:.3f}"),
            (f"calls an independent visit of {name}: plain walkers; with turns; draws of the flow",
             f"{per_visit(unaided)}; {per_visit(turned)}; {len(found.samples) / row['effective_reweighted']:.0f}"),
        ]  # fmt: skip
    lines.append(("processor seconds: " + "; ".join(seconds), "; ".join(f"{value:.0f}" for value in seconds.values())))
    return lines


def per_visit(walk: Reference) -> str:
    """Returns calls of the calculator per independent visit; only a bound if there were fewer than ten visits."""
    if walk.visits < 1:
        return f"more than {walk.calls}"
    return f"{walk.calls / walk.visits:.0f}" + (f" (of {walk.visits:.1f} visits)" if walk.visits < 10 else "")


TITLE = "Free energies of rotamers"


def notes(options: argparse.Namespace) -> str:
    """Returns what a reader must know."""
    basins = "; ".join(f"{name}: {', '.join(molecule.torsions)}" for name, molecule in MOLECULES.items())
    return (
        f"GFN2-xTB, {TEMPERATURE:g} K. Walkers: Hamiltonian Monte Carlo of {LEAPFROG} leapfrog steps a frame, 8 "
        "walkers from conformers of RDKit, with turns about the bonds of the torsions. Flow: given the "
        f"{'elements alone' if options.elements else 'molecular graph'}, 4 layers of 64, {options.steps} batches of "
        "128 of their frames. A torsion is trans within 60° of 180°, else gauche, both mirror images together; basins "
        f"are those of {basins}. ΔF is against the most frequent basin. The effective visits of a basin are the sum of "
        "its frames over the integrated autocorrelation time of being in it, or Kish's number of its weights. Calls of "
        "the flow do not hold those of the walkers whose frames it learned from. Processor seconds of one thread, "
        "without those of parts that an interruption lost."
    )


if __name__ == "__main__":
    main()
