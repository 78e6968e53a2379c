"""Classifier-free guidance: how far molecules are pushed towards the requested properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ase_enf.flow.context import Context, split_context
from ase_enf.flow.divergence import Velocity
from ase_enf.flow.model import ENF
from ase_enf.sampling.properties import PropertyRequest
from ase_enf.values import check_guidance

# Key in ``info`` of the weight; molecules that are not guided have none.
GUIDANCE_KEY = "enf_guidance"


@dataclass(frozen=True, eq=False)
class GuidedVelocity:
    """Velocity of molecules that are guided towards their conditions (Ho and Salimans 2022).

    v(x) = v(x | ∅) + w (v(x | c) − v(x | ∅))

    On the path of flow matching v is linear in the mean of the data given x_t, so that it makes no difference whether
    velocities, denoised molecules or scores are combined. w = 1 is the conditional flow, w = 0 the flow without
    conditions. With w > 1, molecules show c more clearly than those of the training set do, roughly as if drawn from
    p(x | c) p(c | x)^(w − 1); their true density is not known.

    Args:
        both: Velocity of a doubled batch: the molecules under c first, then the same ones without conditions.
        weight: w.

    Example:
        >>> both = lambda t, x, h: (torch.tensor([3.0, 1.0])[:, None, None].expand_as(x), h)
        >>> velocity = GuidedVelocity(both, weight=2.0)
        >>> velocity(torch.tensor(0.5), torch.zeros(1, 1, 2), torch.zeros(1, 1, 0))[0].tolist()
        [[[5.0, 5.0]]]
    """

    both: Velocity
    weight: float

    def __call__(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx/dt (B, M, n) and dh/dt (B, M, F)."""
        times = torch.cat([t, t]) if t.ndim else t
        rates = self.both(times, torch.cat([x, x]), torch.cat([h, h]))
        return tuple(free + self.weight * (known - free) for known, free in (rate.chunk(2) for rate in rates))


def guided_velocity(
    flow: ENF, mask: Tensor, context: Tensor | Context | None, free: Tensor | Context | None, weight: float
) -> Velocity:
    """Returns the guided velocity of a batch; one evaluation of the network serves both contexts.

    Args:
        flow: The flow.
        mask: True for real atoms, shape (B, M).
        context: Context with the requested properties.
        free: Context without them.
        weight: See :class:`GuidedVelocity`.
    """
    pairs = zip(split_context(context), split_context(free), strict=True)
    together = Context(*(None if known is None else torch.cat([known, unknown]) for known, unknown in pairs))
    return GuidedVelocity(flow.velocity(torch.cat([mask, mask]), together), weight)


def requested_guidance(flow: ENF, guidance: Any, properties: PropertyRequest) -> float:
    """Returns the requested weight, checked.

    Raises:
        ValueError: For anything but a finite number, and for a weight other than 1 without properties or for a flow
            without conditions.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(hidden=8, layers=1))
        >>> requested_guidance(flow, 1, PropertyRequest(flow, None))
        1.0
    """
    weight = check_guidance(guidance)
    if weight == 1.0 or properties.ranges:
        return weight
    if not flow.config.conditions:
        raise ValueError(
            f"guidance={weight:g}: this model has no conditions to guide to; leave guidance out, or train a "
            "model with --condition"
        )
    names = ", ".join(condition.name for condition in flow.config.conditions)
    raise ValueError(f"guidance={weight:g}: needs a property to guide to; ask for one of {names}, or leave it out")
