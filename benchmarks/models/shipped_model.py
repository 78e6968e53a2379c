"""The results on a model card: ``python -m benchmarks.models.shipped_model qm9 -n 1000 --seed 0 [--data QM9.npz]``.

Draws molecules, evaluates them by every metric, draws the gallery and, if data are given, scores the validation split.
With ``--closed-shell``, only molecules with an even number of electrons are drawn, and written to separate files.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

import ase_enf
from ase_enf import metrics, plot
from ase_enf.data import qm9
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import StochasticSampler
from benchmarks.report import RESULTS, write_results

# Metrics that are also measured for the flow itself (churn=0) if the default sampler is stochastic.
WITHOUT_CHURN = ("atom_stability", "molecule_stability", "connected", "validity_largest_fragment", "distance_js")


def main() -> None:
    """Measures and writes ``results/model_NAME``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="shipped name or path")
    parser.add_argument("-n", type=int, default=1000, help="molecules to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--closed-shell", action="store_true", help="no radicals; by the default sampler alone")
    parser.add_argument("--data", default=None, help="QM9 in any form, for the likelihood of its validation split")
    parser.add_argument("--scores", type=int, default=256, help="validation molecules to score")
    parser.add_argument("--trace", default="exact", help="trace of the scores")
    parser.add_argument("--importance-samples", type=int, metavar="K", help="of q a molecule (default: those of score)")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="of which molecules are scored")
    parser.add_argument("--scores-only", action="store_true", help="score and draw nothing, into results/nll_NAME")
    parser.add_argument("--keep-flow", action="store_true", help="keep what is known of the flow itself (churn=0)")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    flow.use_backend("auto")
    if options.scores_only:
        columns = ("metric", "value", "stderr", "denominator", "definition")
        name = f"nll_{flow.name}" + ("_test" if options.split == "test" else "")
        write_results(pd.DataFrame([_nll(flow, options)], columns=columns).round(2), name, f"NLL of `{flow.name}`")
        return
    start = time.perf_counter()
    atoms = ase_enf.generate(flow, options.n, seed=options.seed, closed_shell=options.closed_shell)
    speed = options.n / (time.perf_counter() - start)
    table = metrics.evaluate(atoms, reference="qm9")
    rows = [
        *table.itertuples(index=False, name=None),
        ("samples_per_second", speed, np.nan, options.n, "drawn in one process"),
    ]
    if isinstance(flow.sampling_solver, StochasticSampler) and not options.closed_shell:
        rows += _of_the_flow_itself(flow, options)
    if options.data:
        rows.append(_nll(flow, options))
    result = pd.DataFrame(rows, columns=list(table.columns))
    for column in ("value", "stderr"):
        result[column] = [f"{value:.4g}" for value in result[column]]
    mismatches = np.array([item.info.get("enf_charge_mismatches", 0) for item in atoms])
    unstable = _unstable_elements(atoms)
    versions = ", ".join(f"{key} {value}" for key, value in table.attrs.items())
    again = sum(item.info["enf_attempts"] - 1 for item in atoms)
    shells = f"; {again} radicals (odd numbers of electrons) drawn again" if options.closed_shell else ""
    notes = (
        f"Drawn by {flow.sampling_solver}{shells}. {versions}. Generated charge and type agree on all atoms of "
        f"{int((mismatches == 0).sum())} of {len(atoms)} molecules. Unstable atoms by element: {unstable}."
    )
    name, title = flow.name, f"The model `{flow.name}`"
    if options.closed_shell:
        name, title = f"{name}_closed_shell", f"{title}, closed shells"
    write_results(result, f"model_{name}", title, notes)
    plot.gallery(atoms[:24], RESULTS / f"gallery_{name}.png", dpi=110)
    if not options.closed_shell:
        plot.distance_histogram(atoms, "qm9", RESULTS / f"distances_{name}.png", dpi=110)


def _of_the_flow_itself(flow: ENF, options: argparse.Namespace) -> list[tuple[str, float, float, int, str]]:
    if options.keep_flow:
        known = pd.read_csv(RESULTS / f"model_{flow.name}.csv", comment="#")
        return list(known[known.metric.str.endswith("_without_churn")].itertuples(index=False, name=None))
    plain = metrics.evaluate(ase_enf.generate(flow, options.n, seed=options.seed, churn=0), reference="qm9")
    rows = plain[plain.metric.isin(WITHOUT_CHURN)].itertuples(index=False)
    return [(f"{row.metric}_without_churn", *row[1:]) for row in rows]


def _nll(flow: ENF, options: argparse.Namespace) -> tuple[str, float, float, int, str]:
    valid = qm9.load(options.data, split=options.split)
    chosen = np.random.default_rng(options.seed).permutation(len(valid))[: options.scores]
    how = {} if options.importance_samples is None else {"importance_samples": options.importance_samples}
    scores = ase_enf.score(flow, [valid[k] for k in chosen], trace=options.trace, seed=chosen.tolist(), **how)
    nll = -scores.log_likelihood
    words = f"{scores.kind[0]}, K = {scores.importance_samples[0]}, {scores.trace[0]} trace, {scores.probes[0]} probes"
    definition = f"mean NLL in nats of molecules of the {options.split} split ({words}); stderr over molecules"
    return f"{options.split}_nll", float(nll.mean()), float(nll.std() / np.sqrt(len(nll))), len(nll), definition


def _unstable_elements(atoms: list) -> str:
    """Returns the numbers of unstable and of all atoms of each element as text."""
    from ase_enf.chem.bonds import bond_orders, stable_atoms

    unstable: dict[str, int] = {}
    total: dict[str, int] = {}
    for item in atoms:
        numbers = item.numbers[None]
        good = stable_atoms(numbers, bond_orders(numbers, item.positions[None]))[0]
        for symbol, stable in zip(item.symbols, good, strict=True):
            total[symbol] = total.get(symbol, 0) + 1
            unstable[symbol] = unstable.get(symbol, 0) + (not stable)
    return ", ".join(f"{symbol} {unstable[symbol]} of {total[symbol]}" for symbol in sorted(total))


if __name__ == "__main__":
    main()
