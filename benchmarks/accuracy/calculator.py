"""Tests of ENFCalculator: ``python -m benchmarks.accuracy.calculator [MODEL] [--molecules 98]``.

The molecules are those of ASE's g2 collection that the model knows, with every atom displaced by 0.05 Å. Two tables:

* convergence: energies and forces for several numbers of steps against a reference with twice as many, for the plain
  and the smeared density of the data; what remains is due to the learned density and not to the solver;
* dynamics: whether BFGS converges, and where; the drift of the energy in NVE; seconds for energy and forces.

With ``--minutes``, each row takes molecules, small ones first, until its time is over; the table gives their number.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.collections import g2
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.batch import check_atoms
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from ase_enf.scoring.calculator import DEFAULT_SMEAR, ENFCalculator, log_likelihood_gradient
from benchmarks.report import write_results

DISPLACEMENT = 0.05  # Å
KELVIN = 300.0
KT = KELVIN * units.kB
FMAX, STEPS_MOST = 0.05, 60
TIME_STEP, MD_STEPS = 0.5, 100  # fs
SOLVER_STEPS = (16, 32, 48, 96)


def main() -> None:
    """Measures and writes ``results/calculator_*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qm9-conditional")
    parser.add_argument("--molecules", type=int, default=1000, help="at most (default: all that the model knows)")
    parser.add_argument("--smears", type=float, nargs="+", default=[0.0, DEFAULT_SMEAR], help="Å")
    parser.add_argument("--converged", type=int, default=5, help="molecules of the first table (default: 5)")
    parser.add_argument("--steps", type=int, help="of the calculator (default: its own)")
    parser.add_argument("--md-steps", type=int, default=MD_STEPS)
    parser.add_argument("--bfgs-steps", type=int, default=STEPS_MOST)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of dynamics a smear (default: no limit)")
    parser.add_argument("--out", type=Path, help="another folder than results")
    options = parser.parse_args()
    flow = ase_enf.load(options.model, "cpu", "float64")
    atoms = known(flow)[: options.molecules]
    about = f"`{flow.name}`, float64, kT = {KT:.4f} eV, atoms displaced by {DISPLACEMENT} Å (standard deviation)."
    table = convergence(flow, atoms[: options.converged], options.smears)
    notes = f"{about} {options.converged} molecules; against {2 * SOLVER_STEPS[-1]} steps; rms over molecules."
    write_results(table, f"calculator_convergence_{flow.name}", "Convergence of the calculator", notes, options.out)
    rows = [
        row
        for smear in options.smears
        for row in dynamics(flow, atoms, smear, options.bfgs_steps, options.md_steps, options.steps, options.minutes)
    ]
    notes = (
        f"{about} At most {len(atoms)} molecules of g2, small ones first; BFGS to {FMAX} eV/Å in at most "
        f"{options.bfgs_steps} steps; NVE for {options.md_steps} steps of {TIME_STEP} fs from velocities of "
        f"{KELVIN:g} K; medians over molecules; seconds of one processor."
    )
    write_results(
        pd.DataFrame(rows, columns=["smear, Å", "what", "value"]),
        f"calculator_dynamics_{flow.name}", "The calculator in ASE", notes, options.out,
    )  # fmt: skip


def known(flow: ENF) -> list[Atoms]:
    """Returns displaced molecules of g2 whose elements and sizes the flow knows, small ones first."""
    found = []
    for number, name in enumerate(g2.names):
        atoms = g2[name]
        try:
            check_atoms(atoms, flow.species)
        except ValueError:
            continue
        if len(atoms) in flow.size_prior and atoms.numbers.sum() % 2 == 0:
            atoms.rattle(DISPLACEMENT, seed=number)
            found.append(atoms)
    return sorted(found, key=len)


def convergence(flow: ENF, molecules: Sequence[Atoms], smears: Sequence[float]) -> pd.DataFrame:
    """Returns the errors of energy and forces by the number of steps."""
    rows = []
    for smear in smears:
        many = Solver("rk4", steps=2 * SOLVER_STEPS[-1], warp=2.0)
        truths = [log_likelihood_gradient(flow, atoms, many, smear=smear) for atoms in molecules]
        for steps in SOLVER_STEPS:
            solver, start = Solver("rk4", steps=steps, warp=2.0), time.process_time()
            answers = [log_likelihood_gradient(flow, atoms, solver, smear=smear) for atoms in molecules]
            seconds = (time.process_time() - start) / len(molecules)
            energy = [KT * (a.log_likelihood - b.log_likelihood) for a, b in zip(answers, truths, strict=True)]
            forces = [KT * np.abs(a.gradient - b.gradient).max() for a, b in zip(answers, truths, strict=True)]
            largest = KT * np.mean([np.abs(b.gradient).max() for b in truths])
            numbers = (np.sqrt(np.mean(np.square(energy))), np.sqrt(np.mean(np.square(forces))), largest, seconds)
            rows.append((smear, steps, *(f"{number:.3g}" for number in numbers)))
    columns = ["smear, Å", "steps", "energy, eV", "largest force component, eV/Å", "of", "seconds, with forces"]
    return pd.DataFrame(rows, columns=columns)


def dynamics(
    flow: ENF,
    molecules: Sequence[Atoms],
    smear: float,
    bfgs_steps: int,
    md_steps: int,
    steps: int | None = None,
    minutes: float = math.inf,
) -> list[tuple[float, str, str]]:
    """Returns the results of BFGS and NVE for some molecules."""
    moves, converged, taken, drifts, hottest, failed, energy_s, forces_s = [], 0, [], [], [], 0, [], []
    end, done = time.monotonic() + 60 * minutes, 0
    for atoms in tqdm(molecules, desc=f"smear {smear:g}", dynamic_ncols=True):
        if time.monotonic() > end:
            break
        atoms, done = atoms.copy(), done + 1
        atoms.calc = ENFCalculator(flow, KT, steps=steps, smear=smear)
        try:
            start = time.process_time()
            atoms.get_potential_energy()
            energy_s.append(time.process_time() - start)
            start = time.process_time()
            atoms.get_forces()
            forces_s.append(time.process_time() - start)
            before = atoms.get_all_distances()
            optimiser = BFGS(atoms, logfile=None)
            converged += bool(optimiser.run(fmax=FMAX, steps=bfgs_steps))
            taken.append(optimiser.nsteps)
            moves.append(np.abs(atoms.get_all_distances() - before).max())
            drift, temperature = nve(atoms, md_steps)
            drifts.append(drift)
            hottest.append(temperature)
        except CalculationFailed:
            failed += 1
    rows = [
        ("BFGS converged", f"{converged} of {done}"),
        ("BFGS steps", f"{np.median(taken):.0f}"),
        ("largest change of a distance, Å", f"{np.median(moves):.3f}"),
        ("NVE: range of the total energy an atom, meV", f"{1e3 * np.median(drifts):.2f}"),
        ("NVE: the same, worst molecule", f"{1e3 * np.max(drifts):.2f}"),
        ("NVE: highest temperature, K", f"{np.median(hottest):.0f}"),
        ("failed", str(failed)),
        ("seconds, energy", f"{np.median(energy_s):.2f}"),
        ("seconds, forces", f"{np.median(forces_s):.2f}"),
    ]
    return [(smear, *row) for row in rows]


def nve(atoms: Atoms, steps: int) -> tuple[float, float]:
    """Returns the range of the total energy, eV per atom, and the highest temperature, K, of a run from 300 K."""
    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=KELVIN, rng=rng)
    Stationary(atoms)
    ZeroRotation(atoms)
    md = VelocityVerlet(atoms, timestep=TIME_STEP * units.fs)
    energies, temperatures = [], []
    for _ in md.irun(steps):
        energies.append(atoms.get_total_energy() / len(atoms))
        temperatures.append(atoms.get_temperature())
    return float(np.ptp(energies)), max(temperatures)


if __name__ == "__main__":
    main()
