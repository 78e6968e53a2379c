"""The benchmark of what a flow has learned about its conditions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_enf.atoms.batch import to_batch
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import Condition
from ase_enf.flow.model import ENF
from benchmarks.models.condition_gain import TIMES, gain, overlaps

GAP = Condition.of("gap", "eV", np.array([3.0, 5.0, 7.0, 9.0]), np.array([3, 5, 5, 5]))


@pytest.mark.parametrize("left", [0.5, 0.1, 0.03])
def test_the_gain_of_ideal_velocities_is_the_mutual_information(left):
    """Of one Gaussian coordinate of variance 1, of which a condition leaves r², it is ln(1/r²)/2.

    v = (x_t − E[x|x_t])/t, so that velocities err by Var(x|x_t)/t² = 1/(1/s² + (1 − t)²/t²)/t².
    """
    times = np.array(TIMES)
    free, known = (1.0 / (1.0 / s2 + ((1.0 - times) / times) ** 2) / times**2 for s2 in (1.0, left))
    products = np.stack([free - known, free - known], axis=-1)  # of a mean that is exact, as both terms then agree
    assert gain(products) == pytest.approx(np.log(1.0 / left) / 2, rel=0.15)


def test_what_reads_no_condition_gains_nothing():
    torch.manual_seed(0)
    other = dataclasses.replace(GAP, name="other")
    flow = ENF(ENFConfig(hidden=16, layers=2, conditions=(GAP, other))).double().requires_grad_(False)
    batch = to_batch([molecule("H2O"), molecule("CH4")], flow.species).to(dtype=torch.float64)
    values = torch.tensor([[4.0, 8.0], [6.0, 3.0]], dtype=torch.float64)
    found = overlaps(flow, batch, values, [[0], [0, 1]], torch.Generator().manual_seed(1)).numpy()
    assert found.shape == (2, 2, len(TIMES), 2) and (found[..., 1] > 0).all()
    flow.dynamics.network.embed.weight[:, [7, 9]] = 0.0  # of the second condition: its value, and whether it is known
    found = overlaps(flow, batch, values, [[1], [0], [0, 1]], torch.Generator().manual_seed(1)).numpy()
    assert np.abs(found[:, 0]).max() == 0.0 and np.array_equal(found[:, 1], found[:, 2])
    assert np.abs(gain(found[:, 1])).min() > 0.0
