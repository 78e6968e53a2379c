"""A batch that does not fit into memory is halved, with one warning, and gives the same numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_enf.flow.continuous import Solver
from ase_enf.flow.devices import out_of_memory
from ase_enf.flow.model import ENF
from ase_enf.sampling.generate import generate
from ase_enf.scoring.score import score

ONE_STEP = Solver("euler", steps=1)
FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), FULL])
def test_what_full_memory_raises_is_known(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes do not fit"))


@pytest.fixture
def small_memory(monkeypatch):
    """Simulates memory for three molecules, and records the batches of every call."""
    noted = []

    def limit(name, length):
        whole = getattr(ENF, name)

        def limited(self, *arguments, **options):
            noted.append(length(arguments))
            if noted[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(self, *arguments, **options)

        monkeypatch.setattr(ENF, name, limited)

    limit("sample", lambda arguments: len(arguments[0]))
    limit("log_prob", lambda arguments: len(arguments[0].mask))
    return noted


def test_generate_halves_its_batches(make_flow, small_memory):
    flow = make_flow("given", layers=1, compositions={"CH4": 1}, sizes={5: 1}).double()
    with pytest.warns(UserWarning, match="^memory is not enough for .* molecules at a time; continues with") as said:
        drawn = generate(flow, 22, batch_size=12, solver=ONE_STEP)
    assert [str(w.message).split()[5] for w in said] == ["12", "6"]  # one warning for each halving
    assert small_memory.count(12) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = generate(flow, 22, batch_size=3, solver=ONE_STEP)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert np.allclose(ours.positions, theirs.positions, atol=1e-12)


def test_score_halves_its_batches(make_flow, small_memory):
    flow = make_flow("given", layers=1).double()
    rng = np.random.default_rng(0)
    atoms = [molecule("CH4") for _ in range(13)]
    for one in atoms:
        one.rattle(0.05, rng=rng)
    with pytest.warns(UserWarning, match="^memory is not enough for .* structures at a time; continues with"):
        table = score(flow, atoms, batch_size=8, max_stderr=1e9)
    assert small_memory.count(8) == 1 and max(small_memory[2:]) <= 2
    expected = score(flow, atoms, batch_size=2, max_stderr=1e9)
    assert np.allclose(table.log_likelihood, expected.log_likelihood, atol=1e-9)


def test_one_molecule_that_memory_does_not_hold_is_an_error(make_flow, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("full")

    monkeypatch.setattr(ENF, "sample", fail)
    with pytest.raises(MemoryError, match="^full$"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(make_flow("none", layers=1), 4, solver=ONE_STEP)
