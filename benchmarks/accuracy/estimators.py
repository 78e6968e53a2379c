"""Stochastic traces against the exact one: a table and a figure of ``benchmarks.accuracy.likelihood``."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from ase import Atoms
from torch import Tensor

from ase_enf.flow import divergence
from ase_enf.flow.model import ENF
from ase_enf.flow.quadrature import clenshaw_curtis
from benchmarks.accuracy.trace_estimators import ESTIMATORS
from benchmarks.accuracy.traces import encoded, moment_between, shortest
from benchmarks.report import RESULTS, write_results


def estimators(flow: ENF, molecules: list[Atoms], draws: int = 40) -> None:
    """Measures error and cost of every stochastic estimate of ladj, on full Jacobians at the 49 nodes of a path."""
    nodes, weights = clenshaw_curtis(48)  # in t, whatever the solver's warp
    neighbours = [item.copy() for item in molecules]
    for item in neighbours:
        item.rattle(0.05, seed=0)
    data = encoded(flow, molecules + neighbours)
    with torch.no_grad():
        path = flow.flow(data.mask, data.context, flow.likelihood_solver).trajectory(data.x, data.h, nodes)
    velocity = flow.velocity(data.mask, data.context)
    jacobians = torch.stack([_jacobian(velocity, t.float(), x, h) for t, (x, h) in zip(nodes, path, strict=True)])
    truth = torch.tensordot(weights.float(), jacobians.diagonal(dim1=-2, dim2=-1).sum(-1), dims=1)  # (B,)
    moment, x, h = moment_between(flow, molecules[:1] * 8)
    probes = divergence.draw_probes(x, h, 8)
    product = shortest(lambda: divergence.hutchinson(moment, x, h, probes), x.device) / 64
    closed = shortest(lambda: divergence.exact(moment, x, h), x.device) / 8
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
