"""The cost of one exact trace by every method: a table of ``benchmarks.accuracy.likelihood``."""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd
import torch
from ase import Atoms
from torch import Tensor

from ase_enf.atoms.batch import to_batch
from ase_enf.flow import divergence
from ase_enf.flow.divergence import Moment
from ase_enf.flow.likelihood import Encoded
from ase_enf.flow.model import ENF
from benchmarks.report import write_results

TIME = 0.4  # where a single trace is measured


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
    truth = divergence.exact(*moment_between(flow.double(), molecules[:1])).trace
    moment, x, h = moment_between(flow.float(), (molecules * 8)[:8])
    one, x_1, h_1 = moment_between(flow, molecules[:1])
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
    times = {name: shortest(work, flow.device) / count for name, (work, count) in methods.items()}
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


def moment_between(flow: ENF, molecules: list[Atoms]) -> tuple[Moment, Tensor, Tensor]:
    """Returns the field at one time and a point between data and noise, as in flow matching."""
    data = encoded(flow, molecules)
    generator = torch.Generator().manual_seed(0)
    x, h = (  # the same noise for every molecule, alone or not
        (1 - TIME) * part + TIME * torch.randn(part.shape[1:], generator=generator).to(part)
        for part in (data.x, data.h)
    )
    x = x - x.mean(dim=1, keepdim=True)
    return Moment(flow.velocity(data.mask, data.context), torch.tensor(TIME).to(x)), x, h


def encoded(flow: ENF, molecules: list[Atoms]) -> Encoded:
    """Returns molecules of one size in the coordinates of the flow, with the same noise in every precision."""
    batch = to_batch(molecules, flow.species, flow.config.dimension, dtype=torch.float64)
    noise = torch.randn(*batch.mask.shape[1:], flow.config.flow_features, generator=torch.Generator().manual_seed(1))
    noise = noise.expand(len(molecules), -1, -1)
    with torch.no_grad():
        return flow.encode(batch.to(flow.device, flow.dtype), noise.to(flow.device, flow.dtype))


def _loop_trace(moment: Moment, x: Tensor, h: Tensor) -> Tensor:
    return loop_of_grad(moment, x, h)[1]


def loop_of_grad(moment: Moment, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Returns velocity and trace by the usual method: one call of autograd.grad for each direction."""
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


def shortest(work: Callable[[], object], device: torch.device, least: float = 1.0) -> float:
    """Returns the shortest time of at least 3 runs that take at least ``least`` seconds, after a warm-up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
