"""Table 2, row E-NF, from the weights published with the paper.

python -m benchmarks.tables.published_table2 WEIGHTS.npz --data QM9.npz --work FOLDER

Draws 10,000 molecules and scores the 13,083 of the test split (or ``--test N`` of them), in pieces that are saved in
the folder, so that a second run continues. ``--only samples`` and ``--only scores`` can run at the same time with one
thread each; a run without ``--only`` then writes the table.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ase import Atoms

from ase_enf import metrics, plot
from ase_enf.chem.bonds import stability
from ase_enf.data import qm9
from ase_enf.flow.continuous import Solver
from ase_enf.flow.model import ENF
from benchmarks.common import PIECE, draw_in_pieces, load_flow, open_work, percent, score_in_pieces
from benchmarks.report import RESULTS, write_results

SOLVER = Solver("rk4", steps=32)
SCORE = {"trace": "hutchinson", "probes": 1, "importance_samples": 1, "max_stderr": math.inf, "batch_size": 64}
EXACT = {
    "trace": "exact",
    "importance_samples": 1,
    "max_stderr": math.inf,
}  # the same quadrature: what differs is the trace


def main() -> None:
    """Measures the missing pieces and writes ``results/published_table2``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help=".npz of the published arrays, or the torch checkpoint")
    parser.add_argument("--data", required=True, help="QM9 in any form, for its test split")
    parser.add_argument("--work", type=Path, required=True, help="folder for the pieces")
    parser.add_argument("-n", type=int, default=10_000, help="molecules to draw (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples and scores (default: 0)")
    parser.add_argument("--test", type=int, default=None, help="test molecules to score, at random (default: all)")
    parser.add_argument("--exact", type=int, default=50, help="test molecules to score exactly, too (default: 50)")
    parser.add_argument("--only", choices=("samples", "scores"), help="one half of the work, and no table")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    flow = load_flow(options.weights)
    flow.use_backend("auto")  # the numbers of torch to rounding
    open_work(options.work, flow, seed=options.seed, solver=SOLVER, piece=PIECE, score=SCORE)
    if options.only != "scores":
        atoms = draw_in_pieces(flow, options.n, options.seed, options.work, SOLVER)
    if options.only != "samples":
        test = qm9.load(options.data, split="test")
        order = np.random.default_rng(options.seed).permutation(len(test))[: options.test].tolist()
        scores = score_in_pieces(flow, test, order, options.seed, options.work, SCORE)
        exact = score_in_pieces(flow, test, order[: options.exact], options.seed, options.work, EXACT)
    if options.only is None:
        write_table(flow, atoms, scores, exact, options.seed)


def write_table(flow: ENF, atoms: list[Atoms], scores: pd.DataFrame, exact: pd.DataFrame, seed: int) -> None:
    """Writes our values and those of the paper, with all errors."""
    extra = 3 * math.log(flow.config.position_scale)
    finite = scores[np.isfinite(scores.log_likelihood)]
    nll, error = -float(finite.log_likelihood.mean()), float(finite.log_likelihood.sem())
    both = exact.merge(scores, on="molecule", suffixes=("_exact", "_probe"))
    gap = both.log_likelihood_probe - both.log_likelihood_exact
    verdict = stability(atoms)
    report = metrics.evaluate(atoms, reference="qm9")
    stable = [item for item, good in zip(atoms, verdict.stable, strict=True) if good]

    denominators = report.set_index("metric").denominator

    def measure(metric: str) -> tuple[str, str]:
        return f"{percent(report, metric)} %", str(denominators[metric])

    measured = [
        ("atoms stable", "85 %", *measure("atom_stability")),
        ("molecules stable", "4.9 %", *measure("molecule_stability")),
        ("sanitised by RDKit, of the stable", "100 %", *measure("validity_stable")),
        ("unique, of the stable", "71.8 %", *measure("uniqueness_stable")),
        ("novel, of the stable", "84.4 %", *measure("novelty_stable")),
        ("valid (largest fragment)", "40.2 % (EDM)", *measure("validity_largest_fragment")),
    ]
    rows = [
        ("NLL of the test split, nats", "−59.7", f"{nll:.2f} ± {error:.2f}", str(len(finite))),
        ("the same, the scale counted on 3M dimensions as released", "−59.7", f"{nll + extra:.2f}", str(len(finite))),
        *measured,
    ]
    probes, redrawn = SCORE["probes"], sum(item.info["enf_attempts"] > 1 for item in atoms)
    notes = (
        f"NLL: eq. 12 with one draw of q and {probes} Rademacher probe, the trace by quadrature on 49 nodes of an rk4 "
        f"path, for {len(scores)} molecules of the test split at random; each has noise of its own, so the error over "
        f"molecules holds that of draws and probes. {len(scores) - len(finite)} are not finite and left out. On "
        f"{len(both)} of them the exact trace gives {-both.log_likelihood_exact.mean():.2f} with the same draws and "
        f"nodes; one probe differs from it by {gap.mean():.2f} ± {gap.sem():.2f} on average, with a standard deviation "
        f"of {gap.std():.1f}. Samples: {SOLVER}, seed {seed}, {redrawn} drawn again; {len(stable)} of {len(atoms)} are "
        "stable."
    )
    table = pd.DataFrame(rows, columns=["what", "paper", "from the published weights", "denominator"])
    write_results(table, "published_table2", "Table 2, E-NF, from the published weights", notes)
    plot.gallery(atoms[:12] + stable[:12], RESULTS / "gallery_published.png", dpi=110)  # as Figure 5: any, then stable


if __name__ == "__main__":
    main()
