"""Noise by name: the k-th draw of molecule i of a seed has its own noise, whatever batch it is in."""

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

# Types of device whose noise numpy draws. All others use a counter, so that no step waits for the host.
HOST_DEVICES = ("cpu",)


class Drawing(NamedTuple):
    """The name of a latent molecule."""

    index: int
    attempt: int


class NoiseSource(Protocol):
    """A source of latent molecules: centred Gaussian positions (B, M, n) and Gaussian features (B, M, F)."""

    def latents(self, drawings: Sequence[Drawing], n_atoms: int) -> tuple[Tensor, Tensor]:
        """Returns latent molecules of M atoms, z_x and z_h."""

    def renewed(self, drawings: Sequence[Drawing], n_atoms: int) -> Noise:
        """Returns a function that draws fresh noise for these molecules; see ``stochastic.sample_stochastic``."""


class HostNoise:
    """Noise drawn on the host, by one numpy generator for each molecule.

    Args:
        seed: Of the request.
        flow: Gives dimension, number of features, dtype and device.

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
        """Returns latent molecules of M atoms, z_x (B, M, n) and z_h (B, M, F)."""
        return self._drawn([self._generator(*drawing) for drawing in drawings], n_atoms)

    def renewed(self, drawings: Sequence[Drawing], n_atoms: int) -> Noise:
        """Returns a function that draws fresh noise for these molecules."""
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
    """Noise from a counter, made on the device of the flow for a whole batch at once.

    Only the names of the molecules go to the device, and nothing is read back. The random bits are the same on every
    device; logarithm and cosine may be rounded differently. The numbers are not those of :class:`HostNoise`.

    Args:
        seed: Of the request.
        flow: Gives dimension, number of features, dtype and device.

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
        """Returns latent molecules of M atoms, z_x (B, M, n) and z_h (B, M, F)."""
        return self._drawn(self._names(drawings), 0, n_atoms)

    def renewed(self, drawings: Sequence[Drawing], n_atoms: int) -> Noise:
        """Returns a function whose calls give draws 1, 2 and so on of these molecules; draw 0 is the latent one."""
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
    """Returns the source of noise of a request, which depends on the type of the flow's device.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(hidden=8, layers=1))
        >>> type(noise_source(0, flow)).__name__, type(noise_source(0, flow.to("meta"))).__name__
        ('HostNoise', 'CounterNoise')
    """
    return HostNoise(seed, flow) if flow.device.type in HOST_DEVICES else CounterNoise(seed, flow)
