"""The geometries of the conformer benchmark: ``info`` of each holds its kind, its energies and its fault.

A fault is a short text, "none" for a structure that counts; energies are in eV.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.data import covalent_radii
from ase.io import read, write
from ase.optimize import BFGS
from numpy.typing import NDArray
from tqdm import tqdm

from ase_enf.atoms.files import atomic_write
from ase_enf.chem.bonds import pair_distances
from ase_enf.chem.convert import PerceptionError, sanitise, to_mol

if TYPE_CHECKING:
    from rdkit.Chem import Mol

NOISES = (0.02, 0.05, 0.1, 0.2)  # Å
OTHERS = (*(f"noise {sigma:g} Å" for sigma in NOISES), "MMFF94", "GFN2-xTB")
DISTORTIONS = {"noise 0.01-0.1 Å": (0.01, 0.1), "noise 0.05 Å": (0.05, 0.05)}
CONFORMERS = "conformers"
DISTORTED = 16  # structures of each kind of distortion
EMBEDDED, MOST, FEWEST = 60, 16, 6  # conformers embedded, kept at most, and needed of one molecule
FMAX, STEPS = 0.01, 500  # eV/Å, of the GFN2-xTB relaxation
BONDED, APART = 1.15, 1.35  # of the sum of covalent radii; between them lie the diagonals of small rings, which breathe
SAME_ENERGY, SAME_DISTANCES = 2e-3, 0.05  # eV and Å (rms): two conformers nearer than both are one
KCAL = units.kcal / units.mol
# Saved geometries are reused only with the same constants and programs.
MADE_WITH = (
    NOISES, DISTORTIONS, DISTORTED, EMBEDDED, MOST, FEWEST, FMAX, STEPS, BONDED, APART, SAME_ENERGY, SAME_DISTANCES,
)  # fmt: skip
XTB, MMFF = "GFN2-xTB energy", "MMFF94 energy"


def made_with() -> str:
    """Returns a hash of the constants and programs that geometries are made with, eight hexadecimal digits."""
    made_by = [importlib.metadata.version(name) for name in ("tblite", "rdkit", "ase")]
    return hashlib.sha256(repr((MADE_WITH, made_by)).encode()).hexdigest()[:8]


def contrasts(atoms: Atoms, seed: int) -> list[Atoms]:
    """Returns the DFT geometry of a molecule and its counterparts, ``OTHERS``."""
    rng = np.random.default_rng(seed)
    noisy = [_moved(atoms, atoms.positions + sigma * rng.standard_normal((len(atoms), 3))) for sigma in NOISES]
    topology = Topology.of(atoms)
    mmff, mmff_fault = topology.relaxed(atoms)
    xtb, xtb_fault = xtb_relaxed(atoms)
    structures = [atoms.copy(), *noisy, mmff, xtb]
    faults = ["none"] * (1 + len(noisy)) + [mmff_fault, xtb_fault]
    rows = zip(structures, ("DFT", *OTHERS), faults, strict=True)
    return [_described(item, kind, fault, topology) for item, kind, fault in rows]


def distortions(atoms: Atoms, seed: int) -> list[Atoms]:
    """Returns DFT geometries with Gaussian noise, at levels evenly spaced in the logarithm and at one level."""
    rng = np.random.default_rng(seed)
    topology = Topology.of(atoms)
    result = []
    for kind, (low, high) in DISTORTIONS.items():
        for sigma in np.geomspace(low, high, DISTORTED):
            item = _moved(atoms, atoms.positions + sigma * rng.standard_normal((len(atoms), 3)))
            result.append(_described(item, kind, "none", topology))
    return result


def conformers(atoms: Atoms, seed: int) -> list[Atoms]:
    """Returns distinct conformers by ETKDG, MMFF94 and then GFN2-xTB, after the molecule itself with any fault."""
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom, rdMolDescriptors

    topology = Topology.of(atoms)
    if topology.mol is None:
        return [_described(atoms.copy(), "DFT", topology.fault, topology)]
    mol = Chem.Mol(topology.mol)
    if rdMolDescriptors.CalcNumRotatableBonds(mol) < 2:
        return [_described(atoms.copy(), "DFT", "fewer than 2 rotatable bonds", topology)]
    Chem.AssignStereochemistryFrom3D(mol)
    places = rdDistGeom.EmbedMultipleConfs(mol, EMBEDDED, randomSeed=1 + seed % 2**30)
    embedded = [Topology(mol, "none").relaxed(atoms, place)[0] for place in places]
    starts = distinct(embedded, [topology.energy(item) for item in embedded])[:MOST]
    ends = [_described(*relaxed, topology) for relaxed in (_conformer(item, atoms) for item in starts)]
    sound = [item for item in ends if item.info["fault"] == "none"]
    kept = distinct(sound, [item.info[XTB] for item in sound])
    fault = "none" if len(kept) >= FEWEST else f"fewer than {FEWEST} conformers"
    broken = [item for item in ends if item.info["fault"] != "none"]
    return [_described(atoms.copy(), "DFT", fault, topology), *kept, *broken]


def _conformer(start: Atoms, reference: Atoms) -> tuple[Atoms, str, str]:
    relaxed, fault = xtb_relaxed(start)
    return relaxed, CONFORMERS, fault if fault != "none" else bond_fault(reference, relaxed)


class Topology(NamedTuple):
    """The bonds that RDKit perceives in a DFT geometry, and MMFF94 for them.

    Attributes:
        mol: The molecule with the DFT geometry as conformer; None if no bond orders are found.
        fault: Why MMFF94 cannot be used, or "none".
    """

    mol: Mol | None
    fault: str

    @staticmethod
    def of(atoms: Atoms) -> Topology:
        """Returns the topology of a geometry, by the first method that finds no radicals and has parameters."""
        from rdkit.Chem import rdForceFieldHelpers

        faults = []
        for method in ("rdkit", "table", "openbabel"):  # the first takes some strained rings for other bonds
            try:
                mol = sanitise(to_mol(atoms, method))  # "rdkit" too: its molecule lacks the rings that MMFF94 asks for
            except PerceptionError:
                continue
            if mol is None or any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
                continue
            if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
                return Topology(mol, "none")
            faults.append("no parameters")
        return Topology(None, (faults or ["no bond orders"])[0])

    def energy(self, atoms: Atoms) -> float:
        """Returns the MMFF94 energy of a geometry, eV; NaN without MMFF94."""
        if self.fault != "none":
            return np.nan
        return self._field(-1).CalcEnergy(atoms.positions.ravel().tolist()) * KCAL

    def relaxed(self, atoms: Atoms, conformer: int = -1) -> tuple[Atoms, str]:
        """Returns a conformer relaxed by MMFF94, and its fault."""
        if self.fault != "none":
            return atoms.copy(), self.fault
        field = self._field(conformer)
        unfinished = field.Minimize(maxIts=20_000)
        result = _moved(atoms, np.reshape(field.Positions(), (-1, 3)))
        return result, "not converged" if unfinished else bond_fault(atoms, result)

    def _field(self, conformer: int) -> Any:
        from rdkit.Chem import rdForceFieldHelpers as helpers

        properties = helpers.MMFFGetMoleculeProperties(self.mol, mmffVariant="MMFF94")
        field = helpers.MMFFGetMoleculeForceField(self.mol, properties, confId=conformer)
        field.Initialize()
        return field


def xtb_relaxed(atoms: Atoms) -> tuple[Atoms, str]:
    """Returns a structure relaxed by GFN2-xTB, and its fault."""
    result = atoms.copy()
    result.calc = _xtb()
    try:
        converged = BFGS(result, logfile=None).run(fmax=FMAX, steps=STEPS)
    except CalculationFailed:
        return atoms.copy(), "no SCF"
    result.calc = None
    return result, bond_fault(atoms, result) if converged else "not converged"


def _xtb() -> Calculator:
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise SystemExit("GFN2-xTB comes from tblite, which is not installed: pip install tblite") from error
    return TBLite(method="GFN2-xTB", verbosity=0)


def bond_fault(before: Atoms, after: Atoms) -> str:
    """Returns "other bonds" if a pair of atoms is bonded in one structure and not in the other, else "none"."""
    radii = covalent_radii[before.numbers]
    first, second = (pair_distances(item.positions[None])[0] / (radii[:, None] + radii) for item in (before, after))
    changed = (np.minimum(first, second) < BONDED) & (np.maximum(first, second) > APART)
    return "other bonds" if changed.any() else "none"


def distinct(structures: Sequence[Atoms], energies: Sequence[float]) -> list[Atoms]:
    """Returns structures without duplicates by energy and distances; mirror images, whose scores are equal, are one.

    Args:
        structures: Structures of one molecule.
        energies: Their energies, eV; NaN where unknown, which distinguishes nothing.
    """
    shapes = [np.sort(pair_distances(item.positions[None])[0].ravel()) for item in structures]
    kept: list[int] = []
    for place, (shape, energy) in enumerate(zip(shapes, energies, strict=True)):
        if not any(
            np.sqrt(np.square(shape - shapes[k]).mean()) < SAME_DISTANCES
            and not abs(energy - energies[k]) >= SAME_ENERGY
            for k in kept
        ):
            kept.append(place)
    return [structures[place] for place in kept]


def _moved(atoms: Atoms, positions: NDArray[np.float64]) -> Atoms:
    result = atoms.copy()
    result.positions = positions
    return result


def _described(item: Atoms, kind: str, fault: str, topology: Topology) -> Atoms:
    """Returns the structure with its kind, its fault and its energies."""
    item.calc = _xtb()
    try:
        energy = item.get_potential_energy()
    except CalculationFailed:
        energy, fault = np.nan, fault if fault != "none" else "no SCF"
    item.calc = None
    index = item.info["qm9_index"]
    item.info = {"qm9_index": index, "kind": kind, "fault": fault, XTB: energy, MMFF: topology.energy(item)}
    return item


def geometries(
    folder: Path, name: str, molecules: Iterable[Atoms], seed: int, make: Callable[[Atoms, int], list[Atoms]]
) -> list[list[Atoms]]:
    """Returns the result of ``make`` for every molecule, each with its own seed; files in the folder are reused."""
    return [
        _kept(folder, name, atoms, seed, make) for atoms in tqdm(molecules, desc=name, disable=None, dynamic_ncols=True)
    ]


def _kept(folder: Path, name: str, atoms: Atoms, seed: int, make: Callable[[Atoms, int], list[Atoms]]) -> list[Atoms]:
    """Returns the structures of a molecule from their file, which is written first if it does not exist."""
    index = int(atoms.info["qm9_index"])
    path = folder / f"{name}_{index:06d}.extxyz"
    if not path.exists():
        text = io.StringIO()
        # Neither kinds of structures nor neighbouring seeds share a stream of random numbers.
        stream = np.random.SeedSequence((seed, index, *name.encode())).generate_state(1)
        write(text, make(atoms, int(stream[0])), format="extxyz")
        with atomic_write(path) as handle:
            handle.write(text.getvalue().encode())
    result = read(path, index=":")
    for place, item in enumerate(result):
        item.info["name"] = f"{folder.name}/{path.stem}/{place}"
    return result


def flexible(folder: Path, molecules: Iterable[Atoms], wanted: int, seed: int) -> tuple[list[list[Atoms]], str]:
    """Returns the first molecules with enough conformers, and how many were skipped and why."""
    found, reasons = [], Counter()
    with tqdm(total=wanted, desc=CONFORMERS, disable=None, dynamic_ncols=True) as bar:
        for atoms in molecules:
            if len(found) == wanted:
                break
            group = _kept(folder, CONFORMERS, atoms, seed, conformers)
            reasons[group[0].info["fault"]] += 1
            if group[0].info["fault"] == "none":
                found.append(group)
                bar.update()
    passed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if reason != "none")
    return found, f"Conformers: the first {reasons['none']} suitable of {reasons.total()} molecules (passed: {passed})."


def of_kind(group: list[Atoms], kind: str) -> list[Atoms]:
    """Returns the structures of one kind that count."""
    return [item for item in group if item.info["kind"] == kind and item.info["fault"] == "none"]


def pairs_of(groups: list[list[Atoms]], kind: str) -> list[tuple[Atoms, Atoms]]:
    """Returns the DFT geometry and its counterpart for every molecule in which neither has a fault."""
    pairs = [(*of_kind(group, "DFT"), *of_kind(group, kind)) for group in groups]
    return [pair for pair in pairs if len(pair) == 2]


def faults(groups: list[list[Atoms]]) -> str:
    """Returns as text how many structures of each kind were left out, and why."""
    counts = Counter(
        (item.info["kind"], item.info["fault"]) for group in groups for item in group if item.info["fault"] != "none"
    )
    lost = ", ".join(f"{count} × {kind}: {fault}" for (kind, fault), count in sorted(counts.items()))
    unknown = sum(bool(np.isnan(group[0].info[MMFF])) for group in groups)
    return f"Left out: {lost or 'none'}. Molecules without MMFF94 (bond orders or parameters): {unknown}."
