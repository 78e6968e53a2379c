"""What turns gradients into steps: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("auto", "muon", "adamw")
# First and last maps ("weight" is all that kernel dynamics has): their rows or columns are single features.
OUTER = ("embed", "out", "weight")


class Optimizers:
    """Several optimizers, each for its own parameters, that step together and share one schedule.

    Args:
        members: Optimizers; the learning rate each was made with is its peak.
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
        """Forgets the gradients."""
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
        """Takes over what :meth:`state_dict` returned, or the state of one optimizer, as older runs have it.

        Weight decays stay as they were built: a run may go on with another.
        """
        states = [states] if isinstance(states, dict) else states
        for member, state in zip(self.members, states, strict=True):
            decays = [group["weight_decay"] for group in member.param_groups]
            member.load_state_dict(state)
            for group, decay in zip(member.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def resolve_optimizer(name: str, objective: str) -> str:
    """Returns "muon" or "adamw"; "auto" is muon for flow matching, where torch has it, and the paper's for nll.

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
    """Builds "adamw", or "muon": that for the hidden matrices of ``network``, AdamW for all other ``parameters``.

    Muon (Jordan et al. 2024) steps along the orthogonal polar factor U Vᵀ of the momentum G = U S Vᵀ, so that all
    directions of a layer learn at one pace; scaled by 0.2 √max(rows, columns), its steps have the root mean square
    0.2 · ``matrix_rate`` (Liu et al. 2025).

    Args:
        network: The network of the dynamics.
        parameters: All that is trained.
        name: "muon" or "adamw".
        rate: Peak learning rate of AdamW.
        matrix_rate: Peak learning rate of Muon.
        matrix_decay: Decoupled weight decay of Muon, which bounds the matrices where nothing else does.
        weight_decay: That of AdamW.
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
    """Returns the trained matrices between hidden features, which are neither vectors nor the first or last map."""
    return [
        parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
        and parameter.ndim == 2
        and min(parameter.shape) > 1
        and name.split(".")[0] not in OUTER
    ]
