"""Rotamers of ethanol by GFN2-xTB: ``python -m benchmarks.models.rotamers FOLDER [--frames N] [--temperature 300]``.

The population of trans in the C–C–O–H torsion without a flow, by

* walkers of Hamiltonian Monte Carlo, which no time step biases (``ase_enf.data.thermal``), resumed from the state in
  FOLDER;
* the harmonic approximation of the classical integral about each minimum;

and the exact temperature of each vibration under ASE's ``Langevin``: on a quadratic surface its update is linear, and
its stationary covariance solves a discrete Lyapunov equation.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms, units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from scipy.linalg import null_space, solve_discrete_lyapunov

from ase_enf.chem.mmff import conformers
from ase_enf.data import thermal
from ase_enf.data.series import autocorrelation_time, standard_error
from ase_enf.ensemble.basins import Torsions
from ase_enf.ensemble.calculators import calculator
from benchmarks.report import write_results

TORSION = (0, 1, 2, 3)
FRICTIONS, TIME_STEPS = (0.01, 0.002), (0.5, 1.0)  # 1 / fs, fs
HOT = 455.0  # K, about the mean temperature of the modes that fixcm=True leads to at 300 K
STEP = 0.005  # Å, of finite differences
# eV/Å², restrains translation and rotation so that their covariance is finite; it does not affect internal modes.
_SPRING = 0.01


def main() -> None:
    """Measures and writes ``results/rotamers.*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the state of the walkers")
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--temperature", type=float, default=300.0)
    parser.add_argument("--out", type=Path, help="another folder than results")
    options = parser.parse_args()
    atoms = molecule("CH3CH2OH")
    calc = calculator("gfn2", atoms)
    rows = walkers(atoms, calc, options.temperature, options.frames, options.folder)
    minima = {angle: relaxed(atoms, calc, angle) for angle in (180.0, 60.0)}
    rows += harmonic(minima, calc, options.temperature)
    rows += [(f"harmonic: share of trans at {HOT:g} K", harmonic(minima, calc, HOT)[-1][1])]
    rows += langevin(minima[60.0], calc, options.temperature)
    notes = (
        f"GFN2-xTB, {options.temperature:g} K. Trans is a torsion within 60° of 180°. The error of the walkers is "
        "√(p (1 − p) τ / n) with the integrated autocorrelation time τ of being trans; with fewer than ten effective "
        "frames in trans that error is itself uncertain, see the row. The temperatures of ASE's Langevin are exact for "
        "the quadratic surface about the gauche minimum: λ ⟨q²⟩ / kB of each of its 3 M − 6 internal modes."
    )
    table = pd.DataFrame(rows, columns=["what", "value"])
    write_results(table, "rotamers", "Rotamers of ethanol", notes, options.out)


def walkers(atoms: Atoms, calc: Any, temperature: float, frames: int, folder: Path) -> list[tuple[str, str]]:
    """Returns the population of trans among frames of walkers."""
    found = thermal.run(
        conformers(atoms, 8, 0), calc, temperature, frames, leapfrog=16, burn_in=60, out=folder / "thermal.npz"
    )
    basin = Torsions([TORSION])
    whole = len(found.frames) // found.walkers * found.walkers
    trans = np.array([basin(frame) == "trans" for frame in found.frames[:whole]], float).reshape(-1, found.walkers)
    tau, d = float(autocorrelation_time(trans)), found.diagnostics
    return [
        ("walkers: frames, calls of the calculator", f"{whole}, {d.calls}"),
        ("walkers: share of trans", f"{trans.mean():.3f} ± {float(standard_error(trans)):.3f}"),
        ("walkers: share of trans of each", " ".join(f"{share:.3f}" for share in trans.mean(axis=0))),
        ("walkers: τ of being trans, frames; calls an independent frame", f"{tau:.1f}; {16 * tau:.0f}"),
        ("walkers: effective frames in trans", f"{trans.sum() / tau:.1f}"),
        ("walkers: r_hat, virial temperature / K",
         f"{d.r_hat:.3f}, {d.temperature:.0f} ± {d.temperature_stderr:.0f}"),
    ]  # fmt: skip


def relaxed(atoms: Atoms, calc: Any, angle: float) -> Atoms:
    """Returns the minimum near a value of the torsion, degrees."""
    found = atoms.copy()
    found.set_dihedral(*TORSION, angle, indices=[TORSION[3]])
    found.calc = calc
    BFGS(found, logfile=None).run(fmax=1e-3, steps=300)
    return found


def hessian(atoms: Atoms, calc: Any) -> np.ndarray:
    """Returns second derivatives of the energy, eV/Å², shape (3 M, 3 M), by finite differences of forces."""
    moved, matrix = atoms.copy(), np.empty((3 * len(atoms), 3 * len(atoms)))
    moved.calc = calc
    for k in range(len(matrix)):
        forces = []
        for sign in (1, -1):
            step = np.zeros(len(matrix))
            step[k] = sign * STEP
            moved.positions = atoms.positions + step.reshape(-1, 3)
            forces.append(moved.get_forces().ravel())
        matrix[k] = (forces[1] - forces[0]) / (2 * STEP)
    return (matrix + matrix.T) / 2


def internal(atoms: Atoms) -> np.ndarray:
    """Returns an orthonormal basis of displacements without translation and rotation, shape (3 M, 3 M − 6)."""
    x = atoms.positions - atoms.positions.mean(axis=0)
    rigid = [np.tile(axis, len(x)) for axis in np.eye(3)] + [np.cross(axis, x).ravel() for axis in np.eye(3)]
    return null_space(np.array(rigid))


def harmonic(minima: dict[float, Atoms], calc: Any, temperature: float) -> list[tuple[str, str]]:
    """Returns the population of trans from the harmonic classical integral about the minima; gauche counts twice."""
    kt, log_z = units.kB * temperature, {}
    energies = {angle: float(atoms.get_potential_energy()) for angle, atoms in minima.items()}
    for angle, atoms in minima.items():
        basis = internal(atoms)
        stiffness = np.linalg.eigvalsh(basis.T @ hessian(atoms, calc) @ basis)
        x = atoms.positions - atoms.positions.mean(axis=0)
        turning = np.linalg.slogdet(np.eye(3) * np.square(x).sum() - x.T @ x)[1]  # of unit masses
        log_z[angle] = -energies[angle] / kt + 0.5 * turning - 0.5 * np.log(stiffness).sum()
    log_z[60.0] += np.log(2.0)
    share = 1.0 / (1.0 + np.exp(log_z[60.0] - log_z[180.0]))
    angles = ", ".join(f"{atoms.get_dihedral(*TORSION):.0f}°" for atoms in minima.values())
    return [
        ("minima: torsions", angles),
        ("minima: E(trans) − E(gauche), kT", f"{(energies[180.0] - energies[60.0]) / kt:.2f}"),
        ("harmonic: share of trans", f"{share:.3f}"),
    ]


def langevin(atoms: Atoms, calc: Any, temperature: float) -> list[tuple[str, str]]:
    """Returns the temperatures of vibrations under ASE's Langevin, with and without ``fixcm``."""
    matrix, basis = hessian(atoms, calc), internal(atoms)
    stiffness, modes = np.linalg.eigh(basis.T @ matrix @ basis)
    modes = basis @ modes
    held = modes @ np.diag(stiffness) @ modes.T + _SPRING * (np.eye(len(matrix)) - basis @ basis.T)
    rows = []
    for friction in FRICTIONS:
        for time_step in TIME_STEPS:
            for fixcm in (True, False):
                covariance = stationary(atoms, held, temperature, friction, time_step, fixcm)
                kelvin = stiffness * np.einsum("ik,ij,jk->k", modes, covariance, modes) / units.kB
                text = f"mean {kelvin.mean():.1f}, softest {kelvin[0]:.1f}, {kelvin.min():.1f} to {kelvin.max():.1f}"
                rows.append((f"Langevin, {friction:g} / fs, {time_step:g} fs, fixcm={fixcm}: K of the modes", text))
    return rows


def stationary(
    atoms: Atoms, stiffness: np.ndarray, temperature: float, friction: float, time_step: float, fixcm: bool
) -> np.ndarray:
    """Returns the covariance of positions, (3 M, 3 M), that ASE's Langevin leaves unchanged on ½ x·Kx.

    One step is linear in state and noise; its coefficients are taken from a ``Langevin`` object of ASE that never runs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fixcm, which is what is looked at
        md = Langevin(atoms, time_step * units.fs, temperature_K=temperature, friction=friction / units.fs, fixcm=fixcm)
    size, natoms = len(stiffness), len(atoms)
    masses = np.repeat(atoms.get_masses(), 3)
    c3, c4, c5 = (np.repeat(np.ravel(c), 3) for c in (md.c3, md.c4, md.c5))
    one, ones = np.eye(size), np.kron(np.ones((natoms, natoms)), np.eye(3)) / natoms
    shift = kick = one
    if fixcm:
        factor = np.sqrt(natoms / (natoms - 1.0))
        shift, kick = factor * (one - ones), factor * (one - ones * masses[None] / masses[:, None])
    # Noise (ξ, η) → displacement and kick; then half a step of v, a step of x, and half a step of v.
    displace = np.hstack([0 * one, shift @ np.diag(c5)])
    kick = kick @ np.hstack([np.diag(c3), -np.diag(c4)])
    pull = -md.c1 * stiffness / masses[:, None]
    half = np.hstack([pull, (1 - md.c2) * one])
    x = np.hstack([one, 0 * one]) + md.dt * half
    x_noise = md.dt * kick + displace
    v = (1 - md.c2) * half + pull @ x
    v_noise = (1 - md.c2) * kick + pull @ x_noise + kick
    step, noise = np.vstack([x, v]), np.vstack([x_noise, v_noise])
    return solve_discrete_lyapunov(step, noise @ noise.T)[:size, :size]


if __name__ == "__main__":
    main()
