"""Generation: latent noise through the inverse flow to ``ase.Atoms``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from ase import Atoms

from ase_enf.bars import Progress
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF, check_flow
from ase_enf.flow.stochastic import StochasticSampler
from ase_enf.sampling.request import MAX_REJECTIONS, Request
from ase_enf.sampling.sampler import Sampler
from ase_enf.values import check_counts


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
    progress: Progress = None,
    churn: float | None = None,
    closed_shell: bool = False,
    properties: Mapping[str, Any] | None = None,
    smiles: str | None = None,
    require: str | Iterable[str] = (),
    max_attempts: int = MAX_REJECTIONS,
    with_smiles: bool = False,
    fragment: Atoms | None = None,
    strength: float | None = None,
    guidance: float = 1.0,
) -> list[Atoms]:
    """Draws n molecules, ``(x, h) = g_θ(z)`` with z from the base distribution (eq. 1, 11).

    By default, a flow trained by flow matching is sampled stochastically: each step replaces some of the noise by fresh
    noise (``churn`` sets how much), so that the errors of earlier steps fade and many more molecules are stable. The
    molecules then do not follow the density that ``score`` gives: the distribution of the sampler has no closed form,
    and the likelihood of a molecule remains that of the flow. ``churn=0`` draws from the density of ``score``, up to
    the error of the solver.

    Molecule i depends on ``(seed, i)`` alone, not on n, the batch size or the rest of its batch (up to rounding, with a
    fixed-step solver). CPU and GPU draw different noise; see ``sampling.noise``. A molecule whose integration fails is
    drawn again, with a warning, and ``info["enf_attempts"]`` counts how often; nothing is zeroed or dropped.

    ``require=("closed_shell", "stable")`` keeps only molecules that pass these tests; one that fails is drawn again
    with the same size (and composition, where it is given). This is rejection sampling from ``p(x, h | M, passes)``:
    sizes still follow p_M, and the log-likelihood of a molecule is larger by −log P(passes | M) than the one that
    ``score`` gives. ``closed_shell`` tests **electron parity** alone: an even number of electrons, without which there
    is no closed shell. ``connected``, ``stable`` and ``valid`` are the metrics of the same names.

    Args:
        flow: A flow, as ``ase_enf.load`` returns it.
        n: Number of molecules.
        seed: Seed of the random numbers, at least 0.
        n_atoms: Fixed size M; drawn from p_M when None.
        formula: Composition such as "C7H10O2". With ``features="given"`` every molecule gets it, and None draws from
            the compositions of the training set; "joint" draws until a molecule has it, if the training set makes that
            likely enough.
        solver: How to draw: a ``Solver`` or the name of a method for the flow itself, or a ``StochasticSampler``; None
            for ``ENF.sampling_solver``.
        steps: Number of steps, when ``solver`` is a name or None.
        batch_size: Molecules integrated together.
        device: Where to compute; None for the device of the flow.
        progress: Whether to show a progress bar, by default on a terminal only; or a function that is told, after each
            batch, how many molecules are finished and of how many.
        churn: How much noise is replaced on the way, see ``StochasticSampler``; 0 draws from the flow itself.
        closed_shell: Adds "closed_shell" to ``require``.
        properties: For a flow with conditions: for each name the wanted value, ``{"gap": 5.2}``, or a range,
            ``{"gap": "4:6"}`` or ``{"gap": (4, 6)}``, within which values are drawn as frequently as in the training
            set. The number of atoms is then drawn from p(M | properties).
        smiles: For a flow of graphs: the molecular graph whose conformers are drawn; hydrogens are added.
        require: What a molecule must pass to be kept: "closed_shell", "connected", "stable", "valid"; names, or one
            string of names separated by commas.
        max_attempts: How often one molecule may be rejected before an error is raised.
        with_smiles: Whether to write the SMILES of each valid molecule to ``info["enf_smiles"]``.
        fragment: Structure to complete: its atoms under ``FixAtoms``, or all of them without a constraint, keep their
            places and elements while the rest is drawn around them. Order and constraints are kept, and new atoms are
            appended; n_atoms and formula are those of the whole molecule.
        strength: How far back towards noise, in (0, 1], the free atoms of ``fragment`` start, which varies them.
        guidance: Weight w of ``properties`` in v = v(x | ∅) + w (v(x | c) − v(x | ∅)): 1 is the conditional flow, 0 the
            flow without conditions; above 1, molecules show the properties more clearly and vary less. A weight other
            than 1 takes twice the time and draws from a density that is not known; ``score`` remains that of the flow.
            See ``guidance.GuidedVelocity``.

    Returns:
        Molecules without a cell, centred, positions in Å. Their provenance is in ``info``: ``enf_model``, ``enf_seed``,
        ``enf_index``, ``enf_solver`` and ``enf_attempts``; for "joint" ``enf_charge_mismatches``, the number of atoms
        whose drawn charge is not that of their type; ``enf_condition_gap`` and so on for its conditions;
        ``enf_guidance`` where it is not 1; ``enf_graph`` and ``enf_bonds`` for its graph; with ``require``,
        ``enf_require`` and ``enf_acceptance``, the number of molecules of this request so far divided by the attempts
        that they took; ``enf_fragment`` and ``enf_strength``. Molecules around a fragment are in its frame, not
        centred.

    Raises:
        ValueError: For n < 1, a negative seed, a size p_M never saw, a formula that does not fit the model, churn
            where the flow was not trained by flow matching, an unknown requirement, any requirement for a flow that
            knows no elements, a closed shell for a formula with an odd number of electrons, a property that is unknown
            or far outside training, guidance that is not finite or comes without properties, or a SMILES that does not
            describe one neutral closed-shell molecule that the flow can draw; for fragments, see ``Fragment``.
        GenerationError: If a molecule fails ten times, or is rejected ``max_attempts`` times.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), sizes={3: 1}, hidden=8, layers=1))
        >>> generate(flow, 1, formula="H2O")[0].get_chemical_formula()
        'H2O'
    """
    check_flow(flow)
    check_counts(n, seed, batch_size)
    request = Request(
        seed=seed, n_atoms=n_atoms, formula=formula, solver=solver, steps=steps, churn=churn, batch_size=batch_size,
        device=device, require=require, closed_shell=closed_shell, max_attempts=max_attempts, with_smiles=with_smiles,
        properties=properties, smiles=smiles, fragment=fragment, strength=strength, guidance=guidance,
    )  # fmt: skip
    sampler = Sampler(flow, request)
    return list(sampler.stream(range(n), progress))


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
    progress: Progress = None,
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
    guidance: float = 1.0,
) -> Iterator[Atoms]:
    """Draws the molecules of :func:`generate` one after another and keeps none of them.

    Each is yielded as soon as it and all before it are finished, so that any number of molecules needs the memory of a
    few batches only. The first is integrated alone and therefore comes soon.

    Args:
        flow: A flow; all arguments but ``start`` are those of :func:`generate`.
        n: Number of molecules.
        seed: Seed of the random numbers, at least 0.
        n_atoms: Fixed size.
        formula: Composition, for "given".
        solver: A ``Solver`` or the name of a method.
        steps: Number of fixed steps.
        batch_size: Molecules integrated together.
        device: Where to compute.
        progress: Whether to show a progress bar, or a function that is told of progress.
        start: Index of the first molecule, so that several processes can share one sequence.
        churn: How much noise is replaced on the way.
        closed_shell: Adds "closed_shell" to ``require``.
        properties: Wanted values of the conditions.
        smiles: Molecular graph.
        require: What a molecule must pass.
        max_attempts: How often one may be rejected.
        with_smiles: Whether to write ``enf_smiles``.
        fragment: Structure to complete.
        strength: How far its free atoms are varied.
        guidance: Weight of the properties.

    Returns:
        An iterator; arguments are checked before it is returned.
    """
    check_flow(flow)
    check_counts(n, seed, batch_size, start)
    request = Request(
        seed=seed, n_atoms=n_atoms, formula=formula, solver=solver, steps=steps, churn=churn, batch_size=batch_size,
        device=device, require=require, closed_shell=closed_shell, max_attempts=max_attempts, with_smiles=with_smiles,
        properties=properties, smiles=smiles, fragment=fragment, strength=strength, guidance=guidance,
    )  # fmt: skip
    sampler = Sampler(flow, request)
    return sampler.stream(range(start, start + n), progress, soon=True)
