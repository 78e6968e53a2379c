"""An ASE calculator whose energy is ``−kT log p``."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, CalculatorSetupError, all_changes
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import ContinuousFlow, Solver, SolverError, resolve_solver
from ase_enf.flow.likelihood import Later, log_likelihood, smeared
from ase_enf.flow.model import ENF, check_flow
from ase_enf.scoring.conditions import conditioned_batch

# With these steps the forces of methanol (qm9-conditional, atoms displaced by 0.05 Å) are off by 1 %; with half as
# many, by 10 % and more.
DEFAULT_SOLVER = Solver("rk4", steps=96, warp=2.0)
# Standard deviation of the Gaussian that smears the data, Å. Along a line of ±0.05 Å, the converged log p of this
# methanol differs from a parabola by 1.2 nats rms without it and by 0.06 with it.
DEFAULT_SMEAR = 0.05


class EnergyAndForces(NamedTuple):
    """What :func:`log_likelihood_gradient` returns."""

    log_likelihood: float  # nats
    gradient: np.ndarray  # (M, n), nats/Å


def smeared_log_likelihood(
    flow: ENF, batch: Batch, solver: Solver = DEFAULT_SOLVER, intervals: int | None = None, smear: float = 0.0
) -> Tensor:
    """Log-density of data smeared by a Gaussian, at the mean of q; differentiable with respect to positions.

    Up to a factor, the smeared x + σ z is x_t = (1 − t) x + t z on the path of flow matching:

    log p_σ(x) = log p_t((1 − t) x) + D log(1 − t),  t = σ / (σ + s)

    where s is the length unit of the flow and D its number of dimensions; p_t is the density of the flow on the
    interval from t to 1. Lifted features are smeared likewise, in units of the flow. σ = 0 is the flow itself.

    Args:
        flow: A flow.
        batch: Molecules.
        solver: A fixed-step solver.
        intervals: Number of intervals of the quadrature of the trace, a multiple of 8; by default the number of steps
            of the solver, rounded up.
        smear: σ, Å.

    Returns:
        Nats, shape (B,), without p_M.

    Raises:
        ValueError: For a negative σ, or a positive one for a flow that was not trained by flow matching.
    """
    _check_smear(flow, smear)
    if intervals is None:  # one step from each node to the next, and no others
        intervals, solver = 8 * -(-solver.steps // 8), replace(solver, steps=1)
    noise = torch.zeros(*batch.mask.shape, flow.config.flow_features, dtype=flow.dtype, device=flow.device)
    time = smear / (smear + flow.config.position_scale)
    data = smeared(flow.encode(batch, noise), time)
    velocity = flow.velocity(data.mask, data.context)
    trace = functools.partial(divergence.exact, create_graph=torch.is_grad_enabled())
    path = ContinuousFlow(Later(velocity, time) if time else velocity, data.mask, solver)
    z = path.forward(data.x, data.h, trace, intervals=intervals)
    return log_likelihood(data, z.x, z.h, z.ladj).log_density


def log_likelihood_gradient(
    flow: ENF,
    atoms: Atoms,
    solver: Solver = DEFAULT_SOLVER,
    intervals: int | None = None,
    smear: float = 0.0,
) -> EnergyAndForces:
    """Log-likelihood and its gradient with respect to the positions, by back-propagation through the flow.

    With the exact trace, the mean of q and a fixed-step solver, it is a smooth function of the positions, invariant to
    translation, to permutation and, for an equivariant network, to rotation. The gradient is exactly that of this
    function.

    Args:
        flow: A flow.
        atoms: One structure.
        solver: A fixed-step solver.
        intervals: Of the quadrature of the trace; see :func:`smeared_log_likelihood`.
        smear: Standard deviation of the Gaussian that smears the data, Å.

    Returns:
        Nats, and nats/Å. For ``features="joint"`` the value is the bound's integrand at the mean of q, without p_M.
        Its errors, of the path and of the quadrature, are smooth; ``score`` estimates both.

    Raises:
        ValueError: See ``atoms.batch.check_atoms`` and :func:`smeared_log_likelihood`.
        SolverError: If the solution is not finite.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), hidden=8, layers=1))
        >>> log_likelihood_gradient(flow, molecule("H2O")).gradient.shape
        (3, 3)
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the mode of the caller
        batch = conditioned_batch(flow, [atoms])
        positions = batch.positions.requires_grad_(True)
        total = smeared_log_likelihood(flow, batch._replace(positions=positions), solver, intervals, smear).sum()
        (gradient,) = torch.autograd.grad(total, positions)
        gradient = gradient - gradient.mean(dim=1, keepdim=True)  # because positions are centred first
    _check_finite(atoms, total, gradient)
    return EnergyAndForces(float(total.detach()), gradient[0].cpu().double().numpy())


def _check_finite(atoms: Atoms, *values: Tensor) -> None:
    if not all(torch.isfinite(value).all() for value in values):
        raise SolverError(
            f"log-likelihood of {atoms.get_chemical_formula()} is not finite; move its atoms apart or use more steps"
        )


def _check_smear(flow: ENF, smear: float) -> None:
    if not 0 <= smear < float("inf"):
        raise ValueError(f"smear={smear}: must be a length in Å, at least 0")
    if smear and not flow.matched:
        raise ValueError(
            f"smear={smear:g}: only a flow trained by flow matching knows smeared data, and {flow.name!r} is not one; "
            "use smear=0"
        )


class ENFCalculator(Calculator):
    """Pseudo-energy of a flow, ``E = −kT log p``, with forces by automatic differentiation.

    With kT in eV, energies are in eV and forces in eV/Å, and ASE's optimisers, filters and dynamics run on them; the
    structures that they find need not be sound. It is *not* a potential energy: a flow trained on relaxed structures
    has a sharp well around each of them, and absolute values compare within one composition only. ``ase.io.write``
    stores it as ``energy``.

    It tells how far a structure is from the training data of the flow, and in which direction they lie. The learned
    density of relaxed structures is rough on the scale of a hundredth of an Å, which no solver can mend; therefore the
    default is the density of smeared data. Even so it is no force field: optimisers converge, but not always to a sound
    structure (``qm9-conditional`` took water, displaced by 0.05 Å, to O-H lengths of 1.15 and 1.36 Å), and trajectories
    are not physical. On one core and for three to six atoms, an energy takes some two seconds and a call with forces 15
    to 30 seconds; both times fall with ``steps``. ``benchmarks/accuracy/calculator.py`` measures all of this.

    ``results`` also has ``log_likelihood`` (nats), which ASE's writers drop; ``ase_enf.annotate`` puts it into
    ``info``.

    Args:
        flow: A flow, as ``ase_enf.load`` returns it; in float64 (``load(..., dtype="float64")``) forces are exact to
            rounding.
        kT: Unit of energy, eV; 0.0257 is room temperature.
        solver: A fixed-step ``Solver`` or the name of a method. The number of steps is rounded up to a multiple of
            eight; the trace is evaluated once in each, so that fewer steps take less time.
        steps: Number of fixed steps, when ``solver`` is a name or None.
        smear: Standard deviation σ of a Gaussian that smears the data, Å; see :func:`smeared_log_likelihood`. 0 is the
            density of ``score``. By default 0.05 for flows of molecules trained by flow matching, otherwise 0.

    Raises:
        CalculatorSetupError: For an adaptive solver, a stochastic sampler, a kT that is not positive, or a positive
            ``smear`` for a flow that was not trained by flow matching; on calculation, for periodic cells, unknown
            elements and other structures that the flow does not accept.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.flow.config import ENFConfig
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
        smear: float | None = None,
    ) -> None:
        self._flow = check_flow(flow)
        try:
            self._solver = resolve_solver(solver, steps, DEFAULT_SOLVER)
        except TypeError as error:
            raise CalculatorSetupError(str(error)) from None
        if self._solver.adaptive:
            raise CalculatorSetupError(
                f"solver {self._solver.method!r} is adaptive, which makes forces noisy; use rk4 or midpoint"
            )
        smooth = flow.matched and flow.config.knows_types
        try:
            self._smear = float(smear if smear is not None else DEFAULT_SMEAR if smooth else 0.0)
            _check_smear(flow, self._smear)
        except (OverflowError, TypeError, ValueError) as error:
            raise CalculatorSetupError(str(error)) from None
        super().__init__(
            kT=float(kT), model=flow.name, solver=self._solver.method, steps=self._solver.steps, smear=self._smear
        )

    def set(self, **settings: Any) -> dict[str, Any]:
        """Changes kT; any other change needs a new calculator."""
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
        wanted = properties or ["energy"]
        super().calculate(atoms, wanted, system_changes)
        try:
            if "forces" in wanted:
                value, gradient = log_likelihood_gradient(self._flow, self.atoms, self._solver, smear=self._smear)
            else:
                value, gradient = self._log_likelihood(), None
        except ValueError as error:
            raise CalculatorSetupError(str(error)) from None
        except SolverError as error:
            raise CalculationFailed(str(error)) from None
        kT = self.parameters["kT"]  # noqa: N806
        self.results = {"energy": -kT * value, "free_energy": -kT * value, "log_likelihood": value}
        if gradient is not None:
            self.results["forces"] = np.zeros((len(self.atoms), 3))
            self.results["forces"][:, : gradient.shape[1]] = kT * gradient

    def _log_likelihood(self) -> float:
        flow = self._flow
        batch = conditioned_batch(flow, [self.atoms])
        with torch.no_grad():
            value = smeared_log_likelihood(flow, batch, self._solver, smear=self._smear)
        _check_finite(self.atoms, value)
        return float(value)
