"""Training objectives: flow matching (simulation-free) and maximum likelihood; ``(model, batch) → loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import Solver
from ase_enf.flow.likelihood import log_likelihood
from ase_enf.flow.model import ENF
from ase_enf.geometry import center, subspace_dim
from ase_enf.values import TIMES, check_choice

# Probabilities that a molecule keeps none of its conditions, at most one, and each of them otherwise.
KEEP_NONE, KEEP_ONE, KEEP_EACH = 0.1, 0.5, 0.7


class Loss(NamedTuple):
    """What an objective returns."""

    loss: Tensor  # (), what is minimised
    value: Tensor  # (), what is logged: nats a molecule for nll, the mean squared error for flow matching


class Objective(Protocol):
    """A function of model and batch that returns a loss; its randomness is an argument."""

    def __call__(self, model: ENF, batch: Batch, generator: torch.Generator | None = None) -> Loss:
        """Returns the loss of one batch; ``generator`` lives on the CPU."""


def _normal(like: Tensor, *shape: int, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise from ``generator`` (of the CPU, so that all devices see the same), or from that of the device."""
    device = like.device if generator is None else generator.device
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device=device).to(like)


def _uniform(like: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1), drawn like :func:`_normal`."""
    device = like.device if generator is None else generator.device
    return torch.rand(size, generator=generator, dtype=torch.float32, device=device)


def drop_conditions(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """Returns a batch in which some conditions of each molecule are unknown, so that a flow learns to do without them.

    A molecule keeps none with probability 0.1, exactly one with 0.4; otherwise each is kept with probability 0.7.

    Args:
        batch: Molecules; a batch without conditions is returned unchanged, and nothing is drawn.
        generator: The source of randomness.
    """
    if batch.conditions is None:
        return batch
    size, count = batch.conditions.shape
    device = batch.conditions.device if generator is None else generator.device
    draws = torch.rand(size, count + 2, generator=generator, device=device).to(batch.conditions.device)
    kind, place, each = draws[:, :1], (draws[:, 1:2] * count).long(), draws[:, 2:]
    alone = torch.arange(count, device=place.device) == place
    keep = torch.where(kind < KEEP_ONE, alone, each < KEEP_EACH) & (kind >= KEEP_NONE)
    return batch._replace(conditions=torch.where(keep, batch.conditions, torch.nan))


@dataclass(frozen=True)
class FlowMatching:
    """Simulation-free training of the same flow (Lipman et al. 2023; Liu et al. 2023).

    x_t = (1 − t) x + t z,  loss = E ‖φ(x_t, t) − (z − x)‖² / D

    for positions and lifted features together; z is drawn from the base distribution, and D = (M − 1) n + M F.

    Args:
        times: How t is drawn from a uniform u: "power" for t = u^p, which is dense near the data only, or "beta" for
            t = 1 − u^(1/p), the distribution Beta(1, p), whose density falls like (1 − t)^(p − 1). The loss is not
            reweighted.
        time_power: p; values above 1 draw more times near the data.
        feature_weight: Weight of the features' squared error.

    Raises:
        ValueError: For an unknown distribution of times.
    """

    times: str = "power"
    time_power: float = 1.3
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("times", self.times, TIMES)

    def draw_times(self, uniform: Tensor) -> Tensor:
        """Transforms uniform random numbers into times.

        Example:
            >>> FlowMatching("beta", 2.0).draw_times(torch.tensor([0.0, 0.25, 1.0]))
            tensor([1.0000, 0.5000, 0.0000])
        """
        return uniform**self.time_power if self.times == "power" else 1.0 - uniform ** (1.0 / self.time_power)

    def coupled(self, x: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """Returns the noise that is paired with the data: as drawn, unless a subclass couples them in another way.

        Args:
            x: Data, centred, shape (B, M, n).
            z: Noise, centred, shape (B, M, n).
            mask: Shape (B, M).
        """
        return z

    def __call__(self, model: ENF, batch: Batch, generator: torch.Generator | None = None) -> Loss:
        """Returns the mean squared error of the velocity."""
        size, width, _ = batch.positions.shape
        features = model.config.flow_features
        like = batch.positions
        batch = drop_conditions(batch, generator)
        with torch.no_grad():
            noise = _normal(like, size, width, features, generator=generator)
            data = model.encode(batch, noise)
            z_x = center(_normal(like, *data.x.shape, generator=generator), data.mask)
            z_x = self.coupled(data.x, z_x, data.mask)
            z_h = _normal(like, *data.h.shape, generator=generator) * data.mask.unsqueeze(-1)
            t = self.draw_times(_uniform(like, size, generator)).to(like)
            along = t[:, None, None]
            x_t = torch.lerp(data.x, z_x, along)
            h_t = torch.lerp(data.h, z_h, along)
        dx, dh = model.dynamics(t, x_t, h_t, data.mask, data.context)
        squared = (dx - (z_x - data.x)).square().sum(dim=(1, 2))
        squared = squared + self.feature_weight * (dh - (z_h - data.h)).square().sum(dim=(1, 2))
        dimensions = subspace_dim(data.mask, model.config.dimension) + features * data.mask.sum(dim=-1)
        loss = (squared / dimensions.to(squared.dtype)).mean()
        return Loss(loss, loss.detach())


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Maximum likelihood through the ODE, as in the paper, with the regulariser of Finlay et al. (2020).

    loss = E[−log p] + λ E[∫ ‖f‖² dt + ∫ ‖vᵀ J‖² dt],  with one Hutchinson probe v for each solve.

    Args:
        solver: The solver; the paper uses dopri5 with a tolerance of 1e-4.
        regularisation: λ.
        adjoint: Whether to use the adjoint method, as in the paper, whose memory is constant, instead of
            back-propagation through the solver.
        probe: "rademacher" or "gaussian".
    """

    solver: Solver = Solver("dopri5", rtol=1e-4, atol=1e-4)
    regularisation: float = 1e-3
    adjoint: bool = True
    probe: str = "rademacher"

    def __call__(self, model: ENF, batch: Batch, generator: torch.Generator | None = None) -> Loss:
        """Returns the regularised loss; ``value`` is the NLL in nats."""
        size, width, _ = batch.positions.shape
        batch = drop_conditions(batch, generator)
        noise = _normal(batch.positions, size, width, model.config.flow_features, generator=generator)
        data = model.encode(batch, noise)
        v_x, v_h = divergence.draw_probes(data.x, data.h, 1, generator, self.probe)
        flow = model.flow(data.mask, data.context, self.solver)
        parameters = list(model.dynamics.parameters())
        z = flow.forward_regularised(data.x, data.h, (v_x[0], v_h[0]), parameters, self.adjoint)
        nll = -log_likelihood(data, z.x, z.h, z.ladj).log_prob.mean()
        return Loss(nll + self.regularisation * (z.kinetic + z.jacobian).mean(), nll.detach())
