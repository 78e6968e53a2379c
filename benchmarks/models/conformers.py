"""Scores of a flow as a measure of geometries: ``python -m benchmarks.models.conformers MODEL --data QM9.npz -n 100``.

MODEL is a shipped name or a .safetensors file with ``features="given"``. Its exact log p(x | types) is used to answer
two questions about molecules of the test split of QM9:

* geometries: does the DFT geometry have a higher score than with noise, or relaxed by MMFF94 or GFN2-xTB?
* energies: does −log p rank conformers and distorted geometries of one molecule like the GFN2-xTB energy?

For comparison, the tables include the likelihood of the distances by histograms of the training split, and the
energies themselves. Writes ``results/conformers``, ``results/conformers_energy`` and a figure. With ``--work FOLDER``,
geometries and scores are saved, and a second run continues. GFN2-xTB needs ``pip install tblite``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from tqdm import tqdm

import ase_enf
from ase_enf.atoms.files import atomic_write
from ase_enf.data import qm9
from ase_enf.flow.model import ENF
from benchmarks.common import open_work
from benchmarks.models.conformers_figure import draw
from benchmarks.models.conformers_geometries import (
    CONFORMERS,
    DISTORTIONS,
    contrasts,
    distortions,
    faults,
    flexible,
    geometries,
    made_with,
    of_kind,
)
from benchmarks.models.conformers_histogram import DistanceHistogram
from benchmarks.models.conformers_tables import (
    ENERGY_NOTES,
    FLOW,
    GEOMETRY_NOTES,
    HISTOGRAM,
    energy_table,
    energy_verdict,
    geometry_table,
    geometry_verdict,
)
from benchmarks.report import RESULTS, write_results

CHUNK = 128  # structures scored before the scores are saved


def main() -> None:
    """Measures and writes ``results/conformers*``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="shipped name or .safetensors, features='given'")
    parser.add_argument("--data", help="QM9 in any form (default: what ASE_ENF_QM9 names)")
    parser.add_argument("-n", type=int, default=100, help="molecules of the test split (default: 100)")
    parser.add_argument("--ranked", type=int, default=25, help="molecules of the rank correlations (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder that keeps geometries and scores")
    options = parser.parse_args()
    flow = ase_enf.load(options.model)
    if not flow.config.types_given:
        raise SystemExit(f"{options.model}: features={flow.features!r}; conformers are scored by a 'given' model")
    flow.use_backend("auto")
    with tempfile.TemporaryDirectory() as folder:
        run(flow, options, options.work or Path(folder))


def run(flow: ENF, options: argparse.Namespace, work: Path) -> None:
    """Makes the geometries, scores them, and writes tables and figure."""
    test = qm9.load(options.data, split="test")
    order = np.random.default_rng(options.seed).permutation(len(test))
    chosen = [test[k] for k in order[: options.n]]
    folder = work / f"geometries_{made_with()}_seed{options.seed}"
    pairs = geometries(folder, "geometries", chosen, options.seed, contrasts)
    distorted = geometries(folder, "distorted", chosen[: options.ranked], options.seed, distortions)
    flexed, tried = flexible(folder, [test[k] for k in order], options.ranked, options.seed)
    # One pass over all structures, so that batches of one size are full.
    every = [item for group in (*pairs, *distorted, *flexed) for item in group if item.info["fault"] == "none"]
    attach_scores(flow, every, open_work(work / f"scores_{flow.name}", flow))
    histogram = DistanceHistogram.fit(qm9.load(options.data, split="train"))
    for item in every:
        item.info[HISTOGRAM] = histogram.log_likelihood(item)
    ranked = {name: [of_kind(group, name) for group in distorted] for name in DISTORTIONS}
    ranked[CONFORMERS] = [of_kind(group, CONFORMERS) for group in flexed]
    first = geometry_table(pairs, options.seed)
    second = energy_table(ranked)
    common = f"`{flow.name}`, exact trace, seed {options.seed}; tblite {importlib.metadata.version('tblite')}. "
    rough = [item.info["stderr"] for item in every]
    common += f"Integration error of log p: median {np.median(rough):.2g}, largest {max(rough):.2g} nats."
    write_results(
        first.drop(columns=["value", "error"]),
        "conformers",
        "Telling DFT geometries from others of the same molecule",
        "\n\n".join([common, GEOMETRY_NOTES, faults(pairs), geometry_verdict(first)]),
    )
    write_results(
        second.drop(columns=["value", "error"]),
        "conformers_energy",
        "Ranking structures of one molecule by energy",
        "\n\n".join([common, ENERGY_NOTES, tried, faults(distorted + flexed), energy_verdict(second)]),
    )
    draw(pairs, ranked, RESULTS / "conformers.png")


def attach_scores(flow: ENF, structures: list[Atoms], folder: Path) -> None:
    """Puts log p and its error into ``info``; scores found in ``scores.json`` of the folder are reused."""
    path = folder / "scores.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = sorted((item for item in structures if item.info["name"] not in known), key=len)
    starts = range(0, len(missing), CHUNK)
    for start in tqdm(starts, desc="scores", unit="chunk", disable=None, dynamic_ncols=True):
        chunk = missing[start : start + CHUNK]
        table = ase_enf.score(flow, chunk, trace="exact", progress=False)
        rows = zip(chunk, table.log_likelihood, table.stderr, strict=True)
        known |= {item.info["name"]: (value, error) for item, value, error in rows}
        with atomic_write(path) as handle:
            handle.write(json.dumps(known).encode())
    for item in structures:
        item.info[FLOW], item.info["stderr"] = known[item.info["name"]]


if __name__ == "__main__":
    main()
