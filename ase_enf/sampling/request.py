"""A request for molecules, before it is checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms

from ase_enf.chem.graph import Graph
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.sampling.requirements import Requirements
from ase_enf.sampling.samplers import resolve_sampler
from ase_enf.values import check_whole

# How often one molecule may be rejected, by default.
MAX_REJECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for molecules; its fields are the arguments of ``generate`` except their number.

    ``graph`` is a molecular graph with its atoms in an order of its own, in place of ``smiles``.

    Example:
        >>> Request(seed=1, n_atoms=9, require="stable", closed_shell=True).wanted
        ('stable', 'closed_shell')
    """

    seed: int = 0
    n_atoms: int | None = None
    formula: str | None = None
    solver: str | Solver | StochasticSampler | None = None
    steps: int | None = None
    churn: float | None = None
    batch_size: int = 64
    device: str | torch.device | None = None
    require: str | Iterable[str] = ()
    closed_shell: bool = False
    max_attempts: int = MAX_REJECTIONS
    with_smiles: bool = False
    properties: Mapping[str, Any] | None = None
    smiles: str | None = None
    graph: Graph | None = None
    fragment: Atoms | None = None
    strength: float | None = None
    guidance: float = 1.0

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the tests that a molecule must pass."""
        words = self.require.split(",") if isinstance(self.require, str) else self.require
        return (*words, *(["closed_shell"] if self.closed_shell else []))

    def requirements(self, flow: ENF) -> Requirements:
        """Returns the tests that a molecule must pass, checked; see ``Requirements.of``."""
        check_whole("max_attempts", self.max_attempts, 1)
        return Requirements.of(flow, self.wanted)

    def sampler(self, flow: ENF) -> Solver | StochasticSampler:
        """Returns how to draw, checked; see ``resolve_sampler``."""
        return resolve_sampler(flow, self.solver, self.steps, self.churn)
