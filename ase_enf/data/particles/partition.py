"""Partition function and entropy of four particles in the plane, by quadrature."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ase_enf.data import DataError
from ase_enf.data.particles.system import Array, System
from ase_enf.data.particles.systems import resolve

_VANISHED = 1e-15  # exp(−v) at the border of a quadrature, relative to its maximum
_WALL = 1e3  # kT; exp(−v) is zero here


class Quadrature(NamedTuple):
    """What ``quadrature`` returns; nats and kT."""

    log_z: float
    energy: float  # <U>
    entropy: float  # <U> + ln Z


def quadrature(system: System | str = "dw4", extent: float = 8.0, spacing: float = 0.15) -> Quadrature:
    """Partition function of four particles in two dimensions without sampling, exact to rounding for DW4.

    With f_d(x) = exp(−v(|x|) − v(|x − d e_x|)) and K = exp(−v), in the coordinates relative to particle 1,

        Z = ¼ ∫ 2π d K(d) ∬ f_d(x) K(|x − y|) f_d(y) dx dy dd,

    where ¼ = M^(−n/2) is the volume element of the zero-mean subspace in these coordinates. The double integral is a
    convolution, computed by FFT: for integrands that are smooth and vanish at the borders, sums over a grid converge
    exponentially, as does Gauss-Legendre for d.

    Args:
        system: Four particles in two dimensions without a trap.
        extent: Distance beyond which exp(−v) vanishes.
        spacing: Spacing of the grid of x and y, a small fraction of the width of exp(−v).

    Returns:
        ln Z, <U> and the differential entropy on the zero-mean subspace.

    Raises:
        DataError: If the system is of another kind, a number not positive, or exp(−v) has not vanished at ``extent``.

    Example:
        >>> round(quadrature("dw4").entropy, 6)
        7.125723
    """
    system = resolve(system)
    if (system.n_atoms, system.dimension, system.trap) != (4, 2, 0.0):
        raise DataError(f"{system.name}: the quadrature takes four particles in two dimensions without a trap")

    if not (0 < spacing < extent < math.inf):
        raise DataError(f"extent={extent}, spacing={spacing}: must be positive, the spacing much smaller")

    def pair(r2: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return system.pair(r2)[0]

    d = np.linspace(spacing, extent, 512)
    if (left := float(np.exp(pair(d * d).min() - pair(d[-1:] ** 2)[0]))) > _VANISHED:
        raise DataError(f"{system.name}: exp(−v) at {extent} is {left:.0e} of its maximum; use a larger extent")

    half = round(1.5 * extent / spacing)  # half the period, which is 3 extents, so that no pair meets its image
    axis = np.arange(-half, half) * spacing
    x, y = axis[:, None], axis[None, :]
    v = np.minimum(pair(np.fft.ifftshift(x * x + y * y)), _WALL)  # v exp(−v) of a wall is 0
    kernel, weighted = np.fft.rfft2(np.exp(-v)), np.fft.rfft2(v * np.exp(-v))
    z = energy = 0.0
    nodes, weights = np.polynomial.legendre.leggauss(round(1.5 * extent / spacing))
    for d, length in zip(0.5 * extent * (nodes + 1), 0.5 * extent * weights, strict=True):
        both = pair((x - d / 2) ** 2 + y * y) + pair((x + d / 2) ** 2 + y * y)
        both = np.minimum(both, _WALL)
        f = np.exp(-both)
        transform = np.fft.rfft2(f)
        convolved = np.fft.irfft2(transform * kernel, s=f.shape)
        inner, between = (f * convolved).sum(), (f * np.fft.irfft2(transform * weighted, s=f.shape)).sum()
        own = float(pair(np.array(d * d)))
        weight = 2 * math.pi * d * math.exp(-own) * length * spacing**4 / 4
        z += weight * inner
        energy += weight * (own * inner + 2 * (both * f * convolved).sum() + between)
    log_z = math.log(z)
    return Quadrature(log_z, float(energy / z), float(energy / z) + log_z)
