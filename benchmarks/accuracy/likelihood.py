"""Cost and accuracy of exact likelihoods: ``python -m benchmarks.accuracy.likelihood MODEL [--data QM9.npz]``.

MODEL is a shipped name, a .safetensors file, or the .npz of the weights published with the paper. Four tables:

* traces: milliseconds for one exact trace by every method, on the CPU and on CUDA if available;
* scores: exact scores against a converged reference and against the exact trace by a loop of ``autograd.grad`` inside
  dopri5 at 1e-5; float32 against float64;
* quadrature: true error against number of nodes, for the rule in use and for Gauss-Kronrod panels, and the ratio of
  true to estimated error;
* estimators: error against cost of stochastic traces, with a figure.

True errors are relative to ``benchmarks.accuracy.reference``: rk4 whose steps are halved until two independent rules
agree to a tenth of the error to be measured. Times of scores are processor seconds, which other work on the machine
does not affect.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torchdiffeq
from ase import Atoms
from torch import Tensor

import ase_enf
from ase_enf.atoms.batch import canonical_order, to_batch
from ase_enf.data import qm9
from ase_enf.flow import divergence
from ase_enf.flow.divergence import Moment
from ase_enf.flow.likelihood import log_likelihood
from ase_enf.flow.model import ENF
from ase_enf.scoring.score import Row, Scorer
from benchmarks.accuracy.estimators import estimators
from benchmarks.accuracy.quadrature import quadrature
from benchmarks.accuracy.reference import AGREEMENT, REFERENCE, reference, sizes
from benchmarks.accuracy.traces import loop_of_grad, traces
from benchmarks.common import load_flow
from benchmarks.report import RESULTS, write_results

SAMPLE = RESULTS.parent.parent / "tests" / "data" / "qm9_sample.npz"
PARTS = ("traces", "scores", "quadrature", "estimators")
DEFAULT_TOLERANCE = 0.2  # of score


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


def scores(flow: ENF, molecules: list[Atoms], checked: int, loops: int) -> None:
    """Measures exact scores: their time and true error, and those of the traditional method."""
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
            ours = ase_enf.score(flow, item, trace="exact", importance_samples=1).log_likelihood[0]
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
        f"`{flow.name}`, one draw of q, molecules of the test split drawn at random, those checked of {sizes(some)} "
        f"atoms. {REFERENCE} (the smaller of both rms errors). "
        "True errors hold those of the path, of the quadrature and of rounding."
    )
    name = f"likelihood_scores_{flow.name}"
    write_results(pd.DataFrame(rows, columns=["what", "unit", "value"]), name, f"Exact scores, {flow.name}", notes)


def _truth(double: ENF, molecules: list[Atoms], answers: Sequence[pd.Series]) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p by the reference for the noise of ``score``, and the difference of its two rules."""
    measured = [torch.tensor(answer.to_numpy()) for answer in answers]

    def enough(value: Tensor, gap: Tensor) -> Tensor:
        return gap <= AGREEMENT * min((answer - value).square().mean().sqrt() for answer in measured)

    scorer = Scorer(double, "exact", 1, 1, math.inf, 1)
    batch = to_batch(molecules, double.species, double.config.dimension, dtype=torch.float64)
    noise = torch.zeros(*batch.mask.shape, double.config.flow_features, dtype=torch.float64)
    if not double.config.mode.exact:
        for k, item in enumerate(molecules):
            noise[k, : len(item)] = scorer.noise([Row(0, item, canonical_order(item), 0)], noise.shape[-1])[0]
    value, gap = reference(double, batch, noise, lambda index: divergence.exact, enough)
    return value.numpy(), gap.numpy()


def _estimates(flow: ENF, molecules: list[Atoms], tolerance: float) -> pd.DataFrame:
    """Returns the results of ``score`` for exact traces and one draw, with a separate integration error."""
    scorer = Scorer(flow, "exact", 1, 1, tolerance, 32)
    return pd.DataFrame(scorer.run(molecules, [0] * len(molecules), progress=False))


def _spread(error: pd.Series | np.ndarray) -> str:
    return f"{np.sqrt((error**2).mean()):.4f}, {np.abs(error).max():.4f}"


def _traditional(flow: ENF, item: Atoms) -> tuple[float, int]:
    """Returns log p by the exact trace inside dopri5 at 1e-5 for the noise of ``score``, and the evaluations."""
    scorer = Scorer(flow, "exact", 1, 1, math.inf, 1)
    noise = None
    if not flow.config.mode.exact:
        noise = scorer.noise([Row(0, item, canonical_order(item), 0)], flow.config.flow_features)
    data = flow.encode(to_batch([item], flow.species, flow.config.dimension, dtype=flow.dtype), noise)
    velocity, n = flow.velocity(data.mask, data.context), flow.config.dimension
    evaluations = 0

    def augmented(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        x, h = state[0][..., :n], state[0][..., n:]
        with torch.enable_grad():
            return loop_of_grad(Moment(velocity, t), x, h)

    start = (torch.cat([data.x, data.h], dim=-1), torch.zeros(1))
    with torch.no_grad():
        y, ladj = torchdiffeq.odeint(augmented, start, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5, method="dopri5")
    return float(log_likelihood(data, y[-1][..., :n], y[-1][..., n:], ladj[-1]).log_prob), evaluations


if __name__ == "__main__":
    main()
