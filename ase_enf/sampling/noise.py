"""Noise of molecules by their names: molecule i of a seed, drawn for the k-th time, has its own wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ase_enf.flow import base
from ase_enf.flow.model import ENF
from ase_enf.flow.stochastic import Noise
from ase_enf.sampling.counter import standard_normal

# Kinds of device whose noise numpy draws. All others draw by a counter, so that no step waits for the host.
HOST_DEVICES = ("cpu",)


class Drawing(NamedTuple):
    """The name of a latent molecule."""

    index: int
    attempt: int


class NoiseSource(Protocol):
    """What draws latent molecules: centred Gaussian positions (B, M, n) and Gaussian features (B, M, F)."""

    def latents(self, drawings: Sequence[Drawing], n_atoms: int) -> tuple[Tensor, Tensor]:
        """Returns where molecules of M atoms begin, z_x and z_h."""

    def renewed(self, drawings: Sequence[Drawing], n_atoms: int) -> Noise:
        """Returns what draws fresh noise for these molecules at every call; see ``stochastic.sample_stochastic``."""


class HostNoise:
    """Noise by a generator of numpy for each molecule, drawn on the host.

    Args:
        seed: Of the request.
        flow: Says dimension, number of features, dtype and device.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> source = HostNoise(0, ENF(ENFConfig(hidden=8, layers=1)))
        >>> both, _ = source.latents([Drawing(3, 0), Drawing(4, 0)], 5)
        >>> torch.equal(both[1:], source.latents([Drawing(4, 0)], 5)[0])
        True
    """

    def __init__(self, seed: int, flow: ENF) -> None:
        self.seed, self.flow = seed, flow

    def latents(self, drawings: Sequence[Drawing], n_atoms: int) -> tuple[Tensor, Tensor]:
        """Returns where molecules of M atoms begin, z_x (B, M, n) and z_h (B, M, F)."""
        return self._drawn([self._generator(*drawing) for drawing in drawings], n_atoms)

    def renewed(self, drawings: Sequence[Drawing], n_atoms: int) -> Noise:
        """Returns what draws fresh noise for these molecules."""
        generators = [self._generator(*drawing, 1) for drawing in drawings]
        return lambda: self._drawn(generators, n_atoms)

    def _generator(self, *name: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=name))

    def _drawn(self, generators: Sequence[np.random.Generator], n_atoms: int) -> tuple[Tensor, Tensor]:
        config = self.flow.config
        drawn = [base.sample_latent(rng, n_atoms, config.dimension, config.flow_features) for rng in generators]
        x, h = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
        return x.to(self.flow.device, self.flow.dtype), h.to(self.flow.device, self.flow.dtype)


class CounterNoise:
    """Noise by a counter, made on the device of the flow for a whole batch at once.

    Nothing is read back, and nothing but the names of the molecules goes to the device. The random bits are the same on
    every device; logarithm and cosine round in their own way. They are other numbers than those of :class:`HostNoise`.

    Args:
        seed: Of the request.
        flow: Says dimension, number of features, dtype and device.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> source = CounterNoise(0, ENF(ENFConfig(hidden=8, layers=1)))
        >>> both, _ = source.latents([Drawing(3, 0), Drawing(4, 0)], 5)
        >>> torch.equal(both[1:], source.latents([Drawing(4, 0)], 5)[0])
        True
    """

    def __init__(self, seed: int, flow: ENF) -> None:
        self.seed, self.flow = seed, flow

    def latents(self, drawings: Sequence[Drawing], n_atoms: int) -> tuple[Tensor, Tensor]:
        """Returns where molecules of M atoms begin, z_x (B, M, n) and z_h (B, M, F)."""
        return self._drawn(self._names(drawings), 0, n_atoms)

    def renewed(self, drawings: Sequence[Drawing], n_atoms: int) -> Noise:
        """Returns what draws fresh noise for these molecules; the latent molecule is draw 0, the first of these 1."""
        names, draw = self._names(drawings), 0

        def fresh() -> tuple[Tensor, Tensor]:
            nonlocal draw
            draw += 1
            return self._drawn(names, draw, n_atoms)

        return fresh

    def _names(self, drawings: Sequence[Drawing]) -> Tensor:
        """Returns indices and attempts on the device, shape (2, B)."""
        return torch.tensor(list(zip(*drawings, strict=True)), dtype=torch.int64, device=self.flow.device)

    def _drawn(self, names: Tensor, draw: int, n_atoms: int) -> tuple[Tensor, Tensor]:
        config = self.flow.config
        width = config.dimension + config.flow_features
        z = standard_normal(self.seed, *names, draw, n_atoms * width, self.flow.dtype)
        x, h = z.unflatten(1, (n_atoms, width)).split([config.dimension, config.flow_features], dim=2)
        return x - x.mean(dim=1, keepdim=True), h


def noise_source(seed: int, flow: ENF) -> NoiseSource:
    """Returns what draws the noise of a request, by the kind of the flow's device.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(hidden=8, layers=1))
        >>> type(noise_source(0, flow)).__name__, type(noise_source(0, flow.to("meta"))).__name__
        ('HostNoise', 'CounterNoise')
    """
    return HostNoise(seed, flow) if flow.device.type in HOST_DEVICES else CounterNoise(seed, flow)
