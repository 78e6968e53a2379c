"""The two ways to draw: the flow itself, by a solver of its ODE, and the stochastic sampler of the same path."""

from __future__ import annotations

from dataclasses import replace

from ase_enf.flow.continuous import Solver, resolve_solver
from ase_enf.flow.model import ENF, STOCHASTIC_SAMPLER
from ase_enf.flow.stochastic import StochasticSampler


def resolve_sampler(
    flow: ENF, solver: str | Solver | StochasticSampler | None, steps: int | None, churn: float | None
) -> Solver | StochasticSampler:
    """Returns how molecules of a flow are drawn: by a solver of the ODE, or by the stochastic sampler.

    Raises:
        ValueError: For churn beside a solver, or a stochastic sampler for a flow that flow matching has not trained.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(hidden=8, layers=1, path="linear"))
        >>> str(resolve_sampler(flow, None, 64, None)), str(resolve_sampler(flow, "rk4", 8, None))
        ('stochastic, 64 steps, warp 2, churn 50', 'rk4, 8 steps, warp 1.75')
    """
    if solver is not None and churn:
        raise ValueError(f"solver={str(solver)!r} and churn={churn:g} are two ways to draw; leave one of them out")
    if isinstance(solver, StochasticSampler):
        if steps is not None or churn is not None:
            raise ValueError(f"solver={str(solver)!r} already says its steps and churn; leave them out")
        flow.check_sampler(solver)
        return solver
    default = flow.sampling_solver if churn is None else STOCHASTIC_SAMPLER
    if solver is not None or churn == 0 or isinstance(default, Solver):
        return resolve_solver(solver, steps, flow.ode_solver)
    given = {"steps": steps, "churn": churn}
    chosen = replace(default, **{name: value for name, value in given.items() if value is not None})
    flow.check_sampler(chosen)
    return chosen
