"""The settings of a training run; every field carries its own check and help text."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from ase_enf.flow.modes import MODES, FeatureMode, feature_mode
from ase_enf.renamed import refuse_renamed
from ase_enf.values import (
    BACKENDS,
    DEQUANTIZERS,
    NETWORKS,
    OBJECTIVES,
    OPTIMIZERS,
    PARAMETERISATIONS,
    SCHEDULES,
    TIMES,
    check_choice,
    check_whole,
)

if TYPE_CHECKING:
    from ase_enf.flow.config import ENFConfig

PRECISIONS = ("float32", "tf32", "bf16")
CAPTURES = ("auto", "always", "never")
# Names of backends in earlier versions.
RENAMED_BACKENDS = {"fused": "compiled", "plain": "torch"}
# Names of fields in earlier versions; runs and weights of those versions have them.
RENAMED = {
    "decay": "cool_down",
    "ema": "ema_decay",
    "feature_spread": "type_scale",
    "initial": "init_from",
    "kernel": "backend",
    "matrix_decay": "muon_weight_decay",
    "matrix_rate": "muon_learning_rate",
    "tolerance": "ode_tolerance",
}
# Fields that may change when a run is resumed; all others decide which numbers come next.
RESUME_MAY_CHANGE = (
    "epochs", "steps", "validate_every", "validation_size", "checkpoint_every", "log_every", "time_limit", "init_from",
    "out", "device", "precision", "compile", "backend", "capture", "cool_down", "muon_weight_decay",
)  # fmt: skip
# Fields that a fine-tuned flow takes from its first weights.
MODEL_FIELDS = (
    "parameterisation", "features", "dimension", "network", "hidden", "layers", "attention", "radial", "dequantizer",
)  # fmt: skip


class Range(NamedTuple):
    """The values that a field may have."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Range(lambda value: 0 < value < math.inf, "positive and finite")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "finite and not negative")
PART = Range(lambda value: 0 < value <= 1, "in (0, 1]")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "in [0, 1)")
HOURS = Range(lambda value: 0 < value < math.inf, "a positive number of hours, or None for no limit")
WORD = Range(lambda value: value < 2**64, "below 2^64")


def setting(
    default: Any, text: str, within: Range | None = None, least: int = 1, one_of: Sequence[str] | None = None
) -> Any:
    """Returns a field of :class:`TrainConfig`.

    Args:
        default: Its default.
        text: Its description, for ``ase-enf train --help`` and the docstring.
        within: The range of a real number.
        least: The smallest allowed whole number.
        one_of: The allowed names.
    """
    about = {"help": text, "within": within, "least": least, "one_of": one_of}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, by which objective and for how long; the defaults are those of the shipped models.

    Raises:
        TypeError: For a field that has been renamed; the message gives its new name.
        ValueError: For a value outside its range, an unknown name, or fields that contradict each other.

    Example:
        >>> TrainConfig(features="given", steps=20).steps
        20
    """

    features: str = setting(
        "joint",
        'what the flow draws: "joint" (positions and elements: unconditional), "given" (positions, conditional on the '
        'composition) or "none" (positions only)',
        one_of=tuple(MODES),
    )
    condition: str = setting(
        "",
        "numbers in the info of the structures that condition the flow, such as gap: a name, or several with commas "
        "(a tuple in Python, or the option more than once); training drops them at random, so that the same weights "
        "also draw without them",
    )
    graph: bool = setting(
        False,
        "whether the molecular graph, perceived from the positions, conditions the flow (features given, network egnn)",
    )
    dimension: int = setting(3, "3, or 2 for structures in the xy plane")
    network: str = setting(
        "egnn",
        '"egnn", "gnn" or, with features "none", "simple" or "kernel" (Köhler et al. 2020); see ENFConfig',
        one_of=NETWORKS,
    )
    hidden: int = setting(64, "width of the network")
    layers: int = setting(6, "layers of the network")
    attention: bool = setting(True, "soft edges (eq. 4)")
    radial: int = setting(
        16, "radial functions of each distance beside its square, in an EGNN; 0 for the paper's network", least=0
    )
    dequantizer: str = setting("fixed", '"fixed", or "learned" (with objective "nll" only)', one_of=DEQUANTIZERS)
    type_scale: float = setting(
        0.3,
        "separation of one-hot types (and spread of charges) inside the flow, where positions have unit variance; "
        "below one the positions are decided first on the way from noise to data",
        POSITIVE,
    )
    objective: str = setting("flow_matching", '"flow_matching" or "nll"', one_of=OBJECTIVES)
    parameterisation: str = setting(
        "auto",
        'how the network\'s output becomes a velocity, "velocity", "endpoint" or "denoising"; see ENFConfig. "auto" is '
        "denoising for flow matching of molecules by an EGNN, else velocity",
        one_of=("auto", *PARAMETERISATIONS),
    )
    times: str = setting(
        "auto",
        'how flow matching draws t from a uniform u: "power", t = u^time_power, or "beta", t = 1 − u^(1/time_power); '
        '"auto" is power for velocity, else beta',
        one_of=("auto", *TIMES),
    )
    time_power: float | None = setting(None, "the exponent in times; by default 1.3 for power, 1.8 for beta", POSITIVE)
    schedule: str = setting(
        "cosine",
        'learning rate after the warm-up: "cosine" (constant, then half a cosine to zero at the end, see cool_down) or '
        '"constant" (without an end of its own: training stops after steps, if given, or at the time limit)',
        one_of=SCHEDULES,
    )
    cool_down: float = setting(
        1.0,
        "fraction of the steps after the warm-up, at the end, over which the learning rate falls to zero; 1 for all of "
        "them; with the constant schedule, that of its branches",
        PART,
    )
    regularisation: float = setting(1e-3, "λ of the kinetic and Jacobian terms of nll", NOT_NEGATIVE)
    ode_tolerance: float = setting(1e-4, "rtol and atol of dopri5 for nll", POSITIVE)
    adjoint: bool = setting(True, "adjoint (constant memory) instead of back-propagation through the solver, for nll")
    epochs: int = setting(100, "passes over the training set; ignored if steps is given, or with the constant schedule")
    steps: int | None = setting(None, "optimizer steps")
    batch_size: int = setting(64, "molecules in a step of one process")
    optimizer: str = setting(
        "auto",
        '"adamw", "muon" (Muon for the hidden matrices, AdamW for the rest), or "auto": muon, where torch has it, for '
        "flow matching; AdamW with amsgrad, as in the paper, for nll",
        one_of=OPTIMIZERS,
    )
    learning_rate: float = setting(1e-3, "peak of AdamW's learning rate", POSITIVE)
    muon_learning_rate: float = setting(1e-2, "peak of Muon's learning rate, in the scale of AdamW's", POSITIVE)
    muon_weight_decay: float = setting(0.1, "decoupled weight decay of Muon", NOT_NEGATIVE)
    warmup: int = setting(500, "steps of linear warm-up", least=0)
    weight_decay: float = setting(1e-12, "weight decay of AdamW", NOT_NEGATIVE)
    ema_decay: float = setting(
        0.999, "decay of the exponential moving average of the weights, which is validated and saved", BELOW_ONE
    )
    long_ema_decay: float | None = setting(
        None,
        "decay of a second, longer average, which is validated beside the first; the better one is kept",
        BELOW_ONE,
    )
    augment: bool = setting(False, "random rotations, for networks that are not equivariant")
    seed: int = setting(0, "seed of initialisation, order, times and noise", WORD, least=0)
    validate_every: int = setting(
        0,
        "steps between validations; 0 for one epoch, or for more with flow matching on a training set so small that "
        "validations would take more than a fifth of the time of training",
        least=0,
    )
    validation_size: int = setting(
        128,
        "molecules of the validation set that are scored, always the same; the weights of their lowest mean negative "
        "log-likelihood (NLL, nats a molecule) are kept",
    )
    checkpoint_every: int = setting(500, "steps between saves of the training state")
    log_every: int = setting(50, "steps between rows of the log")
    time_limit: float | None = setting(
        None, "hours after which training stops as if interrupted; it can be resumed", HOURS
    )
    init_from: str | None = setting(
        None, "weights to start from, a path or a shipped name; they decide the fields of the model"
    )
    out: str | None = setting(None, "folder of weights, training state and log; without it everything stays in memory")
    device: str = setting("auto", '"auto", "cpu", "cuda" …')
    precision: str = setting(
        "float32",
        '"float32", "tf32", or "bf16": the products of the pair network in bfloat16, all else in float32',
        one_of=PRECISIONS,
    )
    compile: bool = setting(False, "compile the network by torch.compile (flow matching only; needs a C++ compiler)")
    backend: str = setting(
        "auto",
        'what computes the pairs of an EGNN: "compiled" (a C++ kernel for CPUs, for flow matching in float32, in three '
        'quarters of the time on one thread), "triton" (kernels for GPUs, for flow matching), "torch", or "auto": '
        "compiled on one thread (torchrun gives each process one), triton on a GPU",
        one_of=BACKENDS,
    )
    capture: str = setting(
        "auto",
        "whether steps stay on the device, which the host waits for only now and then, and each is one CUDA graph on a "
        'GPU: "always" (flow matching, one process), "never", or "auto": on a GPU, where that is possible',
        one_of=CAPTURES,
    )

    def __new__(cls, *_: Any, **fields: Any) -> Self:  # noqa: D102 (a hook before dataclass's own __init__)
        refuse_renamed("TrainConfig", fields, RENAMED)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.condition, list | tuple):
            object.__setattr__(self, "condition", ",".join(self.condition))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        _check_optimizer(self.optimizer)
        for wrong, message in _CONTRADICTIONS:
            if wrong(self):
                raise ValueError(message)

    def resolved(self) -> Self:
        """Returns the settings with every "auto" resolved; a run keeps these, however later versions resolve it.

        Example:
            >>> chosen = TrainConfig().resolved()
            >>> chosen.parameterisation, chosen.times, chosen.time_power
            ('denoising', 'beta', 1.8)
            >>> TrainConfig(features="none").resolved().parameterisation
            'velocity'
        """
        parameterisation, times, power = self.parameterisation, self.times, self.time_power
        if parameterisation == "auto":
            molecules = self.mode.knows_types and self.network == "egnn" and self.objective == "flow_matching"
            parameterisation = "denoising" if molecules else "velocity"
        if times == "auto":
            times = "power" if parameterisation == "velocity" else "beta"
        if power is None:
            power = 1.3 if times == "power" else 1.8
        from ase_enf.training.optimizers import resolve_optimizer

        optimizer = resolve_optimizer(self.optimizer, self.objective)
        return dataclasses.replace(
            self, parameterisation=parameterisation, times=times, time_power=power, optimizer=optimizer
        )

    @property
    def mode(self) -> FeatureMode:
        """What flows, what conditions, and which terms the likelihood has."""
        return feature_mode(self.features)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions.

        Example:
            >>> TrainConfig(condition=("gap", "alpha")).conditions
            ('gap', 'alpha')
        """
        return tuple(name.strip() for name in self.condition.split(",")) if self.condition else ()

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Decays of the averages of the weights, one or two."""
        return (self.ema_decay,) if self.long_ema_decay is None else (self.ema_decay, self.long_ema_decay)


_CONTRADICTIONS: tuple[tuple[Callable[[TrainConfig], bool], str], ...] = (
    (
        lambda c: c.graph and not c.init_from and not (c.mode.types_given and c.network == "egnn"),
        "graph=True conditions an EGNN of given types; use features='given' and network='egnn'",
    ),
    (
        lambda c: len(set(c.conditions)) < len(c.conditions) or "" in c.conditions,
        "condition: names one twice, or an empty name; write each once, like gap,alpha",
    ),
    (
        lambda c: bool(c.condition) and c.network in ("simple", "kernel"),
        "condition: the networks 'simple' and 'kernel' know no conditions; use 'egnn' or 'gnn'",
    ),
    (
        lambda c: c.objective == "flow_matching" and c.dequantizer == "learned" and c.mode.types_flow,
        "dequantizer='learned' collapses under flow matching; use dequantizer='fixed' or objective='nll'",
    ),
    (
        lambda c: c.compile and c.objective == "nll",
        "compile=True fails under the second derivatives of objective='nll'; use compile=False",
    ),
    (
        lambda c: c.precision == "bf16" and c.objective == "nll",
        "precision='bf16' is too coarse for likelihoods (objective='nll'); use precision='float32'",
    ),
    (
        lambda c: c.precision == "bf16" and c.network != "egnn",
        "precision='bf16' rounds the products of an EGNN's pairs; with another network use precision='float32'",
    ),
    (
        lambda c: c.backend == "compiled" and (c.objective == "nll" or c.compile or c.precision != "float32"),
        "backend='compiled' has no second derivatives (objective='nll'), no other precision than float32 and no "
        "compile=True; use backend='torch'",
    ),
    (
        lambda c: c.backend == "triton" and (c.objective == "nll" or c.compile),
        "backend='triton' has no second derivatives (objective='nll') and no compile=True; use backend='torch'",
    ),
    (
        lambda c: c.capture == "always" and (c.objective == "nll" or c.augment),
        "capture='always' is for flow matching without augment; use capture='auto'",
    ),
    (
        lambda c: c.schedule == "constant" and not (c.steps or c.time_limit or c.out),
        "schedule='constant' has no end; give steps, time_limit, or out, where a stopped run can be resumed",
    ),
)


def _check_optimizer(name: str) -> None:
    """Raises ``ValueError`` for "muon" where torch does not have it."""
    if name == "muon":
        from ase_enf.training.optimizers import resolve_optimizer  # it imports torch, which takes seconds

        resolve_optimizer(name, "flow_matching")


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value of a field, checked, as a plain Python value that JSON can store."""
    kind, *optional = field.type.split(" | ")
    if optional and value is None:
        return None
    value = _PLAIN[kind](field.name, value, field.metadata["least"])
    within, one_of = field.metadata["within"], field.metadata["one_of"]
    if one_of:
        check_choice(field.name, value, one_of)
    if within and not within.holds(value):
        raise ValueError(f"{field.name}={value}: must be {within.words}")
    return value


def _flag(name: str, value: Any, _: int) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r}: must be True or False")
    return bool(value)


def _real(name: str, value: Any, _: int) -> float:
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}: must be a number")
    return float(value)


def _text(name: str, value: Any, _: int) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={value!r}: must be a string")
    return os.fsdecode(value)


_PLAIN: dict[str, Callable[[str, Any, int], Any]] = {"bool": _flag, "int": check_whole, "float": _real, "str": _text}


def field_help() -> dict[str, str]:
    """Returns the description of every field of :class:`TrainConfig`.

    Example:
        >>> field_help()["warmup"]
        'steps of linear warm-up'
    """
    return {field.name: field.metadata["help"] for field in dataclasses.fields(TrainConfig)}


if TrainConfig.__doc__:  # python -OO has none
    _fields = "".join(f"        {name}: {text}.\n" for name, text in field_help().items())
    TrainConfig.__doc__ = TrainConfig.__doc__.replace("    Raises:\n", f"    Args:\n{_fields}\n    Raises:\n", 1)


def migrated(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run under their present names, whichever version wrote them.

    Example:
        >>> migrated({"ema": 0.99, "kernel": "plain"})
        {'ema_decay': 0.99, 'backend': 'torch'}
    """
    settings = {RENAMED.get(name, name): value for name, value in saved.items()}
    if "kernel" in saved:
        settings["backend"] = RENAMED_BACKENDS.get(saved["kernel"], saved["kernel"])
    return settings


def model_fields(config: ENFConfig) -> dict[str, Any]:
    """Returns the fields of TrainConfig that the configuration of a fine-tuned flow's first weights decides.

    Example:
        >>> from ase_enf.flow.config import ENFConfig
        >>> model_fields(ENFConfig(features="given", hidden=8))["hidden"]
        8
    """
    fields = {name: getattr(config, name) for name in MODEL_FIELDS}
    return fields | ({"type_scale": config.feature_scale[0]} if config.types_flow else {})
