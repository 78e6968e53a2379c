"""Training on one GPU at its full speed: data, noise and decisions stay on the device, a step is one CUDA graph.

The numbers of a step are those of the trainer's: flow matching, clipping by recent norms, Muon and AdamW, averaged
weights. On other devices, and where graphs are not wanted, the same step runs without being captured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ase_enf.atoms.batch import Batch
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.flow.model import ENF
from ase_enf.training.objectives import Objective
from ase_enf.training.optimizers import hidden_matrices

# Padded sizes: a batch takes the molecules up to one of them, and above the one before.
WIDTHS = (17, 20, 23, 29)
GRADIENT_HISTORY = 50
MOMENTUM = 0.95
# Newton-Schulz iteration of Muon (Jordan et al. 2024).
POLYNOMIAL = (3.4445, -4.775, 2.0315)
ADAM_BETAS = (0.9, 0.999)
WARM_UP_RUNS = 3


class DeviceSet:
    """A training set that lives on one device; batches are gathered there.

    Args:
        molecules: The set.
        device: Where.
        widths: Padded sizes, of which those that some molecule needs are kept; the largest molecule is one more.
    """

    def __init__(self, molecules: MoleculeSet, device: torch.device, widths: Sequence[int] = WIDTHS) -> None:
        self.positions, self.types, self.charges, self.sizes, self.starts = (
            t.to(device)
            for t in (molecules.positions, molecules.types, molecules.charges, molecules.sizes, molecules.starts)
        )
        self.conditions = None if molecules.conditions is None else molecules.conditions.to(device)
        self.bonds = None if molecules.bonds is None else molecules.bonds.to(device)
        self.bond_starts = None if molecules.bonds is None else molecules.bond_starts.to(device)
        largest = int(molecules.sizes.max())
        self.widths: tuple[int, ...] = ()
        self.members: list[Tensor] = []
        for width in (*(width for width in widths if width < largest), largest):
            low = self.widths[-1] if self.widths else 0
            inside = torch.nonzero((molecules.sizes > low) & (molecules.sizes <= width))[:, 0]
            if len(inside):
                self.widths += (width,)
                self.members.append(inside.to(device))

    def batch(self, index: Tensor, width: int) -> Batch:
        """Gathers the molecules ``index``, shape (B,), padded to ``width`` atoms, without reading anything back."""
        sizes, starts = self.sizes[index], self.starts[index]
        slots = torch.arange(width, device=index.device)
        mask = slots < sizes[:, None]
        atom = torch.where(mask, starts[:, None] + slots, starts[:, None])
        real = mask.unsqueeze(-1).to(self.positions.dtype)
        conditions = None if self.conditions is None else self.conditions[index]
        atoms = (self.positions[atom] * real, self.types[atom] * real, self.charges[atom] * real)
        return Batch(*atoms, mask, conditions, None if self.bonds is None else self._bonds(index, sizes, mask))

    def _bonds(self, index: Tensor, sizes: Tensor, mask: Tensor) -> Tensor:
        slots = torch.arange(mask.shape[1], device=index.device)
        inside = mask.unsqueeze(2) & mask.unsqueeze(1)
        place = self.bond_starts[index, None, None] + slots[:, None] * sizes[:, None, None] + slots
        return torch.where(inside, self.bonds[torch.where(inside, place, 0)], 0)

    def epoch(self, batch_size: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
        """Returns the batches of one epoch as (number of the width, index on the device), in random order.

        What does not fill a batch waits for another epoch, in which others are left over.
        """
        plan = []
        for k, members in enumerate(self.members):
            order = torch.randperm(len(members), generator=generator)
            full = len(members) // batch_size * batch_size
            shuffled = members[order[:full].to(members.device)]
            plan += [(k, piece) for piece in shuffled.split(batch_size) if len(piece) == batch_size]
        return [plan[k] for k in torch.randperm(len(plan), generator=generator).tolist()]


class FlatOptimizer:
    """Muon for the hidden matrices and AdamW for the rest, on one flat vector of weights and one of gradients.

    Nothing is read by the host: the rate is a tensor, and a step whose gradient is not finite changes nothing.
    The parameters of the model become views of the flat vector.

    Args:
        model: What is trained.
        learning_rate: Peak of AdamW's rate.
        matrix_rate: Peak of Muon's.
        matrix_decay: Muon's decoupled weight decay.
        ema_decays: Decays of the averages that are kept.
    """

    def __init__(
        self,
        model: ENF,
        learning_rate: float = 1e-3,
        matrix_rate: float = 1e-2,
        matrix_decay: float = 0.1,
        ema_decays: Sequence[float] = (0.999, 0.9999),
    ) -> None:
        self.learning_rate, self.matrix_rate, self.matrix_decay = learning_rate, matrix_rate, matrix_decay
        matrices = {id(matrix) for matrix in hidden_matrices(model.dynamics.network)}
        # Matrices come last, those of one shape side by side: one slice is a stack of them.
        named = sorted(
            model.named_parameters(), key=lambda item: (True, *item[1].shape) if id(item[1]) in matrices else (False,)
        )
        self.names = [name for name, _ in named]
        parameters = [parameter for _, parameter in named]
        self.shapes = [tuple(parameter.shape) for parameter in parameters]
        device = parameters[0].device
        self.weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.gradient = torch.zeros_like(self.weights)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, value, gradient in zip(
            parameters, self.weights.split(sizes), self.gradient.split(sizes), strict=True
        ):
            parameter.data = value.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)
        is_matrix = [id(parameter) in matrices for parameter in parameters]
        self.others = sum(size for size, matrix in zip(sizes, is_matrix, strict=True) if not matrix)
        stacks = Counter(shape for shape, matrix in zip(self.shapes, is_matrix, strict=True) if matrix)
        self.groups: list[tuple[slice, tuple[int, ...]]] = []  # of the matrices' part
        start = 0
        for shape, count in stacks.items():
            self.groups.append((slice(start, start + count * math.prod(shape)), (count, *shape)))
            start += count * math.prod(shape)
        self.first, self.second = (torch.zeros_like(self.weights[: self.others]) for _ in range(2))
        self.momentum = torch.zeros_like(self.weights[self.others :])
        self.ema_decays = tuple(ema_decays)
        self.averages = [self.weights.clone() for _ in self.ema_decays]
        self.count = torch.zeros((), device=device)  # steps taken
        self.rate = torch.ones((), device=device)  # fraction of the peak rates
        self.norms = torch.zeros(GRADIENT_HISTORY, device=device)
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    def step(self, loss: Tensor) -> None:
        """Takes one step along the gradients that stand in ``gradient``."""
        finite = torch.isfinite(loss) & torch.isfinite(self.gradient).all()
        gradient = torch.where(finite, self.gradient, 0.0)
        norm = gradient.norm()
        known = self.count.clamp(max=GRADIENT_HISTORY)
        mean = self.norms.sum() / known.clamp(min=1)
        spread = (self.norms.square().sum() / known.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        limit = torch.where(known > 0, 1.5 * mean + 2.0 * spread, math.inf)
        gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1.0)
        clipped = torch.minimum(norm, limit)
        place = torch.arange(GRADIENT_HISTORY, device=norm.device) == self.count % GRADIENT_HISTORY
        self.norms.copy_(torch.where(place & finite, clipped, self.norms))
        self.norm.copy_(norm)
        taken = finite.to(norm.dtype)
        self.skipped += 1 - taken
        self.count += taken
        rate = self.rate * taken
        self._adam(gradient[: self.others], rate, finite)
        self._muon(gradient[self.others :], rate, finite)
        for average, decay in zip(self.averages, self.ema_decays, strict=True):
            now = torch.minimum((1.0 + self.count) / (10.0 + self.count), torch.full_like(self.count, decay))
            average.lerp_(self.weights, (1.0 - now) * taken)

    def _adam(self, gradient: Tensor, rate: Tensor, finite: Tensor) -> None:
        b1, b2 = ADAM_BETAS
        self.first.copy_(torch.where(finite, torch.lerp(self.first, gradient, 1 - b1), self.first))
        self.second.copy_(torch.where(finite, torch.lerp(self.second, gradient.square(), 1 - b2), self.second))
        steps = self.count.clamp(min=1)
        scale = (self.second / (1 - b2**steps)).sqrt() + 1e-8
        self.weights[: self.others].sub_(self.learning_rate * rate * self.first / (1 - b1**steps) / scale)

    def _muon(self, gradient: Tensor, rate: Tensor, finite: Tensor) -> None:
        self.momentum.copy_(torch.where(finite, torch.lerp(self.momentum, gradient, 1 - MOMENTUM), self.momentum))
        nesterov = torch.lerp(gradient, self.momentum, MOMENTUM)
        matrices = self.weights[self.others :]
        matrices.mul_(1 - self.matrix_rate * self.matrix_decay * rate)
        for place, shape in self.groups:
            step = orthogonal_factor(nesterov[place].view(shape)).flatten()
            matrices[place].sub_(step * (rate * (0.2 * math.sqrt(max(shape[1:])) * self.matrix_rate)))

    def state(self, vector: Tensor | None = None) -> dict[str, Tensor]:
        """Returns a flat vector (by default the weights) as named tensors, copies on the CPU."""
        vector = self.weights if vector is None else vector
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = vector.detach().cpu().split(sizes)
        return {name: p.view(shape).clone() for name, p, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything that a run needs to go on, copies on the CPU."""
        names = ("weights", "first", "second", "momentum", "count", "norms", "skipped")
        state = {name: getattr(self, name).detach().cpu().clone() for name in names}
        return state | {f"average_{k}": t.detach().cpu().clone() for k, t in enumerate(self.averages)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what :meth:`tensors` returned."""
        for name, value in state.items():
            own = self.averages[int(name[8:])] if name.startswith("average_") else getattr(self, name)
            own.copy_(value)


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """Returns about U Vᵀ of each G = U S Vᵀ by five Newton-Schulz steps in bfloat16, shape (K, rows, columns)."""
    a, b, c = POLYNOMIAL
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class CapturedSteps:
    """Training steps of one batch size: one CUDA graph for each padded size, replayed.

    Args:
        model: The flow, on the device.
        data: The training set there.
        objective: Whose loss is minimised; draws its noise on the device.
        optimizer: Takes the steps.
        batch_size: Molecules a step.
        compile: Compile the layers by ``torch.compile``, one shape at a time, but those whose pairs Triton computes.
        capture: Whether to capture graphs; only on CUDA.
    """

    def __init__(
        self,
        model: ENF,
        data: DeviceSet,
        objective: Objective,
        optimizer: FlatOptimizer,
        batch_size: int,
        compile: bool = True,
        capture: bool = True,
    ) -> None:
        self.model, self.data, self.objective, self.optimizer = model, data, objective, optimizer
        self.loss_sum = torch.zeros((), device=model.device)
        self.index = torch.zeros(batch_size, dtype=torch.long, device=model.device)
        if compile:
            torch._dynamo.config.recompile_limit = 64
            for layer in model.dynamics.network.layers:
                if not layer.triton:
                    layer.compile(dynamic=False)
        if not capture:
            self.replays: list[Callable[[], Any]] = [
                (lambda width=width: self._step(width)) for width in self.data.widths
            ]
            return
        state = optimizer.tensors()
        self.replays, pool = [], None
        for k, width in enumerate(self.data.widths):
            self.index.copy_(data.members[k][torch.arange(batch_size, device=model.device) % len(data.members[k])])
            graph, pool = self._capture(width, pool)
            self.replays.append(graph.replay)
        optimizer.load(state)  # capturing has taken steps

    def _capture(self, width: int, pool: Any) -> tuple[Any, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._step(width)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._step(width)
        return graph, pool or graph.pool()

    def _step(self, width: int) -> None:
        self.optimizer.gradient.zero_()
        loss = self.objective(self.model, self.data.batch(self.index, width)).loss
        loss.backward()
        self.optimizer.step(loss.detach())
        self.loss_sum += torch.nan_to_num(loss.detach())

    def __call__(self, k: int, index: Tensor) -> None:
        """Takes one step with the molecules ``index`` of the k-th width."""
        self.index.copy_(index)
        self.replays[k]()
