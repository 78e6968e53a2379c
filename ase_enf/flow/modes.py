"""The three feature modes: what flows, what conditions, and which terms a likelihood has.

Only this file distinguishes the modes by name; all other code asks the object of the mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ase_enf.atoms.batch import Batch


@dataclass(frozen=True)
class FeatureMode:
    """How a flow treats the elements of the atoms.

    Args:
        name: Name, as in ``ENFConfig.features``.
        density: What the likelihood is, in words.
        types_flow: Whether types and charges flow with the positions. The likelihood is then a lower bound from draws
            of q(h̃|h), log p_Z(z) + ladj − log q(h̃|h) + log p_M(M) (eq. 12).
        types_given: Whether the types condition the flow. The likelihood is then exact, log p_Z(z) + ladj, and a sample
            needs a composition.

    Example:
        >>> MODES["joint"].flow_features(5), MODES["given"].context_features(5), MODES["none"].knows_types
        (6, 5, False)
    """

    name: str
    density: str
    types_flow: bool = False
    types_given: bool = False

    @property
    def knows_types(self) -> bool:
        """Whether the flow knows types at all; without them it accepts any element."""
        return self.types_flow or self.types_given

    @property
    def exact(self) -> bool:
        """Whether the likelihood is exact, with the terms of positions only and no draws of q."""
        return not self.types_flow

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of a likelihood that are not zero, as ``likelihood.Terms`` calls them."""
        return ("log_base", "ladj") if self.exact else ("log_base", "ladj", "log_q", "log_size")

    def flow_features(self, species: int) -> int:
        """Returns the number F of features that flow: one score for each element, and the charge."""
        return species + 1 if self.types_flow else 0

    def context_features(self, species: int) -> int:
        """Returns the number of features by which the types condition the flow."""
        return species if self.types_given else 0

    def conditioning(self, batch: Batch) -> list[Tensor]:
        """Returns the features by which the types condition a batch: [(B, M, K)], or an empty list."""
        return [batch.types] if self.types_given else []


MODES = {
    mode.name: mode
    for mode in (
        FeatureMode("joint", "lower bound of log p(x, h, M)", types_flow=True),
        FeatureMode("none", "exact log p(x | M)"),
        FeatureMode("given", "exact log p(x | types)", types_given=True),
    )
}


def feature_mode(name: str) -> FeatureMode:
    """Returns a mode by its name.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> feature_mode("given").density
        'exact log p(x | types)'
    """
    if name not in MODES:
        raise ValueError(f"features {name!r} is unknown; choose one of {', '.join(MODES)}")
    return MODES[name]
