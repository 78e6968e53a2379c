"""Meets a request for molecules: in order, in batches, and again where one fails or is rejected."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor

from ase_enf.atoms.batch import COINCIDENT, Batch, closest_pair, to_atoms
from ase_enf.bars import Bar, Progress
from ase_enf.flow.context import Context
from ase_enf.flow.continuous import SolverError
from ase_enf.flow.devices import out_of_memory, resolve_device
from ase_enf.flow.divergence import Velocity
from ase_enf.flow.model import ENF
from ase_enf.flow.replay import replayed
from ase_enf.flow.stochastic import Noise, StochasticSampler, sample_stochastic
from ase_enf.sampling.compositions import awaited_composition
from ase_enf.sampling.drafts import Draft, Drafts
from ase_enf.sampling.fragments import LAST_LOOK, Fragment, requested_fragment
from ase_enf.sampling.graphs import graph_info, requested_graph
from ase_enf.sampling.guidance import GUIDANCE_KEY, guided_velocity, requested_guidance
from ase_enf.sampling.noise import noise_source
from ase_enf.sampling.particles import Particles
from ase_enf.sampling.properties import PropertyRequest
from ase_enf.sampling.request import Request
from ase_enf.sampling.requirements import Requirements, strict_smiles
from ase_enf.values import check_whole

# How often the integration of one molecule may fail.
MAX_ATTEMPTS = 10
# Molecules are grouped by size inside windows of this many batches, which bounds the memory of a stream.
WINDOW_BATCHES = 8
# Last number in the key of the generator that selects particles; fresh noise on the way has 1.
PARTICLE_KEY = 2


class GenerationError(RuntimeError):
    """A molecule could not be integrated to finite positions, or was rejected too often."""


class Sampler:
    """One request, checked, with everything that its molecules share."""

    def __init__(self, flow: ENF, request: Request) -> None:
        if request.device is not None and resolve_device(request.device) != flow.device:
            flow = copy.deepcopy(flow).to(resolve_device(request.device))
        if request.n_atoms is not None:
            check_whole("n_atoms", request.n_atoms, 1)
        self.flow, self.seed, self.max_attempts = flow, request.seed, request.max_attempts
        self.source, self.solver = noise_source(request.seed, flow), request.sampler(flow)
        self.fragment = requested_fragment(flow, request.fragment, request.strength, self.solver, request.n_atoms)
        n_atoms = (self.fragment and self.fragment.size) or request.n_atoms
        self.require = request.requirements(flow)
        even = "closed_shell" in self.require.names
        awaited = awaited_composition(flow, n_atoms, request.formula, even, request.max_attempts)
        if awaited is not None:
            n_atoms, self.require = len(awaited), Requirements.of(flow, request.wanted, awaited)
            if self.fragment:
                self.fragment.compositions([str(request.formula)], np.ones(1))
        self.with_smiles = request.with_smiles
        if self.with_smiles and not flow.config.knows_types:
            raise ValueError("with_smiles=True: this model knows no elements; leave it out")
        self.properties = PropertyRequest(flow, request.properties)
        self.guidance = requested_guidance(flow, request.guidance, self.properties)
        # In a batch, particles take as much room as molecules, and so do the twins without conditions of guidance.
        copies = (self.fragment.particles if self.fragment else 1) * (2 if self.guided else 1)
        self.batch_size = max(1, request.batch_size // copies)
        self.graph = requested_graph(flow, request.graph or request.smiles, n_atoms, request.formula)
        self.drafts = Drafts(
            flow, request.seed, n_atoms, request.formula, even, self.properties, self.graph, self.fragment
        )

    @property
    def guided(self) -> bool:
        """Whether molecules are drawn by another velocity than that of the conditional flow."""
        return self.guidance != 1.0

    def stream(self, indices: Sequence[int], progress: Progress, soon: bool = False) -> Iterator[Atoms]:
        """Yields the molecules ``indices`` in order; with ``soon`` the first comes alone, the next in small windows."""
        self.integrations = self.failures = self.kept = self.attempts = 0
        largest = self.batch_size * WINDOW_BATCHES
        done, window = 0, 1 if soon else largest
        with Bar(len(indices), progress, "molecule") as bar:
            while done < len(indices):
                for atoms in self._window(indices[done : done + window], bar):
                    yield self._counted(atoms, bar)
                done += window
                window = min(2 * max(window, self.batch_size), largest)
        if self.failures:
            warnings.warn(
                f"{self.failures} of {self.integrations} integrations failed and were drawn again", stacklevel=2
            )

    def _window(self, indices: Sequence[int], bar: Bar) -> Iterator[Atoms]:
        """Yields the molecules of a window in order, each as soon as it and those before it are finished."""
        done: dict[int, Atoms] = {}
        waiting = [self.draft(index, attempt=0) for index in indices]
        coming = iter(indices)
        following = next(coming, None)
        while waiting:
            again = []
            for batch in self.same_size(waiting):
                self.integrations += len(batch)
                before = len(again)
                for draft, atoms in zip(batch, self._integrate(batch), strict=True):
                    if atoms is None:
                        self.failures += 1
                        again.append(self.draft(draft.index, draft.attempt + 1, draft.failures + 1))
                    elif unmet := self.require.unmet([atoms])[0]:
                        self._check_rejections(draft, unmet)
                        again.append(self.draft(draft.index, draft.attempt + 1, draft.failures))
                    else:
                        done[draft.index] = atoms
                bar.update(len(batch) - len(again) + before)
                while following in done:
                    yield done.pop(following)
                    following = next(coming, None)
            waiting = again

    def _counted(self, atoms: Atoms, bar: Bar) -> Atoms:
        """Counts a molecule and notes the acceptance so far; called in order, so that batches do not change it."""
        self.kept += 1
        self.attempts += atoms.info["enf_attempts"]
        if self.require.names:
            atoms.info["enf_acceptance"] = self.kept / self.attempts
            bar.set_postfix_str(f"{self.kept / self.attempts:.0%} accepted", refresh=False)
        return atoms

    def _check_rejections(self, draft: Draft, unmet: str) -> None:
        """Raises ``GenerationError`` if a rejected draft was the last that is allowed."""
        if draft.attempt + 1 - draft.failures < self.max_attempts:
            return
        what = self.require.reason(unmet) if len(self.require.names) == 1 else f"did not pass {self.require}"
        raise GenerationError(
            f"molecule {draft.index} (seed {self.seed}) {what} {self.max_attempts} times; leave "
            f"{unmet} out, choose another n_atoms, or raise max_attempts"
        )

    def draft(self, index: int, attempt: int, failures: int = 0) -> Draft:
        """Returns the draft of an index, see :meth:`Drafts.draw`.

        Raises:
            GenerationError: If it failed too often.
        """
        if failures == MAX_ATTEMPTS:
            raise GenerationError(
                f"molecule {index} (seed {self.seed}) failed {MAX_ATTEMPTS} times with {self.solver.method}; "
                "use more steps, or train the model further"
            )
        return self.drafts.draw(index, attempt, failures)

    def same_size(self, drafts: list[Draft]) -> list[list[Draft]]:
        """Returns batches of one size each, in the order of their first drafts."""
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
        """Returns a molecule for each draft, None where the integration failed; halves what memory cannot hold."""
        try:
            batch = self.sample(drafts)
        except SolverError:
            if len(drafts) == 1:
                return [None]
            parts = [[draft] for draft in drafts]  # one of them failed: find out which
        except Exception as error:
            if len(drafts) == 1 or not out_of_memory(error):
                raise
            parts = self._halved(drafts)
        else:
            return self._finished(batch, drafts)
        return [atoms for part in parts for atoms in self._integrate(part)]

    def _halved(self, drafts: list[Draft]) -> list[list[Draft]]:
        """Returns the halves of a batch that does not fit into memory; later batches are no larger."""
        half = (len(drafts) + 1) // 2
        if half < self.batch_size:
            warnings.warn(
                f"memory is not enough for {len(drafts)} molecules at a time; continues with {half}", stacklevel=2
            )
        self.batch_size = min(self.batch_size, half)
        return [drafts[:half], drafts[half:]]

    def _finished(self, batch: Batch, drafts: list[Draft]) -> list[Atoms | None]:
        """Returns the molecules of a batch, None where one is not finite or has coinciding atoms."""
        both = torch.cat([batch.positions, batch.charges], dim=2)
        finite = torch.isfinite(both).all(dim=2).all(dim=1).tolist()
        safe = batch._replace(positions=torch.nan_to_num(batch.positions))  # for to_atoms; failures are discarded
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
        latents = self.latents(drafts)
        return self.flow.sample(*latents, self.solver, noise, self.velocity(drafts, *latents))

    def _completed(self, drafts: list[Draft], fragment: Fragment) -> Batch:
        """Takes drafts of one size to data around the fragment; each molecule is one of several particles."""
        several = [trial for draft in drafts for trial in draft.particles(fragment.particles)]
        z_x, z_h, mask, context = self.latents(several)
        own = fragment.bound(self.flow, z_x)
        names = [(draft.index, draft.attempt, PARTICLE_KEY) for draft in drafts]
        generators = [np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=name)) for name in names]
        count = fragment.particles
        particles = Particles(own.misfit, count, generators, LAST_LOOK) if count > 1 else None
        with torch.no_grad():
            velocity = own.looking(self.velocity(several, z_x, z_h, mask, context))
            start = own.started(z_x, z_h)
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

    def velocity(
        self, drafts: list[Draft], z_x: Tensor, z_h: Tensor, mask: Tensor, context: Tensor | Context | None
    ) -> Velocity:
        """Returns the velocity that moves drafts of these latents: that of the flow, guided if so requested."""
        if not self.guided:
            return replayed(self.flow.velocity(mask, context), z_x, z_h)
        free = self._context([draft._replace(conditions=None) for draft in drafts], z_x, mask)
        return replayed(guided_velocity(self.flow, mask, context, free, self.guidance), z_x, z_h)

    def noise(self, drafts: list[Draft]) -> Noise:
        """Returns a function that draws fresh latent molecules for these drafts, which all have one size."""
        return self.source.renewed([draft.drawing for draft in drafts], drafts[0].n_atoms)

    def _context(self, drafts: list[Draft], like: Tensor, mask: Tensor) -> Tensor | Context | None:
        """Returns the context of drafts of one size; ``like`` has the shape of their positions."""
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
        if self.guided:
            atoms.info[GUIDANCE_KEY] = self.guidance
        atoms.info.update(self.properties.info(draft.conditions) | graph_info(self.graph))
        return atoms
