"""Noise from a counter: published values, the normal distribution, and independence of batch and device."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ase_enf.sampling.counter import WORD, philox, standard_normal


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_the_published_ones(counter, key, words):
    found = philox(tuple(torch.tensor(word, dtype=torch.int64) for word in counter), key)
    assert tuple(int(word) for word in found) == words


def draws(index, attempt=0, draw=0, seed=0, numbers=10, **how):
    index = torch.tensor(index, dtype=torch.int64, **how)
    return standard_normal(seed, index, torch.full_like(index, attempt), draw, numbers, torch.float64)


def test_a_molecule_has_its_noise_in_every_batch():
    together = draws([5, 0, 2**33 + 5])
    assert torch.equal(together, torch.cat([draws([5]), draws([0]), draws([2**33 + 5])]))
    assert torch.equal(draws([5], numbers=7), draws([5], numbers=10)[:, :7])


def test_everything_that_names_a_draw_changes_it():
    named = [
        draws([0]), draws([1]), draws([2**32]), draws([2**40]), draws([0], attempt=1), draws([0], draw=1),
        draws([0], seed=1), draws([0], seed=2**64),
    ]  # fmt: skip
    values = torch.cat(named).flatten()
    assert values.unique().numel() == values.numel()


def test_numbers_are_standard_normal_and_independent():
    values = draws(range(2000), numbers=50)
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(values.T) - torch.eye(50)
    assert correlation.abs().max() < 5 / 2000**0.5
    neighbours = (values[1:] * values[:-1]).mean()
    assert neighbours.abs() < 5 / values.numel() ** 0.5


def test_no_step_waits_for_the_host():
    found = draws([0, 1], device="meta")
    assert found.is_meta and found.shape == (2, 10)
