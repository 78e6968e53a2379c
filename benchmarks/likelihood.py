"""What an exact likelihood costs: ``python -m benchmarks.likelihood MODEL [--data QM9.npz]``.

MODEL is a shipped name, a .safetensors, or the .npz of the weights published with the paper. Four tables:

* traces: milliseconds of one exact trace by every method, on the CPU and on CUDA where there is one;
* scores: exact scores against a reference that has converged, against the exact trace by a loop of ``autograd.grad``
  inside dopri5 at 1e-5, and float32 against float64;
* quadrature: true error against nodes, for the rule in use and for Gauss-Kronrod panels, and how honest its estimate
  is;
* estimators: error against cost of stochastic traces, with a figure.

True errors are those against ``benchmarks.reference``: rk4 whose steps are halved until two independent rules agree to
a tenth of the error that is measured. Times of scores are processor seconds, which other work on the machine does not
change.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torchdiffeq
from ase import Atoms
from numpy.polynomial import chebyshev, legendre
from torch import Tensor

import ase_enf
from ase_enf.atoms.batch import canonical_order, to_batch
from ase_enf.data import qm9
from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS
from ase_enf.flow.divergence import Moment
from ase_enf.flow.likelihood import Encoded, log_likelihood
from ase_enf.flow.model import ENF
from ase_enf.flow.quadrature import Integral, clenshaw_curtis, integrate
from ase_enf.scoring.score import Row, Scorer
from benchmarks.common import load_flow
from benchmarks.reference import FIRST, LAST, RULES, reference
from benchmarks.report import RESULTS, write_results
from benchmarks.trace_estimators import ESTIMATORS

SAMPLE = RESULTS.parent.parent / "tests" / "data" / "qm9_sample.npz"
PARTS = ("traces", "scores", "quadrature", "estimators")
AGREEMENT = 0.1  # of the error that is measured: how far two rules of a reference may differ
TIME = 0.4  # where a single trace is measured
DEFAULT_TOLERANCE = 0.2  # of score
REFERENCE = (
    "True error: against rk4 in float64, whose steps were halved until two rules, in u with t = u^2 and with t = u^3, "
    "agreed to a tenth of the error that is measured"
)


def main() -> None:
    """Measures and writes ``results/likelihood_*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name, .safetensors, or .npz of the published weights")
    parser.add_argument("--data", default=str(SAMPLE), help="QM9 in any form (default: the sample of the tests)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables to make (default: all)")
    parser.add_argument("--largest", type=int, help="leave out molecules of more atoms (default: none)")
    parser.add_argument("--molecules", type=int, default=100, help="to score (default: 100)")
    parser.add_argument("--checked", type=int, default=10, help="of them against a tight reference (default: 10)")
    parser.add_argument("--loops", type=int, default=1, help="of them by the loop of autograd.grad (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    flow = load_flow(options.model)
    test = qm9.load(options.data, split="test")
    order = np.random.default_rng(options.seed).permutation(len(test))
    molecules = [test[k] for k in order if len(test[k]) in flow.size_prior]
    molecules = [item for item in molecules if len(item) <= (options.largest or len(item))]
    if "traces" in options.parts:
        traces(flow, molecules)
    if "scores" in options.parts:
        scores(flow, molecules[: options.molecules], options.checked, options.loops)
    if "quadrature" in options.parts:
        quadrature(flow, molecules[: options.checked])
    if "estimators" in options.parts:
        estimators(flow, [item for item in molecules if len(item) == 18][:3])


# One exact trace


def traces(flow: ENF, molecules: list[Atoms]) -> None:
    """Times every method on molecules of three sizes, on every device."""
    rows = []
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        for size in (9, 18, 27):
            if chosen := [item for item in molecules if len(item) == size][:8]:
                rows += _trace_rows(flow.to(device), chosen, size)
    flow.to("cpu")
    columns = ["device", "atoms", "directions", "method", "ms a molecule", "times the loop's speed", "error, nats"]
    notes = (
        f"`{flow.name}`, {flow.config.layers} x {flow.config.hidden}, at t = {TIME} on straight paths, float32; error "
        "against float64. Best of at least 3 runs."
    )
    write_results(pd.DataFrame(rows, columns=columns), "likelihood_traces", "One exact trace", notes)


def _trace_rows(flow: ENF, molecules: list[Atoms], size: int) -> list[tuple[object, ...]]:
    truth = divergence.exact(*_moment(flow.double(), molecules[:1])).trace
    moment, x, h = _moment(flow.float(), (molecules * 8)[:8])
    one, x_1, h_1 = _moment(flow, molecules[:1])
    methods: dict[str, tuple[Callable[[], Tensor], int]] = {
        "loop of autograd.grad": (lambda: _loop_trace(one, x_1, h_1), 1),
        "reverse, directions in chunks": (lambda: divergence.exact(one.__call__, x_1, h_1).trace, 1),
        "forward (vmap of jvp), in chunks": (lambda: _forward_trace(one, x_1, h_1), 1),
        "closed form": (lambda: divergence.exact(one, x_1, h_1).trace, 1),
        "closed form, 8 molecules": (lambda: divergence.exact(moment, x, h).trace, 8),
        "closed form, 8 molecules, compiled kernel": (
            _with_kernel(flow, lambda: divergence.exact(moment, x, h).trace),
            8,
        ),
        "(velocity alone, 8 molecules)": (lambda: _velocity_only(moment, x, h), 8),
    }
    times = {name: _seconds(work, flow.device) / count for name, (work, count) in methods.items()}
    rows = []
    for name, (work, _) in methods.items():
        gap = "" if name.startswith("(") else f"{float((work()[:1].double() - truth).abs()):.1e}"
        ratio = f"{times['loop of autograd.grad'] / times[name]:.1f}"
        device, directions = flow.device.type, size * (x.shape[-1] + h.shape[-1])
        rows.append((device, size, directions, name, f"{1e3 * times[name]:.2f}", ratio, gap))
    return rows


def _with_kernel(flow: ENF, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        flow.use_backend("auto")
        result = work()
        flow.use_backend("torch")
        return result

    return run


def _moment(flow: ENF, molecules: list[Atoms]) -> tuple[Moment, Tensor, Tensor]:
    """Returns the field at one time and a point between data and noise, as in flow matching."""
    data = _encode(flow, molecules)
    generator = torch.Generator().manual_seed(0)
    x, h = (  # the same noise for every molecule, alone or not
        (1 - TIME) * part + TIME * torch.randn(part.shape[1:], generator=generator).to(part)
        for part in (data.x, data.h)
    )
    x = x - x.mean(dim=1, keepdim=True)
    return Moment(flow.velocity(data.mask, data.context), torch.tensor(TIME).to(x)), x, h


def _encode(flow: ENF, molecules: list[Atoms]) -> Encoded:
    """Returns molecules of one size in the coordinates of the flow, all with the same noise, in every precision."""
    batch = to_batch(molecules, flow.species, flow.config.dimension, dtype=torch.float64)
    noise = torch.randn(*batch.mask.shape[1:], flow.config.flow_features, generator=torch.Generator().manual_seed(1))
    noise = noise.expand(len(molecules), -1, -1)
    with torch.no_grad():
        return flow.encode(batch.to(flow.device, flow.dtype), noise.to(flow.device, flow.dtype))


def _loop_trace(moment: Moment, x: Tensor, h: Tensor) -> Tensor:
    return _loop(moment, x, h)[1]


def _loop(moment: Moment, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and trace as they are usually written: one call of autograd.grad for each direction."""
    n = x.shape[-1]
    y = torch.cat([x, h], dim=-1).detach().requires_grad_(True)
    out = torch.cat(moment(y[..., :n], y[..., n:]), dim=-1)
    trace = torch.zeros(len(x)).to(x)
    for i in range(y.shape[1]):
        for c in range(y.shape[2]):
            (row,) = torch.autograd.grad(out[:, i, c].sum(), y, retain_graph=True)
            trace = trace + row[:, i, c]
    return out.detach(), trace


def _forward_trace(moment: Moment, x: Tensor, h: Tensor, chunk: int = 18) -> Tensor:
    n, shape = x.shape[-1], (*x.shape[:2], x.shape[-1] + h.shape[-1])
    y = torch.cat([x, h], dim=-1)

    def field(y: Tensor) -> Tensor:
        return torch.cat(moment(y[..., :n], y[..., n:]), dim=-1)

    def along(v: Tensor) -> Tensor:
        return (torch.func.jvp(field, (y,), (v,))[1] * v).sum()

    basis = torch.eye(shape[1] * shape[2]).to(x).view(-1, *shape[1:]).unsqueeze(1)
    with torch.no_grad():
        return torch.func.vmap(along, chunk_size=chunk)(basis).sum().view(1)


def _velocity_only(moment: Moment, x: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        return moment(x, h)[0]


def _seconds(work: Callable[[], object], device: torch.device, least: float = 1.0) -> float:
    """Returns the shortest of at least 3 runs and ``least`` seconds, after a warm-up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


# Whole scores


def scores(flow: ENF, molecules: list[Atoms], checked: int, loops: int) -> None:
    """Exact scores: time, true error, and the traditional way."""
    backend = flow.use_backend("auto")  # compiled now, if it has to be
    start = time.process_time()
    once = _estimates(flow, molecules, math.inf)
    seconds = time.process_time() - start
    flow.use_backend("torch")
    start = time.process_time()
    _estimates(flow, molecules[: len(molecules) // 4], math.inf)
    plain = time.process_time() - start
    flow.use_backend("auto")
    some, first = molecules[:checked], once.log_likelihood[:checked]
    refined = _estimates(flow, some, DEFAULT_TOLERANCE)
    double = copy.deepcopy(flow).double()
    double.use_backend("auto")
    truth, gap = _truth(double, some, (first, refined.log_likelihood))
    rounding = first - _estimates(double, some, math.inf).log_likelihood
    rough = int((once.integration_error > DEFAULT_TOLERANCE).sum())
    rows = [
        (f"{len(molecules)} exact scores, 49 nodes, backend {backend}", "processor s", f"{seconds:.1f}"),
        (f"the first {len(molecules) // 4} of them, backend torch", "processor s", f"{plain:.1f}"),
        ("their estimated integration error, rms and largest", "nats", _spread(once.integration_error)),
        (f"rows above {DEFAULT_TOLERANCE}, whose nodes the default doubles", "", str(rough)),
        (f"true error, 49 nodes, rms and largest of {checked}", "nats", _spread(first - truth)),
        (f"true error, default, rms and largest of {checked}", "nats", _spread(refined.log_likelihood - truth)),
        (f"estimated error, default, rms and largest of {checked}", "nats", _spread(refined.integration_error)),
        (f"float32 against float64, rms and largest of {checked}", "nats", _spread(rounding)),
        (f"gap between the two rules of the reference, rms and largest of {checked}", "nats", _spread(gap)),
    ]
    same_size = [item for item in molecules if len(item) == 18][:loops]
    if same_size:
        gaps, slow, fast = [], 0.0, 0.0
        for item in same_size:
            start = time.process_time()
            flow.use_backend("torch")
            value, evaluations = _traditional(flow, item)
            slow += time.process_time() - start
            flow.use_backend("auto")
            start = time.process_time()
            ours = ase_enf.score(flow, item, trace="exact", draws=1).log_likelihood[0]
            fast += time.process_time() - start
            gaps.append(ours - value)
        rows += [
            (
                f"18 atoms, loop of autograd.grad inside dopri5 at 1e-5, mean of {len(gaps)}",
                "processor s",
                f"{slow / len(gaps):.1f}",
            ),
            ("its evaluations of the trace, last molecule", "", str(evaluations)),
            ("the same molecules by score, one at a time", "processor s", f"{fast / len(gaps):.2f}"),
            ("ratio", "", f"{slow / fast:.0f}"),
            ("largest difference of the two", "nats", f"{max(map(abs, gaps)):.3f}"),
        ]
    notes = (
        f"`{flow.name}`, one draw of q, molecules of the test split drawn at random, those checked of {_sizes(some)} "
        f"atoms. {REFERENCE} (the smaller of both rms errors). "
        "True errors hold those of the path, of the quadrature and of rounding."
    )
    name = f"likelihood_scores_{flow.name}"
    write_results(pd.DataFrame(rows, columns=["what", "unit", "value"]), name, "Exact scores", notes)


def _sizes(molecules: list[Atoms]) -> str:
    return ", ".join(str(len(item)) for item in molecules)


def _truth(double: ENF, molecules: list[Atoms], answers: Sequence[pd.Series]) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p by the reference, with the noise of ``score``, and the gap between its two rules."""
    measured = [torch.tensor(answer.to_numpy()) for answer in answers]

    def enough(value: Tensor, gap: Tensor) -> Tensor:
        return gap <= AGREEMENT * min((answer - value).square().mean().sqrt() for answer in measured)

    scorer = Scorer(double, "exact", 1, 1, math.inf, 1)
    batch = to_batch(molecules, double.species, double.config.dimension, dtype=torch.float64)
    noise = torch.zeros(*batch.mask.shape, double.config.flow_features, dtype=torch.float64)
    if double.features == "joint":
        for k, item in enumerate(molecules):
            noise[k, : len(item)] = scorer.noise([Row(0, item, canonical_order(item), 0)], noise.shape[-1])[0]
    value, gap = reference(double, batch, noise, lambda index: divergence.exact, enough)
    return value.numpy(), gap.numpy()


def _estimates(flow: ENF, molecules: list[Atoms], tolerance: float) -> pd.DataFrame:
    """Returns what ``score`` computes for exact traces and one draw, the integration error by itself."""
    scorer = Scorer(flow, "exact", 1, 1, tolerance, 32)
    return pd.DataFrame(scorer.run(molecules, [0] * len(molecules), progress=False))


def _spread(error: pd.Series | np.ndarray) -> str:
    return f"{np.sqrt((error**2).mean()):.4f}, {np.abs(error).max():.4f}"


def _traditional(flow: ENF, item: Atoms) -> tuple[float, int]:
    """Returns log p by the exact trace inside dopri5 at 1e-5, with the noise of ``score``, and the evaluations."""
    scorer = Scorer(flow, "exact", 1, 1, math.inf, 1)
    noise = (
        scorer.noise([Row(0, item, canonical_order(item), 0)], flow.config.flow_features)
        if flow.features == "joint"
        else None
    )
    data = flow.encode(to_batch([item], flow.species, flow.config.dimension, dtype=flow.dtype), noise)
    velocity, n = flow.velocity(data.mask, data.context), flow.config.dimension
    evaluations = 0

    def augmented(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        x, h = state[0][..., :n], state[0][..., n:]
        with torch.enable_grad():
            return _loop(Moment(velocity, t), x, h)

    start = (torch.cat([data.x, data.h], dim=-1), torch.zeros(1))
    with torch.no_grad():
        y, ladj = torchdiffeq.odeint(augmented, start, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5, method="dopri5")
    return float(log_likelihood(data, y[-1][..., :n], y[-1][..., n:], ladj[-1]).log_prob), evaluations


# Quadrature


def quadrature(flow: ENF, molecules: list[Atoms]) -> None:
    """True integration error against the number of nodes, along accurate paths."""
    double = copy.deepcopy(flow).double()
    double.use_backend("auto")
    paths = [_trace_of_path(double, item) for item in molecules]
    interpolants = [path.trace for path in paths]
    truths, gap = (np.array([getattr(path, name) for path in paths]) for name in ("integral", "gap"))
    rows = []
    for warp in (1, 2):
        for intervals in (16, 24, 32, 48, 64, 96):
            answers = [_clenshaw_curtis(f, warp, intervals) for f in interpolants]
            error = np.array([float(a.value) for a in answers]) - truths
            name = "Clenshaw-Curtis in t" if warp == 1 else f"Clenshaw-Curtis in u, t = u^{warp}"
            rows.append(_quadrature_row(name, intervals + 1, error, [float(a.error) for a in answers], gap))
    for panels in (1, 2, 3, 4, 6):
        error, estimate = [], []
        for f, truth in zip(interpolants, truths, strict=True):
            gauss, kronrod = _gauss_kronrod(f, panels)
            error.append(kronrod - truth)
            estimate.append(abs(kronrod - gauss))
        rows.append(
            _quadrature_row(f"Gauss-Kronrod 7-15, {panels} panels", 15 * panels, np.array(error), estimate, gap)
        )
    columns = ["rule", "nodes", "rms error, nats", "largest", "mean estimate", "rms of error / estimate", "covered"]
    notes = (
        f"`{flow.name}`, {len(molecules)} molecules of the test split drawn at random, of {_sizes(molecules)} atoms, "
        f"each with one draw of q. {REFERENCE} (that of "
        "the rule in use, or its estimate where that is larger); the gap that was left is "
        f"{np.sqrt((gap**2).mean()):.1e} nats rms, and rms errors below ten times that are not resolved (<). Traces "
        "are those of the path in u with t = u^2, as a Chebyshev interpolant in u. Estimates: of the nested rules for "
        "Clenshaw-Curtis, |K15 - G7| for the others. Covered: the share of molecules whose error is below the estimate."
    )
    name = f"likelihood_quadrature_{flow.name}"
    write_results(pd.DataFrame(rows, columns=columns), name, "Quadrature of the trace", notes)


def _clenshaw_curtis(trace: Callable[[np.ndarray], np.ndarray], warp: float, intervals: int) -> Integral:
    u = clenshaw_curtis(intervals)[0].numpy()
    return integrate(torch.from_numpy(trace(u**warp) * warp * u ** (warp - 1)))


def _quadrature_row(
    name: str, nodes: int, error: np.ndarray, estimate: Sequence[float], gap: np.ndarray
) -> tuple[str, ...]:
    bars = np.array(estimate)
    ratio = np.sqrt(((error / bars) ** 2).mean())
    covered = (np.abs(error) <= bars).mean()
    rms, largest = np.sqrt((error**2).mean()), np.abs(error).max()
    least = np.sqrt((gap**2).mean()) / AGREEMENT
    if rms < least:
        return (name, str(nodes), f"< {least:.4f}", "", f"{bars.mean():.4f}", "", "")
    return (name, str(nodes), f"{rms:.4f}", f"{largest:.4f}", f"{bars.mean():.4f}", f"{ratio:.2f}", f"{covered:.2f}")


class PathTrace(NamedTuple):
    """Tr J along a path that has converged."""

    trace: Callable[[np.ndarray], np.ndarray]  # of t
    integral: float  # nats, the mean of two rules
    gap: float  # between them


def _trace_of_path(double: ENF, item: Atoms) -> PathTrace:
    """Returns Tr J as a function of t along the path of one molecule."""
    data, warp, intervals = _encode(double, [item]), double.likelihood_solver.warp, FIRST
    while True:
        with torch.no_grad():
            one, other = (
                double.flow(data.mask, data.context, rule).forward(
                    data.x, data.h, divergence.exact, intervals=intervals
                )
                for rule in RULES
            )
        integral, gap = float(one.ladj + other.ladj) / 2, abs(float(one.ladj - other.ladj))
        points = 2 * clenshaw_curtis(intervals)[0].numpy() - 1
        coefficients = np.linalg.solve(chebyshev.chebvander(points, intervals), one.traces[:, 0, 0].numpy())
        path = PathTrace(functools.partial(_interpolated, coefficients), integral, gap)
        used = _clenshaw_curtis(path.trace, warp, INTERVALS)
        if gap <= AGREEMENT * max(abs(float(used.value) - integral), float(used.error)):
            return path
        if intervals == LAST:
            raise ArithmeticError(f"{item.get_chemical_formula()}: two rules still differ by {gap:.2g} nats")
        intervals *= 2


def _interpolated(coefficients: np.ndarray, t: np.ndarray) -> np.ndarray:
    return chebyshev.chebval(2 * np.sqrt(t) - 1, coefficients)


def _gauss_kronrod(f: Callable[[np.ndarray], np.ndarray], panels: int) -> tuple[float, float]:
    """Returns the composite 7-point Gauss and 15-point Kronrod values on equal panels."""
    points, weights = legendre.leggauss(7)
    gauss = kronrod = 0.0
    for k in range(panels):
        low, high = k / panels, (k + 1) / panels
        gauss += float(weights @ f((low + high) / 2 + (high - low) / 2 * points)) * (high - low) / 2
        kronrod += _kronrod(f, low, high)
    return gauss, kronrod


def _kronrod(f: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    half = np.array([0.991455371120812639, 0.949107912342758525, 0.864864423359769073, 0.741531185599394440,
                     0.586087235467691130, 0.405845151377397167, 0.207784955007898468])  # fmt: skip
    weights = np.array([0.022935322010529225, 0.063092092629978553, 0.104790010322250184, 0.140653259715525919,
                        0.169004726639267903, 0.190350578064785410, 0.204432940075298892])  # fmt: skip
    centre, radius = (low + high) / 2, (high - low) / 2
    inner = weights @ (f(centre - radius * half) + f(centre + radius * half))
    return float(radius * (inner + 0.209482141084727828 * f(np.array(centre))))


# Stochastic estimates


def estimators(flow: ENF, molecules: list[Atoms], draws: int = 40) -> None:
    """Error of ladj against cost for every stochastic estimate, on Jacobians written out at the 49 nodes of a path."""
    nodes, weights = clenshaw_curtis(48)  # in t, whatever the solver's warp
    neighbours = [item.copy() for item in molecules]
    for item in neighbours:
        item.rattle(0.05, seed=0)
    data = _encode(flow, molecules + neighbours)
    with torch.no_grad():
        path = flow.flow(data.mask, data.context, flow.likelihood_solver).trajectory(data.x, data.h, nodes)
    velocity = flow.velocity(data.mask, data.context)
    jacobians = torch.stack([_jacobian(velocity, t.float(), x, h) for t, (x, h) in zip(nodes, path, strict=True)])
    truth = torch.tensordot(weights.float(), jacobians.diagonal(dim1=-2, dim2=-1).sum(-1), dims=1)  # (B,)
    moment, x, h = _moment(flow, molecules[:1] * 8)
    probes = divergence.draw_probes(x, h, 8)
    product = _seconds(lambda: divergence.hutchinson(moment, x, h, probes), x.device) / 64
    closed = _seconds(lambda: divergence.exact(moment, x, h), x.device) / 8
    rows = []
    for name, estimator in ESTIMATORS.items():
        for products in (6, 12, 24, 48, 96):
            generator = torch.Generator().manual_seed(0)
            errors = torch.stack(
                [
                    torch.tensordot(weights.float(), estimator(jacobians, products, generator), dims=1) - truth
                    for _ in range(draws)
                ]
            )
            gaps = errors[:, : len(molecules)] - errors[:, len(molecules) :]
            rms, rms_gap = (float(error.square().mean().sqrt()) for error in (errors, gaps))
            rows.append((name, products, 49 * products * product, rms, rms_gap))
    rows.append(("closed form", x.shape[1] * (3 + h.shape[-1]), 49 * closed, 0.0, 0.0))
    columns = ["estimate", "products", "seconds a molecule", "rms error, nats", "of a difference"]
    table = pd.DataFrame(rows, columns=columns)
    _plot(table, flow.name)
    for column, digits in zip(columns[2:], (2, 3, 3), strict=True):
        table[column] = [f"{value:.{digits}f}" for value in table[column]]
    notes = (
        f"`{flow.name}`, {len(molecules)} molecules of {x.shape[1]} atoms, {draws} draws each. Cost: the products with "
        f"the Jacobian at 49 nodes, each {1e3 * product:.2f} ms a molecule by a reverse pass in batches of 8, velocity "
        "included; the closed form pushes all directions at once. The error of the quadrature is left out. The last "
        "column is the error of the difference to the same molecule rattled by 0.05 Å, with the same probes (other "
        "probes would give 1.41 times the error of one)."
    )
    name = f"likelihood_estimators_{flow.name}"
    write_results(table, name, "Stochastic traces against the exact one", notes)


def _jacobian(velocity: Callable[..., tuple[Tensor, Tensor]], t: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Returns the whole Jacobian of each molecule, shape (B, D, D)."""
    n = x.shape[-1]
    y = torch.cat([x, h], dim=-1).detach().requires_grad_(True)
    with torch.enable_grad():
        out = torch.cat(velocity(t, y[..., :n], y[..., n:]), dim=-1)
        basis = torch.eye(y[0].numel()).view(-1, 1, *y.shape[1:]).expand(-1, len(y), -1, -1)
        pieces = [torch.autograd.grad(out, y, v, is_grads_batched=True, retain_graph=True)[0] for v in basis.split(18)]
    return torch.cat(pieces).flatten(2).transpose(0, 1)


def _plot(table: pd.DataFrame, name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for estimate, part in table.groupby("estimate", sort=False):
        if estimate == "closed form":
            axes.axvline(part["seconds a molecule"].iloc[0], color="black", label="closed form: no error")
        else:
            axes.plot(part["seconds a molecule"], part["rms error, nats"], marker="o", label=estimate)
    axes.set(xscale="log", yscale="log", xlabel="seconds a molecule, traces alone", ylabel="rms error of log p, nats")
    axes.set_title(f"Traces of {name}, 18 atoms")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / f"likelihood_estimators_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
