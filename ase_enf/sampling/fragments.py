"""Fragments: atoms that stay where they are while a flow draws the rest around them, and variants of a structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from torch import Tensor

from ase_enf.atoms.batch import check_atoms, closest_pair, to_batch
from ase_enf.atoms.formula import formula_numbers
from ase_enf.flow.divergence import Velocity
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.values import check_strength

# Å; no two atoms of a molecule are this close.
OVERLAP = 0.5
# Particles of each molecule. With one, few completions are stable; 16 are no better than 8 (qm9-small).
PARTICLES = 8
# Particles are compared down to this time t; below it, r is smaller than the errors of the flow.
LAST_LOOK = 0.02


class Fragment:
    """A structure to complete, of which some atoms are kept.

    On the path x_t = (1 − t) x + t z, every step predicts an end D, in which the kept atoms K are replaced by those of
    the fragment f,

        D_i ← f_i − f̄ + D̄,  i ∈ K,  where f̄ and D̄ are means over K,

    so that their geometry is that of the fragment and their centre the one that the flow predicts, since the true one
    is not known before the rest is drawn; the mean of all atoms stays zero. Their features are replaced as well. The
    flow sees the kept atoms without noise, at (1 − t) f. This alone would put the rest anywhere, because noise hides
    where the fragment lacks a bond. Therefore every molecule has :data:`PARTICLES` particles
    (:class:`~ase_enf.sampling.particles.Particles`), and those survive for which the flow itself predicts the fragment
    well:

        U = ‖f − f̄ − (D_K − D̄)‖² / (2 r²) + ‖f_h − D_h,K‖² / (2 r_h²),  r² = t² s² / ((1 − t)² s² + t²)

    where r² is the posterior variance at time t of data with standard deviation s (1 for positions). The resulting
    distribution is not the exact conditional one of the flow. Use ``require="stable"`` and expect some attempts.

    Args:
        flow: A flow of molecules, trained by flow matching.
        atoms: The structure. Atoms under ``FixAtoms`` are kept; without a constraint all are, or none if a strength is
            given.
        strength: How far back towards noise, in (0, 1], the other atoms start; None is 1, which leaves nothing of their
            positions.

    Raises:
        TypeError: For anything but ``Atoms``.
        ValueError: For elements that the flow does not know, atoms closer than 0.5 Å, more atoms than the flow saw,
            constraints other than ``FixAtoms``, a cell, or a flow that cannot do this.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(hidden=8, layers=1, sizes={9: 1}, path="linear"))
        >>> fragment = Fragment(flow, molecule("CH3"))
        >>> fragment.kept.tolist(), fragment.least
        ([0, 1, 2, 3], 5)
    """

    def __init__(self, flow: ENF, atoms: Atoms, strength: float | None = None) -> None:
        _check_flow(flow)
        _check_structure(flow, atoms)
        if strength is not None:
            check_strength(strength)
        fixed = _fixed(atoms)
        if fixed is None:
            fixed = np.arange(len(atoms) if strength is None else 0)
        elif len(fixed) == len(atoms) and strength is not None:
            raise ValueError(f"strength={strength:g}: the constraint keeps every atom; nothing is left to vary")
        self.atoms = atoms
        self.kept = fixed
        self.strength = strength
        self.least = max(len(atoms), len(fixed) + 1)
        self.size = None if strength is None else len(atoms)  # of the whole, where nothing is added
        self.particles = PARTICLES if len(fixed) else 1

    def sizes(self, weights: Mapping[int, float]) -> dict[int, float]:
        """Returns the weights of sizes, zero for those that the whole cannot have.

        Raises:
            ValueError: If none is left.
        """
        allowed = {size: float(weight) * (size >= self.least) for size, weight in weights.items()}
        if not any(allowed.values()):
            raise ValueError(
                f"fragment: has {len(self.atoms)} atoms and leaves none to draw: this model saw at most {max(weights)}"
            )
        return allowed

    def check_size(self, n_atoms: int | None) -> None:
        """Raises ``ValueError`` for a size of the whole that leaves nothing to draw or to vary."""
        if n_atoms is None:
            return
        if self.size not in (None, n_atoms):
            raise ValueError(
                f"n_atoms={n_atoms}: variants of a structure have its {len(self.atoms)} atoms; leave n_atoms out"
            )
        if n_atoms < self.least:
            raise ValueError(
                f"n_atoms={n_atoms}: the fragment has {len(self.atoms)} atoms, {len(self.kept)} of them kept; ask for "
                f"at least {self.least} in all"
            )

    def compositions(self, formulas: list[str], weights: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Returns those compositions that contain the structure, with their weights.

        Raises:
            ValueError: If there is none.
        """
        needed = Counter(self.atoms.numbers.tolist())
        fits = []
        for formula in formulas:
            numbers = formula_numbers(formula)
            exact = self.size in (None, len(numbers))
            fits.append(exact and len(numbers) >= self.least and needed <= Counter(numbers.tolist()))
        if not any(fits):
            asked = f"formula={formulas[0]!r}" if len(formulas) == 1 else "the compositions that this model saw"
            raise ValueError(
                f"fragment: {asked} cannot hold {self.atoms.get_chemical_formula()} and at least {self.least} atoms; "
                "give a formula of the whole"
            )
        kept = [formula for formula, fit in zip(formulas, fits, strict=True) if fit]
        return kept, weights[fits] / weights[fits].sum()

    def ordered(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the atomic numbers of a whole with those of the structure first, in its order."""
        rest = Counter(numbers.tolist()) - Counter(self.atoms.numbers.tolist())
        return np.concatenate([self.atoms.numbers, np.sort(list(rest.elements())).astype(int)])

    def bound(self, flow: ENF, like: Tensor) -> BoundFragment:
        """Returns the fragment in the coordinates of a flow; ``like`` gives dtype and device."""
        batch = to_batch([self.atoms], flow.species, dtype=like.dtype).to(device=like.device)
        with torch.no_grad():
            features = batch.positions.new_zeros(1, len(self.atoms), flow.config.flow_features)
            encoded = flow.encode(batch, features)  # without noise: the mean of q
        kept = torch.from_numpy(self.kept).to(like.device)
        return BoundFragment(encoded.x[0], encoded.h[0], kept, self.strength, flow.config.feature_std)

    def finished(self, atoms: Atoms) -> Atoms:
        """Returns a drawn molecule in the frame of the fragment, with its atoms as they were and its constraints."""
        kept = self.kept
        reference = kept if len(kept) else np.arange(len(self.atoms))
        shift = self.atoms.positions[reference].mean(axis=0) - atoms.positions[reference].mean(axis=0)
        atoms.positions += shift
        atoms.positions[kept] = self.atoms.positions[kept]
        atoms.numbers[kept] = self.atoms.numbers[kept]
        atoms.set_constraint([constraint.copy() for constraint in self.atoms.constraints])
        return atoms

    def info(self) -> dict[str, Any]:
        """Returns the entries of ``info`` about the fragment."""
        kept = self.atoms[self.kept].get_chemical_formula() if len(self.kept) else "none"
        return {"enf_fragment": kept} | ({} if self.strength is None else {"enf_strength": self.strength})


class BoundFragment:
    """A fragment in the coordinates of a flow.

    Args:
        x: Positions of the structure, centred, shape (A, n).
        h: Its features, shape (A, F).
        kept: Indices of the kept atoms, shape (K,).
        strength: Time on the path where the others start; 1 when None.
        feature_std: Standard deviation of features; that of positions is 1.
    """

    def __init__(self, x: Tensor, h: Tensor, kept: Tensor, strength: float | None, feature_std: float = 1.0) -> None:
        self.x, self.h, self.kept = x, h, kept
        self.start = 1.0 if strength is None else float(strength)
        self.feature_std = feature_std

    def started(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns where latent molecules start: (1 − t) x + t z, with x the structure and t the strength."""
        if self.start == 1.0:
            return x, h
        return tuple((1.0 - self.start) * own + self.start * z for own, z in ((self.x, x), (self.h, h)))

    def corrected(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the kept atoms into predicted ends x (B, M, n) and h (B, M, F); see :class:`Fragment`."""
        return self._put_in(x, h, 1.0) if len(self.kept) else (x, h)

    def looking(self, velocity: Velocity) -> Velocity:
        """Returns a velocity that sees the kept atoms without noise, at (1 − t) f, and predicts the end from there."""

        def clear(t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            states = self._put_in(x, h, 1.0 - t)
            rates = velocity(t, *states)
            return tuple(
                (state - (seen - t * rate)) / t for state, seen, rate in zip((x, h), states, rates, strict=True)
            )

        return clear if len(self.kept) else velocity

    def misfit(self, t: float, x: Tensor, h: Tensor) -> Tensor:
        """Returns U of predicted ends x (B, M, n) and h (B, M, F), shape (B,); see :class:`Fragment`."""
        own, predicted = self.x[self.kept], x[:, self.kept]
        apart = own - own.mean(dim=0) - (predicted - predicted.mean(dim=1, keepdim=True))
        by_features = (self.h[self.kept] - h[:, self.kept]).square().sum(dim=(1, 2)) / _seen(t, self.feature_std)
        return (apart.square().sum(dim=(1, 2)) / _seen(t, 1.0) + by_features) / 2.0

    def _put_in(self, x: Tensor, h: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Returns copies of x and h whose kept atoms are the fragment times ``scale``, about their present centre."""
        own = self.x[self.kept]
        centre = x[:, self.kept].mean(dim=1, keepdim=True)
        x, h = x.clone(), h.clone()
        x[:, self.kept] = scale * (own - own.mean(dim=0)) + centre
        h[:, self.kept] = scale * self.h[self.kept]
        return x, h


def requested_fragment(
    flow: ENF, atoms: Atoms | None, strength: float | None, solver: object, n_atoms: int | None
) -> Fragment | None:
    """Returns the requested fragment, checked; None without one.

    Raises:
        TypeError: For anything but ``Atoms``.
        ValueError: For a strength without a structure, a solver that replaces no noise, and as :class:`Fragment`.
    """
    if atoms is None:
        if strength is not None:
            raise ValueError(f"strength={strength}: needs a structure to vary; give one as fragment")
        return None
    fragment = Fragment(flow, atoms, strength)
    if not isinstance(solver, StochasticSampler) or not solver.churn:
        raise ValueError(f"fragment: needs the stochastic sampler with churn, not {solver}; leave solver and churn out")
    fragment.check_size(n_atoms)
    return fragment


def _seen(t: float, std: float) -> float:
    """Returns the posterior variance r² at time t of data with this standard deviation."""
    return t**2 * std**2 / ((1.0 - t) ** 2 * std**2 + t**2)


def _check_flow(flow: ENF) -> None:
    if not flow.config.knows_types:
        raise ValueError("fragment: this model knows no elements; use a model of molecules, such as qm9")
    if flow.config.graph:
        raise ValueError("fragment: this model draws conformers of whole graphs; use another one, such as qm9")
    if not flow.matched:
        raise ValueError("fragment: this model was not trained by flow matching; use one that was, such as qm9")


def _check_structure(flow: ENF, atoms: Atoms) -> None:
    if not isinstance(atoms, Atoms):
        raise TypeError(f"fragment: expected ase.Atoms, got {type(atoms).__name__}; read a file with ase.io.read")
    try:
        check_atoms(atoms, flow.species, dimension=flow.config.dimension)
    except ValueError as error:
        raise ValueError(f"fragment, {error}") from None
    distance, i, j = closest_pair(atoms.positions)
    if distance < OVERLAP:
        raise ValueError(f"fragment: atoms {i} and {j} overlap, {distance:.2f} Å apart; move or remove one of them")
    if len(atoms) > (largest := max(flow.size_prior.counts)):
        raise ValueError(f"fragment: has {len(atoms)} atoms, and this model saw at most {largest}; remove some")


def _fixed(atoms: Atoms) -> np.ndarray | None:
    """Returns the indices under ``FixAtoms``, None without a constraint."""
    if not atoms.constraints:
        return None
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise ValueError(
                f"fragment: has the constraint {type(constraint).__name__}, and only FixAtoms is understood; remove it"
            )
    return np.unique(np.concatenate([constraint.get_indices() for constraint in atoms.constraints]))
