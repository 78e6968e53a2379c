"""Converged likelihoods, as a reference for the errors of solvers and quadratures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ase import Atoms
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.flow.continuous import Solver, TraceMethod
from ase_enf.flow.model import ENF

# Two rules that share neither steps nor nodes, except at the ends: rk4 on grids that differ in density near the data,
# with the quadrature in u, t = u².
RULES = (Solver("rk4", steps=1, warp=2.0), Solver("rk4", steps=1, warp=3.0))
FIRST, LAST = 96, 768  # intervals; a step each
AGREEMENT = 0.1  # of the error that is measured: how far the rules may differ
REFERENCE = (
    "True error: against rk4 in float64, whose steps were halved until two rules, in u with t = u^2 and with t = u^3, "
    "agreed to a tenth of the error that is measured"
)


def reference(
    flow: ENF,
    batch: Batch,
    noise: Tensor,
    trace: Callable[[Tensor], TraceMethod],
    enough: Callable[[Tensor, Tensor], Tensor],
    strict: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns log-likelihoods by two independent rules whose steps are halved until both agree.

    Args:
        flow: A flow in float64.
        batch: B molecules.
        noise: ε of q, shape (B, M, F).
        trace: Indices of molecules → method of their trace.
        enough: (log-likelihoods, differences of the rules), shape (B,) each → whether the rules agree well enough.
        strict: Whether it is an error if they still differ with ``LAST`` intervals; otherwise the value is NaN.

    Returns:
        The mean and the difference of both rules, nats, shape (B,) each.

    Raises:
        ArithmeticError: If they still differ, with ``strict``.
    """
    value = torch.full((len(batch.mask),), torch.nan, dtype=torch.float64)
    gap = torch.full_like(value, torch.inf)
    todo, intervals = torch.arange(len(value)), FIRST
    while len(todo):
        if intervals > LAST and not strict:
            value[todo] = torch.nan
            break
        if intervals > LAST:
            raise ArithmeticError(f"molecules {todo.tolist()} of {flow.name}: gaps {gap[todo].tolist()} nats remain")
        part = batch.select(todo)
        both = [
            flow.log_prob(part, noise[todo], trace(todo), rule, intervals, estimate_path_error=False).log_prob
            for rule in RULES
        ]
        value[todo], gap[todo] = (both[0] + both[1]) / 2, (both[0] - both[1]).abs()
        todo, intervals = todo[~enough(value, gap)[todo]], 2 * intervals
    return value, gap


def sizes(molecules: list[Atoms]) -> str:
    """Returns the numbers of atoms of some molecules as text."""
    return ", ".join(str(len(item)) for item in molecules)
