"""The theorem of stated errors: for every shipped model and solver, the true error is below three times the stated one.

The truth is by two independent rules that agree to a tenth of the error under test (``benchmarks.accuracy.reference``).
"""

from __future__ import annotations

import functools

import pytest
import torch
from ase import Atoms
from ase.collections import g2

from ase_enf.atoms.batch import to_batch
from ase_enf.data import samples
from ase_enf.flow import divergence
from ase_enf.flow.continuous import Solver
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from benchmarks.accuracy.reference import reference

SOLVERS = {
    "own": None,
    "rk4": Solver("rk4", steps=8),
    "midpoint": Solver("midpoint", steps=32),
    "euler": Solver("euler", steps=100, warp=2.0),
    "dopri5": Solver(),
    "dopri5, loose": Solver(rtol=1e-3, atol=1e-3, warp=2.0),
    "dopri5, tight": Solver(rtol=1e-7, atol=1e-7, warp=2.0),
}
FEW = ("own", "dopri5", "dopri5, loose")


def structures(flow: ENF, count: int) -> list[Atoms]:
    """Samples of the system of a particle model; else the smallest molecules of ASE's g2 that the model may know."""
    if flow.features == "none":
        return samples.sample(flow.name, count, seed=3, ladders=4, burn_in=200, progress=False).to_atoms()
    known = [g2[name] for name in g2.names if set(g2[name].symbols) <= set(flow.species)]
    known = [atoms for atoms in known if len(atoms) in flow.size_prior and atoms.numbers.sum() % 2 == 0]
    known = [atoms for atoms in known if not atoms.get_initial_magnetic_moments().any()]
    return sorted(known, key=len)[:count]


def check(name: str, count: int, solvers, kind: str) -> None:
    flow = load(name, "cpu", "float64")
    flow.use_backend("auto")
    batch = to_batch(structures(flow, count), flow.species, flow.config.dimension, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.mask.shape, flow.config.flow_features)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    v_x, v_h = divergence.draw_probes(batch.positions, noise, 2, generator)

    def trace(index):
        if kind == "exact":
            return divergence.exact
        return functools.partial(divergence.hutchinson, probes=(v_x[:, index], v_h[:, index]))

    everything = torch.arange(count)
    answers = {key: flow.log_prob(batch, noise, trace(everything), SOLVERS[key]) for key in solvers}

    def enough(value, gap):
        return torch.stack(
            [gap <= 0.1 * torch.maximum(out.error, (out.log_prob - value).abs()) for out in answers.values()]
        ).all(dim=0)

    truth, _ = reference(flow, batch, noise, trace, enough)
    for key, out in answers.items():
        ratio = (out.log_prob - truth).abs() / out.error
        print(f"{name}, {kind}, {key}: true over stated at most {ratio.max():.2f}, median {ratio.median():.2f}")
        assert (ratio <= 3.0).all(), f"{key}: true error {ratio.max():.1f} times the stated one"


SMALL = [("dw4", "exact"), ("dw4", "hutchinson"), ("qm9-small", "exact"), ("qm9-conditional", "hutchinson")]


@pytest.mark.parametrize(("name", "kind"), SMALL)
def test_stated_errors_cover_the_true_ones(name, kind):
    check(name, 2, FEW, kind)


# lj13-factor2 is not among them: its reference does not come within a tenth of the error of "dopri5, tight" by 768
# intervals.
COUNTS = {"dw4": 20, "lj13": 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", COUNTS)
def test_stated_errors_cover_the_true_ones_of_many(name, kind):
    check(name, COUNTS[name], SOLVERS if kind == "exact" else FEW, kind)


# References of molecules are expensive: the smallest ones, and no tight solver. Those of the larger networks are open
# but for the few above.
MOLECULES = {"qm9-small": 5}
COARSE = ("own", "rk4", "midpoint", "euler", "dopri5", "dopri5, loose")


@pytest.mark.slow
@pytest.mark.parametrize("name", MOLECULES)
def test_stated_errors_cover_the_true_ones_of_molecules(name):
    check(name, MOLECULES[name], COARSE, "exact")
