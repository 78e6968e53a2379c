"""Training at the full speed of one GPU: data, noise and decisions stay on the device, and a step is one CUDA graph.

A step does what one of ``loop`` does: flow matching, clipping by recent norms, Muon and AdamW, averaged weights. On
other devices, or with ``capture=False``, the same step runs without being captured.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ase_enf.atoms.batch import Batch
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.flow.model import ENF
from ase_enf.flow.replay import cuda_graph
from ase_enf.training.objectives import Objective
from ase_enf.training.optimizers import GRADIENT_HISTORY, Optimizers, hidden_matrices

# Padded sizes; the molecules of a batch fit into one of them and not into the one before.
WIDTHS = (17, 20, 23, 29)
MOMENTUM = 0.95
# Newton-Schulz iteration of Muon (Jordan et al. 2024).
POLYNOMIAL = (3.4445, -4.775, 2.0315)
ADAM_BETAS = (0.9, 0.999)


class DeviceSet:
    """A training set that lives on one device; batches are gathered there.

    Args:
        molecules: The set.
        device: The device.
        widths: Padded sizes; those that no molecule needs are dropped, and the size of the largest molecule is added.
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
        """Gathers the molecules ``index``, shape (B,), padded to ``width`` atoms; the host reads nothing."""
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

        Molecules that do not fill a batch are left out; in the next epoch they are others.
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

    The host reads nothing: the rate is a tensor, and a step whose gradient is not finite changes no weight. The
    parameters of the model become views of the flat vector.

    Args:
        model: The flow that is trained.
        learning_rate: Peak learning rate of AdamW.
        matrix_rate: Peak learning rate of Muon.
        matrix_decay: Decoupled weight decay of Muon.
        ema_decays: Decays of the moving averages.
        weight_decay: Decoupled weight decay of AdamW.
        muon: Whether Muon steps the hidden matrices; if not, AdamW steps all.
    """

    def __init__(
        self,
        model: ENF,
        learning_rate: float = 1e-3,
        matrix_rate: float = 1e-2,
        matrix_decay: float = 0.1,
        ema_decays: Sequence[float] = (0.999, 0.9999),
        weight_decay: float = 0.0,
        muon: bool = True,
    ) -> None:
        self.learning_rate, self.matrix_rate = learning_rate, matrix_rate
        self.weight_decay, self.matrix_decay = weight_decay, matrix_decay
        matrices = {id(matrix) for matrix in hidden_matrices(model.dynamics.network)} if muon else set()
        # Matrices come last, those of one shape side by side: one slice is a stack of them.
        named = sorted(
            model.named_parameters(), key=lambda item: (True, *item[1].shape) if id(item[1]) in matrices else (False,)
        )
        self.names = [name for name, _ in named]
        parameters = [parameter for _, parameter in named]
        self.shapes = [tuple(parameter.shape) for parameter in parameters]
        stops = itertools.accumulate(parameter.numel() for parameter in parameters)
        # Where each parameter lies in the flat vector.
        self.places = {id(p): slice(stop - p.numel(), stop) for p, stop in zip(parameters, stops, strict=True)}
        self._flatten(parameters)
        others = [parameter.numel() for parameter in parameters if id(parameter) not in matrices]
        self.others = sum(others)
        self.groups = _stacks(self.shapes[len(others) :])  # slices of the matrices' part
        self.first, self.second = (torch.zeros_like(self.weights[: self.others]) for _ in range(2))
        self.momentum = torch.zeros_like(self.weights[self.others :])
        self.ema_decays = tuple(ema_decays)
        self.averages = [self.weights.clone() for _ in self.ema_decays]
        device = self.weights.device
        self.count = torch.zeros((), device=device)  # steps taken
        self.recorded = torch.zeros((), device=device)  # norms that entered the history, as those of zero do not
        self.rate = torch.ones((), device=device)  # fraction of the peak rates
        self.norms = torch.zeros(GRADIENT_HISTORY, device=device)
        self.norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    def _flatten(self, parameters: list[torch.nn.Parameter]) -> None:
        """Lays all parameters and their gradients out in two vectors, of which they become views."""
        self.weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.gradient = torch.zeros_like(self.weights)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, value, gradient in zip(
            parameters, self.weights.split(sizes), self.gradient.split(sizes), strict=True
        ):
            parameter.data = value.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)

    def step(self, loss: Tensor) -> None:
        """Takes one step along the gradients in ``gradient``."""
        finite = torch.isfinite(loss) & torch.isfinite(self.gradient).all()
        gradient = torch.where(finite, self.gradient, 0.0)
        norm = gradient.norm()
        known = self.recorded.clamp(max=GRADIENT_HISTORY)
        mean = self.norms.sum() / known.clamp(min=1)
        spread = (self.norms.square().sum() / known.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        limit = torch.where(known > 0, 1.5 * mean + 2.0 * spread, math.inf)
        gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1.0)
        clipped = torch.minimum(norm, limit)
        counts = finite & (norm > 0)  # norms of zero would clip everything to zero
        place = torch.arange(GRADIENT_HISTORY, device=norm.device) == self.recorded % GRADIENT_HISTORY
        self.norms.copy_(torch.where(place & counts, clipped, self.norms))
        self.recorded += counts.to(norm.dtype)
        self.norm.copy_(torch.where(finite, norm, torch.nan))
        taken = finite.to(norm.dtype)
        self.skipped += 1 - taken
        self.count += taken
        rate = self.rate * taken
        self._adam(gradient[: self.others], rate, finite)
        self._muon(gradient[self.others :], rate, finite)
        for average, decay in zip(self.averages, self.ema_decays, strict=True):
            before = self.count - taken  # updates; the first one copies
            now = torch.where(before > 0, ((1.0 + before) / (10.0 + before)).clamp(max=decay), 0.0)
            average.lerp_(self.weights, (1.0 - now) * taken)

    def _adam(self, gradient: Tensor, rate: Tensor, finite: Tensor) -> None:
        b1, b2 = ADAM_BETAS
        self.first.copy_(torch.where(finite, torch.lerp(self.first, gradient, 1 - b1), self.first))
        self.second.copy_(torch.where(finite, torch.lerp(self.second, gradient.square(), 1 - b2), self.second))
        steps = self.count.clamp(min=1)
        scale = (self.second / (1 - b2**steps)).sqrt() + 1e-8
        weights = self.weights[: self.others]
        weights.mul_(1 - self.learning_rate * self.weight_decay * rate)
        weights.sub_(self.learning_rate * rate * self.first / (1 - b1**steps) / scale)

    def _muon(self, gradient: Tensor, rate: Tensor, finite: Tensor) -> None:
        self.momentum.copy_(torch.where(finite, torch.lerp(self.momentum, gradient, 1 - MOMENTUM), self.momentum))
        nesterov = torch.lerp(gradient, self.momentum, MOMENTUM)
        matrices = self.weights[self.others :]
        matrices.mul_(1 - self.matrix_rate * self.matrix_decay * rate)
        for place, shape in self.groups:
            step = orthogonal_factor(nesterov[place].view(shape)).flatten()
            matrices[place].sub_(step * (rate * (0.2 * math.sqrt(max(shape[1:])) * self.matrix_rate)))

    def take_over(self, optimizers: Optimizers, averages: Sequence[AveragedModel], norms: Sequence[float]) -> None:
        """Continues from the state of torch's optimizers and averages, whose tensors become views of the flat vectors.

        Args:
            optimizers: AdamW, and Muon if there is one, of the same parameters.
            averages: Moving averages, as many as decays.
            norms: Recent gradient norms, the latest last.
        """
        self.count.copy_(averages[0].n_averaged)
        for flat, average in zip(self.averages, averages, strict=True):
            parameters = dict(average.module.named_parameters())
            for name, value in self._named(flat).items():
                value.copy_(parameters[name].detach())
                parameters[name].data = value
        self.adam_steps: list[Tensor] = []
        for member in optimizers.members:
            for parameter in (parameter for group in member.param_groups for parameter in group["params"]):
                member.state[parameter] = self._shared(parameter, member.state[parameter])
        self.recorded.fill_(len(norms))
        self.norms[: len(norms)] = torch.tensor(list(norms))

    def _shared(self, parameter: torch.nn.Parameter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state of one parameter as views of the flat vectors, which take its values."""
        place = self.places[id(parameter)]
        if place.start >= self.others:
            vectors = {"momentum_buffer": self.momentum[place.start - self.others : place.stop - self.others]}
            shared = {}
        else:
            vectors = {"exp_avg": self.first[place], "exp_avg_sq": self.second[place]}
            shared = {"step": torch.tensor(float(self.count))}
            self.adam_steps.append(shared["step"])
        for name, vector in vectors.items():
            view = vector.view_as(parameter)
            if name in state:
                view.copy_(state[name])
            shared[name] = view
        return shared

    def recent_norms(self) -> list[float]:
        """Returns the recent gradient norms, the latest last."""
        count, norms = int(self.recorded), self.norms.tolist()
        return [norms[place % GRADIENT_HISTORY] for place in range(max(count - GRADIENT_HISTORY, 0), count)]

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        """Returns a flat vector as named views."""
        pieces = vector.split([math.prod(shape) for shape in self.shapes])
        return {name: p.view(shape) for name, p, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def state(self, vector: Tensor | None = None) -> dict[str, Tensor]:
        """Returns a flat vector (by default the weights) as named tensors, copies on the CPU."""
        vector = self.weights if vector is None else vector
        return {name: value.clone() for name, value in self._named(vector.detach().cpu()).items()}

    def tensors(self) -> dict[str, Tensor]:
        """Returns copies, on the CPU, of everything that a run needs to be resumed."""
        names = ("weights", "first", "second", "momentum", "count", "recorded", "norms", "skipped")
        state = {name: getattr(self, name).detach().cpu().clone() for name in names}
        return state | {f"average_{k}": t.detach().cpu().clone() for k, t in enumerate(self.averages)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`tensors` returned."""
        for name, value in state.items():
            own = self.averages[int(name[8:])] if name.startswith("average_") else getattr(self, name)
            own.copy_(value)


def _stacks(shapes: Sequence[tuple[int, ...]]) -> list[tuple[slice, tuple[int, ...]]]:
    """Returns slice and shape (K, rows, columns) of each stack of matrices of one shape; stacks lie side by side."""
    stacks, start = [], 0
    for shape, count in Counter(shapes).items():
        stop = start + count * math.prod(shape)
        stacks.append((slice(start, stop), (count, *shape)))
        start = stop
    return stacks


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """Returns U Vᵀ of each G = U S Vᵀ, nearly: five Newton-Schulz steps in bfloat16, shape (K, rows, columns)."""
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
        data: The training set, on the same device.
        objective: The loss that is minimised; it draws its noise on the device.
        optimizer: Takes the steps.
        batch_size: Molecules in a step; other batches take the same step, but it is not captured.
        compile: Whether to compile the layers by ``torch.compile``, for one shape at a time, except those whose pairs
            Triton computes.
        capture: Whether to capture graphs; only on CUDA. A size is captured when it comes for the first time.
        generator: Source of noise, on the device; by default that of the device itself.
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
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.data, self.objective, self.optimizer = model, data, objective, optimizer
        self.capture, self.generator = capture, generator
        self.loss_sum = torch.zeros((), device=model.device)
        self.latest = torch.zeros(3, device=model.device)  # loss, value and gradient norm; NaN where no step was taken
        self.index = torch.zeros(batch_size, dtype=torch.long, device=model.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if compile:
            torch._dynamo.config.recompile_limit = 64
            for layer in model.dynamics.network.layers:
                if not layer.triton:
                    layer.compile(dynamic=False)

    def prepare(self) -> None:
        """Captures the steps of all sizes, so that none has to be captured during training."""
        for k, members in enumerate(self.data.members):
            self.index.copy_(members[torch.arange(len(self.index), device=members.device) % len(members)])
            self._graph(k)

    def _graph(self, k: int) -> torch.cuda.CUDAGraph:
        """Returns the step of the k-th size with the molecules in ``index``, captured."""
        if k not in self.graphs:
            state, loss_sum = self.optimizer.tensors(), self.loss_sum.clone()
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            step = functools.partial(self._step, self.index, self.data.widths[k])
            try:
                self.graphs[k] = cuda_graph(step, pool, self.generator)
            finally:  # capturing took steps, which are undone here
                self.optimizer.load(state)
                self.loss_sum.copy_(loss_sum)
        return self.graphs[k]

    def _step(self, index: Tensor, width: int) -> None:
        self.optimizer.gradient.zero_()
        loss, value = self.objective(self.model, self.data.batch(index, width), self.generator)
        loss.backward()
        loss = loss.detach()
        self.optimizer.step(loss)
        self.loss_sum += torch.nan_to_num(loss)
        self.latest.copy_(torch.stack([loss, value.detach(), self.optimizer.norm]))

    def __call__(self, k: int, index: Tensor, seed: int | None = None) -> None:
        """Takes one step.

        Args:
            k: Number of the padded size.
            index: The molecules, on the device, shape (B,).
            seed: Seed of the noise; by default the generator is not reseeded.
        """
        captured = self.capture and len(index) == len(self.index)
        if captured:
            self.index.copy_(index)
            graph = self._graph(k)
        if seed is not None:
            self.generator.manual_seed(seed)
        if captured:
            graph.replay()
        else:
            self._step(index, self.data.widths[k])
