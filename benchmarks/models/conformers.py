"""What the score of a flow is worth: ``python -m benchmarks.models.conformers MODEL --data QM9.npz -n 100``.

MODEL is a shipped name or a .safetensors with ``features="given"``; its exact log p(x | types) is asked two questions
about molecules of QM9's test split:

* geometries: does the DFT geometry score higher than the same with noise, than its MMFF94 and its GFN2-xTB relaxation?
* energies: does -log p rank conformers, and distorted geometries, of one molecule as the GFN2-xTB energy does?

Beside it: the likelihood of the distances by histograms of the train split, and the energies themselves. Writes
``results/conformers``, ``results/conformers_energy`` and a figure. With ``--work FOLDER`` geometries and scores are
kept and a stopped run goes on where it was. GFN2-xTB needs ``pip install tblite``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed, Calculator
from ase.data import covalent_radii
from ase.io import read, write
from ase.optimize import BFGS
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.stats import kendalltau, rankdata, spearmanr
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.files import atomic_write
from ase_enf.chem.bonds import pair_distances, size_groups
from ase_enf.chem.convert import PerceptionError, sanitise, to_mol
from ase_enf.data import qm9
from ase_enf.flow.model import ENF
from benchmarks.common import open_work
from benchmarks.report import RESULTS, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
# Geometries that were kept count only for what they were made with.
MADE_WITH = (
    NOISES, DISTORTIONS, DISTORTED, EMBEDDED, MOST, FEWEST, FMAX, STEPS, BONDED, APART, SAME_ENERGY, SAME_DISTANCES,
)  # fmt: skip
CHUNK = 128  # structures scored before the scores are saved
BOOTSTRAPS = 1000
FLOW, HISTOGRAM, XTB, MMFF = "flow", "distance histograms", "GFN2-xTB energy", "MMFF94 energy"
LIKELIHOODS = (FLOW, HISTOGRAM)
UNITS = {FLOW: "nats", HISTOGRAM: "nats", XTB: "eV", MMFF: "eV"}
FIGURES = ("accuracy", "paired AUC", "pooled AUC", "median difference")


def main() -> None:
    """Measures and writes ``results/conformers*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors, features='given'")
    parser.add_argument("--data", help="QM9 in any form (default: what ASE_ENF_QM9 names)")
    parser.add_argument("-n", type=int, default=100, help="molecules of the test split (default: 100)")
    parser.add_argument("--ranked", type=int, default=25, help="molecules of the rank correlations (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder that keeps geometries and scores")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    if not flow.config.types_given:
        raise SystemExit(f"{options.model}: features={flow.features!r}; conformers are scored by a 'given' model")
    flow.use_backend("auto")
    with tempfile.TemporaryDirectory() as folder:
        run(flow, options, options.work or Path(folder))


def run(flow: ENF, options: argparse.Namespace, work: Path) -> None:
    """Makes the geometries, scores them, writes tables and figure."""
    test = qm9.load(options.data, split="test")
    order = np.random.default_rng(options.seed).permutation(len(test))
    chosen = [test[k] for k in order[: options.n]]
    made_by = [importlib.metadata.version(name) for name in ("tblite", "rdkit", "ase")]
    made_with = hashlib.sha256(repr((MADE_WITH, made_by)).encode()).hexdigest()[:8]
    geometries = work / f"geometries_{made_with}_seed{options.seed}"
    pairs = _make(geometries, "geometries", chosen, options.seed, contrasts)
    distorted = _make(geometries, "distorted", chosen[: options.ranked], options.seed, distortions)
    flexible, tried = _flexible(geometries, [test[k] for k in order], options.ranked, options.seed)
    # One pass over all, so that batches of one size are full.
    every = [item for group in (*pairs, *distorted, *flexible) for item in group if item.info["fault"] == "none"]
    attach_scores(flow, every, open_work(work / f"scores_{flow.name}", flow))
    histogram = DistanceHistogram.fit(qm9.load(options.data, split="train"))
    for item in every:
        item.info[HISTOGRAM] = histogram.log_likelihood(item)
    ranked = {name: [_of_kind(group, name) for group in distorted] for name in DISTORTIONS}
    ranked[CONFORMERS] = [_of_kind(group, CONFORMERS) for group in flexible]
    first = geometry_table(pairs, options.seed)
    second = energy_table(ranked)
    common = f"`{flow.name}`, exact trace, seed {options.seed}; tblite {importlib.metadata.version('tblite')}. "
    rough = [item.info["stderr"] for item in every]
    common += f"Integration error of log p: median {np.median(rough):.2g}, largest {max(rough):.2g} nats."
    write_results(
        first.drop(columns=["value", "error"]),
        "conformers",
        "Telling DFT geometries from others of the same molecule",
        "\n\n".join([common, GEOMETRY_NOTES, _faults(pairs), geometry_verdict(first)]),
    )
    write_results(
        second.drop(columns=["value", "error"]),
        "conformers_energy",
        "Ranking structures of one molecule by energy",
        "\n\n".join([common, ENERGY_NOTES, tried, _faults(distorted + flexible), energy_verdict(second)]),
    )
    draw(pairs, ranked, RESULTS / "conformers.png")


# Geometries. Each carries in ``info`` its kind, its fault ("none" where it counts) and its energies in eV


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
    """Returns DFT geometries with Gaussian noise: of levels even in the logarithm, and of one level."""
    rng = np.random.default_rng(seed)
    topology = Topology.of(atoms)
    result = []
    for kind, (low, high) in DISTORTIONS.items():
        for sigma in np.geomspace(low, high, DISTORTED):
            item = _moved(atoms, atoms.positions + sigma * rng.standard_normal((len(atoms), 3)))
            result.append(_described(item, kind, "none", topology))
    return result


def conformers(atoms: Atoms, seed: int) -> list[Atoms]:
    """Returns distinct conformers: ETKDG, MMFF94, then GFN2-xTB; first the molecule itself, which says what failed."""
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
    """The bonds of a DFT geometry as RDKit reads them, and MMFF94 on them.

    Attributes:
        mol: The molecule with the DFT geometry as conformer, None where no bond orders are found.
        fault: Why MMFF94 cannot be had, or "none".
    """

    mol: Mol | None
    fault: str

    @staticmethod
    def of(atoms: Atoms) -> Topology:
        """Returns the topology of a geometry, by the first method whose reading has no radicals and has parameters."""
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
        """Returns the MMFF94 energy of any geometry, eV; NaN without MMFF94."""
        if self.fault != "none":
            return np.nan
        return self._field(-1).CalcEnergy(atoms.positions.ravel().tolist()) * KCAL

    def relaxed(self, atoms: Atoms, conformer: int = -1) -> tuple[Atoms, str]:
        """Returns a conformer relaxed by MMFF94, and what is wrong with it."""
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
    """Returns a structure relaxed by GFN2-xTB, and what is wrong with it."""
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
    """Returns "other bonds" where a pair of the same atoms is bonded in one structure and apart in the other."""
    radii = covalent_radii[before.numbers]
    first, second = (pair_distances(item.positions[None])[0] / (radii[:, None] + radii) for item in (before, after))
    changed = (np.minimum(first, second) < BONDED) & (np.maximum(first, second) > APART)
    return "other bonds" if changed.any() else "none"


def distinct(structures: Sequence[Atoms], energies: Sequence[float]) -> list[Atoms]:
    """Returns the structures without repetitions, by energy and distances: mirror images, which score alike, are one.

    Args:
        structures: Of one molecule.
        energies: eV; NaN, where there are none, tells nothing apart.
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


def _make(
    folder: Path, name: str, molecules: Iterable[Atoms], seed: int, make: Callable[[Atoms, int], list[Atoms]]
) -> list[list[Atoms]]:
    return [
        _kept(folder, name, atoms, seed, make) for atoms in tqdm(molecules, desc=name, disable=None, dynamic_ncols=True)
    ]


def _kept(folder: Path, name: str, atoms: Atoms, seed: int, make: Callable[[Atoms, int], list[Atoms]]) -> list[Atoms]:
    """Returns the structures of a molecule, from their file; it is written first where there is none."""
    index = int(atoms.info["qm9_index"])
    path = folder / f"{name}_{index:06d}.extxyz"
    if not path.exists():
        text = io.StringIO()
        # Nothing shares a stream of random numbers: neither kinds of structures nor neighbouring seeds.
        stream = np.random.SeedSequence((seed, index, *name.encode())).generate_state(1)
        write(text, make(atoms, int(stream[0])), format="extxyz")
        with atomic_write(path) as handle:
            handle.write(text.getvalue().encode())
    result = read(path, index=":")
    for place, item in enumerate(result):
        item.info["name"] = f"{folder.name}/{path.stem}/{place}"
    return result


def _flexible(folder: Path, molecules: Iterable[Atoms], wanted: int, seed: int) -> tuple[list[list[Atoms]], str]:
    """Returns the first molecules with enough conformers, and how many were passed over, and why."""
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


def _of_kind(group: list[Atoms], kind: str) -> list[Atoms]:
    return [item for item in group if item.info["kind"] == kind and item.info["fault"] == "none"]


def _pairs(groups: list[list[Atoms]], kind: str) -> list[tuple[Atoms, Atoms]]:
    """Returns the DFT geometry and its counterpart of every molecule that has both without fault."""
    pairs = [(*_of_kind(group, "DFT"), *_of_kind(group, kind)) for group in groups]
    return [pair for pair in pairs if len(pair) == 2]


def _faults(groups: list[list[Atoms]]) -> str:
    counts = Counter(
        (item.info["kind"], item.info["fault"]) for group in groups for item in group if item.info["fault"] != "none"
    )
    lost = ", ".join(f"{count} × {kind}: {fault}" for (kind, fault), count in sorted(counts.items()))
    unknown = sum(bool(np.isnan(group[0].info[MMFF])) for group in groups)
    return f"Left out: {lost or 'none'}. Molecules without MMFF94 (bond orders or parameters): {unknown}."


# Scores


def attach_scores(flow: ENF, structures: list[Atoms], folder: Path) -> None:
    """Puts log p and its error into ``info``; what ``scores.json`` of the folder holds is not scored again."""
    path = folder / "scores.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = sorted((item for item in structures if item.info["name"] not in known), key=len)
    starts = range(0, len(missing), CHUNK)
    for start in tqdm(starts, desc="scores", unit="chunk", disable=None, dynamic_ncols=True):
        chunk = missing[start : start + CHUNK]
        table = ase_enf.score(flow, chunk, trace="exact", progress=False)
        rows = zip(chunk, table.log_likelihood, table.stderr, strict=True)
        known |= {item.info["name"]: (value, error) for item, value, error in rows}
        with atomic_write(path) as handle:
            handle.write(json.dumps(known).encode())
    for item in structures:
        item.info[FLOW], item.info["stderr"] = known[item.info["name"]]


class DistanceHistogram(NamedTuple):
    """The baseline: a density of distances for each pair of elements, Σ_{i<j} log p(d_ij | elements of i and j).

    The densities are linear between the centres of bins and mixed with a little of the uniform one. The sum is not the
    logarithm of a normalised density of geometries: distances depend on each other.

    Attributes:
        centres: Densities at the centres of the bins by atomic numbers, 1/Å, shape (Z, Z, N).
        width: Of a bin, Å.
    """

    centres: NDArray[np.float64]
    width: float

    @staticmethod
    def fit(
        molecules: Iterable[Atoms], width: float = 0.0025, smoothing: float = 0.5, reach: float = 15.0
    ) -> DistanceHistogram:
        """Counts distances; the defaults give unseen molecules (validation split) the highest likelihood.

        Args:
            molecules: Where they are taken from.
            width: Of a bin, Å.
            smoothing: Standard deviation of the Gaussian that smooths the counts, in bins.
            reach: The largest distance, Å; what lies beyond counts as this.
        """
        molecules = list(molecules)
        bins, top = round(reach / width), max(int(item.numbers.max()) for item in molecules) + 1
        counts = np.zeros(top * top * bins)
        for group in size_groups(molecules):
            i, j = np.triu_indices(group.numbers.shape[1], 1)
            place = np.minimum(pair_distances(group.positions)[:, i, j] / width, bins - 1).astype(np.int64)
            pair = group.numbers[:, i] * top + group.numbers[:, j]
            counts += np.bincount((pair * bins + place).ravel(), minlength=len(counts))
        counts = counts.reshape(top, top, bins)
        counts = counts + counts.transpose(1, 0, 2)
        smooth = gaussian_filter1d(counts, smoothing, axis=-1, mode="reflect") if smoothing else counts
        total = smooth.sum(axis=-1, keepdims=True)
        # A pair of elements never seen is uniform; so is one distance in 10,000 of the others, or their logarithm ends.
        floor = np.where(total > 0, 1e-4, 1.0)
        return DistanceHistogram(((1 - floor) * smooth / np.maximum(total, 1) + floor / bins) / width, width)

    def density(self, first: int, second: int, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns p(d | elements) in 1/Å for two atomic numbers."""
        places = np.asarray(distances) / self.width - 0.5
        return np.interp(places, np.arange(self.centres.shape[-1]), self.centres[first, second])

    def log_likelihood(self, atoms: Atoms) -> float:
        """Returns the sum over all pairs of atoms, nats."""
        i, j = np.triu_indices(len(atoms), 1)
        distances = pair_distances(atoms.positions[None])[0, i, j]
        pairs = np.sort(atoms.numbers[np.stack([i, j], axis=1)], axis=1)
        return float(
            sum(
                np.log(self.density(first, second, distances[(pairs == (first, second)).all(axis=1)])).sum()
                for first, second in np.unique(pairs, axis=0).tolist()
            )
        )


# Statistics


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Returns the area under the ROC curve, P(positive > negative) + ½ P(equal) over all pairs of one of each.

    Example:
        >>> auc(np.array([2.0, 1.0]), np.array([1.0, 0.0]))
        0.875
    """
    n, m = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def paired_auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Returns P(positive > negative) + ½ P(equal) within the pairs.

    Example:
        >>> paired_auc(np.array([2.0, 1.0]), np.array([1.0, 1.0]))
        0.75
    """
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def bootstrap(
    statistic: Callable[..., float], *columns: NDArray[np.float64], seed: int = 0, resamples: int = BOOTSTRAPS
) -> float:
    """Returns the standard error of a statistic over molecules: both members of a pair are drawn together."""
    draws = np.random.default_rng(seed).integers(len(columns[0]), size=(resamples, len(columns[0])))
    return float(np.std([statistic(*(column[draw] for column in columns)) for draw in draws], ddof=1))


def value_of(item: Atoms, score: str) -> float:
    """Returns a score, higher for what it prefers: nats of a likelihood, or minus an energy in eV."""
    return item.info[score] if score in LIKELIHOODS else -item.info[score]


# Tables

GEOMETRY_NOTES = (
    "Each row asks one score about pairs of the DFT geometry and another of the same molecule. `flow`: exact log p(x | "
    "types); `distance histograms`: Σ over pairs of atoms of log p(d | elements), densities of the train split; the "
    "energies prefer the lower (MMFF94 on the bonds of the DFT geometry).\n\n"
    "* accuracy: share of molecules whose DFT geometry scores strictly higher; binomial standard error, with the "
    "share taken as (k + 1) / (n + 2), so that it does not vanish for k = n.\n"
    "* paired AUC: P(DFT > other) + ½ P(equal) within one molecule; bootstrap over molecules. Without ties it is the "
    "accuracy. It is the area under the ROC curve that means something: log p of different molecules differ by "
    "dimension and composition. (A bootstrap of equal answers has no spread: take the error of the accuracy.)\n"
    "* pooled AUC: the same over all DFT geometries against all others, whichever the molecule, of log p / (3(M - 1)) "
    "for the flow and of the mean over pairs of atoms for the histograms; bootstrap over molecules. What one threshold "
    "would do for a single structure.\n"
    "* median difference: DFT minus other, in nats (likelihoods) or eV (minus energy).\n\n"
    "MMFF94 and GFN2-xTB start from the DFT geometry; each energy prefers its own relaxed geometry by construction."
)
ENERGY_NOTES = (
    "Correlation of -log p (of the energy for MMFF94) with the GFN2-xTB energy among structures of one molecule: mean "
    f"over molecules ± standard error. Conformers: ETKDG, MMFF94, GFN2-xTB to {FMAX:g} eV/Å, mirror images and "
    f"repetitions removed, {FEWEST} to {MOST} a molecule. Noise on the DFT geometry: {DISTORTED} a molecule. Picked: "
    "GFN2-xTB energy of the structure that a score likes best above the lowest; random: the mean of all above it. With "
    "noise of many levels the level decides the rank, so it is the easy case; noise of one level is the hard one."
)


def geometry_table(groups: list[list[Atoms]], seed: int = 0) -> pd.DataFrame:
    """Returns the table of the first question; ``value`` and ``error`` are the paired AUC's numbers."""
    rows = []
    for kind in OTHERS:
        pairs = _pairs(groups, kind)
        for score in (FLOW, HISTOGRAM, XTB, MMFF):
            values = np.array([[value_of(item, score) for item in pair] for pair in pairs]).reshape(-1, 2)
            usable = np.isfinite(values).all(axis=1)
            row = {"against": kind, "score": score, "molecules": usable.sum(), "left out": len(groups) - usable.sum()}
            row |= dict.fromkeys(FIGURES, "") | {"value": np.nan, "error": np.nan}
            if usable.any():
                size = np.array([len(pair[0]) for pair in pairs])[usable]
                row |= _compare(*values[usable].T, size, score, seed)
            rows.append(row)
    return pd.DataFrame(rows)


def _compare(
    dft: NDArray[np.float64], other: NDArray[np.float64], size: NDArray[np.int64], score: str, seed: int
) -> dict[str, str | float]:
    """Returns the figures of one row; ``size`` is the number of atoms."""
    count, accuracy, value = len(dft), float((dft > other).mean()), paired_auc(dft, other)
    likely = (count * accuracy + 1) / (count + 2)  # or 20 of 20 would be without error
    error, pooled = bootstrap(paired_auc, dft, other, seed=seed), "not comparable"
    if score in LIKELIHOODS:
        terms = 3 * (size - 1) if score == FLOW else size * (size - 1) / 2
        pooled = _figure(auc(dft / terms, other / terms), bootstrap(auc, dft / terms, other / terms, seed=seed))
    median = f"{np.median(dft - other):.3g} {UNITS[score]}"
    accuracy_figure = _figure(accuracy, np.sqrt(likely * (1 - likely) / count))
    figures = (accuracy_figure, _figure(value, error), pooled, median)
    return dict(zip(FIGURES, figures, strict=True)) | {"value": value, "error": error}


def energy_table(ranked: dict[str, list[list[Atoms]]]) -> pd.DataFrame:
    """Returns the table of the second question; ``value`` and ``error`` are Spearman's numbers."""
    rows = []
    for kind, groups in ranked.items():
        for score in (FLOW, HISTOGRAM, MMFF):
            results = [found for group in groups if (found := _rank(group, score))]
            row = {
                "structures": kind,
                "score": score,
                "molecules": len(results),
                "left out": len(groups) - len(results),
            }
            columns = np.array(results).reshape(-1, 4).T
            means = [float(column.mean()) if len(results) else np.nan for column in columns]
            errors = [float(c.std(ddof=1) / np.sqrt(len(c))) if len(c) > 1 else np.nan for c in columns]
            row |= {name: _figure(means[k], errors[k]) for k, name in enumerate(("Spearman", "Kendall"))}
            row |= {f"{name}, meV": f"{1e3 * means[k]:.0f}" for k, name in ((2, "picked"), (3, "random"))}
            rows.append(row | {"value": means[0], "error": errors[0]})
    return pd.DataFrame(rows)


def _rank(group: list[Atoms], score: str) -> tuple[float, float, float, float] | None:
    """Returns both correlations with the GFN2-xTB energy, and the energy of the picked and the mean one, eV."""
    energy = np.array([item.info[XTB] for item in group])
    mine = np.array([-value_of(item, score) for item in group])
    if len(group) < 3 or not np.isfinite(mine).all() or not np.ptp(mine):
        return None
    above = energy - energy.min()
    return (
        float(spearmanr(mine, energy).statistic),
        float(kendalltau(mine, energy).statistic),
        float(above[mine.argmin()]),
        float(above.mean()),
    )


def _figure(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def geometry_verdict(table: pd.DataFrame) -> str:
    """Says against what the flow's score does not help: chance, the wrong one, or a cheaper score does as well."""
    return _verdict(table, "against", 0.5, "paired AUC", "it prefers the other geometry")


def energy_verdict(table: pd.DataFrame) -> str:
    """Says where -log p ranks no better than chance, or a cheaper score as well."""
    return _verdict(table, "structures", 0.0, "Spearman", "it ranks the wrong way round")


def _verdict(table: pd.DataFrame, column: str, chance: float, figure: str, wrong: str) -> str:
    findings: dict[str, list[str]] = {}
    for kind, part in table.groupby(column, sort=False):
        rows = part.set_index("score")
        flow = rows.loc[FLOW]
        if not flow.molecules:
            continue
        if not abs(flow.value - chance) > 2 * flow.error:
            words = "it cannot be told from chance (2 standard errors)"
            findings.setdefault(words, []).append(f"{kind} ({flow[figure]})")
        elif flow.value < chance:
            findings.setdefault(wrong, []).append(f"{kind} ({flow[figure]})")
        for name, other in rows.drop(FLOW).iterrows():
            if other.value >= flow.value:
                findings.setdefault(f"{name}: as good or better", []).append(f"{kind} ({other[figure]})")
    lines = [f"* {words}: {', '.join(kinds)}" for words, kinds in findings.items()]
    return "Where the flow's score does not help:\n\n" + ("\n".join(lines) or "* nowhere among these structures")


# Figure


def draw(pairs: list[list[Atoms]], ranked: dict[str, list[list[Atoms]]], path: Path) -> None:
    """Draws the differences by kind, and -log p against energy for the molecules of the median correlation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, *others = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    _draw_differences(left, pairs)
    for axes, kind in zip(others, ("noise 0.01-0.1 Å", CONFORMERS), strict=True):
        _draw_ranks(axes, ranked[kind], kind)
    figure.savefig(path, dpi=110)


def _draw_differences(axes: Axes, groups: list[list[Atoms]]) -> None:
    rng = np.random.default_rng(0)
    for place, kind in enumerate(OTHERS):
        found = [dft.info[FLOW] - other.info[FLOW] for dft, other in _pairs(groups, kind)]
        height = place + rng.uniform(-0.28, 0.28, len(found))
        colour = ["#15803d" if value > 0 else "#b91c1c" for value in found]
        axes.scatter(found, height, s=9, c=colour, alpha=0.6, linewidths=0)
        if found:
            axes.plot([np.median(found)] * 2, [place - 0.38, place + 0.38], color="black", lw=1.6)
            share = f"{np.mean(np.array(found) > 0):.0%} "
            axes.annotate(share, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=9)
    axes.set_xscale("symlog", linthresh=10)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(OTHERS)), labels=OTHERS)
    axes.invert_yaxis()
    axes.set(
        xlabel="log p(DFT) - log p(other), nats",
        title="DFT geometry against another of the same molecule\n(right: share whose DFT geometry scores higher)",
    )
    axes.set_xlim(right=4 * axes.get_xlim()[1])  # room for the shares


def _draw_ranks(axes: Axes, groups: list[list[Atoms]], kind: str) -> None:
    results = [(found[0], place) for place, group in enumerate(groups) if (found := _rank(group, FLOW))]
    if not results:
        axes.set_title(f"{kind}: none")
        return
    correlation, place = sorted(results)[len(results) // 2]
    energy = np.array([item.info[XTB] for item in groups[place]])
    surprise = np.array([-item.info[FLOW] for item in groups[place]])
    axes.scatter(energy - energy.min(), surprise - surprise.min(), s=22, color="#1d4ed8", alpha=0.8)
    formula = groups[place][0].get_chemical_formula(mode="hill")
    axes.set(
        xlabel="GFN2-xTB energy above the lowest, eV",
        ylabel="-log p above the lowest, nats",
        title=f"{formula}, {kind}\n(median Spearman, {correlation:.2f})",
    )


if __name__ == "__main__":
    main()
