"""Generation: latent noise through the inverse flow to ``ase.Atoms``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from ase import Atoms

from ase_enf.atoms.batch import check_whole
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF, check_flow
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.sampling.sampler import MAX_REJECTIONS, Sampler
from ase_enf.sampling.samplers import resolve_sampler


def generate(
    flow: ENF,
    n: int,
    seed: int = 0,
    n_atoms: int | None = None,
    formula: str | None = None,
    solver: str | Solver | StochasticSampler | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    churn: float | None = None,
    closed_shell: bool = False,
    properties: Mapping[str, Any] | None = None,
    smiles: str | None = None,
    require: str | Iterable[str] = (),
    max_attempts: int = MAX_REJECTIONS,
    with_smiles: bool = False,
    fragment: Atoms | None = None,
    strength: float | None = None,
) -> list[Atoms]:
    """Draws n molecules, ``(x, h) = g_θ(z)`` with z from the base distribution (eq. 1, 11).

    By default, molecules of a flow trained by flow matching are drawn by a stochastic sampler: noise is replaced by
    fresh noise on the way (``churn`` says how much), so that errors of earlier steps fade and many more molecules are
    stable. They are not distributed as ``score`` says: their distribution is not known in closed form, and a likelihood
    of such a molecule is one of the flow, not of the sampler. ``churn=0`` draws from the density that ``score`` gives,
    to the error of the solver.

    Molecule i depends on ``(seed, i)`` alone: not on n, the batch size or its batch mates (to rounding, with a
    fixed-step solver). CPU and GPU draw other noise, see ``sampling.noise``. An integration that fails is drawn again,
    reported by a warning, and noted in ``info["enf_attempts"]``; nothing is zeroed or dropped.

    ``require`` keeps only molecules that pass, as ``require=("closed_shell", "stable")``: one that does not is drawn
    again, of the same size (and composition, where that is given). That is rejection sampling of
    ``p(x, h | M, passes)``: the size stays as p_M has it, and the likelihood of a molecule is larger by
    −log P(passes | M) than the one that ``score`` gives. ``closed_shell`` looks at **electron parity**: an even number
    of electrons is what a closed shell needs, and all that is looked at. ``connected``, ``stable`` and ``valid`` are
    the metrics of these names.

    Args:
        flow: A flow, as of ``ase_enf.load``.
        n: How many.
        seed: Non-negative.
        n_atoms: Fixed size M; drawn from p_M when None.
        formula: Composition such as "C7H10O2". ``features="given"`` takes it as it is, and draws from those of the
            training set when None; "joint" draws until a molecule has it, if the training set makes that likely.
        solver: How to draw: a ``Solver`` or the name of a method for the flow itself, or a ``StochasticSampler``; that
            of ``ENF.sampling_solver`` when None.
        steps: Number of steps, when ``solver`` is a name or None.
        batch_size: Molecules integrated together.
        device: Where to compute; where the flow is when None.
        progress: Show a bar; by default on a terminal only.
        churn: How much noise to renew on the way, see ``StochasticSampler``; 0 for the flow itself.
        closed_shell: Adds "closed_shell" to ``require``.
        properties: Of a flow with conditions, by name the value that is wanted, ``{"gap": 5.2}``, or a range,
            ``{"gap": "4:6"}`` or ``{"gap": (4, 6)}``, within which values are drawn as the training set has them. The
            number of atoms then is drawn from p(M | properties).
        smiles: Molecular graph whose conformers are drawn, of a flow of graphs; hydrogens are added.
        require: What a molecule must pass to be kept: "closed_shell", "connected", "stable", "valid"; names, or a text
            of them with commas.
        max_attempts: How often one molecule may be rejected before that is an error.
        with_smiles: Write the SMILES of a molecule, if it is valid, to ``info["enf_smiles"]``.
        fragment: Structure whose atoms under ``FixAtoms``, or all, are kept where they are with their elements, while
            the rest is drawn around them; its order and its constraints are kept, and new atoms are appended. n_atoms
            and formula are those of the whole.
        strength: Vary the atoms of ``fragment`` that no constraint keeps, from so far back towards noise, in (0, 1].

    Returns:
        Molecules without cell, positions in Å, centred; provenance in ``info``: ``enf_model``, ``enf_seed``,
        ``enf_index``, ``enf_solver``, ``enf_attempts`` and, for "joint", ``enf_charge_mismatches`` (atoms whose drawn
        charge is not that of their type); ``enf_condition_gap`` and so on for what conditioned a molecule,
        ``enf_graph`` and ``enf_bonds`` for its graph; with ``require``, ``enf_require`` and ``enf_acceptance``: the
        molecules of this request up to this one, by the attempts that they took; ``enf_fragment`` and
        ``enf_strength``. Molecules around a fragment are in its frame, not centred.

    Raises:
        ValueError: For n < 1, a negative seed, a size p_M never saw, a formula that does not fit the model, churn
            where the flow was not trained by flow matching, an unknown requirement, any of a flow that knows no
            elements, closed shells of a formula that has none, a property that is unknown or far outside training, or
            a SMILES that is not that of one neutral closed-shell molecule the flow can draw; for fragments, see
            ``Fragment``.
        GenerationError: If a molecule fails ten times, or is rejected ``max_attempts`` times.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), sizes={3: 1}, hidden=8, layers=1))
        >>> generate(flow, 1, formula="H2O")[0].get_chemical_formula()
        'H2O'
    """
    sampler = _sampler(
        flow, n, seed, 0, closed_shell, require, n_atoms, formula, solver, steps, churn,
        batch_size=batch_size, device=device, max_attempts=max_attempts, with_smiles=with_smiles,
        properties=properties, smiles=smiles, fragment=fragment, strength=strength,
    )  # fmt: skip
    return list(sampler.stream(range(n), sys.stderr.isatty() if progress is None else progress))


def igenerate(
    flow: ENF,
    n: int,
    seed: int = 0,
    n_atoms: int | None = None,
    formula: str | None = None,
    solver: str | Solver | StochasticSampler | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    start: int = 0,
    churn: float | None = None,
    closed_shell: bool = False,
    properties: Mapping[str, Any] | None = None,
    smiles: str | None = None,
    require: str | Iterable[str] = (),
    max_attempts: int = MAX_REJECTIONS,
    with_smiles: bool = False,
    fragment: Atoms | None = None,
    strength: float | None = None,
) -> Iterator[Atoms]:
    """Draws the molecules of :func:`generate` as an iterator that keeps none of them, in order.

    Each is handed out as soon as it and those before it are finished, so that any number of them needs no more memory
    than a few batches. The first is integrated alone, so that it comes soon.

    Args:
        flow: See :func:`generate`, as all others but one.
        n: How many.
        seed: Non-negative.
        n_atoms: Fixed size.
        formula: Composition, for "given".
        solver: A ``Solver`` or the name of a method.
        steps: Number of fixed steps.
        batch_size: Molecules integrated together.
        device: Where to compute.
        progress: Show a bar.
        start: Index of the first molecule: several processes can share one sequence.
        churn: How much noise is added again before a step.
        closed_shell: Adds "closed_shell" to ``require``.
        properties: What is wanted of the conditions.
        smiles: Molecular graph.
        require: What a molecule must pass.
        max_attempts: How often one may be rejected.
        with_smiles: Write ``enf_smiles``.
        fragment: Structure that is completed.
        strength: How far its free atoms are varied.

    Returns:
        An iterator; arguments are checked before it is returned.
    """
    sampler = _sampler(
        flow, n, seed, start, closed_shell, require, n_atoms, formula, solver, steps, churn,
        batch_size=batch_size, device=device, max_attempts=max_attempts, with_smiles=with_smiles,
        properties=properties, smiles=smiles, fragment=fragment, strength=strength,
    )  # fmt: skip
    return sampler.stream(range(start, start + n), sys.stderr.isatty() if progress is None else progress, soon=True)


def _sampler(
    flow: ENF,
    n: int,
    seed: int,
    start: int,
    closed_shell: bool,
    require: str | Iterable[str],
    n_atoms: int | None,
    formula: str | None,
    solver: str | Solver | StochasticSampler | None,
    steps: int | None,
    churn: float | None,
    batch_size: int,
    device: str | torch.device | None,
    **more: Any,
) -> Sampler:
    """Returns a request, checked."""
    check_flow(flow)
    check_counts(n, seed, batch_size, start)
    chosen = resolve_sampler(flow, solver, steps, churn)
    asked = [require] if isinstance(require, str) else list(require)
    if closed_shell:
        asked.append("closed_shell")
    return Sampler(flow, seed, n_atoms, formula, chosen, batch_size, device, ",".join(asked), **more)


def check_counts(n: int, seed: int, batch_size: int, start: int = 0) -> None:
    """Raises ``ValueError`` for a request of nothing, a negative seed, an empty batch or part of a number."""
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("batch_size", batch_size, 1), ("start", start, 0)):
        check_whole(name, value, least)
