"""Conformers from SMILES: ``python -m benchmarks.models.conformers_from_smiles MODEL --data QM9.npz -n 100``.

MODEL draws conformers of molecules of the test split of QM9 from their graphs alone. They are compared with the DFT
geometry, as are conformers by RDKit's ETKDG (version 3), both as embedded and relaxed by MMFF94. Measured are

* bonds: whether RDKit perceives the requested graph from the positions; and stability by the published table of
  distances;
* the RMSD of heavy atoms from the DFT geometry, for the best of 1, 10 and 50 draws. Neither method is given the
  stereochemistry, and the nearer of a conformer and its mirror image counts, as their energies are equal.

With ``--work FOLDER``, draws are saved, and a second run continues. Writes ``results/conformers_from_smiles``.

``--strain K`` instead measures by how much a relaxation by GFN2-xTB lowers the energy of the first K conformers of each
molecule, which needs ``pip install tblite``. Writes ``results/conformers_strain``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from ase import Atoms
from ase.io import read, write
from ase.optimize import LBFGS
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
DATA = "the DFT geometry"
RMSD_NOTES = (
    f"RMSD of heavy atoms in Å to the DFT geometry, up to mirror images; covered is below {THRESHOLD} Å. Where a way "
    "finds no conformer of a molecule, it counts as not covered, and is left out of the mean RMSD."
)
FORCE, RELAXATION = 0.02, 500  # eV/Å, and steps, of a relaxation


class Target(NamedTuple):
    """A molecule of the test split: its graph and its DFT geometry."""

    index: int  # qm9_index
    smiles: str
    reference: Mol  # heavy atoms, with the DFT positions
    atoms: Atoms  # all of them


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
    parser.add_argument("--strain", type=int, metavar="K", help="relax K conformers of each molecule by GFN2-xTB")
    parser.add_argument("--work", type=Path, help="folder that keeps the draws")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    if not flow.config.graph:
        raise SystemExit(f"{options.model}: knows no molecular graphs; use one that does, such as qm9-conformers")
    flow.use_backend("auto")
    with tempfile.TemporaryDirectory() as folder:
        run(flow, options, options.work or Path(folder))


def run(flow: ENF, options: argparse.Namespace, work: Path) -> None:
    """Draws and measures conformers, and writes the table."""
    targets, without = choose_targets(qm9.load(options.data, split="test"), options.n, options.seed)
    kept = open_work(work, flow, draws=options.draws, steps=options.steps, churn=options.churn, seed=options.seed)
    ways: dict[str, Callable[[Target], list[Atoms]]] = {
        f"`{flow.name}`": lambda target: from_flow(flow, target, options),
        "ETKDG": lambda target: from_etkdg(target.smiles, options.draws, options.seed, relax=False),
        "ETKDG + MMFF94": lambda target: from_etkdg(target.smiles, options.draws, options.seed, relax=True),
    }
    started, results = time.monotonic(), {name: [] for name in (*ways, *([DATA] if options.strain else []))}
    for target in tqdm(targets, unit="molecule", disable=None):
        if options.seconds and time.monotonic() - started > options.seconds:
            break
        for number, (name, draw) in enumerate(ways.items()):
            drawn = kept_or_drawn(kept / f"{target.index}_{number}.extxyz", target, draw)
            results[name].append(strains(drawn[: options.strain]) if options.strain else measure(target, drawn))
        if options.strain:
            results[DATA].append(strains([target.atoms]))
    done = len(results["ETKDG"])
    summarise = strain_summary if options.strain else functools.partial(summary, draws=options.draws)
    rows = [row for name, found in results.items() for row in summarise(name, found, seed=options.seed)]
    table = pd.DataFrame(rows, columns=("conformers", "quantity", "value", "error", "of"))
    solver = ase_enf.generate(flow, 1, smiles="C", steps=options.steps, churn=options.churn)[0].info["enf_solver"]
    notes = (
        f"{done} molecules of the test split at random (seed {options.seed}), {options.strain or options.draws} "
        f"conformers of each; {without} more were left out, whose DFT geometry has by RDKit no neutral closed-shell "
        f"graph. Drawn by {solver}. {_strain_notes() if options.strain else RMSD_NOTES} Errors are standard deviations "
        f"over {BOOTSTRAPS} bootstraps of the molecules."
    )
    file, title = "conformers_from_smiles", "Conformers of QM9 molecules from their SMILES"
    if options.strain:
        file, title = "conformers_strain", "Strain of conformers of QM9 molecules from their SMILES"
    write_results(table, file, title, notes)


def choose_targets(test: list[Atoms], n: int, seed: int) -> tuple[list[Target], int]:
    """Returns n molecules in random order, and the number of those skipped because they have no graph."""
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
        targets.append(Target(int(test[k].info["qm9_index"]), canonical_smiles(mol), heavy(mol), test[k]))
    return targets, without


def heavy(mol: Mol) -> Mol:
    """Returns a molecule without hydrogens and stereochemistry."""
    from rdkit import Chem

    bare = Chem.RemoveHs(mol)
    Chem.RemoveStereochemistry(bare)
    return bare


def from_flow(flow: ENF, target: Target, options: argparse.Namespace) -> list[Atoms]:
    """Draws conformers, with different noise for each molecule."""
    seed = options.seed + target.index
    return ase_enf.generate(
        flow, options.draws, seed=seed, smiles=target.smiles, steps=options.steps, churn=options.churn
    )


def from_etkdg(smiles: str, draws: int, seed: int, relax: bool) -> list[Atoms]:
    """Embeds conformers, and relaxes each by MMFF94 if it has parameters for the molecule."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMultipleConfs(mol, draws, randomSeed=seed + 1)
    if relax and AllChem.MMFFHasAllMoleculeParams(mol):
        AllChem.MMFFOptimizeMoleculeConfs(mol, maxIters=1000)
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    return [Atoms(numbers, conformer.GetPositions()) for conformer in mol.GetConformers()]


def kept_or_drawn(file: Path, target: Target, draw: Callable[[Target], list[Atoms]]) -> list[Atoms]:
    """Returns saved conformers, or draws and saves them."""
    if not file.exists():
        drawn = draw(target)
        if not drawn:
            return []
        with atomic_write(file) as handle, tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "drawn.extxyz", drawn)
            handle.write((Path(folder) / "drawn.extxyz").read_bytes())
    return read(file, index=":")


def measure(target: Target, drawn: list[Atoms]) -> NDArray[np.float64]:
    """Returns whether each conformer has the requested bonds, its RMSD, and whether it is stable, shape (draws, 3)."""
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
    """Returns the smallest RMSD of heavy atoms over symmetric matches and mirror images, Å."""
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


def strains(drawn: list[Atoms]) -> NDArray[np.float64]:
    """Returns the energy that each conformer loses when GFN2-xTB relaxes it, eV, shape (draws, 1)."""
    from ase_enf.ensemble.calculators import calculator  # which needs tblite

    return np.array([strain(atoms, calculator("gfn2", atoms)) for atoms in drawn]).reshape(-1, 1)


def strain(atoms: Atoms, calculator: Any) -> float:
    """Returns the energy above that of the nearest minimum, eV; NaN if the relaxation does not converge.

    Args:
        atoms: A structure; it is not modified.
        calculator: An ASE calculator of energies and forces.
    """
    moving = atoms.copy()
    moving.calc = calculator
    before = moving.get_potential_energy()
    arrived = LBFGS(moving, logfile=None).run(fmax=FORCE, steps=RELAXATION)
    return before - moving.get_potential_energy() if arrived else np.nan


def strain_summary(name: str, found: list[NDArray[np.float64]], seed: int) -> list[tuple[str, ...]]:
    """Returns the rows of strain for one method."""
    molecules = [known for f in found if len(known := f[np.isfinite(f)])]
    medians = [float(np.median(known)) for known in molecules]
    lost = 100 * (1 - sum(map(len, molecules)) / sum(map(len, found)))
    rows = [
        _row(name, "strain, median, eV", medians, seed, "{:.3f}", np.median),
        _row(name, "strain, mean, eV", [float(known.mean()) for known in molecules], seed, "{:.3f}"),
    ]
    return [*rows, (name, "not relaxed in time, %", f"{lost:.1f}", "", f"{sum(map(len, found))} conformers")]


def summary(name: str, found: list[NDArray[np.float64]], draws: int, seed: int) -> list[tuple[str, ...]]:
    """Returns the rows for one method."""
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


def _row(
    name: str,
    quantity: str,
    values: list[float],
    seed: int,
    form: str,
    middle: Callable[..., NDArray[np.float64]] = np.mean,
) -> tuple[str, ...]:
    data = np.array(values)
    chosen = np.random.default_rng(seed).integers(len(data), size=(BOOTSTRAPS, len(data)))
    error = middle(data[chosen], axis=1).std()
    return name, quantity, form.format(middle(data)), form.format(error), f"{len(data)} molecules"


def _strain_notes() -> str:
    return (
        f"Strain is the energy by GFN2-xTB (tblite {importlib.metadata.version('tblite')}) above that of the minimum "
        f"to which LBFGS relaxes the conformer, forces below {FORCE} eV/Å, within {RELAXATION} steps; of the medians "
        "over the conformers of a molecule, median is the median over molecules. Minima of GFN2-xTB are not those of "
        "DFT, so that the DFT geometry is strained, too."
    )


if __name__ == "__main__":
    main()
