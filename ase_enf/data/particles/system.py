"""Particles with a pair energy in a trap: energies and forces of many configurations at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ase_enf.data import DataError

Array = NDArray[np.float64]

_BLOCK = 128  # configurations at a time, so that the arrays of their pairs stay in the cache


class Energies(NamedTuple):
    """Energies and forces of many configurations."""

    energy: Array  # (B,), kT
    forces: Array  # (B, M, n), kT / length; minus the gradient


@dataclass(frozen=True)
class System:
    """Particles with a pair energy in a harmonic trap, ``U = Σ_{i<j} v(d_ij) + ½ k Σ_i |x_i − x̄|²``.

    U does not change when all particles move together; its density ``exp(−U)`` lives on the zero-mean subspace.

    Args:
        name: Its name in files and messages.
        n_atoms: Number M of particles.
        dimension: Dimension n of space.
        pair: Squared distances → v and v'(d)/d, of the same shape, kT and kT / length². If it uses arithmetic only, it
            takes tensors as well.
        trap: k, kT / length².
        reference: Force constant of the harmonic system that sampling and free energies start from, kT / length².
        power: Power of the path between them, λ = u^power. With 4 the integrand <∂U/∂λ> dλ/du of d⁻¹² in three
            dimensions stays finite at u = 0, because <∂U/∂λ> grows as λ^(3/12 − 1).
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
    def _differences(self) -> Array:  # (pairs, M), ±1: a matrix product is the fastest way to gather and scatter
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
            Shapes (B,) and (B, M, n). If two particles coincide, undefined values are inf or nan.

        Raises:
            DataError: If the shape is not (B, M, n).

        Example:
            >>> from ase_enf.data.particles import resolve
            >>> resolve("lj13").evaluate(np.random.default_rng(0).normal(size=(5, 13, 3))).forces.shape
            (5, 13, 3)
        """
        energy, gradient = self.gradient(self.checked(positions).transpose(1, 2, 0))
        return Energies(energy, -gradient.transpose(2, 0, 1))

    def energy(self, positions: Any) -> Any:
        """Energies of many configurations: an array for an array, a differentiable tensor for a tensor.

        Args:
            positions: Array or torch tensor of any float dtype and device, shape (B, M, n).

        Returns:
            U, kT, shape (B,), of the same kind.

        Raises:
            DataError: If the shape is not (B, M, n).

        Example:
            >>> from ase_enf.data.particles import resolve
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
        """Returns positions as float64, after checking that their shape is (B, M, n).

        Raises:
            DataError: If their shape is not (B, M, n).
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
            >>> from ase_enf.data.particles import resolve
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
