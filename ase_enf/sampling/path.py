"""The path of molecules from noise to data, frame by frame (figure 2 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_enf.atoms.batch import Batch, to_atoms
from ase_enf.bars import Progress
from ase_enf.flow.continuous import Solver
from ase_enf.flow.divergence import Velocity
from ase_enf.flow.model import ENF, check_flow
from ase_enf.flow.stochastic import StochasticSampler, sample_stochastic
from ase_enf.sampling.drafts import Draft
from ase_enf.sampling.request import Request
from ase_enf.sampling.sampler import Sampler
from ase_enf.values import check_counts, check_whole

State = tuple[float, Tensor, Tensor]
"""Time t, positions (B, M, n) and features (B, M, F) on the way."""


class MoleculePath(NamedTuple):
    """A molecule and its path.

    Attributes:
        molecule: As ``generate`` returns it.
        frames: From noise to data, ``info["enf_time"]`` from 1 to 0; the last one is the molecule.
    """

    molecule: Atoms
    frames: list[Atoms]


def paths(
    flow: ENF,
    n: int,
    frames: int = 60,
    seed: int = 0,
    start: int = 0,
    n_atoms: int | None = None,
    formula: str | None = None,
    solver: str | Solver | StochasticSampler | None = None,
    steps: int | None = None,
    churn: float | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    require: str | Iterable[str] = (),
    closed_shell: bool = False,
    progress: Progress = False,
    **request: Any,
) -> Iterator[MoleculePath]:
    """Draws the molecules of ``generate`` together with their paths from noise to data.

    A path consists of the states x_t of the sampler. ``churn=0`` follows the flow itself, the ODE of eq. 2: a smooth
    path, x(t) = z − ∫_t^1 φ dt. By default, a flow trained by flow matching uses the stochastic sampler, whose states
    x_t = (1 − t) x + t ε have ever new noise ε: a path that trembles until it arrives.

    Elements and charges of every frame are quantised like those of a finished molecule: argmax of the types, floor of
    the charges. Frames are not made to look better than they are, and one in the middle need not be a molecule.

    Args:
        flow: A flow, as ``ase_enf.load`` returns it.
        n: How many molecules.
        frames: Frames of a path, noise and molecule included, at least 2; fewer where the sampler takes fewer steps.
        seed: Seed of the random numbers, at least 0.
        start: Index of the first molecule.
        n_atoms: Fixed size; this and the arguments below are those of ``generate``.
        formula: Composition, for "given".
        solver: How to draw.
        steps: Number of steps.
        churn: How much noise is replaced on the way; 0 for the flow itself.
        batch_size: Molecules integrated together.
        device: Where to compute.
        require: What a molecule must pass to be kept.
        closed_shell: Adds "closed_shell" to ``require``.
        progress: Whether to show a progress bar, or a function that is told of progress.
        **request: ``properties``, ``guidance``, ``smiles``, ``max_attempts`` and ``with_smiles`` of ``generate``.

    Returns:
        An iterator over the molecules, in order; arguments are checked before it is returned.

    Raises:
        ValueError: For frames < 2, for a fragment, or as ``generate`` does.
        GenerationError: As ``generate`` does.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), sizes={3: 1}, hidden=8, layers=1))
        >>> (path,) = paths(flow, 1, frames=3, formula="H2O", steps=8)
        >>> [frame.info["enf_time"] for frame in path.frames][::2], len(path.frames)
        ([1.0, 0.0], 3)
    """
    check_flow(flow)
    check_counts(n, seed, batch_size, start)
    check_whole("frames", frames, 2)
    if request.get("fragment") is not None:
        raise ValueError("fragment: paths are those of whole molecules; leave out the fragment or the path")
    asked = Request(
        seed=seed, n_atoms=n_atoms, formula=formula, solver=solver, steps=steps, churn=churn, batch_size=batch_size,
        device=device, require=require, closed_shell=closed_shell, **request,
    )  # fmt: skip
    recorder = _Recorder(flow, asked, frames)
    return recorder.paths(range(start, start + n), progress)


class _Recorder(Sampler):
    """A sampler that records the paths of its molecules."""

    def __init__(self, flow: ENF, request: Request, frames: int) -> None:
        super().__init__(flow, request)
        self._frames = frames
        self._recorded: dict[int, dict[int, list[Atoms]]] = {}  # by index and attempt

    def paths(self, indices: Sequence[int], progress: Progress) -> Iterator[MoleculePath]:
        """Yields the paths of the molecules ``indices``, in order."""
        for atoms in self.stream(indices, progress, soon=True):
            attempts = self._recorded.pop(atoms.info["enf_index"])
            *frames, last = attempts[atoms.info["enf_attempts"] - 1]
            arrived = atoms.copy()
            arrived.info["enf_time"] = last.info["enf_time"]
            yield MoleculePath(atoms, [*frames, arrived])

    def sample(self, drafts: list[Draft]) -> Batch:
        """Takes drafts of one size to data, and records some of the states on the way."""
        z_x, z_h, mask, context = self.latents(drafts)
        with torch.no_grad():
            states = self._states(drafts, z_x, z_h, mask, self.velocity(drafts, z_x, z_h, mask, context))
            picked = np.unique(np.linspace(0, len(states) - 1, self._frames).round().astype(int))
            decoded = [self.flow.decode(*states[k][1:], mask, context) for k in picked]
        for draft in drafts:
            self._recorded.setdefault(draft.index, {})[draft.attempt] = []
        for k, batch in zip(picked, decoded, strict=True):
            for draft, atoms in zip(drafts, to_atoms(batch, self.flow.species), strict=True):
                atoms.info |= self._said(draft, states[k][0])
                self._recorded[draft.index][draft.attempt].append(atoms)
        return decoded[-1]

    def _said(self, draft: Draft, time: float) -> Mapping[str, Any]:
        return {"enf_model": self.flow.name, "enf_seed": self.seed, "enf_index": draft.index, "enf_time": time}

    def _states(self, drafts: list[Draft], z_x: Tensor, z_h: Tensor, mask: Tensor, velocity: Velocity) -> list[State]:
        """Returns the states from t = 1 to t = 0."""
        if isinstance(self.solver, Solver):
            times = _ode_times(self.solver, self._frames)
            states = self.flow.flow(mask, None, self.solver, velocity).trajectory(z_x, z_h, times)
            return [(time, *state) for time, state in zip(times.tolist(), states, strict=True)]
        states: list[State] = []

        def noted(t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            states.append((t.item(), x, h))  # each step evaluates the velocity once, at its state
            return velocity(t, x, h)

        arrived = sample_stochastic(noted, z_x, z_h, self.noise(drafts), self.solver)
        return [*states, (0.0, *arrived)]


def _ode_times(solver: Solver, frames: int) -> Tensor:
    """Returns times from 1 to 0: the solver's grid of fixed steps; for an adaptive solver, one dense near the data."""
    grid = torch.linspace(0, 1, frames, dtype=torch.float64) ** 2 if solver.adaptive else solver.grid()
    return grid.double().sort(descending=True).values
