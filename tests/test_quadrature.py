"""Clenshaw-Curtis quadrature: exact for polynomials of its degree, nested, with an estimate that covers the error."""

from __future__ import annotations

import math

import pytest
import torch

from ase_enf.flow.quadrature import clenshaw_curtis, integrate


@pytest.mark.parametrize("intervals", [2, 8, 24, 48])
def test_exact_for_polynomials_and_no_further(intervals):
    nodes, weights = clenshaw_curtis(intervals)
    assert (nodes.diff() > 0).all() and nodes[0] == 0 and nodes[-1] == 1 and (weights > 0).all()
    for degree in range(intervals + 1):
        assert abs((weights * nodes**degree).sum() - 1.0 / (degree + 1)) < 1e-14
    beyond = torch.cos(2 * intervals * torch.acos(2 * nodes - 1))  # T_2n: 1 at every node, its integral is not
    assert (weights * beyond).sum() - 1 / (1 - 4 * intervals**2) > 0.9


def test_rules_are_nested():
    assert torch.allclose(clenshaw_curtis(48)[0][::2], clenshaw_curtis(24)[0], atol=1e-15, rtol=0)


FUNCTIONS = {
    "peak at the data": (lambda t: 1 / (t + 0.01), math.log(1.01 / 0.01)),
    "waves": (lambda t: torch.cos(40 * t), math.sin(40) / 40),
    "wave and slope": (lambda t: torch.tanh(5 * (t - 0.7)), math.log(math.cosh(1.5) / math.cosh(3.5)) / 5),
    "root": (torch.sqrt, 2 / 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("intervals", [16, 32, 64])
def test_estimate_covers_the_error(name, intervals):
    function, truth = FUNCTIONS[name]
    answer = integrate(function(clenshaw_curtis(intervals)[0]))
    assert abs(answer.value - truth) <= answer.error + 1e-14
    assert answer.error < 0.2


def test_slow_convergence_is_seen():
    """For a narrow peak, the last difference alone would underestimate the error."""
    nodes = clenshaw_curtis(48)[0]
    for width in (0.005, 0.01, 0.02):
        peak = width / ((nodes - 0.4) ** 2 + width**2)
        truth = math.atan(0.6 / width) + math.atan(0.4 / width)
        answer = integrate(peak)
        assert abs(answer.value - truth) <= 3 * answer.error


@pytest.mark.parametrize("place", [0.093, 0.114])
def test_a_dip_that_two_rules_miss_alike_is_seen_by_a_third(place):
    """Rules on every, every second and every fourth node agree by accident; the one on every third does not."""
    nodes = clenshaw_curtis(48)[0]
    dip = 20 * torch.exp(-(((nodes - place) / 0.01) ** 2))
    answer = integrate(10 * torch.exp(-8 * nodes) + dip)
    truth = 10 * (1 - math.exp(-8)) / 8 + 0.2 * math.sqrt(math.pi)
    assert abs(answer.value - truth) <= 3 * answer.error < 0.15


def test_an_integral_that_is_not_finite_has_no_finite_error():
    values = torch.zeros(9, 3)
    values[4, 1], values[4, 2] = math.inf, math.nan
    assert torch.isfinite(integrate(values).error).tolist() == [True, False, False]


def test_shapes_and_precision_are_those_of_the_values():
    values = torch.rand(17, 3, 2)
    answer = integrate(values)
    assert answer.value.shape == answer.error.shape == (3, 2) and answer.value.dtype == torch.float32
    assert torch.allclose(answer.value[1], integrate(values[:, 1]).value)


@pytest.mark.parametrize("intervals", [0, 3, 12])
def test_other_numbers_are_refused(intervals):
    with pytest.raises(ValueError, match=f"^quadrature intervals={intervals}: must be a positive multiple of 8"):
        integrate(torch.zeros(intervals + 1))
