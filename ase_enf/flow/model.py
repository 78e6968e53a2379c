"""The E(n) equivariant normalizing flow: likelihood and sampling (eq. 6)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ase_enf.atoms.batch import Batch
from ase_enf.flow import base, divergence
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import (
    GRAPH_FEATURES,
    Context,
    condition_features,
    graph_features,
    split_context,
)
from ase_enf.flow.continuous import (
    INTERVALS,
    ContinuousFlow,
    Solver,
    TraceMethod,
)
from ase_enf.flow.dequantize import build_q, lift, quantize
from ase_enf.flow.dynamics import BoundDynamics, Dynamics, build_network
from ase_enf.flow.likelihood import Encoded, LogProb, log_likelihood, path_error
from ase_enf.flow.parameterisation import Parameterisation
from ase_enf.flow.stochastic import Noise, StochasticSampler, sample_stochastic
from ase_enf.flow.weights import write_weights
from ase_enf.geometry import subspace_dim

# Likelihoods are integrated on a fixed grid, so that none depends on its batch mates; a step leads from node to node of
# the quadrature. A bare velocity trained by flow matching changes fast near the data, and its nodes lie in u, t = u²;
# all other flows take nodes in t. Along paths of qm9-small, u is better with 49 nodes and t with 65: two molecules do
# not decide it (benchmarks/accuracy/likelihood.py, quadrature).
LIKELIHOOD_SOLVER = Solver("rk4", steps=4)
MATCHED_LIKELIHOOD_SOLVER = Solver("rk4", steps=4, warp=2.0)
SAMPLING_SOLVER = Solver("midpoint", steps=32)
MATCHED_SAMPLING_SOLVER = Solver("midpoint", steps=64, warp=1.75)
# Renewed noise corrects many errors of a trained velocity (benchmarks/accuracy/samplers.py).
STOCHASTIC_SAMPLER = StochasticSampler()


class ENF(nn.Module):
    """E(n) equivariant normalizing flow (eq. 6).

    log p(x, h, M) ≥ log p_Z(z) + ladj − log q(h̃|h) + log p_M(M),   z = f(x, h̃)

    * ``features="none"``: exact log p(x | M).
    * ``features="given"``: exact log p(x | types).
    * ``features="joint"``: one draw of q; its expectation is a lower bound of log p(x, h, M).

    Args:
        config: What the flow is.
        provenance: How it was trained: data, steps, scores, versions (JSON values).

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.atoms.batch import to_batch
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> batch = to_batch([molecule("H2O")], flow.species)
        >>> flow.log_prob(batch).log_prob.shape
        torch.Size([1])
    """

    def __init__(self, config: ENFConfig, provenance: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.provenance = dict(provenance or {})
        self._features: dict[tuple[Any, ...], Tensor] = {}
        self.name = "unnamed"  # of the file it came from, see load
        self.size_prior = base.SizePrior(config.sizes)
        network = build_network(
            config.network,
            in_features=config.flow_features + config.context_features + 1,
            out_features=config.flow_features,
            dimension=config.dimension,
            hidden=config.hidden,
            layers=config.layers,
            attention=config.attention,
            radial=config.radial,
            pair_features=GRAPH_FEATURES if config.graph else 0,
        )
        self.dynamics = Dynamics(network, Parameterisation(config.parameterisation, config.feature_std))
        self.q = build_q(config.dequantizer, len(config.species)) if config.types_flow else None

    def __repr__(self) -> str:
        """Says in two lines what the flow is; ``print(flow.dynamics)`` lists its modules."""
        config, sizes = self.config, list(self.size_prior.counts)
        trained = f", {self.provenance['objective']}" if "objective" in self.provenance else ""
        weights = sum(parameter.numel() for parameter in self.parameters())
        known = ["the molecular graph"] if config.graph else []
        known += [f"{condition.name} in {condition.unit or 'its unit'}" for condition in config.conditions]
        conditioned = f", conditioned by {', '.join(known)}" if known else ""
        return (
            f"ENF {self.name!r}: features {config.features}, {' '.join(self.species) or 'any elements'}, {sizes[0]} to "
            f"{sizes[-1]} atoms{conditioned}{trained}\n"
            f"    {config.network}, {config.layers} layers x {config.hidden}, {weights:,} weights, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        )

    @property
    def species(self) -> tuple[str, ...]:
        """Elements the flow knows; empty for positions only."""
        return self.config.species

    @property
    def features(self) -> str:
        """ "joint", "given" or "none"."""
        return self.config.features

    @property
    def matched(self) -> bool:
        """Whether flow matching trained it, so that its path from data to noise is (1 − t) x + t z in distribution."""
        return self.config.path == "linear"

    @property
    def likelihood_solver(self) -> Solver:
        """How likelihoods are integrated: rk4 on the nodes of the quadrature.

        A bare velocity trained by flow matching changes fast near the data, so that its nodes are denser there; the
        other parameterisations divide that change out.

        Example:
            >>> str(ENF(ENFConfig(hidden=8, layers=1, path="linear")).likelihood_solver)
            'rk4, 4 steps, warp 2'
        """
        dense = self.matched and self.config.parameterisation == "velocity"
        return MATCHED_LIKELIHOOD_SOLVER if dense else LIKELIHOOD_SOLVER

    @property
    def ode_solver(self) -> Solver:
        """How samples of exactly the flow's own density are integrated.

        Example:
            >>> str(ENF(ENFConfig(hidden=8, layers=1, path="linear")).ode_solver)
            'midpoint, 64 steps, warp 1.75'
        """
        return MATCHED_SAMPLING_SOLVER if self.matched and self.config.knows_types else SAMPLING_SOLVER

    @property
    def sampling_solver(self) -> Solver | StochasticSampler:
        """How samples are drawn: with renewed noise where flow matching has trained a flow of molecules.

        Flows of positions alone are for exact densities (``reweight``), and those trained by likelihood have no known
        path; both take the flow itself.

        Example:
            >>> str(ENF(ENFConfig(features="none", hidden=8, layers=1)).sampling_solver)
            'midpoint, 32 steps, warp 1'
        """
        return STOCHASTIC_SAMPLER if self.matched and self.config.knows_types else self.ode_solver

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return next(self.parameters()).dtype

    def use_backend(self, backend: str = "auto") -> str:
        """Chooses what computes the pairs of an EGNN: torch, a compiled kernel on a CPU, or Triton kernels on a GPU.

        All give the same numbers to rounding. The compiled kernel is made by the system's C++ compiler at first use and
        has no second derivatives (for training by ``objective="nll"``); where gradients with respect to the input are
        asked for on a GPU, torch computes.

        Args:
            backend: "compiled", "triton", "torch", or "auto": the first of them that is possible.

        Returns:
            "compiled", "triton" or "torch".

        Raises:
            ValueError: For an unknown name, or a backend that cannot be used, with the reason.

        Example:
            >>> ENF(ENFConfig(hidden=16, layers=1)).use_backend("torch")
            'torch'
        """
        return self.dynamics.use_backend(backend)

    def use_kernel(self, *_: object, **__: object) -> NoReturn:
        """Raises ``TypeError``: the method is called :meth:`use_backend`."""
        raise TypeError(
            'use_kernel is now called use_backend; write use_backend("auto"), or "compiled" for "fused", "torch" for '
            '"plain"'
        )

    def velocity(self, mask: Tensor, context: Tensor | Context | None = None) -> BoundDynamics:
        """Returns ``(t, x, h) → (dx, dh)`` with mask and context bound."""
        return BoundDynamics(self.dynamics, mask, context)

    def flow(
        self, mask: Tensor, context: Tensor | Context | None = None, solver: Solver | None = None
    ) -> ContinuousFlow:
        """Returns the continuous flow of one batch, integrated by :attr:`likelihood_solver` unless another is given."""
        return ContinuousFlow(self.velocity(mask, context), mask, solver or self.likelihood_solver)

    def encode(self, batch: Batch, noise: Tensor | None = None) -> Encoded:
        """Scales positions and lifts features.

        Positions are divided by ``position_scale`` s, whose volume is counted on the subspace: −(M − 1) n log s.

        Args:
            batch: Molecules, on the device of the model.
            noise: ε of q, shape (B, M, F); zeros give the mean of q; drawn from torch's generator when None.
        """
        config = self.config
        real = batch.mask.unsqueeze(-1)
        x = batch.positions / config.position_scale
        context = self.context(batch)
        if self.q is None:
            return self.encoded(x, x[..., :0], batch.mask, context)
        if noise is None:
            noise = torch.randn(*x.shape[:2], config.flow_features, dtype=x.dtype, device=x.device)
        lifted = lift(self.q, batch.positions, batch.types, batch.charges, batch.mask, noise)
        h = (lifted.features - self._feature(config.feature_shift)) * self._feature(config.feature_scale) * real
        return self.encoded(x, h, batch.mask, context, lifted.log_q)

    def encoded(
        self, x: Tensor, h: Tensor, mask: Tensor, context: Tensor | Context | None = None, log_q: Tensor | None = None
    ) -> Encoded:
        """Adds the terms of the likelihood to molecules that are in the coordinates of the flow; see :meth:`encode`.

        Args:
            x: Scaled and centred positions, shape (B, M, n).
            h: Lifted and scaled features, shape (B, M, F).
            mask: True for real atoms, shape (B, M).
            context: What conditions the dynamics; see :meth:`context`.
            log_q: log q(h̃|h), nats, shape (B,); zero when None.
        """
        config, n_atoms = self.config, mask.sum(dim=-1)
        log_volume = -subspace_dim(mask, config.dimension).to(x.dtype) * math.log(config.position_scale)
        if config.flow_features:
            log_volume = log_volume + n_atoms.to(x.dtype) * sum(math.log(s) for s in config.feature_scale)
        zero = torch.zeros_like(log_volume)
        log_size = self.size_prior.log_prob(n_atoms).to(log_volume) if "log_size" in config.mode.terms else zero
        return Encoded(x, h, mask, context, log_volume, zero if log_q is None else log_q, log_size)

    def context(self, batch: Batch) -> Tensor | Context | None:
        """Returns what conditions the dynamics of a batch: given types, conditions, and features of the graph's pairs.

        Raises:
            ValueError: If the flow needs a graph, and the batch has none.
        """
        config = self.config
        nodes = config.mode.conditioning(batch)
        if config.conditions:
            mean, std = (self._feature([getattr(c, name) for c in config.conditions]) for name in ("mean", "std"))
            known = condition_features(batch.conditions, batch.positions, mean, std)
            nodes.append(known * batch.mask.unsqueeze(-1))
        together = torch.cat(nodes, dim=-1) if len(nodes) > 1 else nodes[0] if nodes else None
        if not config.graph:
            return together
        if batch.bonds is None:
            raise ValueError(f"the flow {self.name!r} is one of molecular graphs; give the batch its bonds")
        return Context(together, graph_features(batch.bonds, batch.positions.dtype))

    def decode(self, x: Tensor, h: Tensor, mask: Tensor, context: Tensor | Context | None = None) -> Batch:
        """Returns molecules in Å with discrete features; the inverse of :meth:`encode`."""
        positions = x * self.config.position_scale
        if self.q is not None:
            features = h / self._feature(self.config.feature_scale) + self._feature(self.config.feature_shift)
            types, charges = quantize(features)
            return Batch(positions, types * mask.unsqueeze(-1), charges * mask.unsqueeze(-1), mask)
        types = x[..., :0]
        if self.config.types_given:
            types = split_context(context).nodes[..., : len(self.species)]
        return Batch(positions, types, torch.zeros_like(x[..., :1]), mask)

    def log_prob(
        self,
        batch: Batch,
        noise: Tensor | None = None,
        trace: TraceMethod = divergence.exact,
        solver: Solver | None = None,
        intervals: int = INTERVALS,
        estimate_path_error: bool = True,
    ) -> LogProb:
        """Log-likelihood of each molecule and its terms (eq. 6, 11, 12).

        ``error`` joins the error of the quadrature and that of the path. For the latter, the path is solved again by a
        coarser solver (half the steps, or looser tolerances; and with tighter ones, too, if the solver is adaptive).

        Args:
            batch: Molecules on the model's device and in its dtype.
            noise: ε of q for "joint", shape (B, M, F); see :meth:`encode`.
            trace: ``divergence.exact`` or a closure over probes around ``divergence.hutchinson``.
            solver: How the state is integrated; :attr:`likelihood_solver`, as in ``score``, when None.
            intervals: Of the quadrature of the trace; see ``ContinuousFlow.transport``.
            estimate_path_error: Whether to solve the path again for its part of ``error``.

        Raises:
            SolverError: If the solver fails.
        """
        with torch.no_grad():
            encoded = self.encode(batch, noise)
            flow = self.flow(encoded.mask, encoded.context, solver)
            z = flow.forward(encoded.x, encoded.h, trace, intervals=intervals)
            terms = log_likelihood(encoded, z.x, z.h, z.ladj)
            error, nfe = z.error, z.nfe
            if estimate_path_error:
                by_path, more = path_error(flow, encoded.x, encoded.h, terms.log_base, z.traces, trace)
                error, nfe = error + by_path, nfe + more
            return LogProb(terms.log_prob, terms.log_density, *terms, error, z.samples + encoded.log_volume, nfe)

    def sample(
        self,
        z_x: Tensor,
        z_h: Tensor,
        mask: Tensor,
        context: Tensor | Context | None = None,
        solver: Solver | StochasticSampler | None = None,
        noise: Noise | None = None,
    ) -> Batch:
        """Takes latent molecules to data, ``(x, h) = g(z_x, z_h)`` followed by argmax and floor.

        A ``StochasticSampler`` renews noise on the way; see ``stochastic.sample_stochastic``. By default that is what
        ``generate`` does, if ``noise`` is given; without it, molecules are drawn from the density of :meth:`log_prob`,
        by the ODE.

        Args:
            z_x: Centred Gaussian positions, shape (B, M, n); see ``base.sample_latent``.
            z_h: Gaussian features, shape (B, M, F).
            mask: True for real atoms, shape (B, M).
            context: One-hot types for "given", shape (B, M, K), and what else conditions the flow; see
                :meth:`context`.
            solver: How to integrate; when None, :attr:`sampling_solver`, or :attr:`ode_solver` if there is no noise.
            noise: Draws fresh latent molecules like z_x and z_h, for a stochastic sampler.

        Raises:
            SolverError: If the solver fails.
            ValueError: For a stochastic sampler where the flow was not trained by flow matching, or without noise.
        """
        if solver is None:
            solver = self.ode_solver if noise is None else self.sampling_solver
        with torch.no_grad():
            if isinstance(solver, Solver):
                out = self.flow(mask, context, solver).inverse(z_x, z_h)
                return self.decode(out.x, out.h, mask, context)
            self.check_sampler(solver)
            if noise is None:
                raise ValueError(f"solver {solver}: needs noise, a function that draws latent molecules")
            x, h = sample_stochastic(self.velocity(mask, context), z_x, z_h, noise, solver)
            return self.decode(x, h, mask, context)

    def check_sampler(self, sampler: Solver | StochasticSampler) -> None:
        """Raises ``ValueError`` for a sampler that renews noise where the flow has no known path to do so."""
        if isinstance(sampler, StochasticSampler) and not self.matched:
            raise ValueError(
                f"churn={sampler.churn:g}: noise can be renewed on the path of flow matching only, and the flow "
                f"{self.name!r} was not trained by it; use churn=0"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, configuration and provenance to a ``.safetensors`` file, atomically.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        write_weights(path, self.config, self.provenance, self.state_dict())

    def _feature(self, values: Sequence[float]) -> Tensor:
        """Returns numbers as a tensor like the weights; kept, because making it would halt a GPU."""
        key = (tuple(values), self.dtype, self.device)
        if key not in self._features:
            self._features[key] = torch.tensor(values, dtype=self.dtype, device=self.device)
        return self._features[key]


def check_flow(flow: Any) -> ENF:
    """Returns a flow, and raises a ``TypeError`` for anything else, such as the name of one."""
    if isinstance(flow, ENF):
        return flow
    if isinstance(flow, str | os.PathLike):
        raise TypeError(f"expected a flow, got {os.fspath(flow)!r}; ase_enf.load({os.fspath(flow)!r}) gives one")
    raise TypeError(f"expected a flow, got {type(flow).__name__}; ase_enf.load and ase_enf.train give one")
