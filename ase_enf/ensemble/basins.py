"""Populations and free energies of basins, from walkers and from weighted draws, with honest errors for few samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.data.series import Array, autocorrelation_time, standard_error
from ase_enf.scoring.reweight import FEW

# A torsion less than this many degrees from 180 is trans.
_TRANS = 60.0


class Torsions:
    """Names a basin by its torsions: each is "trans" within 60° of 180°, otherwise "gauche".

    Mirror images share a basin: an equivariant flow draws both with the same density, so the sign of a torsion carries
    no information.

    Args:
        atoms: Indices of the four atoms of each torsion.

    Example:
        >>> from ase.build import molecule
        >>> Torsions([(0, 1, 2, 3)])(molecule("CH3CH2OH"))
        'trans'
    """

    def __init__(self, atoms: Sequence[Sequence[int]]) -> None:
        self.atoms = [tuple(four) for four in atoms]

    def __call__(self, atoms: Atoms) -> str:
        """Returns the name of the basin of a structure."""
        angles = [atoms.get_dihedral(*four) for four in self.atoms]
        return " ".join("trans" if abs(angle - 180.0) < _TRANS else "gauche" for angle in angles)


class Basins(NamedTuple):
    """Which structures are in which basin.

    Attributes:
        names: Names of the basins, the most frequent among the walkers first.
        walkers: Basin of each frame as an index into ``names``, shape (S, C).
        draws: Basin of each draw as an index into ``names``, −1 for a draw without weight, shape (n,).
    """

    names: list[str]
    walkers: NDArray[np.int64]
    draws: NDArray[np.int64]


def assign(
    basin: Callable[[Atoms], Any], frames: Sequence[Atoms], walkers: int, samples: Sequence[Atoms], weights: Array
) -> Basins:
    """Finds the basin of every frame and of every sample that has a weight.

    Args:
        basin: A function of one structure that returns the name of its basin.
        frames: Frames of the walkers, one of each walker in turn.
        walkers: Number C of walkers; frames of a last, incomplete sweep are left out.
        samples: n draws of the flow, atoms in the order of the molecule.
        weights: Their weights, shape (n,).

    Returns:
        The basins.

    Example:
        >>> from ase.build import molecule
        >>> ethanol = molecule("CH3CH2OH")
        >>> assign(Torsions([(0, 1, 2, 3)]), [ethanol] * 4, 2, [ethanol], np.ones(1)).names
        ['trans']
    """
    whole = len(frames) // walkers * walkers
    seen = [str(basin(atoms)) for atoms in frames[:whole]]
    drawn = [str(basin(atoms)) if weight > 0 else None for atoms, weight in zip(samples, weights, strict=True)]
    names = sorted({*seen, *drawn} - {None}, key=lambda name: (-seen.count(name), name))
    places = {name: place for place, name in enumerate(names)} | {None: -1}
    found = [np.array([places[name] for name in many], dtype=np.int64) for many in (seen, drawn)]
    return Basins(names, found[0].reshape(-1, walkers), found[1])


def free_energies(basins: Basins, weights: Array) -> pd.DataFrame:
    """Populations p of the basins, and their free energies F = −ln(p / p_0) relative to the first basin, in kT.

    Errors are of first order: for the walkers they include the autocorrelation of the series, for the weights they come
    from the delta method for a ratio. An error is infinite where the basin, or the first one, has fewer than ten
    effective samples: the delta method sees only what was drawn, and so underestimates the error of so few.

    Args:
        basins: Which structures are in which basin.
        weights: Normalised weights, shape (n,).

    Returns:
        One row for each basin: ``share_md``, the population among the walkers, with its error and the effective number
        of samples; ``share_flow``, that among the unweighted draws; ``share_reweighted``, that among the weighted
        draws, with its error and the effective number of samples; ``free_energy_md`` and ``free_energy_reweighted``,
        kT, with errors.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> seen, drawn = rng.integers(0, 2, (500, 4)), rng.integers(0, 2, 900)
        >>> table = free_energies(Basins(["a", "b"], seen, drawn), np.full(900, 1 / 900))
        >>> bool(table.free_energy_md.abs().max() < 0.3 and table.free_energy_reweighted_stderr[1] < 0.1)
        True
    """
    counted = basins.draws >= 0
    rows = []
    for place, name in enumerate(basins.names):
        inside = (basins.walkers == place).astype(float)
        chosen = basins.draws == place
        share, drawn = inside.mean(), weights[chosen].sum()
        row = {
            "basin": name,
            "share_md": share,
            "share_md_stderr": float(standard_error(inside)),
            "effective_md": _effective(inside),
            "share_flow": chosen.sum() / max(counted.sum(), 1),
            "share_reweighted": drawn,
            "share_reweighted_stderr": float(np.sqrt(np.sum(np.square(weights * (chosen - drawn))))),
            "effective_reweighted": _kish(weights[chosen]),
        }
        rows.append(row | _against_first(basins, weights, place))
    table = pd.DataFrame(rows)
    few = table.effective_reweighted < FEW
    table.loc[few, "share_reweighted_stderr"] = np.inf
    table.loc[few | few.iloc[0], "free_energy_reweighted_stderr"] = np.inf
    few = table.effective_md < FEW
    table.loc[few, "share_md_stderr"] = np.inf
    table.loc[few | few.iloc[0], "free_energy_md_stderr"] = np.inf
    table.loc[0, ["free_energy_md_stderr", "free_energy_reweighted_stderr"]] = 0.0
    return table


def _effective(inside: Array) -> float:
    """Effective number of frames in a basin; all are counted where it holds all or none, as nothing then varies."""
    if inside.std() == 0:
        return float(inside.sum())
    return float(inside.sum() / max(float(autocorrelation_time(inside)), 1.0))


def _kish(weights: Array) -> float:
    return float(weights.sum() ** 2 / np.square(weights).sum()) if weights.any() else 0.0


def _against_first(basins: Basins, weights: Array, place: int) -> dict[str, float]:
    """−ln(p_b / p_0) and its first-order error, from the walkers and from the weights."""
    found = {}
    first, here = basins.walkers == 0, basins.walkers == place
    p, q = first.mean(), here.mean()
    known = p > 0 and q > 0
    found["free_energy_md"] = float(np.log(p / q)) if known else np.inf
    found["free_energy_md_stderr"] = float(standard_error(here / q - first / p)) if known else np.inf
    first, here = basins.draws == 0, basins.draws == place
    p, q = weights[first].sum(), weights[here].sum()
    known = p > 0 and q > 0
    found["free_energy_reweighted"] = float(np.log(p / q)) if known else np.inf
    influence = weights * (here / q - first / p) if known else np.array([np.inf])
    found["free_energy_reweighted_stderr"] = float(np.sqrt(np.square(influence).sum()))
    return found
