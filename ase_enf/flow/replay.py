"""Fast repeated evaluation of one velocity on a GPU: all kernels of an evaluation are launched as one CUDA graph.

An EGNN launches some twenty small kernels in each layer, and for a batch of molecules the host takes longer to launch
them than the GPU takes to compute them. A sampler evaluates the same velocity a hundred times with the same shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ase_enf.flow.devices import out_of_memory
from ase_enf.flow.divergence import Velocity

# Runs before a graph is recorded: in the first, libraries create their handles and workspaces.
WARM_UP_RUNS = 3
# Takes work that reads and writes tensors at fixed addresses; returns a function that repeats it.
Record = Callable[[Callable[[], None]], Callable[[], Any]]


def cuda_graph(
    work: Callable[[], None], pool: Any = None, generator: torch.Generator | None = None
) -> torch.cuda.CUDAGraph:
    """Records work as a CUDA graph.

    Args:
        work: Work that reads and writes tensors at fixed addresses and never waits for the GPU.
        pool: Memory pool of another graph that never runs at the same time; by default the graph has its own.
        generator: Source of random numbers of the work, other than that of the GPU; a replay draws from its present
            state.

    Returns:
        The graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph


class Replayed:
    """A velocity ``(t, x, h) → (dx, dh)`` that is recorded once and replayed.

    If gradients are enabled, or if shapes or dtype differ from the recorded ones, the velocity itself is evaluated. Its
    trace is never replayed.

    Args:
        velocity: The velocity to record.
        x: Positions that set shape (B, M, n), dtype and device of those to come.
        h: Features that set shape (B, M, F), dtype and device of those to come.
        record: How to record; by default as a CUDA graph.

    Example:
        Without a GPU, simply repeating the work takes the place of a graph:

        >>> x, h = torch.ones(1, 2, 3), torch.ones(1, 2, 1)
        >>> replayed = Replayed(lambda t, x, h: (t * x, h), x, h, record=lambda work: work)
        >>> with torch.no_grad():
        ...     dx, dh = replayed(torch.tensor(2.0), 3 * x, h)
        ...     other, _ = replayed(torch.tensor(0.0), x, h)
        >>> dx.mean().item(), other.mean().item()
        (6.0, 0.0)
    """

    def __init__(self, velocity: Velocity, x: Tensor, h: Tensor, record: Record | None = None) -> None:
        self.velocity = velocity
        # The inputs of a replay, including the time, are tensors at fixed addresses on the device.
        self.t, self.x, self.h = torch.ones((), dtype=x.dtype, device=x.device), x.clone(), h.clone()
        self.rates = (torch.zeros_like(x), torch.zeros_like(h))
        self.replay = (record or (lambda work: cuda_graph(work).replay))(self._evaluate)

    def _evaluate(self) -> None:
        with torch.no_grad():
            for place, rate in zip(self.rates, self.velocity(self.t, self.x, self.h), strict=True):
                place.copy_(rate)

    def __call__(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns dx/dt and dh/dt in new tensors."""
        alike = (t.shape, x.shape, h.shape, x.dtype) == (self.t.shape, self.x.shape, self.h.shape, self.x.dtype)
        if torch.is_grad_enabled() or not alike:
            return self.velocity(t, x, h)
        for place, value in ((self.t, t), (self.x, x), (self.h, h)):
            place.copy_(value)
        self.replay()
        dx, dh = self.rates
        return dx.clone(), dh.clone()

    def trace(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns dx/dt, dh/dt and the exact trace (B,), or None if the velocity has no closed form of it."""
        trace = getattr(self.velocity, "trace", None)
        return None if trace is None else trace(t, x, h)


def replayed(velocity: Velocity, x: Tensor, h: Tensor, record: Record | None = None) -> Velocity:
    """Returns a velocity that is fast to evaluate many times at the shapes of x and h.

    On a CPU, and if it is recorded already, the velocity itself is returned; so it is, with a warning, if it cannot be
    recorded.

    Args:
        velocity: ``(t, x, h) → (dx, dh)``; it is not differentiated.
        x: Positions, shape (B, M, n).
        h: Features, shape (B, M, F).
        record: How to record; by default as a CUDA graph, on a GPU only.

    Returns:
        The recorded velocity, or the given one.

    Raises:
        RuntimeError: If the memory of the GPU is full.
    """
    if isinstance(velocity, Replayed) or (record is None and x.device.type != "cuda"):
        return velocity
    try:
        return Replayed(velocity, x, h, record)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"cannot record the velocity as a CUDA graph ({reason}); continues without, more slowly", stacklevel=2
        )
        return velocity
