"""Likelihoods compared with the determinant of the whole map: ``python -m benchmarks.accuracy.jacobian qm9``.

For a few small molecules, log p with the mean of q is computed in float64 from ``slogdet`` of the Jacobian of the
solved flow by autograd (no trace, no quadrature), and as the package does, at default and at tight settings.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from ase.build import molecule
from torch import Tensor

import ase_enf
from ase_enf.atoms.batch import Batch, to_batch
from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS, Solver
from ase_enf.flow.likelihood import log_likelihood
from ase_enf.flow.model import ENF
from benchmarks.report import write_results

REFERENCE = Solver("rk4", steps=300, warp=3.0)
TIGHT, FINE = Solver("dopri5", rtol=1e-9, atol=1e-9), 384


def main() -> None:
    """Compares and writes ``results/jacobian_NAME``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help="shipped name or path of a flow with features='joint'")
    parser.add_argument("--molecules", nargs="+", default=["HCN", "H2O"], help="names of ase.build.molecule")
    options = parser.parse_args()
    flow = ase_enf.load(options.model, device="cpu", dtype="float64")
    rows = []
    for name in options.molecules:
        batch = to_batch([molecule(name)], flow.species, dtype=torch.float64)
        noise = torch.zeros(*batch.mask.shape, flow.config.flow_features, dtype=torch.float64)
        expected = by_determinant(flow, batch, noise)
        default = flow.log_prob(batch, noise, divergence.exact, flow.likelihood_solver)
        tight = float(flow.log_prob(batch, noise, divergence.exact, TIGHT, intervals=FINE).log_prob)
        apart = float(default.log_prob) - expected
        stated = float(default.error)
        rows.append((name, f"{expected:.6f}", f"{apart:.1e}", f"{stated:.1e}", f"{tight - expected:.1e}"))
    columns = ["molecule", "log p by determinant, nats", "default settings, difference", "stated error"]
    columns += ["tight settings, difference"]
    notes = (
        f"Path of the determinant: {REFERENCE}. Default: {flow.likelihood_solver}, {INTERVALS} intervals. "
        f"Tight: {TIGHT}, {FINE} intervals. No likelihood is refined, as `score` does where the stated error is large. "
        "The molecules, of ASE's G2 set, are unlike those that the flow draws: hardly any molecule in QM9 is as small."
    )
    write_results(pd.DataFrame(rows, columns=columns), f"jacobian_{flow.name}", "Likelihood against determinant", notes)


def by_determinant(flow: ENF, batch: Batch, noise: Tensor) -> float:
    """Returns log p of one molecule, nats, from the Jacobian of the solved flow.

    The flow does not move the centroid, so the determinant in the ambient space is that on the subspace (eq. 10).
    """
    data = flow.encode(batch, noise)
    shape, n = (*data.mask.shape, -1), flow.config.dimension

    def latent(flat: Tensor) -> Tensor:
        y = flat.view(shape)
        z = flow.flow(data.mask, None, REFERENCE).forward(y[..., :n], y[..., n:])
        return torch.cat([z.x, z.h], dim=-1).flatten()

    y = torch.cat([data.x, data.h], dim=-1).flatten()
    determinant = torch.linalg.slogdet(torch.autograd.functional.jacobian(latent, y)).logabsdet
    with torch.no_grad():
        z = latent(y).view(shape)
    return float(log_likelihood(data, z[..., :n], z[..., n:], determinant).log_prob)


if __name__ == "__main__":
    main()
