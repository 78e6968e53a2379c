"""The particle systems DW4, LJ13 and LJ55: vectorised energies with forces, and the same as ASE calculators.

=================  ========================  =============================================================
name               particles                 energy in kT
=================  ========================  =============================================================
``dw4``            4 in two dimensions       ``Σ_{i<j} b (d − d0)² + c (d − d0)⁴``, b = −4, c = 0.9, d0 = 4
``lj13``           13 in three               ``Σ_{i<j} [d⁻¹² − 2 d⁻⁶] + ½ Σ_i |x_i − x̄|²``
``lj13-factor2``   13 in three               ``2 Σ_{i<j} [d⁻¹² − 2 d⁻⁶] + ½ Σ_i |x_i − x̄|²``
``lj55-factor2``   55 in three               as ``lj13-factor2``
=================  ========================  =============================================================

Factor 1 is the convention of Köhler, Klein and Noé, ICML 2020, and of the E(n) flows paper; factor 2 is that of Klein
and Noé 2023, who sum over ordered pairs. The two are different systems, whose entropies are 23 nats apart. LJ55 is a
system of Klein and Noé and is used with factor 2 only.

Units are reduced: lengths in r_m, energies in kT = 1. ASE takes the numbers for Å and eV, so that ``exp(−U)`` is the
density at 1 eV / k_B = 11604.5 K.

On the zero-mean subspace, in nats (``dw4`` by ``quadrature``, the others by ``ase_enf.data.mcmc.free_energy`` with
5000 and 4000 sweeps of 64 ladders, LJ55 with fewer); the entropy is the lowest mean negative log-likelihood that a
model can reach:

=================  ================  ================  ================
name               <U>               ln Z              entropy
=================  ================  ================  ================
``dw4``            −22.54151         29.66723          7.12572
``lj13``           0.538 ± 0.028     39.251 ± 0.005    39.790 ± 0.024
``lj13-factor2``   −42.977 ± 0.032   59.905 ± 0.026    16.927 ± 0.031
``lj55-factor2``   −325.25 ± 0.22    383.86 ± 0.09     58.61 ± 0.25
=================  ================  ================  ================

The values of ``lj55-factor2`` come from 1500 sweeps of 8 ladders with hot starts, nine minutes on one core;
thermodynamic integration of the same run gives ln Z = 383.82 ± 0.09. 64 chains that started from the icosahedron and
melted (``of_liquid`` in the benchmarks) give <U> = −325.58 ± 0.13, and <x·∇U> = 162.2 ± 0.4, where equipartition
requires 162.
"""

from __future__ import annotations

from ase_enf.data.particles.calculators import DW4, LJ13, LJ55
from ase_enf.data.particles.partition import Quadrature, quadrature
from ase_enf.data.particles.system import Array, Energies, System
from ase_enf.data.particles.systems import (
    SYSTEMS,
    DoubleWell,
    LennardJonesPair,
    flat_atoms,
    lennard_jones,
    resolve,
    to_atoms,
)

__all__ = [
    "DW4",
    "LJ13",
    "LJ55",
    "SYSTEMS",
    "Array",
    "DoubleWell",
    "Energies",
    "LennardJonesPair",
    "Quadrature",
    "System",
    "flat_atoms",
    "lennard_jones",
    "quadrature",
    "resolve",
    "to_atoms",
]
