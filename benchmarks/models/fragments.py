"""Completions of fragments: ``python -m benchmarks.models.fragments qm9-small --data qm9.npz -n 200``.

A functional group, including its hydrogens, is cut off molecules of the test split; the rest is the fragment, and the
model draws as many atoms as were cut off. Reported are the fraction of stable completions, compared with molecules of
the same sizes that the model draws without a fragment, and the fraction in which all drawn atoms are connected to the
fragment by bonds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from ase.io import read
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.io import write_structures
from ase_enf.chem.bonds import bond_orders, n_fragments, stability
from ase_enf.chem.convert import sanitise, to_mol
from ase_enf.data import qm9
from ase_enf.flow.model import ENF
from benchmarks.common import load_flow, open_work
from benchmarks.report import write_results

# Group → SMARTS: the atom it is bonded to, then its heavy atoms.
GROUPS = {
    "OH": "[#6]-[OX2;H1]",
    "NH2": "[#6]-[NX3;H2]",
    "CN": "[#6]-[CX2]#[NX1]",
    "CHO": "[#6]-[CX3;H1]=[OX1]",
    "CH3": "[#6]-[CX4;H3]",
}


def main() -> None:
    """Measures and writes ``results/fragments_NAME``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors of a joint model that flow matching trained")
    parser.add_argument("--data", required=True, help="QM9, in any form that the package reads")
    parser.add_argument("-n", type=int, default=200, help="molecules (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="of the sampler; its default when left out")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps finished molecules")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flow = load_flow(options.model)
    flow.use_backend("auto")
    open_work(options.work, flow, seed=options.seed, steps=options.steps)
    cuts = _cuts(qm9.load(options.data, split="test"), options.n, options.seed)
    drawn = _drawn(flow, cuts, options)
    alone = _unconditional(flow, [size for _, _, size in cuts], options)
    table = pd.DataFrame(
        {
            "group": [group for group, _, _ in cuts],
            "stable": stability(drawn).stable,
            "bonded": [n_fragments(_orders(atoms)[None])[0] == 1 for atoms in drawn],
            "even": [atoms.numbers.sum() % 2 == 0 for atoms in drawn],
            "kept exactly": [
                float(np.abs(atoms.positions[: len(own)] - own.positions).max()) <= 1e-6
                for atoms, (_, own, _) in zip(drawn, cuts, strict=True)
            ],
            "unconditional": stability(alone).stable,
        }
    )
    rows = [_row(group, part) for group, part in table.groupby("group", sort=False)] + [_row("all", table)]
    notes = (
        f"`{flow.name}`, {options.n} molecules of the test split of QM9, one group cut off each, seed {options.seed}, "
        f"{drawn[0].info['enf_solver']}. One completion a fragment, nothing rejected; shares in per cent."
    )
    name = f"fragments_{flow.name}" + (f"_{options.steps}" if options.steps else "")
    write_results(pd.DataFrame(rows), name, f"Completions of fragments, {flow.name}", notes)


def _row(group: str, part: pd.DataFrame) -> dict[str, str | int]:
    def share(values: pd.Series) -> str:
        p = values.mean()
        return f"{100 * p:.1f} ± {100 * np.sqrt(p * (1 - p) / len(values)):.1f}"

    return {
        "group cut": group,
        "molecules": len(part),
        "fragment kept": share(part["kept exactly"]),
        "completions stable": share(part["stable"]),
        "unconditional stable": share(part["unconditional"]),
        "fragment bonded to all of the rest": share(part["bonded"]),
        "even number of electrons": share(part["even"]),
    }


def _cuts(atoms: list[Atoms], n: int, seed: int) -> list[tuple[str, Atoms, int]]:
    """Returns groups, fragments and sizes of the first n molecules, in random order, that have a group."""
    rng = np.random.default_rng(seed)
    cuts: list[tuple[str, Atoms, int]] = []
    for place in rng.permutation(len(atoms)):
        whole = atoms[place]
        found = _groups(whole) if stability(whole).stable[0] else []
        if found:
            group, members = found[rng.integers(len(found))]
            left = np.setdiff1d(np.arange(len(whole)), members)
            cuts.append((group, Atoms(whole.numbers[left], whole.positions[left]), len(whole)))
        if len(cuts) == n:
            break
    order = {group: k for k, group in enumerate(GROUPS)}
    return sorted(cuts, key=lambda cut: (order[cut[0]], cut[2]))


def _groups(whole: Atoms) -> list[tuple[str, list[int]]]:
    """Returns the groups of a molecule with the atoms of each, including hydrogens."""
    from rdkit import Chem

    mol = sanitise(to_mol(whole))
    if mol is None:
        return []
    found = []
    for group, pattern in GROUPS.items():
        for match in mol.GetSubstructMatches(Chem.MolFromSmarts(pattern)):
            members = set(match[1:])
            for atom in match[1:]:
                members |= {
                    near.GetIdx() for near in mol.GetAtomWithIdx(atom).GetNeighbors() if near.GetAtomicNum() == 1
                }
            found.append((group, sorted(members)))
    return found


def _orders(atoms: Atoms) -> np.ndarray:
    return bond_orders(atoms.numbers[None], atoms.positions[None])[0]


def _drawn(flow: ENF, cuts: list[tuple[str, Atoms, int]], options: argparse.Namespace) -> list[Atoms]:
    """Returns a completion of every fragment; finished ones are read."""
    drawn = []
    for k, (_, own, size) in enumerate(tqdm(cuts, unit="fragment")):
        path = options.work / f"completion_{k:04d}.extxyz"
        if not path.exists():
            fields = {"seed": options.seed + k, "n_atoms": size, "fragment": own, "steps": options.steps}
            write_structures(path, ase_enf.generate(flow, 1, **fields))
        drawn.append(read(path))
    return drawn


def _unconditional(flow: ENF, sizes: list[int], options: argparse.Namespace) -> list[Atoms]:
    """Returns molecules of these sizes, drawn without a fragment."""
    drawn: dict[int, list[Atoms]] = {}
    for size, count in sorted(Counter(sizes).items()):
        path = options.work / f"unconditional_{size}_{count}.extxyz"
        if not path.exists():
            fields = {"seed": options.seed, "n_atoms": size, "steps": options.steps}
            write_structures(path, ase_enf.generate(flow, count, **fields))
        drawn[size] = read(path, index=":")
    return [drawn[size].pop() for size in sizes]


if __name__ == "__main__":
    main()
