"""A request for molecules: which are drawn, again where that failed or was rejected, in order and in batches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor
from tqdm import tqdm

from ase_enf.atoms.batch import COINCIDENT, Batch, check_whole, closest_pair, formula_numbers, to_atoms
from ase_enf.flow.context import Context
from ase_enf.flow.continuous import Solver, SolverError
from ase_enf.flow.devices import out_of_memory, resolve_device
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import Noise, StochasticSampler, sample_stochastic
from ase_enf.sampling.compositions import awaited_composition, drawn_compositions
from ase_enf.sampling.fragments import LAST_LOOK, Fragment, requested_fragment
from ase_enf.sampling.graphs import graph_info, requested_graph
from ase_enf.sampling.noise import Drawing, noise_source
from ase_enf.sampling.particles import Particles
from ase_enf.sampling.properties import PropertyRequest
from ase_enf.sampling.requirements import Requirements, strict_smiles

# How often the integration of one molecule may fail.
MAX_ATTEMPTS = 10
# How often one molecule may be rejected, by default.
MAX_REJECTIONS = 100
# Molecules are grouped by size inside windows of this many batches, which bounds the memory of a stream.
WINDOW_BATCHES = 8
# Last part of the name of the generator that chooses particles; 1 is that of renewed noise.
PARTICLE_KEY = 2


class GenerationError(RuntimeError):
    """A molecule could not be integrated to finite positions, or was rejected too often."""


class Draft(NamedTuple):
    """A latent molecule on its way."""

    index: int
    attempt: int
    n_atoms: int
    numbers: np.ndarray | None  # (M,), the composition for "given"
    conditions: np.ndarray | None = None  # (C,), NaN where unknown
    failures: int = 0  # of the attempts before, those that could not be integrated; others were rejected

    def particles(self, count: int) -> list[Draft]:
        """Returns so many trials of this draft, each with noise of its own."""
        return [self._replace(attempt=self.attempt * count + k) for k in range(count)]

    @property
    def drawing(self) -> Drawing:
        """What names its noise."""
        return Drawing(self.index, self.attempt)


class Sampler:
    """One request, checked, with everything that its molecules share."""

    def __init__(
        self,
        flow: ENF,
        seed: int,
        n_atoms: int | None,
        formula: str | None,
        solver: Solver | StochasticSampler,
        batch_size: int,
        device: str | torch.device | None,
        require: str | Iterable[str] = (),
        max_attempts: int = MAX_REJECTIONS,
        with_smiles: bool = False,
        properties: Mapping[str, Any] | None = None,
        smiles: str | None = None,
        fragment: Atoms | None = None,
        strength: float | None = None,
    ) -> None:
        if device is not None and resolve_device(device) != flow.device:
            flow = copy.deepcopy(flow).to(resolve_device(device))
        if n_atoms is not None:
            check_whole("n_atoms", n_atoms, 1)
        self.flow = flow
        self.seed = seed
        self.source = noise_source(seed, flow)
        self.solver = solver
        self.fragment = requested_fragment(flow, fragment, strength, solver, n_atoms)
        # Particles are integrated as molecules are.
        self.batch_size = max(1, batch_size // self.fragment.particles) if self.fragment else batch_size
        n_atoms = (self.fragment and self.fragment.size) or n_atoms
        self.n_atoms = n_atoms
        check_whole("max_attempts", max_attempts, 1)
        self.max_attempts = max_attempts
        asked = Requirements.of(flow, require)
        awaited = awaited_composition(flow, n_atoms, formula, "closed_shell" in asked.names, max_attempts)
        self.require = asked if awaited is None else Requirements.of(flow, require, awaited)
        if awaited is not None:
            n_atoms = self.n_atoms = len(awaited)
            if self.fragment:
                self.fragment.compositions([str(formula)], np.ones(1))
        self.with_smiles = with_smiles
        if with_smiles and not flow.config.knows_types:
            raise ValueError("with_smiles=True: this model knows no elements; leave it out")
        self.properties = PropertyRequest(flow, properties)
        self.graph = requested_graph(flow, smiles, n_atoms, formula)
        even = "closed_shell" in self.require.names
        self.compositions = None if self.graph else drawn_compositions(flow, n_atoms, formula, even)
        if self.compositions is not None and self.properties.ranges:
            self.compositions = self._reweighted(*self.compositions)
        self.sizes = self.properties.size_weights(flow.size_prior.counts) if self.properties.ranges else None
        if self.fragment and self.compositions is not None:
            self.compositions = self.fragment.compositions(*self.compositions)
        elif self.fragment and n_atoms is None:
            self.sizes = self.fragment.sizes(self.sizes or flow.size_prior.counts)
        if n_atoms is not None and not self.graph and self.compositions is None and n_atoms not in flow.size_prior:
            seen = list(flow.size_prior.counts)
            near = " or ".join(str(size) for size in sorted(sorted(seen, key=lambda size: abs(size - n_atoms))[:2]))
            raise ValueError(
                f"n_atoms={n_atoms}: this model saw sizes {seen[0]} to {seen[-1]} only; choose one of those it saw, "
                f"such as {near}"
            )

    def _reweighted(self, formulas: list[str], weights: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Returns compositions with weights that go with the properties asked for."""
        sizes = [len(formula_numbers(formula)) for formula in formulas]
        shares = self.properties.size_weights(dict.fromkeys(sizes, 1))
        weights = weights * np.array([shares[size] for size in sizes])
        return formulas, weights / weights.sum()

    def stream(self, indices: Sequence[int], progress: bool, soon: bool = False) -> Iterator[Atoms]:
        """Yields the molecules ``indices`` in order; ``soon``: the first alone, the next without waiting for many."""
        self.integrations = self.failures = self.kept = self.attempts = 0
        largest = self.batch_size * WINDOW_BATCHES
        done, window = 0, 1 if soon else largest
        with tqdm(total=len(indices), disable=not progress, unit="molecule", dynamic_ncols=True) as bar:
            while done < len(indices):
                for atoms in self._window(indices[done : done + window], bar):
                    yield self._counted(atoms, bar)
                done += window
                window = min(2 * max(window, self.batch_size), largest)
        if self.failures:
            warnings.warn(
                f"{self.failures} of {self.integrations} integrations failed and were drawn again", stacklevel=2
            )

    def _window(self, indices: Sequence[int], bar: tqdm) -> Iterator[Atoms]:
        """Yields the molecules of a window in order, each as soon as those before it are there."""
        done: dict[int, Atoms] = {}
        waiting = [self.draft(index, attempt=0) for index in indices]
        coming = iter(indices)
        following = next(coming, None)
        while waiting:
            again = []
            for batch in self.same_size(waiting):
                self.integrations += len(batch)
                for draft, atoms in zip(batch, self._integrate(batch), strict=True):
                    if atoms is None:
                        self.failures += 1
                        again.append(self.draft(draft.index, draft.attempt + 1, draft.failures + 1))
                    elif unmet := self.require.unmet([atoms])[0]:
                        self._check_rejections(draft, unmet)
                        again.append(self.draft(draft.index, draft.attempt + 1, draft.failures))
                    else:
                        done[draft.index] = atoms
                        bar.update(1)
                while following in done:
                    yield done.pop(following)
                    following = next(coming, None)
            waiting = again

    def _counted(self, atoms: Atoms, bar: tqdm) -> Atoms:
        """Returns a molecule that is handed out with what was kept so far; in order, so that no batch decides it."""
        self.kept += 1
        self.attempts += atoms.info["enf_attempts"]
        if self.require.names:
            atoms.info["enf_acceptance"] = self.kept / self.attempts
            bar.set_postfix_str(f"{self.kept / self.attempts:.0%} accepted", refresh=False)
        return atoms

    def _check_rejections(self, draft: Draft, unmet: str) -> None:
        """Raises ``GenerationError`` if a draft that is rejected was the last one."""
        if draft.attempt + 1 - draft.failures < self.max_attempts:
            return
        what = self.require.reason(unmet) if len(self.require.names) == 1 else f"did not pass {self.require}"
        raise GenerationError(
            f"molecule {draft.index} (seed {self.seed}) {what} {self.max_attempts} times; leave "
            f"{unmet} out, choose another n_atoms, or raise max_attempts"
        )

    def draft(self, index: int, attempt: int, failures: int = 0) -> Draft:
        """Returns the latent molecule of an index, anew for every attempt but of one size and composition.

        Args:
            index: Number of the molecule, from 0.
            attempt: How often it was drawn before.
            failures: How many of those integrations failed; the others were rejected.

        Raises:
            GenerationError: If it failed too often.
        """
        if failures == MAX_ATTEMPTS:
            raise GenerationError(
                f"molecule {index} (seed {self.seed}) failed {MAX_ATTEMPTS} times with {self.solver.method}; "
                "use more steps, or train the model further"
            )
        # Size and composition stay when the noise is drawn again: failures must not tilt them.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))
        numbers = self.graph.numbers if self.graph else None
        if self.compositions is not None:
            formulas, weights = self.compositions
            numbers = formula_numbers(formulas[rng.choice(len(formulas), p=weights)])
            numbers = self.fragment.ordered(numbers) if self.fragment else numbers
        size = len(numbers) if numbers is not None else self.n_atoms or self.flow.size_prior.sample(rng, self.sizes)
        return Draft(index, attempt, size, numbers, self.properties.draw(rng, size), failures)

    def same_size(self, drafts: list[Draft]) -> list[list[Draft]]:
        """Returns batches of one size, that of the first draft first."""
        by_size: dict[int, list[Draft]] = {}
        for draft in drafts:
            by_size.setdefault(draft.n_atoms, []).append(draft)
        batches = [
            members[k : k + self.batch_size]
            for members in by_size.values()
            for k in range(0, len(members), self.batch_size)
        ]
        return sorted(batches, key=lambda batch: batch[0].index)

    def _integrate(self, drafts: list[Draft]) -> list[Atoms | None]:
        """Returns a molecule for each draft, None where the integration failed; in halves where memory is full."""
        try:
            batch = self.sample(drafts)
        except SolverError:
            if len(drafts) == 1:
                return [None]
            parts = [[draft] for draft in drafts]  # one failed: find it
        except Exception as error:
            if len(drafts) == 1 or not out_of_memory(error):
                raise
            parts = self._halved(drafts)
        else:
            return self._finished(batch, drafts)
        return [atoms for part in parts for atoms in self._integrate(part)]

    def _halved(self, drafts: list[Draft]) -> list[list[Draft]]:
        """Returns the halves of a batch that memory does not hold; those to come are no larger."""
        half = (len(drafts) + 1) // 2
        if half < self.batch_size:
            warnings.warn(
                f"memory is not enough for {len(drafts)} molecules together; goes on with {half}", stacklevel=2
            )
        self.batch_size = min(self.batch_size, half)
        return [drafts[:half], drafts[half:]]

    def _finished(self, batch: Batch, drafts: list[Draft]) -> list[Atoms | None]:
        """Returns the molecules of a batch, None where one is not finite or has atoms on one point."""
        both = torch.cat([batch.positions, batch.charges], dim=2)
        finite = torch.isfinite(both).all(dim=2).all(dim=1).tolist()
        safe = batch._replace(positions=torch.nan_to_num(batch.positions))  # only to convert; failures are discarded
        molecules = to_atoms(safe, self.flow.species)
        mismatches = self._charge_mismatches(batch, molecules)
        return [
            self._annotated(atoms, draft, wrong) if ok and closest_pair(atoms.positions)[0] > COINCIDENT else None
            for atoms, draft, ok, wrong in zip(molecules, drafts, finite, mismatches, strict=True)
        ]

    def sample(self, drafts: list[Draft]) -> Batch:
        """Takes drafts of one size to data; molecules that are not finite are drawn again."""
        if self.fragment:
            return self._completed(drafts, self.fragment)
        noise = self.noise(drafts) if isinstance(self.solver, StochasticSampler) else None
        return self.flow.sample(*self.latents(drafts), self.solver, noise)

    def _completed(self, drafts: list[Draft], fragment: Fragment) -> Batch:
        """Takes drafts of one size to data around the fragment, the best of several particles each."""
        several = [trial for draft in drafts for trial in draft.particles(fragment.particles)]
        z_x, z_h, mask, context = self.latents(several)
        own = fragment.bound(self.flow, z_x)
        names = [(draft.index, draft.attempt, PARTICLE_KEY) for draft in drafts]
        generators = [np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=name)) for name in names]
        count = fragment.particles
        particles = Particles(own.misfit, count, generators, LAST_LOOK) if count > 1 else None
        with torch.no_grad():
            velocity, start = own.looking(self.flow.velocity(mask, context)), own.started(z_x, z_h)
            select = None if particles is None else particles.select
            ended = sample_stochastic(
                velocity, *start, self.noise(several), self.solver, own.corrected, own.start, select
            )
            batch = self.flow.decode(*ended, mask, context)
        if particles is None:
            return batch
        places = particles.last()
        return Batch(*(None if part is None else part[places] for part in batch))

    def latents(self, drafts: list[Draft]) -> tuple[Tensor, Tensor, Tensor, Tensor | Context | None]:
        """Returns z_x (B, M, n), z_h (B, M, F), mask (B, M) and the context of drafts of one size."""
        z_x, z_h = self.source.latents([draft.drawing for draft in drafts], drafts[0].n_atoms)
        mask = torch.ones(z_x.shape[:2], dtype=torch.bool, device=z_x.device)
        return z_x, z_h, mask, self._context(drafts, z_x, mask)

    def noise(self, drafts: list[Draft]) -> Noise:
        """Returns what draws fresh latent molecules for these drafts, which all have one size."""
        return self.source.renewed([draft.drawing for draft in drafts], drafts[0].n_atoms)

    def _context(self, drafts: list[Draft], like: Tensor, mask: Tensor) -> Tensor | Context | None:
        """Returns what conditions drafts of one size; ``like`` has the shape of their positions."""
        types, conditions, bonds = like[..., :0], None, None
        if drafts[0].numbers is not None:
            order = np.array([atomic_numbers[symbol] for symbol in self.flow.species])
            one_hot = np.stack([draft.numbers[:, None] == order[None] for draft in drafts])
            types = torch.from_numpy(one_hot).to(like)
        if drafts[0].conditions is not None:
            conditions = torch.from_numpy(np.stack([draft.conditions for draft in drafts])).to(like)
        if self.graph:
            bonds = torch.from_numpy(self.graph.bonds).to(like.device).expand(len(drafts), -1, -1)
        return self.flow.context(Batch(like, types, like[..., :1], mask, conditions, bonds))

    def _charge_mismatches(self, batch: Batch, molecules: list[Atoms]) -> list[int | None]:
        if not self.flow.config.types_flow:
            return [None] * len(molecules)
        charges = batch.charges[..., 0].cpu().numpy()
        return [
            int((charge[: len(atoms)] != atoms.numbers).sum()) for charge, atoms in zip(charges, molecules, strict=True)
        ]

    def _annotated(self, atoms: Atoms, draft: Draft, mismatches: int | None) -> Atoms:
        atoms.info.update(
            enf_model=self.flow.name,
            enf_seed=self.seed,
            enf_index=draft.index,
            enf_solver=str(self.solver),
            enf_attempts=draft.attempt + 1,
        )
        if mismatches is not None:
            atoms.info["enf_charge_mismatches"] = mismatches
        if self.fragment:
            atoms = self.fragment.finished(atoms)
            atoms.info.update(self.fragment.info())
        if self.require.names:
            atoms.info["enf_require"] = str(self.require)
        if self.with_smiles and (written := strict_smiles(atoms)):
            atoms.info["enf_smiles"] = written
        atoms.info.update(self.properties.info(draft.conditions) | graph_info(self.graph))
        return atoms
