"""From gradients to steps: AdamW or Muon, their learning rate, clipping, and the moving average of the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

GRADIENT_HISTORY = 50
# First and last maps, whose rows or columns are single features; "weight" is the only parameter of kernel dynamics.
OUTER = ("embed", "out", "weight")


class Optimizers:
    """Several optimizers, each for its own parameters, that step together and share one schedule.

    Args:
        members: Optimizers; the learning rate that each was made with is its peak.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = tuple(members)
        self.peaks = [[group["lr"] for group in member.param_groups] for member in self.members]

    def set_rate(self, fraction: float) -> None:
        """Sets every learning rate to this fraction of its peak."""
        for member, peaks in zip(self.members, self.peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = fraction * peak

    def zero_grad(self) -> None:
        """Clears the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Takes one step with all members."""
        for member in self.members:
            member.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the states of all members in order."""
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: Sequence[dict[str, Any]] | dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, or the state of a single optimizer, as older runs have it.

        Weight decays stay as they were built: a resumed run may have another one.
        """
        states = [states] if isinstance(states, dict) else states
        for member, state in zip(self.members, states, strict=True):
            decays = [group["weight_decay"] for group in member.param_groups]
            member.load_state_dict(state)
            for group, decay in zip(member.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def resolve_optimizer(name: str, objective: str) -> str:
    """Returns "muon" or "adamw"; "auto" is muon for flow matching, where torch has it, else adamw, as in the paper.

    Raises:
        ValueError: For "muon" where torch does not have it.
    """
    available = hasattr(torch.optim, "Muon")
    if name == "muon" and not available:
        raise ValueError(f"optimizer='muon' needs torch 2.9 or newer, not {torch.__version__}; use optimizer='adamw'")
    if name != "auto":
        return name
    return "muon" if available and objective == "flow_matching" else "adamw"


def build_optimizers(
    network: nn.Module,
    parameters: Sequence[Tensor],
    name: str,
    rate: float,
    matrix_rate: float,
    matrix_decay: float = 0.0,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
) -> Optimizers:
    """Builds "adamw", or "muon": Muon for the hidden matrices of ``network`` and AdamW for all other ``parameters``.

    Muon (Jordan et al. 2024) steps along the orthogonal polar factor U Vᵀ of the momentum G = U S Vᵀ, so that all
    directions of a layer learn at the same pace; scaled by 0.2 √max(rows, columns), its steps have the root mean square
    0.2 · ``matrix_rate`` (Liu et al. 2025).

    Args:
        network: The network of the dynamics.
        parameters: All trained parameters.
        name: "muon" or "adamw".
        rate: Peak learning rate of AdamW.
        matrix_rate: Peak learning rate of Muon.
        matrix_decay: Decoupled weight decay of Muon; nothing else bounds the matrices.
        weight_decay: Weight decay of AdamW.
        amsgrad: Whether AdamW keeps the maximum of its second moments.

    Example:
        >>> from ase_enf.nn.egnn import EGNN
        >>> network = EGNN(2, 3, hidden=8, layers=1)
        >>> optimizers = build_optimizers(network, list(network.parameters()), "adamw", 1e-3, 1e-2)
        >>> [type(member).__name__ for member in optimizers.members]
        ['AdamW']
    """
    matrices = hidden_matrices(network) if name == "muon" else []
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    members: list[torch.optim.Optimizer] = []
    if others:
        members.append(torch.optim.AdamW(others, rate, weight_decay=weight_decay, amsgrad=amsgrad, foreach=True))
    if matrices:
        scale = "match_rms_adamw"
        members.append(torch.optim.Muon(matrices, matrix_rate, weight_decay=matrix_decay, adjust_lr_fn=scale))
    return Optimizers(members)


def hidden_matrices(network: nn.Module) -> list[Tensor]:
    """Returns the trained matrices between hidden features: neither vectors nor the first or last maps."""
    return [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) > 1
        and name.split(".")[0] not in OUTER
    ]


def schedule(step: int, total: float, warmup: int, cool_down: float = 1.0) -> float:
    """Fraction of the peak learning rate: linear warm-up, a plateau, then half a cosine down to zero.

    Args:
        step: Number of steps before this one.
        total: Total number of steps, after which the rate is zero; infinite for a constant rate.
        warmup: Steps of the warm-up.
        cool_down: Fraction of the steps after the warm-up over which the rate falls.

    Example:
        >>> [round(schedule(step, 110, 10), 3) for step in (0, 4, 9, 60, 110)]
        [0.1, 0.5, 1.0, 0.5, 0.0]
        >>> [round(schedule(step, 110, 10, cool_down=0.2), 3) for step in (60, 90, 100, 110)]
        [1.0, 1.0, 0.5, 0.0]
        >>> [schedule(step, math.inf, 10) for step in (4, 10**9)]
        [0.5, 1.0]
    """
    warmup = min(warmup, max(int(total / 2), 1)) if total < math.inf else warmup
    if step < warmup:
        return (step + 1) / warmup
    if total == math.inf:
        return 1.0
    falling = cool_down * max(total - warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(max(1.0 - (total - step) / falling, 0.0), 1.0)))


class Clipper:
    """Clips gradients at 1.5 · mean + 2 · std of the recent norms.

    Args:
        norms: Recent norms, of a run that is resumed.
    """

    def __init__(self, norms: Sequence[float] = ()) -> None:
        self.norms: deque[float] = deque(norms, maxlen=GRADIENT_HISTORY)

    def __call__(self, parameters: Sequence[Tensor]) -> float:
        """Clips in place and returns the norm before clipping; a non-finite norm does not enter the history."""
        limit = 1.5 * float(np.mean(self.norms)) + 2.0 * float(np.std(self.norms)) if self.norms else math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit if math.isfinite(limit) else 1e9))
        if math.isfinite(norm) and norm > 0:  # norms of zero would clip everything to zero
            self.norms.append(min(norm, limit))
        return norm


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Returns an exponential moving average of the weights, with a shorter memory during the first steps.

    w̄ ← d w̄ + (1 − d) w,   d = min(``decay``, (1 + k) / (10 + k)) after k updates.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> average = moving_average(model, 0.999)
        >>> average.update_parameters(model)
        >>> int(average.n_averaged)
        1
    """

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        now = min(decay, (1.0 + float(count)) / (10.0 + float(count)))
        torch._foreach_lerp_(averaged, current, 1.0 - now)

    return AveragedModel(model, multi_avg_fn=update)
