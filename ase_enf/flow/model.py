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
from ase_enf.flow.divergence import Velocity
from ase_enf.flow.dynamics import BoundDynamics, Dynamics, build_network
from ase_enf.flow.likelihood import Encoded, Known, LogProb, log_likelihood, path_error
from ase_enf.flow.parameterisation import Parameterisation
from ase_enf.flow.replay import replayed
from ase_enf.flow.stochastic import Noise, StochasticSampler, sample_stochastic
from ase_enf.flow.weights import write_weights
from ase_enf.geometry import subspace_dim

# Likelihoods are integrated with fixed steps, so that none depends on the other molecules of its batch; the steps lead
# from node to node of the quadrature. With the parameterisation "velocity", flow matching gives a velocity that changes
# fast near the data, and its nodes are those of a quadrature in u, t = u²; all other flows use t itself. For qm9-small
# the data are undecided: u is better with 49 nodes, t with 65 (benchmarks/accuracy/likelihood.py, quadrature).
LIKELIHOOD_SOLVER = Solver("rk4", steps=4)
MATCHED_LIKELIHOOD_SOLVER = Solver("rk4", steps=4, warp=2.0)
SAMPLING_SOLVER = Solver("midpoint", steps=32)
MATCHED_SAMPLING_SOLVER = Solver("midpoint", steps=64, warp=1.75)
# Fresh noise at each step corrects many errors of a trained velocity (benchmarks/accuracy/samplers.py).
STOCHASTIC_SAMPLER = StochasticSampler()


class ENF(nn.Module):
    """E(n) equivariant normalizing flow (eq. 6).

    log p(x, h, M) ≥ log p_Z(z) + ladj − log q(h̃|h) + log p_M(M),   z = f(x, h̃)

    * ``features="none"``: exact log p(x | M).
    * ``features="given"``: exact log p(x | types).
    * ``features="joint"``: an estimate from one draw of q, whose expectation is a lower bound of log p(x, h, M).

    Args:
        config: Configuration of the flow.
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
        self.name = "unnamed"  # set by load to the name of the file
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
        """Describes the flow in two lines; ``print(flow.dynamics)`` lists its modules."""
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
        """Elements the flow knows; empty for a flow of positions only."""
        return self.config.species

    @property
    def features(self) -> str:
        """ "joint", "given" or "none"."""
        return self.config.features

    @property
    def matched(self) -> bool:
        """Whether it was trained by flow matching: its path from data to noise is (1 − t) x + t z in distribution."""
        return self.config.path == "linear"

    @property
    def likelihood_solver(self) -> Solver:
        """Default solver of likelihoods: rk4 from node to node of the quadrature.

        A velocity that flow matching trained without another parameterisation changes fast near the data, where its
        nodes are therefore denser; the other parameterisations divide that change out.

        Example:
            >>> str(ENF(ENFConfig(hidden=8, layers=1, path="linear")).likelihood_solver)
            'rk4, 4 steps, warp 2'
        """
        dense = self.matched and self.config.parameterisation == "velocity"
        return MATCHED_LIKELIHOOD_SOLVER if dense else LIKELIHOOD_SOLVER

    @property
    def ode_solver(self) -> Solver:
        """Default solver of samples from exactly the density of the flow.

        Example:
            >>> str(ENF(ENFConfig(hidden=8, layers=1, path="linear")).ode_solver)
            'midpoint, 64 steps, warp 1.75'
        """
        return MATCHED_SAMPLING_SOLVER if self.matched and self.config.knows_types else SAMPLING_SOLVER

    @property
    def sampling_solver(self) -> Solver | StochasticSampler:
        """Default sampler: with fresh noise at each step for a flow of molecules that was trained by flow matching.

        All others use the ODE of the flow: flows of positions alone serve exact densities (``reweight``), and the path
        of a flow trained by likelihood is unknown.

        Example:
            >>> str(ENF(ENFConfig(features="none", hidden=8, layers=1)).sampling_solver)
            'midpoint, 32 steps, warp 1'
        """
        return STOCHASTIC_SAMPLER if self.matched and self.config.knows_types else self.ode_solver

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return next(self.parameters()).dtype

    def use_backend(self, backend: str = "auto") -> str:
        """Chooses the backend for the pairs of an EGNN: torch, a compiled kernel on a CPU, or Triton kernels on a GPU.

        All give the same numbers up to rounding. The compiled kernel is built by the system's C++ compiler on first use
        and has no second derivatives, which training with ``objective="nll"`` needs. On a GPU, torch computes gradients
        with respect to the input.

        Args:
            backend: "compiled", "triton", "torch", or "auto" for the first of them that can be used.

        Returns:
            "compiled", "triton" or "torch".

        Raises:
            ValueError: If the name is unknown, or the backend cannot be used; the message gives the reason.

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
        """Returns ``(t, x, h) → (dx, dh)`` for molecules with a mask (B, M) and a context; see :meth:`context`."""
        return BoundDynamics(self.dynamics, mask, context)

    def flow(
        self,
        mask: Tensor,
        context: Tensor | Context | None = None,
        solver: Solver | None = None,
        velocity: Velocity | None = None,
    ) -> ContinuousFlow:
        """Returns the continuous flow of one batch.

        Args:
            mask: True for real atoms, shape (B, M).
            context: What conditions the dynamics; see :meth:`context`.
            solver: How to integrate; :attr:`likelihood_solver` when None.
            velocity: A velocity to use instead, such as a guided or a replayed one.
        """
        return ContinuousFlow(velocity or self.velocity(mask, context), mask, solver or self.likelihood_solver)

    def encode(self, batch: Batch, noise: Tensor | None = None) -> Encoded:
        """Scales positions and lifts features.

        Dividing positions by ``position_scale`` s contributes −(M − 1) n log s, counted on the subspace.

        Args:
            batch: Molecules, on the device of the model.
            noise: ε of q, shape (B, M, F); zeros give the mean of q; drawn from torch's generator when None.

        Returns:
            The batch in the coordinates of the flow.
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
        """Adds the terms of the likelihood to molecules in the coordinates of the flow; see :meth:`encode`.

        Args:
            x: Scaled and centred positions, shape (B, M, n).
            h: Lifted and scaled features, shape (B, M, F).
            mask: True for real atoms, shape (B, M).
            context: What conditions the dynamics; see :meth:`context`.
            log_q: log q(h̃|h), nats, shape (B,); zero when None.

        Returns:
            The molecules with the volume of the scaling, log q and log p_M.
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
            ValueError: If the flow needs a graph and the batch has none.
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
        """Returns molecules in Å with discrete features; the inverse of :meth:`encode`.

        Args:
            x: Scaled positions, shape (B, M, n).
            h: Lifted and scaled features, shape (B, M, F).
            mask: True for real atoms, shape (B, M).
            context: What conditions the dynamics; holds the types of "given".
        """
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
        before: Known | None = None,
    ) -> LogProb:
        """Log-likelihood of each molecule and its terms (eq. 6, 11, 12).

        ``error`` is the sum of the estimated errors of the quadrature and of the path. For the latter, the path is
        solved again with half the steps or looser tolerances, and by an adaptive solver with tighter ones as well.

        Args:
            batch: Molecules on the model's device and in its dtype.
            noise: ε of q for "joint", shape (B, M, F); see :meth:`encode`.
            trace: ``divergence.exact`` or a closure over probes around ``divergence.hutchinson``.
            solver: How the state is integrated; :attr:`likelihood_solver`, as in ``score``, when None.
            intervals: Number of intervals of the quadrature of the trace; see ``ContinuousFlow.transport``.
            estimate_path_error: Whether to solve the path again for its part of ``error``.
            before: Result for the same molecules with half the intervals; see ``LogProb.known``. Only traces at new
                nodes are then computed, and ``path_error`` is kept: a path through more nodes is not less accurate.

        Returns:
            Log-likelihood, terms and error, nats.

        Raises:
            SolverError: If the solver fails.
            ValueError: If ``intervals`` is not a multiple of 8.
        """
        with torch.no_grad():
            encoded = self.encode(batch, noise)
            velocity = replayed(self.velocity(encoded.mask, encoded.context), encoded.x, encoded.h)
            flow = self.flow(encoded.mask, encoded.context, solver, velocity)
            known = None if before is None else before.traces
            z = flow.forward(encoded.x, encoded.h, trace, intervals=intervals, known=known)
            terms = log_likelihood(encoded, z.x, z.h, z.ladj)
            by_path, more = torch.zeros_like(z.error), 0
            if before is not None:
                by_path = before.path_error
            elif estimate_path_error:
                by_path, more = path_error(flow, encoded.x, encoded.h, terms.log_base, z.traces, trace)
            samples = z.samples + encoded.log_volume
            parts = (z.error + by_path, by_path, z.traces, samples, z.nfe + more)
            return LogProb(terms.log_prob, terms.log_density, *terms, *parts)

    def sample(
        self,
        z_x: Tensor,
        z_h: Tensor,
        mask: Tensor,
        context: Tensor | Context | None = None,
        solver: Solver | StochasticSampler | None = None,
        noise: Noise | None = None,
        velocity: Velocity | None = None,
    ) -> Batch:
        """Takes latent molecules to data, ``(x, h) = g(z_x, z_h)`` followed by argmax and floor.

        The ODE of the flow draws from the density of :meth:`log_prob`. A ``StochasticSampler`` adds fresh noise at each
        step and has no likelihood; see ``stochastic.sample_stochastic``.

        Args:
            z_x: Centred Gaussian positions, shape (B, M, n); see ``base.sample_latent``.
            z_h: Gaussian features, shape (B, M, F).
            mask: True for real atoms, shape (B, M).
            context: What conditions the dynamics, such as the types for "given"; see :meth:`context`.
            solver: How to draw; when None, :attr:`sampling_solver`, as in ``generate``, or :attr:`ode_solver` if
                ``noise`` is None.
            noise: Draws fresh latent molecules like z_x and z_h, for a stochastic sampler.
            velocity: A velocity to use instead of the flow's own, such as a guided one.

        Returns:
            Molecules in Å with discrete features.

        Raises:
            SolverError: If the solver fails.
            ValueError: If the sampler is stochastic, but ``noise`` is None or flow matching did not train the flow.
        """
        if solver is None:
            solver = self.ode_solver if noise is None else self.sampling_solver
        with torch.no_grad():
            self.check_sampler(solver)
            if isinstance(solver, StochasticSampler) and noise is None:
                raise ValueError(f"solver {solver}: needs noise, a function that draws latent molecules")
            velocity = replayed(velocity or self.velocity(mask, context), z_x, z_h)
            if isinstance(solver, Solver):
                out = self.flow(mask, context, solver, velocity).inverse(z_x, z_h)
                return self.decode(out.x, out.h, mask, context)
            x, h = sample_stochastic(velocity, z_x, z_h, noise, solver)
            return self.decode(x, h, mask, context)

    def check_sampler(self, sampler: Solver | StochasticSampler) -> None:
        """Raises ``ValueError`` for a stochastic sampler if the path of the flow is unknown."""
        if isinstance(sampler, StochasticSampler) and not self.matched:
            raise ValueError(
                f"churn={sampler.churn:g}: fresh noise needs the path of flow matching, and the flow {self.name!r} was "
                "not trained by it; use churn=0"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, configuration and provenance to a ``.safetensors`` file, atomically.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        write_weights(path, self.config, self.provenance, self.state_dict())

    def _feature(self, values: Sequence[float]) -> Tensor:
        """Returns numbers as a tensor like the weights; cached, as copying it to a GPU would make the host wait."""
        key = (tuple(values), self.dtype, self.device)
        if key not in self._features:
            self._features[key] = torch.tensor(values, dtype=self.dtype, device=self.device)
        return self._features[key]


def check_flow(flow: Any) -> ENF:
    """Returns a flow unchanged.

    Raises:
        TypeError: If it is anything else, such as the name of a flow.
    """
    if isinstance(flow, ENF):
        return flow
    if isinstance(flow, str | os.PathLike):
        raise TypeError(f"expected a flow, got {os.fspath(flow)!r}; ase_enf.load({os.fspath(flow)!r}) gives one")
    raise TypeError(f"expected a flow, got {type(flow).__name__}; ase_enf.load and ase_enf.train give one")
