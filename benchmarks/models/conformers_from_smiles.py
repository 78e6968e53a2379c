"""Conformers from SMILES: ``python -m benchmarks.models.conformers_from_smiles MODEL --data QM9.npz -n 100``.

MODEL draws conformers of molecules of QM9's test split from their graphs alone. They are compared with the DFT
geometry, and so are those of RDKit's ETKDG (version 3), as embedded and relaxed by MMFF94. Measured are

* bonds: whether RDKit perceives the graph that was asked for, in the positions drawn; and stability by the published
  table of distances;
* RMSD of heavy atoms to the DFT geometry, of the best of 1, 10 and 50 draws. No stereochemistry is given to either, and
  of a conformer and its mirror image the nearer one counts: the energy is the same.

With ``--work FOLDER`` draws are kept and a stopped run goes on where it was. Writes ``results/conformers_from_smiles``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from ase import Atoms
from ase.io import read, write
from numpy.typing import NDArray
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.files import atomic_write
from ase_enf.chem.bonds import stability
from ase_enf.chem.convert import PerceptionError, canonical_smiles, sanitise, to_mol
from ase_enf.chem.graph import graph_of_smiles, perceived_bonds, write_bonds
from ase_enf.data import qm9
from ase_enf.flow.model import ENF
from benchmarks.common import open_work
from benchmarks.report import write_results

if TYPE_CHECKING:
    from rdkit.Chem import Mol

BEST_OF = (1, 10, 50)
THRESHOLD = 0.5  # Å, of coverage
MATCHES = 1000  # symmetric matches of heavy atoms that are tried
BOOTSTRAPS = 1000


class Target(NamedTuple):
    """A molecule of the test split: its graph and its DFT geometry."""

    index: int  # qm9_index
    smiles: str
    reference: Mol  # heavy atoms, with the DFT positions


def main() -> None:
    """Measures and writes ``results/conformers_from_smiles``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors of a flow of graphs")
    parser.add_argument("--data", help="QM9 in any form (default: what ASE_ENF_QM9 names)")
    parser.add_argument("-n", type=int, default=500, help="molecules of the test split (default: 500)")
    parser.add_argument("--draws", type=int, default=50, help="conformers of each (default: 50)")
    parser.add_argument("--steps", type=int, default=None, help="of the sampler (default: its own)")
    parser.add_argument("--churn", type=float, default=None, help="of the sampler (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None, help="draw for so long at most; then fewer molecules")
    parser.add_argument("--work", type=Path, help="folder that keeps the draws")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    if not flow.config.graph:
        raise SystemExit(f"{options.model}: knows no molecular graphs; use one that does, such as qm9-conformers")
    flow.use_backend("auto")
    with tempfile.TemporaryDirectory() as folder:
        run(flow, options, options.work or Path(folder))


def run(flow: ENF, options: argparse.Namespace, work: Path) -> None:
    """Draws, measures, writes."""
    targets, without = choose_targets(qm9.load(options.data, split="test"), options.n, options.seed)
    kept = open_work(work, flow, draws=options.draws, steps=options.steps, churn=options.churn, seed=options.seed)
    ways: dict[str, Callable[[Target], list[Atoms]]] = {
        f"`{flow.name}`": lambda target: from_flow(flow, target, options),
        "ETKDG": lambda target: from_etkdg(target.smiles, options.draws, options.seed, relax=False),
        "ETKDG + MMFF94": lambda target: from_etkdg(target.smiles, options.draws, options.seed, relax=True),
    }
    started, results = time.monotonic(), {name: [] for name in ways}
    for target in tqdm(targets, unit="molecule", disable=None):
        if options.seconds and time.monotonic() - started > options.seconds:
            break
        for name, draw in ways.items():
            file = kept / f"{target.index}_{list(ways).index(name)}.extxyz"
            results[name].append(measure(target, kept_or_drawn(file, target, draw)))
    done = len(results["ETKDG"])
    rows = [row for name, found in results.items() for row in summary(name, found, options.draws, options.seed)]
    table = pd.DataFrame(rows, columns=("conformers", "quantity", "value", "error", "of"))
    solver = ase_enf.generate(flow, 1, smiles="C", steps=options.steps, churn=options.churn)[0].info["enf_solver"]
    notes = (
        f"{done} molecules of the test split at random (seed {options.seed}), {options.draws} conformers of each; "
        f"{without} more were left out, whose DFT geometry has by RDKit no neutral closed-shell graph. Drawn by "
        f"{solver}. RMSD of heavy atoms in Å to the DFT geometry, up to mirror images; covered is below {THRESHOLD} Å. "
        f"Errors are standard deviations over {BOOTSTRAPS} bootstraps of the molecules. Where a way finds no conformer "
        "of a molecule, it counts as not covered, and is left out of the mean RMSD."
    )
    write_results(table, "conformers_from_smiles", "Conformers of QM9 molecules from their SMILES", notes)


def choose_targets(test: list[Atoms], n: int, seed: int) -> tuple[list[Target], int]:
    """Returns n molecules in random order, and how many were passed over for want of a graph."""
    targets, without = [], 0
    for k in np.random.default_rng(seed).permutation(len(test)):
        if len(targets) == n:
            break
        try:
            perceived_bonds(test[k])  # which refuses charges and radicals
        except PerceptionError:
            without += 1
            continue
        mol = sanitise(to_mol(test[k], "rdkit"))
        targets.append(Target(int(test[k].info["qm9_index"]), canonical_smiles(mol), heavy(mol)))
    return targets, without


def heavy(mol: Mol) -> Mol:
    """Returns a molecule without hydrogens and stereochemistry."""
    from rdkit import Chem

    bare = Chem.RemoveHs(mol)
    Chem.RemoveStereochemistry(bare)
    return bare


def from_flow(flow: ENF, target: Target, options: argparse.Namespace) -> list[Atoms]:
    """Draws conformers; molecules do not share their noise."""
    seed = options.seed + target.index
    return ase_enf.generate(
        flow, options.draws, seed=seed, smiles=target.smiles, steps=options.steps, churn=options.churn
    )


def from_etkdg(smiles: str, draws: int, seed: int, relax: bool) -> list[Atoms]:
    """Embeds conformers, and relaxes each by MMFF94 where that knows the molecule."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMultipleConfs(mol, draws, randomSeed=seed + 1)
    if relax and AllChem.MMFFHasAllMoleculeParams(mol):
        AllChem.MMFFOptimizeMoleculeConfs(mol, maxIters=1000)
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    return [Atoms(numbers, conformer.GetPositions()) for conformer in mol.GetConformers()]


def kept_or_drawn(file: Path, target: Target, draw: Callable[[Target], list[Atoms]]) -> list[Atoms]:
    """Returns conformers that were kept, or draws and keeps them."""
    if not file.exists():
        drawn = draw(target)
        if not drawn:
            return []
        with atomic_write(file) as handle, tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "drawn.extxyz", drawn)
            handle.write((Path(folder) / "drawn.extxyz").read_bytes())
    return read(file, index=":")


def measure(target: Target, drawn: list[Atoms]) -> NDArray[np.float64]:
    """Returns of every conformer whether its bonds are as asked for, its RMSD, whether it is stable: (draws, 3)."""
    graph, stable = graph_of_smiles(target.smiles), stability(drawn).stable
    rows = [
        (has_bonds(atoms, graph.bonds), rmsd(target, atoms), good) for atoms, good in zip(drawn, stable, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def has_bonds(atoms: Atoms, bonds: NDArray[np.int8]) -> bool:
    """Whether RDKit perceives exactly these bonds."""
    try:
        return write_bonds(perceived_bonds(atoms)) == write_bonds(bonds)
    except PerceptionError:
        return False


def rmsd(target: Target, atoms: Atoms) -> float:
    """Returns the least RMSD of heavy atoms over symmetric matches and mirror images, Å."""
    from rdkit import Chem
    from rdkit.Chem import rdMolAlign

    mol = Chem.AddHs(Chem.MolFromSmiles(target.smiles))
    values = []
    for sign in (1.0, -1.0):
        conformer = Chem.Conformer(len(atoms))
        conformer.SetPositions(sign * np.array(atoms.positions, dtype=np.float64))
        mol.RemoveAllConformers()
        mol.AddConformer(conformer)
        values.append(rdMolAlign.GetBestRMS(heavy(mol), Chem.Mol(target.reference), maxMatches=MATCHES))
    return min(values)


def summary(name: str, found: list[NDArray[np.float64]], draws: int, seed: int) -> list[tuple[str, ...]]:
    """Returns the rows of one way to make conformers."""
    rows = [_row(name, "bonds as asked for, %", [100 * f[:, 0].mean() for f in found if len(f)], seed, "{:.1f}")]
    rows.append(_row(name, "stable, %", [100 * f[:, 2].mean() for f in found if len(f)], seed, "{:.1f}"))
    for best_of in (k for k in BEST_OF if k <= draws):
        best = [f[:best_of, 1].min() if len(f) else np.inf for f in found]
        finite = [value for value in best if np.isfinite(value)]
        covered = [100.0 * (value < THRESHOLD) for value in best]
        rows.append(_row(name, f"RMSD, best of {best_of}, Å", finite, seed, "{:.3f}"))
        rows.append(_row(name, f"covered, best of {best_of}, %", covered, seed, "{:.1f}"))
    every = [f[:, 1].mean() for f in found if len(f)]
    near = [100 * (f[:, 1] < THRESHOLD).mean() for f in found if len(f)]
    rows.append(_row(name, "RMSD, mean of all draws, Å", every, seed, "{:.3f}"))
    rows.append(_row(name, "covering, of all draws, %", near, seed, "{:.1f}"))
    return rows


def _row(name: str, quantity: str, values: list[float], seed: int, form: str) -> tuple[str, ...]:
    data = np.array(values)
    chosen = np.random.default_rng(seed).integers(len(data), size=(BOOTSTRAPS, len(data)))
    error = data[chosen].mean(axis=1).std()
    return name, quantity, form.format(data.mean()), form.format(error), f"{len(data)} molecules"


if __name__ == "__main__":
    main()
