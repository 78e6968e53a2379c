"""An ASE calculator whose energy is ``−kT log p``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, CalculatorSetupError, all_changes
from torch import Tensor

from ase_enf import base, divergence
from ase_enf.flow import Solver, SolverError, resolve_solver
from ase_enf.model import ENF, check_flow
from ase_enf.molecules import to_batch

DEFAULT_SOLVER = Solver("midpoint", steps=16, warp=2.0)
DEFAULT_INTERVALS = 32


class EnergyAndForces(NamedTuple):
    """What :func:`log_likelihood_gradient` returns."""

    log_likelihood: float  # nats
    gradient: np.ndarray  # (M, n), nats / Å


def log_likelihood_gradient(
    flow: ENF, atoms: Atoms, solver: Solver = DEFAULT_SOLVER, intervals: int = DEFAULT_INTERVALS
) -> EnergyAndForces:
    """Log-likelihood and its gradient with respect to positions, by back-propagation through the flow.

    The exact trace, the mean of q and a fixed-step solver make it a smooth function of the positions that is invariant
    to translation and the order of atoms, and with an equivariant network to rotation; its gradient is that of exactly
    this function.

    Args:
        flow: A flow.
        atoms: One structure.
        solver: A fixed-step solver.
        intervals: Of the quadrature of the trace; see ``ContinuousFlow.transport``.

    Returns:
        Nats, and nats / Å. For ``features="joint"`` the value is the bound's integrand at the mean of q, without p_M.
        It holds the errors of the path and of the quadrature, which are smooth; ``score`` estimates both.

    Raises:
        ValueError: See ``molecules.check_atoms``.
        SolverError: If the solution is not finite.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.model import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> log_likelihood_gradient(flow, molecule("H2O")).gradient.shape
        (3, 3)
    """
    batch = to_batch([atoms], flow.species, flow.config.dimension, dtype=flow.dtype).to(flow.device)
    with torch.enable_grad():
        positions = batch.positions.requires_grad_(True)
        total = _log_likelihood(flow, batch._replace(positions=positions), solver, intervals)
        (gradient,) = torch.autograd.grad(total, positions)
        gradient = gradient - gradient.mean(dim=1, keepdim=True)  # positions were centred before
    if not (torch.isfinite(total) and torch.isfinite(gradient).all()):
        raise SolverError(
            f"log-likelihood of {atoms.get_chemical_formula()} is not finite; move its atoms apart or use more steps"
        )
    return EnergyAndForces(float(total.detach()), gradient[0].cpu().double().numpy())


def _log_likelihood(flow: ENF, batch: Any, solver: Solver, intervals: int) -> Tensor:
    shape = (*batch.mask.shape, flow.config.flow_features)
    data = flow.encode(batch, torch.zeros(shape, dtype=flow.dtype, device=flow.device))
    trace = functools.partial(divergence.exact, create_graph=True)
    z = flow.flow(data.mask, data.context, solver).forward(data.x, data.h, trace, intervals=intervals)
    log_base = base.position_log_prob(z.x, data.mask) + base.feature_log_prob(z.h, data.mask)
    return (log_base + z.ladj + data.log_volume - data.log_q).sum()


class ENFCalculator(Calculator):
    """Pseudo-energy of a flow, ``E = −kT log p``, with forces by automatic differentiation.

    With kT in eV the energy is in eV and the forces in eV/Å, so that every ASE optimiser, filter and dynamics works on
    it. It is *not* a potential energy: a flow trained on relaxed structures gives a sharp well around each of them, and
    absolute values mean something within one composition only. ``ase.io.write`` stores it as ``energy``.

    ``results`` also hold ``log_likelihood`` (nats), which ASE's writers drop; ``ase_enf.annotate`` puts it in ``info``.

    Args:
        flow: A flow, as of ``ase_enf.load``; float64 (``load(..., dtype="float64")``) for forces to rounding.
        kT: Energy unit, eV; 0.0257 is room temperature.
        solver: A fixed-step ``Solver`` or the name of a method.
        steps: Number of fixed steps, when ``solver`` is a name or None.

    Raises:
        CalculatorSetupError: For an adaptive solver, one with churn or a kT that is not positive; on calculation, for
            periodic cells, unknown elements and other structures that the flow cannot take.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.model import ENFConfig
        >>> water = molecule("H2O")
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> water.calc = ENFCalculator(flow, kT=1.0)
        >>> water.get_forces().shape
        (3, 3)
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 (ASE's own declaration)
    discard_results_on_any_change = True  # set(kT=...) asks for new energies

    def __init__(
        self,
        flow: ENF,
        kT: float = 0.0257,
        solver: str | Solver | None = None,
        steps: int | None = None,  # noqa: N803
    ) -> None:
        self._flow = check_flow(flow)
        self._solver = resolve_solver(solver, steps, DEFAULT_SOLVER)
        if self._solver.adaptive:
            raise CalculatorSetupError(
                f"solver {self._solver.method!r} is adaptive, which makes forces noisy; use rk4 or midpoint"
            )
        if self._solver.churn:
            raise CalculatorSetupError(
                f"solver churn={self._solver.churn:g}: renewed noise has no likelihood and no energy; use churn=0"
            )
        super().__init__(kT=float(kT), model=flow.name, solver=self._solver.method, steps=self._solver.steps)

    def set(self, **settings: Any) -> dict[str, Any]:
        """Changes kT; anything else takes a new calculator."""
        fixed = set(settings) - {"kT"} if hasattr(self, "parameters") and self.parameters else set()
        if fixed:
            raise CalculatorSetupError(f"{sorted(fixed)[0]} is fixed; make a new ENFCalculator for another")
        kT = settings.get("kT", 1.0)  # noqa: N806
        if not 0 < kT < float("inf"):
            raise CalculatorSetupError(f"kT={kT}: must be a positive energy in eV")
        return super().set(**settings)

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Fills ``results``; called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        try:
            value, gradient = log_likelihood_gradient(self._flow, self.atoms, self._solver)
        except ValueError as error:
            raise CalculatorSetupError(str(error)) from None
        except SolverError as error:
            raise CalculationFailed(str(error)) from None
        energy = -self.parameters["kT"] * value
        forces = np.zeros((len(self.atoms), 3))
        forces[:, : gradient.shape[1]] = self.parameters["kT"] * gradient
        self.results = {"energy": energy, "free_energy": energy, "forces": forces, "log_likelihood": value}
