"""Normal random numbers from a counter, made where they are used: molecule i of a seed has its own in any batch.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) maps a counter of four words and a key of two to four random words. It
has no state, so that a GPU can make the noise of a whole batch at once without a generator for each molecule.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Returns the four random words of each counter, Philox4x32-10.

    Args:
        counter: Four words, each an int64 tensor of values in [0, 2³²), shapes that broadcast.
        key: Two words.

    Returns:
        Four int64 tensors of values in [0, 2³²).

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(word)) for word in philox((zero, zero, zero, zero), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(ROUNDS):
        # The product of two words may overflow int64, but its 64 bits are right, and the masks remove the sign.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & WORD) ^ b ^ k,
            second & WORD,
            ((first >> 32) & WORD) ^ d ^ m,
            first & WORD,
        )
        k, m = (k + KEY_STEPS[0]) & WORD, (m + KEY_STEPS[1]) & WORD
    return a, b, c, d


def standard_normal(
    seed: int, index: Tensor, attempt: Tensor, draw: int, numbers: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns independent standard normal numbers for each molecule, by the Box-Muller transform.

    They depend on ``seed``, ``index``, ``attempt`` and ``draw`` alone. The random bits are the same in every batch and
    on every device; only the rounding of logarithm and cosine may differ.

    Args:
        seed: Of the request.
        index: Numbers of the molecules, shape (B,), int64, below 2⁴⁸.
        attempt: How often each was drawn before, shape (B,), int64, below 2³².
        draw: How many draws these molecules had before this one.
        numbers: How many each molecule gets, N.
        dtype: Of the result.

    Returns:
        Shape (B, N), on the device of ``index``.

    Example:
        >>> index = torch.tensor([3, 4])
        >>> both = standard_normal(0, index, torch.zeros_like(index), draw=0, numbers=6)
        >>> alone = standard_normal(0, index[1:], torch.zeros_like(index[1:]), draw=0, numbers=6)
        >>> torch.equal(both[1:], alone)
        True
    """
    low, high = (int(word) for word in np.random.SeedSequence(seed).generate_state(2, np.uint32))
    blocks = torch.arange(-(-numbers // 4), device=index.device, dtype=torch.int64)
    # The first word counts the blocks of a molecule; its upper half holds the bits of an index beyond 32.
    place = blocks[None] + (index[:, None] >> 32 << 16 & WORD)
    words = philox((place, torch.full_like(place, draw), index[:, None] & WORD, attempt[:, None]), (low, high))
    exact = torch.float32 if index.device.type == "mps" else torch.float64
    uniform = [(word.to(exact) + 0.5) / 2**32 for word in words]
    normal = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length = (-2.0 * radius.log()).sqrt()
        normal += [length * (2.0 * math.pi * angle).cos(), length * (2.0 * math.pi * angle).sin()]
    return torch.stack(normal, dim=-1).flatten(1)[:, :numbers].to(dtype)
