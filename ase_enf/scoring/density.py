"""Molecules of a flow with their log-densities: one solution of the ODE gives both."""

from __future__ import annotations

import math

import torch

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.likelihood import log_likelihood, path_error
from ase_enf.flow.model import ENF
from ase_enf.sampling.drafts import Draft
from ase_enf.sampling.request import Request
from ase_enf.sampling.sampler import Sampler


class DensitySampler(Sampler):
    """The sampler of ``generate``, which also keeps the log-density of each molecule and its estimated error."""

    def __init__(self, flow: ENF, request: Request, intervals: int) -> None:
        super().__init__(flow, request)
        self.intervals = intervals
        self.densities: dict[tuple[int, int], tuple[float, float]] = {}  # (index, attempt) → nats, nats

    def sample(self, drafts: list[Draft]) -> Batch:
        """Takes drafts to data; a draft fails if its density is not finite."""
        z_x, z_h, mask, context = self.latents(drafts)
        with torch.no_grad():
            velocity = self.velocity(drafts, z_x, z_h, mask, context)
            flow = self.flow.flow(mask, context, self.solver, velocity)
            data = flow.inverse(z_x, z_h, divergence.exact, intervals=self.intervals)
            encoded = self.flow.encoded(data.x, data.h, mask, context)
            terms = log_likelihood(encoded, z_x.double(), z_h.double(), -data.ladj.double())
            by_path, _ = path_error(flow, data.x, data.h, terms.log_base, data.traces, divergence.exact)
            log_prob, error = terms.log_prob, data.error.double() + by_path
            batch = self.flow.decode(data.x, data.h, mask, context)
        for draft, *density in zip(drafts, log_prob.tolist(), error.tolist(), strict=True):
            self.densities[draft.index, draft.attempt] = tuple(density)
        known = torch.isfinite(log_prob)[:, None, None]
        return batch._replace(positions=torch.where(known, batch.positions, math.nan))
