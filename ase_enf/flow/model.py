"""The E(n) equivariant normalizing flow: configuration, likelihood, sampling, files (eq. 6)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ase.data import atomic_numbers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ase_enf.atoms.batch import Batch
from ase_enf.atoms.files import atomic_write, require_folder
from ase_enf.flow import base, divergence
from ase_enf.flow.context import (
    GRAPH_FEATURES,
    Condition,
    Context,
    condition_features,
    graph_features,
    read_conditions,
    split_context,
)
from ase_enf.flow.continuous import (
    INTERVALS,
    PATH_REDUCTION,
    ContinuousFlow,
    Solver,
    SolverError,
    TraceMethod,
    Transformed,
)
from ase_enf.flow.dequantize import DEQUANTIZERS, build_q, lift, quantize
from ase_enf.flow.dynamics import POSITION_NETWORKS, BoundDynamics, Dynamics, build_network
from ase_enf.flow.parameterisation import Parameterisation
from ase_enf.geometry import subspace_dim

FEATURES = ("joint", "none", "given")
FORMAT_VERSION = 2
PATHS = (None, "linear")
METADATA_KEY = "ase_enf"
# Likelihoods take a fixed grid, so that one does not depend on its batch mates; the nodes of the quadrature are its
# steps. Flow matching of a bare velocity puts what changes fast near the data: 49 nodes in u, t = u², err by a third of
# what 49 in t do; after maximum likelihood, and of a denoising flow, nodes in t are the better ones
# (benchmarks/likelihood.py, quadrature).
LIKELIHOOD_SOLVER = Solver("rk4", steps=4)
MATCHED_LIKELIHOOD_SOLVER = Solver("rk4", steps=4, warp=2.0)
SAMPLING_SOLVER = Solver("midpoint", steps=32)
MATCHED_SAMPLING_SOLVER = Solver("midpoint", steps=64, warp=1.75)
# Renewed noise mends much of what a trained velocity does wrong, and many short steps of much noise more than few long
# ones of a better method (benchmarks/samplers.py).
RENEWING_SAMPLING_SOLVER = Solver("euler", steps=128, warp=2.0, churn=20.0)
PRETRAINED = Path(__file__).parents[1] / "pretrained"


@dataclass(frozen=True)
class ENFConfig:
    """Everything that defines a flow except its weights; stored as JSON beside them.

    Args:
        features: "joint" (types and charges flow with the positions), "given" (types are the condition) or "none"
            (positions only).
        species: Elements in the order of the one-hot columns; "none" has none and takes any.
        sizes: Counts of molecule sizes in the training set, the prior p_M.
        compositions: Counts of formulas (Hill) in the training set, from which "given" draws; else empty.
        dimension: Dimension n of space, 2 or 3.
        network: "egnn" or a baseline: "gnn" (not equivariant), or, with "none" only, "simple" or "kernel" (Köhler et
            al. 2020; ``nn.koehler``).
        hidden: Width F of the network; of "kernel" the number of its functions of the distance.
        layers: Number L of layers; of "kernel" the number of its functions of the time.
        attention: Soft edges (eq. 4), in "egnn" and "gnn".
        radial: Number of radial functions of each distance beside its square (not in the paper); 0 for none.
        dequantizer: "fixed" or "learned" q(h̃|h), for "joint".
        position_scale: Length in Å that is one unit inside the flow.
        feature_shift: Subtracted from h̃ (K scores, then the charge), for "joint".
        feature_scale: Multiplies h̃ − shift.
        parameterisation: How the network's output becomes a velocity: "velocity" (the paper), "endpoint" or
            "denoising"; see ``parameterisation.Parameterisation``.
        feature_std: Standard deviation of the flowing features inside the flow, for "denoising".
        path: "linear", where flow matching trained it, so that the path from data to noise is (1 − t) x + t z in
            distribution; None where that is not known.
        conditions: Numbers of the whole molecule that condition the flow where they are known; see
            ``context.Condition``.
        graph: Whether the molecular graph conditions the flow, for "given" with "egnn": density p(x | graph).

    Raises:
        ValueError: For an unknown or inconsistent value.
    """

    features: str = "joint"
    species: tuple[str, ...] = ("H", "C", "N", "O", "F")
    sizes: Mapping[int, int] = dataclasses.field(default_factory=lambda: {18: 1})
    compositions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dimension: int = 3
    network: str = "egnn"
    hidden: int = 64
    layers: int = 6
    attention: bool = True
    radial: int = 0
    dequantizer: str = "fixed"
    position_scale: float = 1.0
    feature_shift: tuple[float, ...] = ()
    feature_scale: tuple[float, ...] = ()
    parameterisation: str = "velocity"
    feature_std: float = 1.0
    path: str | None = None
    conditions: tuple[Condition, ...] = ()
    graph: bool = False

    def __post_init__(self) -> None:
        set_field = functools.partial(object.__setattr__, self)
        set_field("species", () if self.features == "none" else tuple(self.species))
        set_field("sizes", {int(size): int(count) for size, count in self.sizes.items()})
        set_field("compositions", dict(self.compositions))
        set_field("conditions", read_conditions(self.conditions))
        width = self.flow_features
        set_field("feature_shift", tuple(self.feature_shift) or (0.0,) * width)
        set_field("feature_scale", tuple(self.feature_scale) or (1.0,) * width)
        if self.features not in FEATURES:
            raise ValueError(f"features {self.features!r} is unknown; choose one of {', '.join(FEATURES)}")
        if self.dimension not in (2, 3):
            raise ValueError(f"dimension {self.dimension}: only 2 and 3 are supported")
        if self.dequantizer not in DEQUANTIZERS:
            raise ValueError(f"dequantizer {self.dequantizer!r} is unknown; choose one of {', '.join(DEQUANTIZERS)}")
        if self.network in POSITION_NETWORKS and self.features != "none":
            raise ValueError(
                f"network {self.network!r} moves positions only, but features={self.features!r}; use features='none'"
            )
        if self.conditions and self.network in POSITION_NETWORKS:
            raise ValueError(f"network {self.network!r} knows no conditions; use 'egnn' or 'gnn'")
        if self.graph and (self.features, self.network) != ("given", "egnn"):
            raise ValueError(
                f"graph=True needs features='given' and network='egnn', not {self.features!r} and {self.network!r}"
            )
        if self.features != "none" and not self.species:
            raise ValueError(f"features={self.features!r} needs the species; only features='none' works without")
        unknown = [symbol for symbol in self.species if symbol not in atomic_numbers]
        if unknown or len(set(self.species)) < len(self.species):
            raise ValueError(f"species {self.species}: must be different chemical symbols")
        if min(self.hidden, self.layers) < 1:
            raise ValueError(f"hidden={self.hidden}, layers={self.layers}: both must be at least 1")
        if self.radial < 0 or (self.radial and self.network != "egnn"):
            raise ValueError(f"radial={self.radial}: must be at least 0, and 0 unless network is 'egnn'")
        base.check_counts("compositions", self.compositions)
        if min(self.sizes, default=2) < 2:
            raise ValueError(f"sizes: {min(self.sizes)} atom(s) have no density on centred positions; the least is 2")
        if not all(math.isfinite(scale) and scale > 0 for scale in self.feature_scale):
            raise ValueError(f"feature_scale {self.feature_scale}: all must be positive")
        if not (math.isfinite(self.position_scale) and self.position_scale > 0):
            raise ValueError(f"position_scale {self.position_scale}: must be a positive length in Å")
        Parameterisation(self.parameterisation, self.feature_std)  # which checks them
        if self.path not in PATHS:
            raise ValueError(f"path {self.path!r} is unknown; choose 'linear' or None")
        if not len(self.feature_shift) == len(self.feature_scale) == width:
            raise ValueError(f"feature_shift and feature_scale need {width} numbers, one a flowing feature")

    @property
    def flow_features(self) -> int:
        """Number F of features that flow with the positions."""
        return len(self.species) + 1 if self.features == "joint" else 0

    @property
    def context_features(self) -> int:
        """Number of features of an atom that condition the flow."""
        return (len(self.species) if self.features == "given" else 0) + 2 * len(self.conditions)


class Encoded(NamedTuple):
    """A batch in the coordinates of the flow."""

    x: Tensor  # (B, M, n), scaled and centred
    h: Tensor  # (B, M, F), lifted, shifted and scaled
    mask: Tensor  # (B, M)
    context: Tensor | Context | None  # (B, M, K) for "given" and of conditions; of a graph those of the pairs, too
    log_volume: Tensor  # (B,), log|det| of the scaling, on the subspace
    log_q: Tensor  # (B,), log q(h̃|h)


class LogProb(NamedTuple):
    """The terms of a log-likelihood, nats, each of shape (B,) unless said otherwise.

    ``log_prob = log_base + ladj − log_q + log_size``
    """

    log_prob: Tensor
    log_base: Tensor  # log p_Z(z)
    ladj: Tensor  # log-determinant of flow and scaling
    log_q: Tensor  # zero unless "joint"
    log_size: Tensor  # log p_M(M), zero unless "joint"
    error: Tensor  # estimated integration error, of the quadrature and of the path
    samples: Tensor  # (P, B), ladj by each probe alone
    nfe: int


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
        self.q = build_q(config.dequantizer, len(config.species)) if config.features == "joint" else None

    def __repr__(self) -> str:
        """Says in two lines what the flow is; ``print(flow.dynamics)`` lists its modules."""
        config, sizes = self.config, list(self.size_prior.counts)
        trained = f", {self.provenance['objective']}" if "objective" in self.provenance else ""
        weights = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"ENF {self.name!r}: features {config.features}, {' '.join(self.species) or 'any elements'}, {sizes[0]} to "
            f"{sizes[-1]} atoms{trained}\n"
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

        Flow matching of a bare velocity leaves a field that changes fast near the data, where the nodes are denser
        then; the other parameterisations divide that change out.

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
        return MATCHED_SAMPLING_SOLVER if self.matched and self.features != "none" else SAMPLING_SOLVER

    @property
    def sampling_solver(self) -> Solver:
        """How samples are integrated: with renewed noise where flow matching has trained a flow of molecules.

        Flows of positions alone are for exact densities (``reweight``), and those trained by likelihood have no known
        path; both take the flow itself.

        Example:
            >>> str(ENF(ENFConfig(features="none", hidden=8, layers=1)).sampling_solver)
            'midpoint, 32 steps, warp 1'
        """
        return RENEWING_SAMPLING_SOLVER if self.matched and self.features != "none" else self.ode_solver

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return next(self.parameters()).dtype

    def use_kernel(self, kernel: str = "auto") -> str:
        """Chooses how an EGNN computes its pairs on a CPU: by torch, or faster by a compiled kernel.

        Both give the same numbers to rounding. The kernel is compiled by the system's C++ compiler at first use, and
        has no second derivatives (for training by ``objective="nll"``).

        Args:
            kernel: "fused", "plain" (torch), or "auto": fused where that is possible.

        Returns:
            "fused" or "plain".

        Raises:
            ValueError: For an unknown name, or "fused" where that is impossible, with the reason.

        Example:
            >>> ENF(ENFConfig(hidden=16, layers=1)).use_kernel("plain")
            'plain'
        """
        return self.dynamics.use_kernel(kernel)

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
        log_volume = -subspace_dim(batch.mask, config.dimension).to(x.dtype) * math.log(config.position_scale)
        context = self.context(batch)
        if self.q is None:
            return Encoded(x, x[..., :0], batch.mask, context, log_volume, torch.zeros_like(log_volume))
        if noise is None:
            noise = torch.randn(*x.shape[:2], config.flow_features, dtype=x.dtype, device=x.device)
        lifted = lift(self.q, batch.positions, batch.types, batch.charges, batch.mask, noise)
        h = (lifted.features - self._feature(config.feature_shift)) * self._feature(config.feature_scale) * real
        log_volume = log_volume + batch.n_atoms.to(x.dtype) * sum(math.log(s) for s in config.feature_scale)
        return Encoded(x, h, batch.mask, context, log_volume, lifted.log_q)

    def context(self, batch: Batch) -> Tensor | Context | None:
        """Returns what conditions the dynamics of a batch: given types, conditions, and features of the graph's pairs.

        Raises:
            ValueError: If the flow needs a graph, and the batch has none.
        """
        config = self.config
        nodes = [batch.types] if config.features == "given" else []
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
        if self.config.features == "given":
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

        The path is solved once more by a coarser solver (half the steps, a looser tolerance; of an adaptive one also by
        a tighter one); what that does to log p_Z and to the trace enters ``error``.

        Args:
            batch: Molecules on the model's device and in its dtype.
            noise: ε of q for "joint", shape (B, M, F); see :meth:`encode`.
            trace: ``divergence.exact`` or a closure over probes around ``divergence.hutchinson``.
            solver: How the state is integrated; :attr:`likelihood_solver`, as in ``score``, when None.
            intervals: Of the quadrature of the trace; see ``ContinuousFlow.transport``.
            estimate_path_error: Whether to solve the path twice for that part of ``error``.

        Raises:
            SolverError: If the solver fails.
        """
        with torch.no_grad():
            encoded = self.encode(batch, noise)
            flow = self.flow(encoded.mask, encoded.context, solver)
            z = flow.forward(encoded.x, encoded.h, trace, intervals=intervals)
            terms = self._terms(encoded, z)
            if not estimate_path_error:
                return terms
            path_error, more = self.path_error(flow, encoded.x, encoded.h, terms.log_base, z.traces, trace)
            return terms._replace(error=terms.error + path_error, nfe=terms.nfe + more)

    def path_error(
        self, flow: ContinuousFlow, x: Tensor, h: Tensor, log_base: Tensor, traces: Tensor, trace: TraceMethod
    ) -> tuple[Tensor, int]:
        """Estimates what the solver does to log p_Z + ladj, from what a coarser one does; see ``Solver.coarser``.

        An adaptive solver is held against a finer one, too, and the larger estimate counts: its error depends on the
        tolerance erratically, and two loose ones may share theirs.

        Args:
            flow: Of one batch, see :meth:`flow`.
            x: Positions at the data end of the path, shape (B, M, n).
            h: Features there, shape (B, M, F).
            log_base: log p_Z at its latent end, shape (B,).
            traces: Along the path, from the quadrature, shape (Q, P, B).
            trace: By which.

        Returns:
            The error, nats, shape (B,), infinite where another solver fails; the number of evaluations it took.
        """
        solver, error, nfe = flow.solver, torch.zeros_like(log_base), 0
        reduction = PATH_REDUCTION[solver.method]
        # Of the difference, how much is the error of the solver itself.
        others = [(solver.coarser(), 1.0 / (reduction - 1.0))]
        if solver.adaptive:
            others.append((solver.finer(x.dtype), reduction / (reduction - 1.0)))
        for other, share in others:
            try:
                again = flow.again(x, h, trace, len(traces) - 1, other)
            except SolverError:
                return torch.full_like(log_base, math.inf), nfe
            by_base = log_base.double() - self._log_base(again.x, again.h, flow.mask).double()
            by_trace = flow.every_fourth(traces[::4]) - again.ladj
            error = torch.maximum(error, share * (by_base + by_trace).abs().to(log_base))
            nfe += again.nfe
        return error, nfe

    @staticmethod
    def _log_base(x: Tensor, h: Tensor, mask: Tensor) -> Tensor:
        return base.position_log_prob(x, mask) + base.feature_log_prob(h, mask)

    def _terms(self, encoded: Encoded, z: Transformed) -> LogProb:
        mask = encoded.mask
        log_base = self._log_base(z.x, z.h, mask)
        log_size = torch.zeros_like(log_base)
        if self.config.features == "joint":
            log_size = self.size_prior.log_prob(mask.sum(dim=-1).tolist()).to(log_base)
        ladj = z.ladj + encoded.log_volume
        total = log_base + ladj - encoded.log_q + log_size
        samples = z.samples + encoded.log_volume
        return LogProb(total, log_base, ladj, encoded.log_q, log_size, z.error, samples, z.nfe)

    def sample(
        self,
        z_x: Tensor,
        z_h: Tensor,
        mask: Tensor,
        context: Tensor | Context | None = None,
        solver: Solver | None = None,
        noise: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> Batch:
        """Takes latent molecules to data, ``(x, h) = g(z_x, z_h)`` followed by argmax and floor.

        With a solver that has churn, noise is renewed on the way; see ``ContinuousFlow.renewed_inverse``. By default
        that is what ``generate`` does, if ``noise`` is given; without it, molecules are drawn from the density of
        :meth:`log_prob`, by the ODE on the same grid.

        Args:
            z_x: Centred Gaussian positions, shape (B, M, n); see ``base.sample_latent``.
            z_h: Gaussian features, shape (B, M, F).
            mask: True for real atoms, shape (B, M).
            context: One-hot types for "given", shape (B, M, K), and what else conditions the flow; see
                :meth:`context`.
            solver: How to integrate; when None, :attr:`sampling_solver`, or :attr:`ode_solver` if there is no noise.
            noise: Draws fresh latent molecules like z_x and z_h, for a solver with churn.

        Raises:
            SolverError: If the solver fails.
            ValueError: For a solver with churn where the flow was not trained by flow matching, or without noise.
        """
        if solver is None:
            solver = self.ode_solver if noise is None else self.sampling_solver
        flow = self.flow(mask, context, solver)
        self.check_churn(flow.solver)
        if flow.solver.churn and noise is None:
            raise ValueError(f"solver churn={flow.solver.churn:g}: needs noise, a function that draws latent molecules")
        with torch.no_grad():
            out = flow.renewed_inverse(z_x, z_h, noise) if flow.solver.churn else flow.inverse(z_x, z_h)
            return self.decode(out.x, out.h, mask, context)

    def check_churn(self, solver: Solver) -> None:
        """Raises ``ValueError`` for a solver that renews noise where the flow has no path on which that can be done."""
        if solver.churn and not self.matched:
            raise ValueError(
                f"solver churn={solver.churn:g}: noise can be renewed on the path of flow matching only, and the flow "
                f"{self.name!r} was not trained by it; use churn=0"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, configuration and provenance to a ``.safetensors`` file, atomically.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        path = require_folder(path)
        header = {
            "format": FORMAT_VERSION,
            "package": package_version(),
            "units": {"positions": "angstrom", "log_likelihood": "nat"},
            "config": dataclasses.asdict(self.config),
            "provenance": self.provenance,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_write(path) as handle:
            handle.write(serialise(tensors, metadata={METADATA_KEY: json.dumps(header)}))

    def _feature(self, values: Sequence[float]) -> Tensor:
        """Returns numbers as a tensor like the weights; kept, because making it would halt a GPU."""
        key = (tuple(values), self.dtype, self.device)
        if key not in self._features:
            self._features[key] = torch.tensor(values, dtype=self.dtype, device=self.device)
        return self._features[key]


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads configuration and provenance of a weights file without loading the weights.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder, of a run for instance.
        ValueError: If the file is truncated, foreign, or of a newer format.
    """
    path = Path(path)
    if path.is_dir() and path != Path():
        inside = sorted(path.glob("*.safetensors"))
        raise IsADirectoryError(
            f"{path}: is a folder; name a weights file{f', such as {inside[-1]}' if inside else ' (.safetensors)'}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; shipped names are {', '.join(shipped()) or 'none'}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no readable .safetensors file ({error}); fetch or train it again") from None
    if text is None:
        raise ValueError(
            f"{path}: holds no ase-enf model (no {METADATA_KEY!r} metadata); pass a file written by ENF.save"
        )
    try:
        header = json.loads(text)
        newer = header.get("format", 0) > FORMAT_VERSION
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: has a damaged header ({error}); fetch or train it again") from None
    if newer:
        raise ValueError(
            f"{path}: was written by ase-enf {header.get('package')}, newer than this {package_version()}; upgrade"
        )
    return _migrated(header)


def _migrated(header: dict[str, Any]) -> dict[str, Any]:
    """Returns a header in today's format; format 1 told the path only by the objective of the training."""
    if header.get("format") == 1 and dict(header.get("provenance") or {}).get("objective") == "flow_matching":
        header = header | {"config": {"path": "linear"} | header["config"]}
    return header


def shipped() -> list[str]:
    """Returns the names of the models that come with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def check_flow(flow: Any) -> ENF:
    """Returns a flow, and raises a ``TypeError`` for anything else, such as the name of one."""
    if isinstance(flow, ENF):
        return flow
    if isinstance(flow, str | os.PathLike):
        raise TypeError(f"expected a flow, got {os.fspath(flow)!r}; ase_enf.load({os.fspath(flow)!r}) gives one")
    raise TypeError(f"expected a flow, got {type(flow).__name__}; ase_enf.load and ase_enf.train give one")


def resolve_device(device: str | torch.device) -> torch.device:
    """Turns "auto" into CUDA where there is one, and checks an explicit choice.

    Raises:
        ValueError: If the device is not there.
    """
    if str(device) == "auto":
        return resolve_device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; choose auto, cpu or cuda") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} usable CUDA device(s); use cpu or auto"
        )
    # With its number it compares equal to the device of tensors.
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Turns "float32" or "float64" into a torch dtype.

    Raises:
        ValueError: For any other.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype {dtype!r} is unknown; choose float32 or float64")
    return known[name]


def load(
    name_or_path: str | os.PathLike[str], device: str | torch.device = "auto", dtype: str | torch.dtype = "float32"
) -> ENF:
    """Loads a flow: a shipped name such as ``"qm9"``, or a path to ``.safetensors``.

    Nothing in the file is executed: tensors and JSON only.

    Args:
        name_or_path: Name or path.
        device: "auto", "cpu", "cuda", "cuda:1" …
        dtype: "float32" or "float64".

    Raises:
        FileNotFoundError: If there is neither a shipped model nor a file of that name.
        ValueError: If the file is truncated, foreign or does not fit its configuration, or the device is missing.
    """
    chosen, floating = resolve_device(device), resolve_dtype(dtype)
    named = PRETRAINED / f"{name_or_path}.safetensors"
    path = named if named.is_file() else Path(name_or_path)
    header = read_header(path)
    try:
        config = ENFConfig(**header["config"])
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        check_extent(config, state)
        model = build_empty(config, header.get("provenance"))
        model.load_state_dict(state, strict=True, assign=True)
    except (
        *(AttributeError, KeyError, TypeError, ValueError),
        *(OverflowError, RuntimeError, SafetensorError),
    ) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: weights do not fit their configuration ({reason}); fetch or train the file again"
        ) from None
    model.name = _model_name(path)
    return model.to(device=chosen, dtype=floating).eval().requires_grad_(False)


def build_empty(config: ENFConfig, provenance: Mapping[str, Any] | None = None) -> ENF:
    """Returns a flow without weights, for ``load_state_dict(..., assign=True)``.

    It takes no memory, and no number from torch's generator.

    Example:
        >>> build_empty(ENFConfig(hidden=8, layers=1)).device
        device(type='meta')
    """
    with torch.device("meta"):
        return ENF(config, provenance)


def check_extent(config: ENFConfig, state: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` for a network larger than the weights that are there for it, before it is built.

    Args:
        config: What the flow is to be.
        state: Its weights by name.

    Example:
        >>> check_extent(ENFConfig(layers=10**9), {"weight": torch.zeros(3)})
        Traceback (most recent call last):
        ValueError: hidden=64, layers=1000000000, radial=0: there are only 3 weights in 1 tensors
    """
    weights = sum(value.numel() for value in state.values())
    tensors = config.layers if config.network == "kernel" else len(state)  # all others have several tensors a layer
    if config.hidden * config.layers > weights or config.layers > tensors or config.radial > weights:
        raise ValueError(
            f"hidden={config.hidden}, layers={config.layers}, radial={config.radial}: there are only {weights} weights "
            f"in {len(state)} tensors"
        )


def _model_name(path: Path) -> str:
    """Returns what provenance calls a model: every run names its files alike, so that its folder tells them apart."""
    if path.stem not in ("model", "last"):
        return path.stem
    folder = path.resolve().parent.name
    return folder if path.stem == "model" else f"{folder}-last"


def package_version() -> str:
    """Returns the installed version of ase-enf ("unknown" from a bare source tree)."""
    try:
        return metadata.version("ase-enf")
    except metadata.PackageNotFoundError:
        return "unknown"
