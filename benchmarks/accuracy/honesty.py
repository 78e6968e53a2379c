"""True errors of log p relative to the stated ones, for shipped models and solvers.

python -m benchmarks.accuracy.honesty --work FOLDER

Each piece of work is a few structures and one kind of trace; finished pieces are saved, so that a second run continues.
``--only MODEL ... --no-table`` divides the work among processes.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from ase import Atoms
from ase.collections import g2
from torch import Tensor
from tqdm import tqdm

from ase_enf.atoms.files import atomic_write
from ase_enf.data import samples
from ase_enf.flow import divergence
from ase_enf.flow.continuous import INTERVALS, Solver, TraceMethod
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.scoring.conditions import conditioned_batch
from benchmarks.accuracy.reference import AGREEMENT, LAST, REFERENCE, reference
from benchmarks.common import open_work
from benchmarks.report import write_results

OWN, REFINED = "own", "refined"
SOLVERS = {
    OWN: None,
    "rk4": Solver("rk4", steps=8),
    "midpoint": Solver("midpoint", steps=32),
    "euler": Solver("euler", steps=100, warp=2.0),
    "dopri5": Solver(),
    "dopri5, loose": Solver(rtol=1e-3, atol=1e-3, warp=2.0),
    "dopri5, tight": Solver(rtol=1e-7, atol=1e-7, warp=2.0),
}
COARSE = {key: solver for key, solver in SOLVERS.items() if key != "dopri5, tight"}  # references are expensive
TIGHT = ("dw4", "lj13")  # models of which it is measured too
MODELS = ("dw4", "lj13", "lj13-factor2", "qm9-small", "qm9-conditional", "qm9-conformers", "qm9")
KINDS = ("exact", "hutchinson")
ALLOWED = 3.0  # true error over stated error
TOGETHER = 5  # structures of a piece: small networks are faster with several
NAME = "honesty"
NOTES = (
    "Nats, float64. The theorem: no true error is above three times the stated one (tests/test_honesty.py holds it for "
    "some of these). Molecules: the smallest of g2 that the model knows, one draw of q; particles: samples of the "
    f"system. Own: the solver that the model comes with. Refined: with twice the nodes, half of which keep their "
    f"traces. Hutchinson: the same two probes everywhere. {REFERENCE} (or its estimate, where that is larger). "
    f"Structures are counted where that is reached within {LAST} intervals. One command for each model, with the "
    "number of structures in its rows."
)


def main() -> None:
    """Measures what is missing and writes ``results/honesty.*``."""
    options = parsed()
    torch.set_num_threads(1)
    for name in options.only or MODELS:
        measure(name, options)
    if not options.no_table:
        write_table(options)


def parsed() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pieces")
    parser.add_argument("--only", nargs="*", choices=MODELS, help="some of the models (default: all)")
    parser.add_argument("--structures", type=int, default=20, help="of each model (default: 20)")
    parser.add_argument("--no-table", action="store_true", help="do the work and write no table")
    options = parser.parse_args()
    if options.structures < 1:
        parser.error(f"--structures {options.structures} must be positive")
    return options


def structures(flow: ENF, count: int) -> list[Atoms]:
    """Returns samples of the system of a particle model, otherwise the smallest molecules of g2 that the model knows.

    Example:
        >>> structures(load("qm9-small"), 2)[0].get_chemical_formula()
        'CO2'
    """
    if flow.features == "none":
        return samples.sample(flow.name, count, seed=3, ladders=4, burn_in=200, progress=False).to_atoms()
    known = [g2[name] for name in g2.names if set(g2[name].symbols) <= set(flow.species)]
    known = [atoms for atoms in known if len(atoms) in flow.size_prior and atoms.numbers.sum() % 2 == 0]
    known = [atoms for atoms in known if not atoms.get_initial_magnetic_moments().any()]
    return sorted(known, key=len)[:count]


def errors(
    flow: ENF, atoms: Sequence[Atoms], solvers: Mapping[str, Solver | None], kind: str, strict: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns true and stated errors of log p.

    They include the refinement by which ``score`` reduces an error: twice the nodes, half of which keep their traces.

    Args:
        flow: A flow in float64.
        atoms: B structures.
        solvers: Name → solver; ``None`` is the flow's own, which must be among them under the name ``OWN``.
        kind: Kind of the trace, "exact" or "hutchinson"; the latter uses the same two probes everywhere.
        strict: Whether it is an error if the reference does not converge; otherwise true errors are NaN.

    Returns:
        Name of each solver, and ``REFINED`` → |true| and stated errors, nats, shape (B,) each.

    Raises:
        ArithmeticError: If the reference does not converge to a tenth of the errors, with ``strict``.
    """
    batch = conditioned_batch(flow, list(atoms))
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.mask.shape, flow.config.flow_features)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    v_x, v_h = divergence.draw_probes(batch.positions, noise, 2, generator)

    def trace(index: Tensor) -> TraceMethod:
        if kind == "exact":
            return divergence.exact
        return functools.partial(divergence.hutchinson, probes=(v_x[:, index], v_h[:, index]))

    everything = torch.arange(len(atoms))
    answers = {key: flow.log_prob(batch, noise, trace(everything), solver) for key, solver in solvers.items()}
    before = answers[OWN].known(everything)
    answers[REFINED] = flow.log_prob(batch, noise, trace(everything), None, 2 * INTERVALS, before=before)

    def enough(value: Tensor, gap: Tensor) -> Tensor:
        return torch.stack(
            [gap <= AGREEMENT * torch.maximum(out.error, (out.log_prob - value).abs()) for out in answers.values()]
        ).all(dim=0)

    truth, _ = reference(flow, batch, noise, trace, enough, strict)
    return {key: ((out.log_prob - truth).abs(), out.error) for key, out in answers.items()}


def measure(name: str, options: argparse.Namespace) -> None:
    """Measures the structures of a model that are missing in the folder."""
    flow = load(name, "cpu", "float64")
    folder = open_work(options.work / name, flow, structures=options.structures)  # a number decides which particles
    solvers = SOLVERS if name in TIGHT else COARSE
    chosen = structures(flow, options.structures)
    starts = range(0, len(chosen), TOGETHER)
    for first, kind in tqdm([(first, kind) for first in starts for kind in KINDS], desc=name, dynamic_ncols=True):
        path = folder / f"{first:03d}_{kind}.json"
        if not path.exists():
            rows = _piece(flow, chosen[first : first + TOGETHER], solvers, kind)
            with atomic_write(path) as handle:
                handle.write(json.dumps(rows).encode())


def _piece(flow: ENF, atoms: list[Atoms], solvers: Mapping[str, Solver | None], kind: str) -> list[dict]:
    """Returns the errors of some structures; true errors are NaN where the reference does not converge."""
    return [
        {"model": flow.name, "trace": kind, "solver": key, "structure": item.get_chemical_formula()}
        | {"true": true.item(), "stated": stated.item()}
        for key, pair in errors(flow, atoms, solvers, kind, strict=False).items()
        for item, true, stated in zip(atoms, *pair, strict=True)
    ]


def write_table(options: argparse.Namespace) -> None:
    """Writes a table of all results in the folder."""
    rows = [row for path in sorted(options.work.glob("*/*_*.json")) for row in json.loads(path.read_text())]
    frame = pd.DataFrame(rows)
    frame["ratio"] = frame.true / frame.stated
    table = [_row(*key, part) for key, part in frame.groupby(["model", "trace", "solver"], sort=False)]
    write_results(pd.DataFrame(table), NAME, "Stated errors of log p", NOTES)


def _row(model: str, trace: str, solver: str, part: pd.DataFrame) -> dict[str, object]:
    """Returns a row of the table."""
    known = part.dropna()
    return {
        "model": model,
        "trace": trace,
        "solver": solver,
        "structures": f"{len(known)} of {len(part)}",
        "true, rms": f"{(known.true**2).mean() ** 0.5:.2g}",
        "stated, rms": f"{(known.stated**2).mean() ** 0.5:.2g}",
        "true / stated, median": f"{known.ratio.median():.2f}",
        "largest": f"{known.ratio.max():.2f}",
        f"above {ALLOWED:g}": int((known.ratio > ALLOWED).sum()),
    }


if __name__ == "__main__":
    main()
