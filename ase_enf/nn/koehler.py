"""Simple and kernel dynamics, baselines of the paper's Table 1 (Köhler, Klein and Noé 2020): radial pair fields.

Both move each particle along the lines to the others by a function φ of distance and time. The trace of their Jacobian
is then a sum over pairs, exact at the cost of one evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ase_enf.geometry import pair_differences
from ase_enf.nn.radial import DISTANCE_EPSILON

# Centres are initially spaced evenly from 0 to REACH, in the units of the flow, in which two latent atoms are
# √2 · |N(0, 1)| apart along each axis. Gaussians are initially OVERLAP spacings wide (published: width 0.5 for 50
# centres from 0 to 8).
REACH = 6.0
OVERLAP = 3.0


class Gaussians(nn.Module):
    """K normalised Gaussians of one variable, ``b_k(s) = e_k / Σ_l e_l``, ``e_k = exp(−(s − μ_k)² / γ_k²)``.

    Centres μ_k and widths γ_k are learned. The functions sum to one, so that their span contains the constants.

    Args:
        count: Number K of functions.
        end: Initial position of the last centre; the first is at 0.
    """

    def __init__(self, count: int, end: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(0.0, end, count))
        width = torch.tensor(OVERLAP * end / max(count - 1, 1))
        self.log_widths = nn.Parameter(width.log().repeat(count))

    def forward(self, s: Tensor) -> Tensor:
        """Returns the functions at s (...), shape (..., K)."""
        return torch.softmax(-self._reduced(s).square(), dim=-1)

    def with_slope(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the functions and their derivatives ``b_k' = b_k (q_k − Σ_l b_l q_l)``, q = (log e)'."""
        reduced = self._reduced(s)
        b = torch.softmax(-reduced.square(), dim=-1)
        q = -2.0 * reduced * torch.exp(-self.log_widths)
        return b, b * (q - (b * q).sum(dim=-1, keepdim=True))

    def _reduced(self, s: Tensor) -> Tensor:
        return (s.unsqueeze(-1) - self.centres) * torch.exp(-self.log_widths)


class RadialField(nn.Module):
    """A field along the lines between pairs, ``x_i^L − x_i = Σ_{j≠i} (x_i − x_j) φ(d_ij, t)`` (Köhler et al. 2020).

    For any φ its mean is zero, and it is equivariant to rotation, reflection, translation and permutation. Its trace is

        Tr J = Σ_{i≠j} n φ(d_ij, t) + φ'(d_ij, t) d_ij

    As φ is evaluated at d = √(r² + ε), the last factor d_ij is r² / d in the code. The field is called like the other
    networks, for positions only: its one node feature is the time.
    """

    def forward(
        self,
        h: Tensor,  # (B, M, 1), the time
        x: Tensor,  # (B, M, n)
        pair_mask: Tensor,  # (B, M, M), 1 where i ≠ j are both real
    ) -> tuple[Tensor, Tensor]:
        """Returns no features (B, M, 0) and x^L (B, M, n)."""
        difference, squared = pair_differences(x)
        phi, _ = self.profile(torch.sqrt(squared + DISTANCE_EPSILON), h[:, 0, 0], slope=False)
        return h[..., :0], x + torch.einsum("bij,bijn->bin", phi * pair_mask, difference)

    def with_trace(self, h: Tensor, x: Tensor, pair_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output of :meth:`forward` and the exact trace of x^L − x, shape (B,), differentiable."""
        difference, squared = pair_differences(x)
        distance = torch.sqrt(squared + DISTANCE_EPSILON)
        phi, slope = self.profile(distance, h[:, 0, 0], slope=True)
        trace = ((x.shape[-1] * phi + slope * squared / distance) * pair_mask).sum(dim=(1, 2))
        return h[..., :0], x + torch.einsum("bij,bijn->bin", phi * pair_mask, difference), trace

    def profile(self, distance: Tensor, time: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Returns φ and, if requested, ∂φ/∂d.

        Args:
            distance: Distances d, shape (B, M, M).
            time: Time t, shape (B,).
            slope: Whether to compute the derivative.

        Returns:
            φ and its derivative or None, shape (B, M, M).
        """
        raise NotImplementedError


class SimpleDynamics(RadialField):
    """Simple dynamics: φ(d, t) is a perceptron of Gaussians of the distance, and of the time.

    v¹ = A b(d) + a t + c,  v^{l+1} = A^l tanh(v^l) + c^l,  φ = w · tanh(v^L)

    In the published code the pair potential does not depend on time. Here φ does, as in all other networks; flow
    matching could not train it otherwise.

    Args:
        hidden: Number of Gaussians and width of the perceptron.
        layers: Number L of hidden layers.

    Example:
        >>> field = SimpleDynamics(hidden=8, layers=2)
        >>> pairs = torch.ones(1, 4, 4) - torch.eye(4)
        >>> h, x, trace = field.with_trace(torch.zeros(1, 4, 1), torch.randn(1, 4, 2), pairs)
        >>> x.shape, trace.shape
        (torch.Size([1, 4, 2]), torch.Size([1]))
    """

    def __init__(self, hidden: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.basis = Gaussians(hidden, REACH)
        self.time = nn.Linear(1, hidden, bias=False)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.out = nn.Linear(hidden, 1, bias=False)
        nn.init.xavier_uniform_(self.out.weight, gain=1e-3)  # the flow begins near the identity

    def profile(self, distance: Tensor, time: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Returns φ and, if requested, ∂φ/∂d, propagated layer by layer; see :meth:`RadialField.profile`."""
        v, rate = self.basis.with_slope(distance) if slope else (self.basis(distance), None)
        shift = self.time(time.unsqueeze(-1))[:, None, None]
        for depth, layer in enumerate(self.layers):
            v = torch.tanh(layer(v) + shift if depth == 0 else layer(v))
            rate = None if rate is None else F.linear(rate, layer.weight) * (1.0 - v.square())
        return self.out(v).squeeze(-1), None if rate is None else self.out(rate).squeeze(-1)


class KernelDynamics(RadialField):
    """Kernel dynamics: φ is linear in products of Gaussians of distance and of time (Köhler et al. 2020).

    φ(d, t) = Σ_kl W_kl b_k(d) b_l(t)

    Weights, centres and widths are learned; the published settings are 50 Gaussians of distance and 10 of time.

    Args:
        hidden: Number of Gaussians of the distance.
        layers: Number of Gaussians of the time.

    Example:
        >>> field = KernelDynamics(hidden=50, layers=10)
        >>> pairs = torch.ones(1, 4, 4) - torch.eye(4)
        >>> field.with_trace(torch.zeros(1, 4, 1), torch.randn(1, 4, 2), pairs)[2].shape
        torch.Size([1])
    """

    def __init__(self, hidden: int = 50, layers: int = 10) -> None:
        super().__init__()
        self.basis = Gaussians(hidden, REACH)
        self.time_basis = Gaussians(layers, 1.0)
        self.weight = nn.Parameter(1e-3 * torch.randn(hidden, layers))  # the flow begins near the identity

    def profile(self, distance: Tensor, time: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Returns φ and, if requested, ∂φ/∂d; see :meth:`RadialField.profile`."""
        b, rate = self.basis.with_slope(distance) if slope else (self.basis(distance), None)
        now = self.time_basis(time) @ self.weight.T  # (B, K), the coefficients at this time
        phi = torch.einsum("bijk,bk->bij", b, now)
        return phi, None if rate is None else torch.einsum("bijk,bk->bij", rate, now)
