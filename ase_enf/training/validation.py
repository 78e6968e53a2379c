"""Validation: the likelihood that the averaged weights give to the same molecules, with the same noise every time."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import SolverError
from ase_enf.flow.model import ENF
from ase_enf.training.folder import BEST_FILE
from ase_enf.training.run import Run

# Name of the rule by which validation likelihoods are integrated; values of different rules are not compared.
NLL_RULE = "nodes of scores"
# The likelihood of one molecule takes as long as flow matching on this many (measured on QM9, one thread).
VALIDATION_COST = 110
VALIDATION_SHARE = 0.2  # largest ratio of the time of validations to that of training


class Validation(NamedTuple):
    """The result of a validation; NaN while the flow is too stiff to be integrated."""

    loss: float  # of the objective
    nll: float  # nats a molecule


def validate(run: Run) -> Validation:
    """Scores the averaged weights, and keeps the better average if it is the best so far.

    All processes take part, each with its share of the batches, and get the same result.

    Returns:
        The result of the better average.
    """
    models = [average.module.eval() for average in run.averages]
    every = [score_validation_set(run, model) for model in models]
    run.validated = (run.step, *(found.nll for found in every))
    average = min(range(len(every)), key=lambda k: math.inf if math.isnan(every[k].nll) else every[k].nll)
    found, model = every[average], models[average]
    if math.isnan(found.loss):
        return found
    if run.best_weights is None or found.nll < run.best or not math.isfinite(run.best):
        run.best = found.nll
        run.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        run.best_provenance = model.provenance = run.provenance(average, found.nll)
        if run.out and run.ranks.main:
            model.save(run.out / BEST_FILE)
    return found


def score_validation_set(run: Run, model: ENF) -> Validation:
    """Returns loss and NLL of one set of weights on the molecules that validation scores, in order of size.

    The noise of a batch does not depend on its process, so that the numbers are those of a single process.
    """
    config, valid, ranks = run.config, run.valid, run.ranks
    index = torch.from_numpy(np.random.default_rng(config.seed).permutation(len(valid))[: config.validation_size])
    index = index[valid.sizes[index].argsort(stable=True)]
    batches = index.split(config.batch_size)
    sums = torch.zeros(len(batches), 2, dtype=torch.float64)  # of the losses and NLLs of each batch
    for k in range(ranks.rank, len(batches), ranks.world):
        batch = valid.batch(batches[k]).to(run.device)
        generator = run.generator(k * config.batch_size, stream=1)
        try:
            with torch.no_grad():
                loss = float(run.objective(model, batch, generator).value) * len(batch.mask)
            nll = float(validation_nll(model, batch, generator).double().sum())
            sums[k] = torch.tensor([loss, nll], dtype=torch.float64)
        except SolverError:  # too stiff at present; further training may change that
            sums[k] = math.nan
    loss, nll = (ranks.total(sums, run.device).sum(dim=0) / len(index)).tolist()
    return Validation(loss, nll)


def validation_nll(model: ENF, batch: Batch, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood with one draw of q and one probe, nats, shape (B,); the same noise every time.

    Quadrature uses the nodes of ``score``, without refinement: cheaper rules err by more than sets of weights differ.
    """
    shape = (*batch.mask.shape, model.config.flow_features)
    noise = torch.randn(shape, generator=generator).to(batch.positions)
    probes = divergence.draw_probes(batch.positions, noise, 1, generator)
    trace = functools.partial(divergence.hutchinson, probes=probes)
    result = model.log_prob(batch, noise, trace, model.likelihood_solver, estimate_path_error=False)
    # A size that training has not seen counts as seen once: with −inf, all sets of weights would be equally bad.
    floor = -math.log(1 + sum(model.config.sizes.values()))
    return -(result.log_density + result.log_size.clamp(min=floor)).cpu()


def steps_between_validations(run: Run) -> int:
    """Returns the number of steps between two validations."""
    config = run.config
    if config.validate_every or config.objective != "flow_matching":
        return config.validate_every or run.steps_per_epoch
    # Molecules of flow matching that take the same time.
    worth = VALIDATION_COST * min(config.validation_size, len(run.valid))
    return max(run.steps_per_epoch, math.ceil(worth / config.batch_size / VALIDATION_SHARE))


def validation_set(run: Run) -> list[float]:
    """Returns numbers that identify a validation set: its molecules, those that are scored, and Σ‖x‖²."""
    squares = float(np.square(run.valid.positions.double().numpy()).sum())
    return [len(run.valid), min(run.config.validation_size, len(run.valid)), squares]
