"""The published weights: ``python -m benchmarks.accuracy.released_weights WEIGHTS.npz --vectors VECTORS.npz``.

The file of vectors holds what the published implementation computes in float64 for a few molecules. Every quantity is
compared and listed with its largest deviation; the exit code is 1 if one exceeds its bound.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import Solver
from ase_enf.flow.en_flows import convert_en_flows
from ase_enf.flow.model import ENF
from benchmarks.report import write_results

# Largest deviation allowed, relative to the largest entry. The solution was computed with tolerance 1e-6.
BOUNDS = {
    "dequantised": 1e-8,
    "log_q": 1e-8,
    "after_actnorm": 1e-8,
    "actnorm_logdet_as_released": 1e-8,
    "velocity": 1e-8,
    "latent": 1e-3,
    "ode_ladj": 1e-3,
}
SOLVER = Solver("dopri5", rtol=1e-7, atol=1e-7)


class Deviation(NamedTuple):
    """Deviation of one quantity of one molecule from the published implementation."""

    molecule: int
    quantity: str
    deviation: float  # relative to the largest entry


def main() -> int:
    """Compares and writes ``results/released_weights``; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("weights", help=".npz of the published arrays, or the torch checkpoint")
    parser.add_argument("--vectors", required=True, help=".npz of what the published implementation computes")
    options = parser.parse_args()
    flow = convert_en_flows(options.weights).double()
    table = pd.DataFrame(compare(flow, options.vectors))
    worst = table.groupby("quantity", sort=False).deviation.agg(["max", "count"]).reset_index()
    worst["bound"] = worst.quantity.map(BOUNDS)
    worst["ok"] = worst["max"] <= worst.bound
    extra = 3 * math.log(flow.config.position_scale)
    notes = (
        "Largest deviation of each quantity, relative to its largest entry, float64. "
        f"The published log-determinant of the scaling counts 3M dimensions instead of 3(M - 1): log p as released is "
        f"{extra:.3f} nats lower (the NLL higher) than ours for every molecule."
    )
    printed = worst.assign(max=[f"{value:.1e}" for value in worst["max"]], bound=[f"{b:.0e}" for b in worst.bound])
    write_results(printed, "released_weights", "Parity with the published implementation", notes)
    return 0 if worst.ok.all() else 1


def compare(flow: ENF, vectors: str) -> Iterator[Deviation]:
    """Yields every deviation between a flow in float64 and a vectors file."""
    with np.load(vectors, allow_pickle=False) as file:
        known = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    count = 1 + max(int(name.split(".")[0]) for name in known)
    for k in range(count):
        theirs = {name.split(".", 1)[1]: value for name, value in known.items() if name.startswith(f"{k}.")}
        ours = quantities(flow, theirs)
        for name in BOUNDS:
            if name in theirs:
                difference = float((ours[name] - theirs[name]).abs().max())
                yield Deviation(k, name, difference / max(1.0, float(theirs[name].abs().max())))


def quantities(flow: ENF, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns our values of all quantities that the vectors hold for one molecule."""
    numbers = given["numbers"]
    elements = torch.tensor([1, 6, 7, 8, 9])
    mask = torch.ones(1, len(numbers), dtype=torch.bool)
    batch = Batch(
        given["x"][None], (numbers[:, None] == elements)[None].double(), numbers[None, :, None].double(), mask
    )
    with torch.no_grad():
        data = flow.encode(batch, given["eps"][None])
        t = given["t"].float().double()  # the published code passes the time in single precision
        dx, dh = flow.dynamics(t, data.x, data.h, mask)
    shift, scale = (
        torch.tensor(values, dtype=torch.float64) for values in (flow.config.feature_shift, flow.config.feature_scale)
    )
    result = {
        "dequantised": data.h[0] / scale + shift,
        "log_q": data.log_q[0],
        "after_actnorm": torch.cat([data.x, data.h], dim=-1)[0],
        "actnorm_logdet_as_released": data.log_volume[0] - 3 * math.log(flow.config.position_scale),
        "velocity": torch.cat([dx, dh], dim=-1)[0],
    }
    if "latent" in given:
        with torch.no_grad():
            z = flow.flow(mask, None, SOLVER).forward(data.x, data.h, divergence.exact, intervals=96)
        result |= {"latent": torch.cat([z.x, z.h], dim=-1)[0], "ode_ladj": z.ladj[0]}
    return result


if __name__ == "__main__":
    sys.exit(main())
