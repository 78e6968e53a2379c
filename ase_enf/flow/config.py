"""The configuration of a flow: everything that defines it except its weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ase.data import atomic_numbers

from ase_enf.flow import base
from ase_enf.flow.context import Condition, read_conditions
from ase_enf.flow.dynamics import POSITION_NETWORKS
from ase_enf.flow.modes import FeatureMode, feature_mode
from ase_enf.flow.parameterisation import Parameterisation
from ase_enf.values import DEQUANTIZERS, check_choice

PATHS = (None, "linear")


@dataclass(frozen=True)
class ENFConfig:
    """Everything that defines a flow except its weights; stored as JSON beside them.

    Args:
        features: "joint" (unconditional: types and charges flow with the positions), "given" (conditional on the
            composition: types are given, positions flow) or "none" (positions only).
        species: Elements in the order of the one-hot columns; empty for "none", which accepts any element.
        sizes: Number of training molecules of each size, the prior p_M.
        compositions: Number of training molecules of each formula (Hill order), from which "given" draws; empty in
            the other modes.
        dimension: Dimension n of space, 2 or 3.
        network: "egnn" or a baseline: "gnn" (not equivariant), or, with "none" only, "simple" or "kernel" (Köhler et
            al. 2020; ``nn.koehler``).
        hidden: Width of the network; for "kernel" the number of its functions of the distance.
        layers: Number L of layers; for "kernel" the number of its functions of the time.
        attention: Soft edges (eq. 4), for "egnn" and "gnn".
        radial: Number of radial functions of each distance in addition to its square (not in the paper); 0 for none.
        dequantizer: "fixed" or "learned" q(h̃|h), for "joint".
        position_scale: Length in Å that is one unit inside the flow.
        feature_shift: Is subtracted from h̃ (K scores, then the charge), for "joint".
        feature_scale: Multiplies h̃ − shift.
        parameterisation: How the network's output becomes a velocity: "velocity" (the paper), "endpoint" or
            "denoising"; see ``parameterisation.Parameterisation``.
        feature_std: Standard deviation of the flowing features inside the flow, for "denoising".
        path: "linear" for a flow trained by flow matching, whose path from data to noise is (1 − t) x + t z in
            distribution; None where the path is unknown.
        conditions: Properties of the whole molecule that condition the flow where they are known; see
            ``context.Condition``.
        graph: Whether the molecular graph conditions the flow, for "given" with "egnn"; the density is p(x | graph).

    Raises:
        ValueError: If a value is unknown, or values are inconsistent.

    Example:
        >>> ENFConfig(features="given", species=("H", "C", "O")).context_features
        3
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
        set_field("species", tuple(self.species) if self.knows_types else ())
        set_field("sizes", {int(size): int(count) for size, count in self.sizes.items()})
        set_field("compositions", dict(self.compositions))
        set_field("conditions", read_conditions(self.conditions))
        set_field("feature_shift", tuple(self.feature_shift) or (0.0,) * self.flow_features)
        set_field("feature_scale", tuple(self.feature_scale) or (1.0,) * self.flow_features)
        self._check_parts()
        self._check_species()
        self._check_numbers()

    def _check_parts(self) -> None:
        """Raises ``ValueError`` for an unknown part, or for parts that do not fit together."""
        if self.dimension not in (2, 3):
            raise ValueError(f"dimension {self.dimension}: only 2 and 3 are supported")
        check_choice("dequantizer", self.dequantizer, DEQUANTIZERS)
        if self.network in POSITION_NETWORKS and self.knows_types:
            raise ValueError(
                f"network {self.network!r} moves positions only, but features={self.features!r}; use features='none'"
            )
        if self.conditions and self.network in POSITION_NETWORKS:
            raise ValueError(f"network {self.network!r} knows no conditions; use 'egnn' or 'gnn'")
        if self.graph and not (self.types_given and self.network == "egnn"):
            raise ValueError(
                f"graph=True needs features='given' and network='egnn', not {self.features!r} and {self.network!r}"
            )

    def _check_species(self) -> None:
        if self.knows_types and not self.species:
            raise ValueError(f"features={self.features!r} needs the species; only features='none' works without")
        unknown = [symbol for symbol in self.species if symbol not in atomic_numbers]
        if unknown or len(set(self.species)) < len(self.species):
            raise ValueError(f"species {self.species}: must be different chemical symbols")

    def _check_numbers(self) -> None:
        """Raises ``ValueError`` for an impossible width, count, scale or path."""
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
        Parameterisation(self.parameterisation, self.feature_std)  # checks both
        if self.path not in PATHS:
            raise ValueError(f"path {self.path!r} is unknown; choose 'linear' or None")
        width = self.flow_features
        if not len(self.feature_shift) == len(self.feature_scale) == width:
            raise ValueError(f"feature_shift and feature_scale need {width} numbers, one a flowing feature")

    @property
    def mode(self) -> FeatureMode:
        """The feature mode: what flows, what conditions, and which terms the likelihood has."""
        return feature_mode(self.features)

    @property
    def types_flow(self) -> bool:
        """Whether types and charges flow with the positions; see ``modes.FeatureMode``."""
        return self.mode.types_flow

    @property
    def types_given(self) -> bool:
        """Whether the types condition the flow."""
        return self.mode.types_given

    @property
    def knows_types(self) -> bool:
        """Whether the flow knows the types of the atoms at all."""
        return self.mode.knows_types

    @property
    def flow_features(self) -> int:
        """Number F of features that flow with the positions."""
        return self.mode.flow_features(len(self.species))

    @property
    def context_features(self) -> int:
        """Number of features of an atom that condition the flow."""
        return self.mode.context_features(len(self.species)) + 2 * len(self.conditions)
