"""Warnings of ``score``: which structures need a second look, and why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from ase import Atoms

from ase_enf.flow.model import ENF

# From the warning to the caller of ``score``, past a function here, ``score`` and its decorator.
_CALLER = 5


def _warn(atoms: Sequence[Atoms], places: Sequence[int], words: str, first: int) -> None:
    """Warns of the structures at these places, if any, and names the first five."""
    if places:
        names = ", ".join(f"{first + k} ({atoms[k].get_chemical_formula()})" for k in places[:5])
        warnings.warn(f"{len(places)} structure(s) {words}: structure {names}", stacklevel=_CALLER)


def warn_of_sizes(flow: ENF, atoms: Sequence[Atoms], first: int) -> None:
    """Warns of structures larger than any in training, whose likelihood extrapolates.

    Args:
        flow: A flow; one that knows no sizes says nothing.
        atoms: The structures.
        first: Number of the first of them in warnings.
    """
    largest = max(flow.size_prior.counts, default=math.inf)
    larger = [k for k, item in enumerate(atoms) if len(item) > largest]
    words = f"have more atoms than any this model was trained on, {largest}, so that their likelihood may mean nothing"
    _warn(atoms, larger, words, first)


def warn_of_errors(
    atoms: Sequence[Atoms], log_likelihoods: Sequence[float], errors: Sequence[float], max_stderr: float, first: int
) -> None:
    """Warns of structures without a finite score, and of those whose integration error stayed too large.

    Args:
        atoms: The structures.
        log_likelihoods: Of each, nats.
        errors: Integration error of each, nats.
        max_stderr: The error that was asked for, nats.
        first: Number of the first structure in warnings.
    """
    finite = [math.isfinite(value) for value in log_likelihoods]
    infinite = [k for k, good in enumerate(finite) if not good]
    _warn(atoms, infinite, "have no finite log-likelihood; use 200 steps or float64", first)
    rough = [k for k, error in enumerate(errors) if finite[k] and not error <= max_stderr]
    worst = max((errors[k] for k in rough), default=0.0)
    words = f"keep an integration error above max_stderr={max_stderr:g}, up to {worst:.2g} nats; take it into account"
    _warn(atoms, rough, words, first)
