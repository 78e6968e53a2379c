"""The particle systems DW4 and LJ13: vectorised energies with forces, and the same as ASE calculators.

=================  ========================  =============================================================
name               particles                 energy in kT
=================  ========================  =============================================================
``dw4``            4 in two dimensions       ``Σ_{i<j} b (d − d0)² + c (d − d0)⁴``, b = −4, c = 0.9, d0 = 4
``lj13``           13 in three               ``Σ_{i<j} [d⁻¹² − 2 d⁻⁶] + ½ Σ_i |x_i − x̄|²``
``lj13-factor2``   13 in three               ``2 Σ_{i<j} [d⁻¹² − 2 d⁻⁶] + ½ Σ_i |x_i − x̄|²``
=================  ========================  =============================================================

Factor 1 is the convention of Köhler, Klein and Noé, ICML 2020, and of the E(n) flows paper; factor 2 is that of Klein
and Noé 2023, who sum over ordered pairs. Their entropies lie 23 nats apart: they are two systems, not two qualities.

Units are reduced: lengths in r_m, energies in kT = 1. ASE reads the numbers as Å and eV, and so the temperature at
which these densities ``exp(−U)`` hold is 1 eV / k_B = 11604.5 K.

On the zero-mean subspace, in nats (``dw4`` by `quadrature`, the others by `ase_enf.data.mcmc.free_energy` with 5000 and
4000 sweeps of 64 ladders), where the entropy is what the best negative log-likelihood can be:

=================  ================  ================  ================
name               <U>               ln Z              entropy
=================  ================  ================  ================
``dw4``            −22.54151         29.66723          7.12572
``lj13``           0.538 ± 0.028     39.251 ± 0.005    39.790 ± 0.024
``lj13-factor2``   −42.977 ± 0.032   59.905 ± 0.026    16.927 ± 0.031
=================  ================  ================  ================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, CalculatorSetupError, all_changes
from numpy.typing import ArrayLike, NDArray

from ase_enf.data import DataError

Array = NDArray[np.float64]

_VANISHED = 1e-15  # of exp(−v), at the border of a quadrature
_WALL = 1e3  # kT; no exp(−v) is left
_BLOCK = 128  # configurations at a time, so that what is computed of their pairs stays in the cache


class Energies(NamedTuple):
    """What `System.evaluate` returns."""

    energy: Array  # (B,), kT
    forces: Array  # (B, M, n), kT / length; minus the gradient


@dataclass(frozen=True)
class System:
    """Particles with a pair energy in a harmonic trap, ``U = Σ_{i<j} v(d_ij) + ½ k Σ_i |x_i − x̄|²``.

    U does not change when all particles move together; its density ``exp(−U)`` lives on the zero-mean subspace.

    Args:
        name: What files and messages call it.
        n_atoms: M.
        dimension: n.
        pair: Squared distances → v and v'(d)/d, of the same shape, kT and kT / length²; by arithmetic alone if it is
            to take tensors, too.
        trap: k, kT / length².
        reference: Constant of the harmonic energy that sampling and free energies start from, kT / length².
        power: Of the path between them, λ = u^power. With 4 the integrand <∂U/∂λ> dλ/du of d⁻¹² in three dimensions
            stays finite at u = 0, because <∂U/∂λ> grows as λ^(3/12 − 1).
        rungs: Number of steps of that path.

    Example:
        >>> spring = System("spring", 2, 3, lambda r2: (0.5 * r2, np.ones_like(r2)))
        >>> spring.evaluate([[[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]]).energy
        array([2.])
    """

    name: str
    n_atoms: int
    dimension: int
    pair: Callable[[Array], tuple[Array, Array]]
    trap: float = 0.0
    reference: float = 1.0
    power: int = 2
    rungs: int = 8

    @property
    def degrees_of_freedom(self) -> int:
        """Dimension of the zero-mean subspace, ``(M − 1) n``, which is E[x·∇U]."""
        return (self.n_atoms - 1) * self.dimension

    @cached_property
    def _differences(self) -> Array:  # (pairs, M), ±1: a matrix product is the fastest gather and scatter
        first, second = np.triu_indices(self.n_atoms, 1)
        rows = np.arange(len(first))
        matrix = np.zeros((len(first), self.n_atoms))
        matrix[rows, first], matrix[rows, second] = 1.0, -1.0
        return matrix

    def evaluate(self, positions: ArrayLike) -> Energies:
        """Energies and forces of many configurations, float64.

        Args:
            positions: Shape (B, M, n).

        Returns:
            Shapes (B,) and (B, M, n). Where two particles coincide, what has no value is inf or nan.

        Raises:
            DataError: The shape is another.

        Example:
            >>> resolve("lj13").evaluate(np.random.default_rng(0).normal(size=(5, 13, 3))).forces.shape
            (5, 13, 3)
        """
        energy, gradient = self.gradient(self.checked(positions).transpose(1, 2, 0))
        return Energies(energy, -gradient.transpose(2, 0, 1))

    def energy(self, positions: Any) -> Any:
        """Energies of many configurations in the positions' own kind: an array, or a tensor with its gradient.

        Args:
            positions: Array or torch tensor of any float dtype and device, shape (B, M, n).

        Returns:
            U, kT, shape (B,), of the same kind.

        Raises:
            DataError: The shape is another.

        Example:
            >>> import torch
            >>> x = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
            >>> (force,) = torch.autograd.grad(-resolve("dw4").energy(x).sum(), x)
            >>> np.allclose(force, resolve("dw4").evaluate(x.detach()).forces)
            True
        """
        self._check(tuple(positions.shape))
        first, second = np.triu_indices(self.n_atoms, 1)
        difference = positions[:, first] - positions[:, second]
        total = self.pair((difference * difference).sum(-1))[0].sum(-1)
        if not self.trap:
            return total
        centred = positions - positions.mean(1)[:, None]
        return total + 0.5 * self.trap * (centred * centred).sum(-1).sum(-1)

    def checked(self, positions: ArrayLike) -> Array:
        """Returns positions as float64 if they have the shape (B, M, n).

        Raises:
            DataError: They have another.
        """
        positions = np.asarray(positions, dtype=np.float64)
        self._check(positions.shape)
        return positions

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[1:] != (self.n_atoms, self.dimension):
            raise DataError(f"{self.name}: positions of shape {shape}; it takes (B, {self.n_atoms}, {self.dimension})")

    def gradient(self, x: Array) -> tuple[Array, Array]:
        """Energies and their gradients in the layout of the samplers, configurations last.

        Args:
            x: Shape (M, n, B).

        Returns:
            U, shape (B,), and ∇U, shape (M, n, B).

        Example:
            >>> resolve("lj13").gradient(np.random.default_rng(0).normal(size=(13, 3, 5)))[0].shape
            (5,)
        """
        energy, gradient = np.empty(x.shape[2]), np.empty(x.shape)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for start in range(0, x.shape[2], _BLOCK):
                block = slice(start, start + _BLOCK)
                energy[block], gradient[:, :, block] = self._block(x[:, :, block])
        return energy, gradient

    def _block(self, x: Array) -> tuple[Array, Array]:
        difference = (self._differences @ x.reshape(self.n_atoms, -1)).reshape(-1, *x.shape[1:])  # (pairs, n, B)
        value, slope = self.pair(np.einsum("pnb,pnb->pb", difference, difference))
        difference *= slope[:, None]
        gradient = (self._differences.T @ difference.reshape(len(difference), -1)).reshape(x.shape)
        energy = value.sum(axis=0)
        if self.trap:
            centred = x - x.mean(axis=0)
            energy += 0.5 * self.trap * np.einsum("mnb,mnb->b", centred, centred)
            gradient += self.trap * centred
        return energy, gradient


@dataclass(frozen=True)
class DoubleWell:
    """Pair energy of DW4, ``v(d) = b (d − d0)² + c (d − d0)⁴`` (the linear term of Köhler et al. 2020 has a = 0).

    Example:
        >>> DoubleWell()(np.array([36.0]))[0]
        array([-1.6])
    """

    b: float = -4.0
    c: float = 0.9
    d0: float = 4.0

    def __call__(self, r2: Array) -> tuple[Array, Array]:
        """Returns v and v'(d)/d at squared distances."""
        d = r2**0.5  # also of a tensor
        y = d - self.d0
        y2 = y * y
        return y2 * (self.b + self.c * y2), y * (2 * self.b + 4 * self.c * y2) / d


@dataclass(frozen=True)
class LennardJonesPair:
    """Pair energy of LJ13, ``v(d) = ε [d⁻¹² − 2 d⁻⁶]``, with its minimum −ε at d = r_m = 1.

    Example:
        >>> LennardJonesPair(2.0)(np.array([1.0]))[0]
        array([-2.])
    """

    epsilon: float = 1.0

    def __call__(self, r2: Array) -> tuple[Array, Array]:
        """Returns v and v'(d)/d at squared distances."""
        inverse = 1.0 / r2
        s = inverse * inverse * inverse
        value = s - 2.0
        value = value * s
        slope = s - 1.0
        slope *= s
        slope *= inverse
        slope *= -12.0 * self.epsilon
        value = value * self.epsilon
        return value, slope


def lennard_jones(factor: float = 1.0, n_atoms: int = 13, name: str | None = None) -> System:
    """Lennard-Jones particles in the harmonic trap of LJ13.

    Args:
        factor: Multiplies the pair energy, not the trap.
        n_atoms: M.
        name: ``lj13``, ``lj13-factor2``, ... by default.

    Returns:
        The system, in three dimensions.

    Raises:
        DataError: If factor is not positive, or there are fewer than two particles.

    Example:
        >>> lennard_jones(2.0).name, lennard_jones(n_atoms=2).degrees_of_freedom
        ('lj13-factor2', 3)
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise DataError(f"factor={factor}: must be positive; 1 is the paper's, 2 that of Klein and Noé 2023")
    if not (n_atoms >= 2 and n_atoms == int(n_atoms)):
        raise DataError(f"n_atoms={n_atoms}: must be a whole number, at least 2")
    name = name or f"lj{n_atoms}" + ("" if factor == 1 else f"-factor{factor:g}")
    rungs = max(8, round(n_atoms * (0.7 + 0.35 * factor)))  # the colder, the more
    return System(name, n_atoms, 3, LennardJonesPair(factor), trap=1.0, reference=1.0, power=4, rungs=rungs)


SYSTEMS = {
    "dw4": System("dw4", 4, 2, DoubleWell(), reference=0.22, power=2, rungs=10),
    "lj13": lennard_jones(1.0),
    "lj13-factor2": lennard_jones(2.0),
}
"""Name → system."""


def resolve(system: System | str) -> System:
    """Returns the system of a name.

    Raises:
        DataError: There is none.

    Example:
        >>> resolve("lj13").degrees_of_freedom
        36
    """
    if isinstance(system, System):
        return system
    if system not in SYSTEMS:
        raise DataError(f"system {system!r} is none of {', '.join(SYSTEMS)}")
    return SYSTEMS[system]


def to_atoms(system: System | str, positions: ArrayLike) -> list[Atoms]:
    """Turns configurations into ``Atoms``: ``X4`` in the xy plane for DW4, ``X13`` for LJ13.

    Args:
        system: A system or its name.
        positions: Shape (B, M, n).

    Returns:
        B structures; give them `DW4` or `LJ13` for energies.

    Raises:
        DataError: The shape is not that of the system.

    Example:
        >>> to_atoms("dw4", np.ones((2, 4, 2)))[1]
        Atoms(symbols='X4', pbc=False)
    """
    return flat_atoms(resolve(system).checked(positions))


def flat_atoms(positions: Array) -> list[Atoms]:
    """Turns configurations of any system, shape (B, M, n), into ``Atoms`` of dummy symbols, in the xy plane if n is 2.

    Example:
        >>> flat_atoms(np.ones((2, 3, 2)))[0]
        Atoms(symbols='X3', pbc=False)
    """
    full = np.zeros((*positions.shape[:2], 3))
    full[:, :, : positions.shape[2]] = positions
    return [Atoms(f"X{full.shape[1]}", one) for one in full]


class Quadrature(NamedTuple):
    """What `quadrature` returns; nats and kT."""

    log_z: float
    energy: float  # <U>
    entropy: float  # <U> + ln Z


def quadrature(system: System | str = "dw4", extent: float = 8.0, spacing: float = 0.15) -> Quadrature:
    """Partition function of four particles in two dimensions without sampling, to rounding for DW4.

    With f_d(x) = exp(−v(|x|) − v(|x − d e_x|)) and K = exp(−v), in the coordinates relative to particle 1,

        Z = ¼ ∫ 2π d K(d) ∬ f_d(x) K(|x − y|) f_d(y) dx dy dd,

    where ¼ = M^(−n/2) is the volume element of the zero-mean subspace in these. The double integral is a convolution,
    by FFT: on integrands that are smooth and vanish at the borders sums over a grid converge exponentially, as does
    Gauss-Legendre for d.

    Args:
        system: Four particles in two dimensions without a trap.
        extent: Distance from which on exp(−v) vanishes.
        spacing: Of the grid of x and y, a small part of the width of exp(−v).

    Returns:
        ln Z, <U> and the differential entropy on the zero-mean subspace.

    Raises:
        DataError: The system is another, a number is not positive, or exp(−v) has not vanished at ``extent``.

    Example:
        >>> round(quadrature("dw4").entropy, 6)
        7.125723
    """
    system = resolve(system)
    if (system.n_atoms, system.dimension, system.trap) != (4, 2, 0.0):
        raise DataError(f"{system.name}: the quadrature takes four particles in two dimensions without a trap")

    if not (0 < spacing < extent < math.inf):
        raise DataError(f"extent={extent}, spacing={spacing}: must be positive, the spacing much smaller")

    def pair(r2: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return system.pair(r2)[0]

    d = np.linspace(spacing, extent, 512)
    if (left := float(np.exp(pair(d * d).min() - pair(d[-1:] ** 2)[0]))) > _VANISHED:
        raise DataError(f"{system.name}: exp(−v) at {extent} is {left:.0e} of its maximum; use a larger extent")

    half = round(1.5 * extent / spacing)  # of the period: 3 extents, so that no pair meets its image
    axis = np.arange(-half, half) * spacing
    x, y = axis[:, None], axis[None, :]
    v = np.minimum(pair(np.fft.ifftshift(x * x + y * y)), _WALL)  # v exp(−v) of a wall is 0
    kernel, weighted = np.fft.rfft2(np.exp(-v)), np.fft.rfft2(v * np.exp(-v))
    z = energy = 0.0
    nodes, weights = np.polynomial.legendre.leggauss(round(1.5 * extent / spacing))
    for d, length in zip(0.5 * extent * (nodes + 1), 0.5 * extent * weights, strict=True):
        both = pair((x - d / 2) ** 2 + y * y) + pair((x + d / 2) ** 2 + y * y)
        both = np.minimum(both, _WALL)
        f = np.exp(-both)
        transform = np.fft.rfft2(f)
        convolved = np.fft.irfft2(transform * kernel, s=f.shape)
        inner, between = (f * convolved).sum(), (f * np.fft.irfft2(transform * weighted, s=f.shape)).sum()
        own = float(pair(np.array(d * d)))
        weight = 2 * math.pi * d * math.exp(-own) * length * spacing**4 / 4
        z += weight * inner
        energy += weight * (own * inner + 2 * (both * f * convolved).sum() + between)
    log_z = math.log(z)
    return Quadrature(log_z, float(energy / z), float(energy / z) + log_z)


class _ParticleCalculator(Calculator):
    """Calls `System.evaluate` for one ``Atoms``."""

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 (ASE's own declaration)
    discard_results_on_any_change = True

    def _system(self) -> System:
        raise NotImplementedError

    def energies(self, positions: np.ndarray) -> np.ndarray:
        """Returns the energies (B,) of many configurations (B, M, n) at once."""
        try:
            return self._system().evaluate(positions).energy
        except DataError as error:
            raise CalculatorSetupError(str(error)) from None

    batch_energies = energies  # what ase_enf.reweight asks for

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Fills ``results``; called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        system, positions = self._system(), self.atoms.positions
        if len(self.atoms) != system.n_atoms:
            raise CalculatorSetupError(f"{system.name} has {system.n_atoms} particles; {self.atoms.symbols} differs")
        if self.atoms.pbc.any():
            raise CalculatorSetupError(f"{system.name} is not periodic; set pbc=False")
        if not np.isfinite(positions).all():
            raise CalculatorSetupError(f"{system.name}: positions are not finite")
        energy, plane = system.evaluate(positions[None, :, : system.dimension])
        if not (np.isfinite(energy).all() and np.isfinite(plane).all()):
            raise CalculatorSetupError(f"{system.name}: two particles coincide or nearly do; move them apart")
        forces = np.zeros_like(positions)
        forces[:, : system.dimension] = plane[0]
        self.results = {"energy": float(energy[0]), "free_energy": float(energy[0]), "forces": forces}


class DW4(_ParticleCalculator):
    """The double-well system of four particles in the xy plane, for ``Atoms("X4")``; z is no part of it.

    Energies in kT = 1, which ASE takes for eV: simulate at 1 / ase.units.kB = 11604.5 K.

    Raises:
        CalculatorSetupError: For any parameter: it has none, ``System`` and ``DoubleWell`` make other wells; on
            calculation, for another number of atoms, periodic cells or two atoms in one place.

    Example:
        >>> atoms = Atoms("X4", [(0, 0, 0), (4, 0, 0), (4, 4, 0), (0, 4, 0)], calculator=DW4())
        >>> round(atoms.get_potential_energy(), 3)  # four sides of d0, two diagonals
        -8.397
    """

    def set(self, **settings: Any) -> dict[str, Any]:
        """Refuses any parameter."""
        if settings:
            raise CalculatorSetupError(
                f"DW4 has no parameter {min(settings)!r}; System(..., DoubleWell(b, c, d0)) does"
            )
        return super().set()

    def _system(self) -> System:
        return SYSTEMS["dw4"]


class LJ13(_ParticleCalculator):
    """Thirteen Lennard-Jones particles in a harmonic trap, for ``Atoms("X13")``.

    Energies in kT = 1, which ASE takes for eV: simulate at 1 / ase.units.kB = 11604.5 K.

    Args:
        factor: Of the pair energy; 1 is the convention of Köhler et al. 2020 and the paper, 2 that of Klein and Noé.

    Raises:
        CalculatorSetupError: For a factor that is not positive; on calculation, for another number of atoms, periodic
            cells or two atoms in one place.

    Example:
        >>> from ase.cluster import Icosahedron
        >>> atoms = Atoms("X13", Icosahedron("Ar", 2, latticeconstant=2**0.5).positions, calculator=LJ13())
        >>> round(atoms.get_potential_energy(), 2)
        -36.58
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(factor=float(factor))

    def set(self, **settings: Any) -> dict[str, Any]:
        """Changes the factor."""
        if set(settings) - {"factor"}:
            raise CalculatorSetupError(f"LJ13 has no parameter {min(set(settings) - {'factor'})!r}, only factor")
        try:
            settings = {key: float(value) for key, value in settings.items()}
            lennard_jones(settings.get("factor", 1.0))
        except (DataError, TypeError, ValueError) as error:
            raise CalculatorSetupError(str(error)) from None
        return super().set(**settings)

    def _system(self) -> System:
        return lennard_jones(self.parameters["factor"])
