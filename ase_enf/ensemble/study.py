"""A study in stages, each saved in a folder and resumed from it: sample, train, draw, reweight, report."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ase_enf.atoms.files import atomic_write, make_folder
from ase_enf.atoms.io import write_structures
from ase_enf.bars import Progress, of_part
from ase_enf.chem.convert import PerceptionError
from ase_enf.chem.graph import BONDS_KEY, bonds_of, write_bonds
from ase_enf.chem.mmff import conformers
from ase_enf.chem.topology import Topology
from ase_enf.data import thermal
from ase_enf.ensemble.basins import Torsions, assign, free_energies
from ase_enf.ensemble.calculators import OUTSIDE, OneMolecule, as_calculator
from ase_enf.flow.model import ENF
from ase_enf.plot.ensembles import torsion_histogram, weight_histogram
from ase_enf.scoring.reweight import Reweighted, ReweightingError, reweight
from ase_enf.training.config import TrainConfig
from ase_enf.training.folder import STATE_FILE
from ase_enf.training.loop import train

Stages = bool | Callable[[str, str, int, int | None], None] | None
"""Whether to show bars, None for on a terminal only; or a function that is told of every result of every stage.

Its arguments: what the stage does, the name of one result, the number of results so far, and that of all.
"""
STRUCTURE_FILES = ("thermal.extxyz", "samples.extxyz")
"""Structures that a study writes to its folder: frames of the walkers, and draws of the flow."""
# Draws saved together; an interruption loses at most this many.
PART = 500
# Fraction of the frames used for validation: the last ones of every walker.
_VALID = 0.1
_SEEDS = 1_000_003  # seed of a part: seed * _SEEDS + its number, so that studies with different seeds share none
_ARRAYS = ("log_weights", "energies", "log_prob", "log_prob_error")


@dataclass(frozen=True)
class Study:
    """What :func:`boltzmann` returns.

    Args:
        ensemble: Frames of the walkers, and diagnostics of how well they mixed.
        flow: The trained flow.
        reweighted: Draws of the flow with their weights, atoms in the order of the molecule.
        table: Free energies of the basins, see :func:`ase_enf.ensemble.basins.free_energies`; None without basins.
    """

    ensemble: thermal.Ensemble
    flow: ENF
    reweighted: Reweighted
    table: pd.DataFrame | None


def default_training(steps: int = 6000, atoms: Atoms | None = None) -> TrainConfig:
    """Returns the default training settings for one small molecule: 4 layers of width 64, given types and graph.

    With the graph, the flow need not find out which atoms are bonded, and wastes no draws on other molecules.

    Args:
        steps: Number of optimizer steps.
        atoms: The molecule; without it, or if RDKit finds no graph of it (charges, radicals), types alone are given.

    Returns:
        The settings.

    Example:
        >>> from ase.build import molecule
        >>> default_training(atoms=molecule("CH3CH2OH")).graph, default_training(atoms=molecule("CH3")).graph
        (True, False)
    """
    graph = atoms is not None and _bonds(atoms) is not None
    return TrainConfig(
        features="given", graph=graph, hidden=64, layers=4, batch_size=128, steps=steps, validation_size=64
    )


def boltzmann(
    atoms: Atoms,
    calculator: Any,
    temperature: float,
    out: str | Path,
    *,
    n: int = 10_000,
    draws: int = 10_000,
    torsions: Sequence[Sequence[int]] = (),
    basin: Callable[[Atoms], Any] | None = None,
    training: TrainConfig | None = None,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Stages = None,
) -> Study:
    """Samples a molecule's thermal ensemble, trains a flow on it, draws from the flow and reweights the draws.

    The ensemble is that of one molecule: no stage counts another isomer or a broken molecule. Every stage is saved in
    ``out``; a second call with the same settings reads the finished stages and continues the interrupted one.

    Args:
        atoms: The molecule; RDKit makes the conformers that the walkers start from.
        calculator: An ASE calculator of energies and forces, eV and eV/Å, or the name of one: "gfn2", "gfn1", "mmff".
        temperature: K.
        out: Folder for everything that is written; created if necessary.
        n: Number of frames of the walkers.
        draws: Number of draws of the flow.
        torsions: Torsions whose basins and histograms are reported, as four atom indices each.
        basin: A function of one structure, with its atoms in the order of the molecule, that returns the name of its
            basin; that of the torsions by default. It must not depend on handedness, as the flow draws both mirror
            images; nor, for a flow that is not given the graph, on the order of equal atoms.
        training: Training settings; :func:`default_training` of the molecule by default. ``out`` and ``seed`` in it
            are replaced.
        sampling: Options of :func:`ase_enf.data.thermal.run`.
        seed: Seed of every stage.
        progress: Whether to show progress bars, by default on a terminal only; or a function that is told, as results
            come, what the stage does, the name of one result ("sweep", "step", "draw"), how many there are and of how
            many. A stage that is finished already is passed over.

    Returns:
        Ensemble, flow, weights and free energies. The folder holds ``report.md``, ``free_energies.csv``,
        ``thermal.extxyz``, ``samples.extxyz``, histograms of torsions and weights, and the training run.

    Raises:
        TypeError: If ``calculator`` is neither a name nor a calculator.
        ValueError: For a bad option, or a folder with stages computed at other settings.
        ReweightingError: If none of the draws is the molecule, or the calculator fails on all of them.

    Example:
        >>> from ase.build import molecule
        >>> study = boltzmann(molecule("CH3CH2OH"), "gfn2", 300.0, "result")  # doctest: +SKIP
        >>> print(study.reweighted)  # doctest: +SKIP
    """
    torsions = _checked_torsions(atoms, torsions)
    calculator = as_calculator(calculator, atoms)
    if draws < 1:
        raise ValueError(f"draws={draws}: must be at least 1")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature}: must be a positive number of K")
    with _begun(out) as folder:
        starts = conformers(atoms, 8, seed)
        what = (
            f"sampling {n} frames of {atoms.get_chemical_formula()} at {temperature:g} K by {type(calculator).__name__}"
        )
        told = _of_stage(progress, what, "sweep")
        options = {"seed": seed, "out": folder / "thermal.npz", "progress": told} | (sampling or {})
        ensemble = thermal.run(starts, calculator, temperature, n, **options)
    if (bonds := _bonds(atoms)) is not None:  # of vibrating frames, RDKit would sometimes find others
        for frame in ensemble.frames:
            frame.info[BONDS_KEY] = bonds
    write_structures(folder / STRUCTURE_FILES[0], ensemble.frames)
    flow = _trained(ensemble, training or default_training(atoms=atoms), folder / "flow", seed, progress)
    found = _drawn(flow, atoms, calculator, temperature, draws, folder / "draws", seed, progress)
    write_structures(folder / STRUCTURE_FILES[1], found.samples)
    table = _basin_table(basin or (Torsions(torsions) if torsions else None), ensemble, found, folder)
    study = Study(ensemble, flow, found, table)
    _draw_pictures(study, atoms, torsions, folder)
    with atomic_write(folder / "report.md") as handle:
        handle.write(report(study, atoms, temperature).encode())
    return study


@contextlib.contextmanager
def _begun(path: str | Path) -> Iterator[Path]:
    """Creates a folder, and removes a new one if a bad option ends the work before anything is written to it."""
    new = not Path(path).exists()
    folder = make_folder(path)
    try:
        yield folder
    except ValueError:
        if new:
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()
        raise


def _bonds(atoms: Atoms) -> str | None:
    """Returns the molecular graph as text for ``info``; None if a graph cannot express the molecule."""
    try:
        return write_bonds(bonds_of(atoms))
    except PerceptionError:
        return None


def _of_stage(progress: Stages, what: str, noun: str) -> Progress:
    """Returns the progress of one stage."""
    return partial(progress, what, noun) if callable(progress) else progress


def _checked_torsions(atoms: Atoms, torsions: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    listed = [tuple(int(place) for place in four) for four in torsions]
    bonds = Topology(atoms).bonds
    for four in listed:
        if len(set(four)) != 4 or len(four) != 4 or min(four) < 0 or max(four) >= len(atoms):
            raise ValueError(f"torsion {list(four)}: need four different atom indices from 0 to {len(atoms) - 1}")
        for first, second in itertools.pairwise(four):
            if not bonds[first, second]:
                pair = " and ".join(f"{atoms.symbols[place]}{place}" for place in (first, second))
                raise ValueError(f"torsion {list(four)}: {pair} are not bonded; name four atoms along bonds")
    return listed


def _trained(ensemble: thermal.Ensemble, training: TrainConfig, folder: Path, seed: int, progress: Stages) -> ENF:
    """Trains a flow on an ensemble; an unfinished run is continued."""
    frames, walkers = ensemble.frames, ensemble.walkers
    first = len(frames) - max(walkers, round(_VALID * len(frames)) // walkers * walkers)
    if first < 1:
        raise ValueError(f"n={len(frames)}: too few frames to train and to validate on; raise n")
    config = replace(training, out=str(folder), seed=seed)
    resume = (folder / STATE_FILE).exists()
    source = f"{first} frames of {frames[0].get_chemical_formula()} at {frames[0].info['thermal_temperature']:g} K"
    told = _of_stage(progress, f"training a flow on {source}", "step")
    return train(config, frames[:first], frames[first:], resume=resume, progress=told, source=source)


def _drawn(
    flow: ENF,
    atoms: Atoms,
    calculator: Any,
    temperature: float,
    draws: int,
    folder: Path,
    seed: int,
    progress: Stages,
) -> Reweighted:
    """Draws from a flow in parts and reweights them; parts already on disk are read."""
    what = f"drawing {draws} structures from the flow and weighting them by {type(calculator).__name__}"
    told = _of_stage(progress, what, "draw")
    folder.mkdir(exist_ok=True)
    graph = flow.config.graph
    topology, bound = Topology(atoms), OneMolecule(atoms, calculator, ordered=graph)
    drawn_as: dict[str, Any] = {"molecule": atoms} if graph else {"formula": atoms.get_chemical_formula()}
    weights = b"".join(value.cpu().numpy().tobytes() for value in flow.state_dict().values())
    mark = f"{hashlib.sha256(weights).hexdigest()[:16]} {type(calculator).__name__} {temperature:g} {seed}"
    parts: list[dict[str, np.ndarray]] = []
    for k, start in enumerate(range(0, draws, PART)):
        count = min(PART, draws - start)
        path = folder / f"part_{k:04d}_{count}.npz"
        part = read_part(path, mark)
        if part is None:
            here = of_part(told, start, draws)
            drawn = reweight(flow, bound, count, temperature, seed=seed * _SEEDS + k, progress=here, **drawn_as)
            part = _part(drawn, topology, mark)
            _write_part(path, part)
        parts.append(part)
    return _joined(parts, atoms, temperature)


def _joined(parts: Sequence[dict[str, np.ndarray]], atoms: Atoms, temperature: float) -> Reweighted:
    """Joins all parts; draws that are not the molecule get neither energy nor weight."""
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in (*_ARRAYS, "positions")}
    outside = arrays["energies"] >= OUTSIDE
    if outside.all():
        raise ReweightingError(f"none of {len(outside)} draws is the molecule; train longer, or raise n")
    arrays["energies"][outside], arrays["log_weights"][outside] = math.nan, -math.inf
    samples = []
    for k, positions in enumerate(arrays.pop("positions")):
        sample = Atoms(atoms.numbers, positions)
        sample.info["enf_log_likelihood"] = float(arrays["log_prob"][k])
        sample.info["enf_log_weight"] = float(arrays["log_weights"][k])
        if math.isfinite(arrays["energies"][k]):
            sample.calc = SinglePointCalculator(sample, energy=float(arrays["energies"][k]))
        samples.append(sample)
    failed, redrawn = (sum(int(part[name]) for part in parts) for name in ("failed", "redrawn"))
    failed += int(outside.sum())
    return Reweighted(samples, *(arrays[name] for name in _ARRAYS), float(temperature), None, failed, redrawn)


def _part(found: Reweighted, topology: Topology, mark: str) -> dict[str, np.ndarray]:
    """A part as arrays, atoms in the order of the molecule; in draws of other molecules only the elements match."""
    positions = []
    for atoms in found.samples:
        order = topology.match(atoms)
        if order is None:  # without weight
            order = np.empty(len(atoms), dtype=np.int64)
            order[np.argsort(topology.numbers, kind="stable")] = np.argsort(atoms.numbers, kind="stable")
        positions.append(atoms.positions[order])
    arrays = {name: getattr(found, name) for name in _ARRAYS}
    counts = {"failed": np.array(found.failed), "redrawn": np.array(found.redrawn), "mark": np.array(mark)}
    return arrays | counts | {"positions": np.array(positions)}


def _write_part(path: Path, part: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **part)
    with atomic_write(path) as handle:
        handle.write(buffer.getvalue())


def read_part(path: Path, mark: str) -> dict[str, np.ndarray] | None:
    """Returns a part of the draws from disk, or None if there is none.

    Args:
        path: File of the part.
        mark: Identifies the flow and the settings.

    Returns:
        Arrays by name, or None.

    Raises:
        ValueError: If the part was drawn from another flow or with other settings.

    Example:
        >>> read_part(Path("no-such-part.npz"), "") is None
        True
    """
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        part = {name: file[name] for name in file.files}
    if str(part.pop("mark")) != mark:
        raise ValueError(f"{path}: drawn from another flow, or at other settings; name another folder, or remove it")
    return part


def _basin_table(
    basin: Callable[[Atoms], Any] | None, ensemble: thermal.Ensemble, found: Reweighted, folder: Path
) -> pd.DataFrame | None:
    """Returns free energies of the basins and writes them to a file; None without basins."""
    if basin is None:
        return None
    basins = assign(basin, ensemble.frames, ensemble.walkers, found.samples, found.weights)
    table = free_energies(basins, found.weights)
    with atomic_write(folder / "free_energies.csv") as handle:
        handle.write(table.to_csv(index=False).encode())
    return table


def _draw_pictures(study: Study, atoms: Atoms, torsions: Sequence[tuple[int, ...]], folder: Path) -> None:
    """Draws histograms of torsions and of weights."""
    weight_histogram(study.reweighted.log_weights, folder / "log_weights.png")
    ours = study.reweighted.weights > 0
    samples = [sample for sample, counts in zip(study.reweighted.samples, ours, strict=True) if counts]
    for four in torsions:
        seen, drawn = (
            np.array([item.get_dihedral(*four) for item in many]) for many in (study.ensemble.frames, samples)
        )
        angles = {
            "walkers": (seen, np.ones(len(seen))),
            "flow": (drawn, np.ones(len(drawn))),
            "reweighted": (drawn, study.reweighted.weights[ours]),
        }
        title = "–".join(f"{atoms.symbols[place]}{place}" for place in four)
        torsion_histogram(angles, title, folder / f"torsion_{'_'.join(map(str, four))}.png")


def report(study: Study, atoms: Atoms, temperature: float) -> str:
    """Returns a report on a study in Markdown.

    Args:
        study: The study.
        atoms: Its molecule.
        temperature: K.

    Returns:
        The text of ``report.md``.
    """
    d, trouble = study.ensemble.diagnostics, study.ensemble.diagnostics.trouble(temperature)
    lines = [
        f"# {atoms.get_chemical_formula()} at {temperature:g} K",
        "",
        f"Walkers: {len(study.ensemble.frames)} frames of {study.ensemble.walkers} walkers, {d.calls} calls of the "
        f"calculator; ⟨U⟩ = {d.energy:.4f} ± {d.energy_stderr:.4f} eV; temperature by the virial "
        f"{d.temperature:.0f} ± {d.temperature_stderr:.0f} K; longest autocorrelation time {d.autocorrelation:.1f} "
        f"frames, {d.effective_size:.0f} effective frames; r_hat {d.r_hat:.3f}; "
        f"{100 * d.acceptance[0]:.0f} % accepted, {d.refused} refused for a changed bond."
        + (f" **Not in equilibrium: {trouble}.**" if trouble else ""),
        "",
        f"Flow: {study.reweighted}.",
        "",
    ]
    if study.table is not None:
        lines += [
            "| basin | share, walkers | effective frames | share, flow | share, reweighted | effective draws | "
            "F, walkers / kT | F, reweighted / kT |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(row) for row in study.table.to_dict("records")]
        lines += ["", "An error of inf means fewer than ten effective samples: too few to estimate an error."]
    return "\n".join([*lines, ""])


def _row(row: dict[str, Any]) -> str:
    """Returns a basin as a row of the table in the report."""
    pairs = [
        f"{row[name]:.3f} ± {row[f'{name}_stderr']:.3f}"
        for name in ("share_md", "share_reweighted", "free_energy_md", "free_energy_reweighted")
    ]
    cells = (
        row["basin"], pairs[0], f"{row['effective_md']:.1f}", f"{row['share_flow']:.3f}", pairs[1],
        f"{row['effective_reweighted']:.1f}", pairs[2], pairs[3],
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
