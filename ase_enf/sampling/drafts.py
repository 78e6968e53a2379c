"""Which molecules a request draws: the size, the composition and the conditions of each, by its index alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ase_enf.atoms.formula import formula_numbers
from ase_enf.chem.graph import Graph
from ase_enf.flow.model import ENF
from ase_enf.sampling.compositions import drawn_compositions
from ase_enf.sampling.fragments import Fragment
from ase_enf.sampling.noise import Drawing
from ase_enf.sampling.properties import PropertyRequest


class Draft(NamedTuple):
    """A latent molecule, before it is integrated."""

    index: int
    attempt: int
    n_atoms: int
    numbers: np.ndarray | None  # (M,), the composition for "given"
    conditions: np.ndarray | None = None  # (C,), NaN where unknown
    failures: int = 0  # earlier attempts that could not be integrated; the others were rejected

    def particles(self, count: int) -> list[Draft]:
        """Returns ``count`` particles of this draft, each with noise of its own."""
        return [self._replace(attempt=self.attempt * count + k) for k in range(count)]

    @property
    def drawing(self) -> Drawing:
        """The name of its noise."""
        return Drawing(self.index, self.attempt)


class Drafts:
    """Draws sizes, compositions and conditions; molecule i of a seed has its own, however often it is drawn.

    Args:
        flow: A flow.
        seed: Of the request.
        n_atoms: Requested size, or None.
        formula: Requested composition, or None.
        even: Whether to leave out compositions with an odd number of electrons.
        properties: Requested properties.
        graph: Requested molecular graph, or None.
        fragment: Fragment that the molecules contain, or None.

    Raises:
        ValueError: For a size that p_M never saw, or a formula that does not fit the model.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="none", sizes={5: 1}, hidden=8, layers=1))
        >>> Drafts(flow, 0, None, None, False, PropertyRequest(flow, None)).draw(index=3, attempt=0).n_atoms
        5
    """

    def __init__(
        self,
        flow: ENF,
        seed: int,
        n_atoms: int | None,
        formula: str | None,
        even: bool,
        properties: PropertyRequest,
        graph: Graph | None = None,
        fragment: Fragment | None = None,
    ) -> None:
        self.seed, self.n_atoms, self.prior = seed, n_atoms, flow.size_prior
        self.properties, self.graph, self.fragment = properties, graph, fragment
        self.compositions = None if graph else drawn_compositions(flow, n_atoms, formula, even)
        if self.compositions is not None and properties.ranges:
            self.compositions = self._reweighted(*self.compositions)
        self.sizes = properties.size_weights(self.prior.counts) if properties.ranges else None
        if fragment and self.compositions is not None:
            self.compositions = fragment.compositions(*self.compositions)
        elif fragment and n_atoms is None:
            self.sizes = fragment.sizes(self.sizes or self.prior.counts)
        if n_atoms is not None and not graph and self.compositions is None and n_atoms not in self.prior:
            seen = list(self.prior.counts)
            near = " or ".join(str(size) for size in sorted(sorted(seen, key=lambda size: abs(size - n_atoms))[:2]))
            raise ValueError(
                f"n_atoms={n_atoms}: this model saw sizes {seen[0]} to {seen[-1]} only; choose one of those it saw, "
                f"such as {near}"
            )

    def _reweighted(self, formulas: list[str], weights: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Returns compositions, their weights multiplied by how well their sizes go with the requested properties."""
        sizes = [len(formula_numbers(formula)) for formula in formulas]
        shares = self.properties.size_weights(dict.fromkeys(sizes, 1))
        weights = weights * np.array([shares[size] for size in sizes])
        return formulas, weights / weights.sum()

    def draw(self, index: int, attempt: int, failures: int = 0) -> Draft:
        """Returns the draft of an index, with the same size and composition at every attempt.

        Otherwise failures would bias them: a size that is hard to integrate would become rare.

        Args:
            index: Number of the molecule, from 0.
            attempt: How often it was drawn before.
            failures: How many of those integrations failed; the others were rejected.
        """
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))
        numbers = self.graph.numbers if self.graph else None
        if self.compositions is not None:
            formulas, weights = self.compositions
            numbers = formula_numbers(formulas[rng.choice(len(formulas), p=weights)])
            numbers = self.fragment.ordered(numbers) if self.fragment else numbers
        size = len(numbers) if numbers is not None else self.n_atoms or self.prior.sample(rng, self.sizes)
        return Draft(index, attempt, size, numbers, self.properties.draw(rng, size), failures)
