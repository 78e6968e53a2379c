"""Builds a run from settings and structures: data sets, model, objective and optimizers; new, fine-tuned or resumed."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ase_enf.atoms.batch import species_of
from ase_enf.atoms.dataset import MoleculeSet
from ase_enf.chem.convert import PerceptionError
from ase_enf.chem.graph import bonds_of
from ase_enf.data.properties import UNITS, property_table
from ase_enf.flow.config import ENFConfig
from ase_enf.flow.context import GRAPH_FEATURES, Condition
from ase_enf.flow.continuous import Solver
from ase_enf.flow.loading import load
from ase_enf.flow.model import ENF
from ase_enf.flow.modes import FeatureMode
from ase_enf.training.config import TrainConfig, model_fields
from ase_enf.training.device_steps import DeviceSteps, stays_on_device
from ase_enf.training.distributed import Ranks
from ase_enf.training.folder import FolderLock, check_new_run, check_no_run
from ase_enf.training.log import LOG_FILE, truncate_log
from ase_enf.training.objectives import FlowMatching, NegativeLogLikelihood, Objective
from ase_enf.training.optimizers import Clipper, build_optimizers, moving_average
from ase_enf.training.run import Run, Step
from ase_enf.training.state import agree, read_state, restore, resumed_config, save_config


def build_objective(config: TrainConfig) -> Objective:
    """Returns the objective of a run."""
    if config.objective == "nll":
        solver = Solver("dopri5", rtol=config.ode_tolerance, atol=config.ode_tolerance)
        return NegativeLogLikelihood(solver, config.regularisation, config.adjoint)
    return FlowMatching(config.times, config.time_power)


def model_config(config: TrainConfig, data: MoleculeSet, species: tuple[str, ...]) -> ENFConfig:
    """Returns the configuration of a new flow, with the sizes, compositions and scales of the data."""
    shift, scale = data.feature_standardisation(config.type_scale) if config.mode.types_flow else ((), ())
    return ENFConfig(
        features=config.features,
        species=species,
        **_counts(data, config.mode),
        dimension=config.dimension,
        network=config.network,
        hidden=config.hidden,
        layers=config.layers,
        attention=config.attention,
        radial=config.radial if config.network == "egnn" else 0,
        dequantizer=config.dequantizer,
        position_scale=data.position_scale(),
        feature_shift=shift,
        feature_scale=scale,
        parameterisation=config.parameterisation,
        feature_std=data.feature_std(scale) if config.parameterisation == "denoising" and scale else 1.0,
        path=training_path(config),
        conditions=conditions_of(config, data),
        graph=config.graph,
    )


def conditions_of(config: TrainConfig, data: MoleculeSet) -> tuple[Condition, ...]:
    """Returns the conditions of a flow, with their statistics in the training set."""
    if not config.condition:
        return ()
    sizes = data.sizes.numpy()
    return tuple(
        Condition.of(name, UNITS.get(name, ""), values, sizes)
        for name, values in zip(config.conditions, data.conditions.double().numpy().T, strict=True)
    )


def training_path(config: TrainConfig) -> str | None:
    """Returns the path from data to noise on which the objective trains a flow."""
    return "linear" if config.objective == "flow_matching" else None


def begin(
    config: TrainConfig,
    train_atoms: list[Atoms],
    valid_atoms: list[Atoms],
    ranks: Ranks,
    source: str | None,
    lock: FolderLock,
) -> Run:
    """Returns a run at step 0; its folder is written only after all checks have passed."""
    if config.out:
        check_new_run(config.out)
    _check_not_empty(train_atoms, valid_atoms)
    initial = _initial(config) if config.init_from else None
    if initial is not None:
        config = dataclasses.replace(config, **model_fields(initial.config), **_context_fields(initial, config))
        species = initial.species
    else:
        species = species_of(train_atoms) if config.mode.knows_types else ()
    data, valid = _data_sets(config, train_atoms, valid_atoms, species)
    with torch.random.fork_rng(devices=[]):  # leaves the random numbers of the caller alone
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would change those on GPUs too
        model = _refitted(initial, config, data) if initial else ENF(model_config(config, data, species))
    run = _assemble(config, data, valid, model, ranks, source)
    start_folder(run, lock)
    _warn_of_common(data, valid)  # last, so that an error is the only line
    return run


def resume(
    config: TrainConfig,
    train_atoms: list[Atoms],
    valid_atoms: list[Atoms],
    ranks: Ranks,
    source: str | None,
    lock: FolderLock,
) -> Run:
    """Returns the run of ``config.out`` at its last save, if settings and data are its own."""
    if not config.out:
        raise ValueError("resume=True needs config.out, the folder of the run")
    if ranks.main and Path(config.out).is_dir():
        lock.take(Path(config.out))
    run = restored(config, read_state(Path(config.out)), train_atoms, valid_atoms, ranks, source)
    if ranks.main:
        truncate_log(run.out / LOG_FILE, run.noted)
        save_config(run)  # a run that is resumed with more steps and interrupted again keeps them
    return run


def restored(
    config: TrainConfig,
    state: Mapping[str, Any],
    train_atoms: list[Atoms],
    valid_atoms: list[Atoms],
    ranks: Ranks,
    source: str | None,
) -> Run:
    """Returns a run at the saved state, if settings and data are its own; nothing is written."""
    _check_not_empty(train_atoms, valid_atoms)
    config, known = resumed_config(config, state, ranks.world), state["model_config"]
    data, valid = _data_sets(config, train_atoms, valid_atoms, known.species)
    _check_same_data(config, known, data)
    with torch.random.fork_rng(devices=[]):
        model = ENF(known)
    run = _assemble(config, data, valid, model, ranks, source)
    restore(run, state)
    return run


def _check_not_empty(train_atoms: list[Atoms], valid_atoms: list[Atoms]) -> None:
    if not train_atoms:
        raise ValueError("no structures to train on; the training set is empty")
    if not valid_atoms:
        raise ValueError("no structures to validate on; the validation set is empty")


def _initial(config: TrainConfig) -> ENF:
    """Returns the flow whose weights training starts from."""
    initial = load(config.init_from, device="cpu", backend="torch")
    learned = initial.config.types_flow and initial.config.dequantizer == "learned"
    if learned and config.objective == "flow_matching":
        raise ValueError(
            f"init_from={config.init_from!r}: its learned q collapses under flow matching; train it with "
            "objective='nll'"
        )
    return initial


def _data_sets(
    config: TrainConfig, train_atoms: list[Atoms], valid_atoms: list[Atoms], species: tuple[str, ...]
) -> tuple[MoleculeSet, MoleculeSet]:
    """Returns the training and the validation set; errors name the set that a structure is in."""
    data = _molecules("training set", train_atoms, species, config)
    for index, item in enumerate(valid_atoms if species and not config.init_from else ()):
        if foreign := sorted(set(item.symbols) - set(species)):
            raise ValueError(
                f"validation set: structure {index} ({item.get_chemical_formula()}): element(s) "
                f"{', '.join(foreign)} are not in the training set; add such structures to it, or take this one out"
            )
    return data, _molecules("validation set", valid_atoms, species, config)


def _warn_of_common(data: MoleculeSet, valid: MoleculeSet) -> None:
    """Warns about structures that are in both sets."""
    if common := valid.common(data):
        warnings.warn(
            f"validation set: {common} of {len(valid)} structures are also in the training set, so that the validation "
            "likelihood does not hold for new structures; remove them from one of the sets",
            stacklevel=2,
        )


def _molecules(name: str, atoms: list[Atoms], species: tuple[str, ...], config: TrainConfig) -> MoleculeSet:
    try:
        bonds = None
        if config.graph:
            atoms, bonds = _with_graphs(name, atoms)
        conditions = property_table(atoms, config.conditions, required=True) if config.condition else None
        return MoleculeSet(atoms, species, config.dimension, conditions, bonds)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _with_graphs(name: str, atoms: list[Atoms]) -> tuple[list[Atoms], list[np.ndarray]]:
    """Returns the structures whose molecular graph is unambiguous, and the graphs; a warning counts the others."""
    kept, bonds = [], []
    for item in atoms:
        try:
            bonds.append(bonds_of(item))
        except PerceptionError:
            continue
        kept.append(item)
    if len(kept) < len(atoms):
        warnings.warn(
            f"{name}: {len(atoms) - len(kept)} of {len(atoms)} structures are left out: RDKit finds no bonds, "
            "or charges, radicals or fragments",
            stacklevel=2,
        )
    if not kept:
        raise ValueError("RDKit finds bonds for none of the structures; train without graph")
    return kept, bonds


def _context_fields(initial: ENF, config: TrainConfig) -> dict[str, Any]:
    """Returns the fields that condition a fine-tuned flow: those of its first weights, or new ones."""
    names = tuple(condition.name for condition in initial.config.conditions)
    if names and config.condition and names != config.conditions:
        raise ValueError(
            f"condition={config.condition!r}: the model of init_from={config.init_from!r} has the conditions "
            f"{', '.join(names)}; leave condition out, or start from a model without"
        )
    if config.graph and not (initial.config.types_given and initial.config.network == "egnn"):
        raise ValueError(
            f"graph=True: the model of init_from={config.init_from!r} has features={initial.features!r}; start from an "
            "EGNN with features='given'"
        )
    return {"condition": names or config.conditions, "graph": initial.config.graph or config.graph}


def _counts(data: MoleculeSet, mode: FeatureMode) -> dict[str, Mapping[Any, int]]:
    """Returns how often each size, and each composition, occurs in the training set."""
    return {
        "sizes": dict(sorted(Counter(data.sizes.tolist()).items())),
        "compositions": dict(sorted(data.compositions.items())) if mode.types_given else {},
    }


def _refitted(initial: ENF, config: TrainConfig, data: MoleculeSet) -> ENF:
    """Returns a trained flow with the sizes and compositions of these data, and its own weights and scales."""
    counts = _counts(data, initial.config.mode)
    conditions = initial.config.conditions or conditions_of(config, data)
    known = dataclasses.replace(
        initial.config, path=training_path(config), **counts, conditions=conditions, graph=config.graph
    )
    model = ENF(known, initial.provenance)
    model.load_state_dict(widened(initial.state_dict(), initial.config, known))
    return model


def widened(state: Mapping[str, Tensor], before: ENFConfig, after: ENFConfig) -> dict[str, Tensor]:
    """Returns weights for a network with more context inputs; theirs are zero, so that the flow stays the same.

    Args:
        state: Weights of the original network.
        before: Its configuration.
        after: The new configuration, with more conditions or with a graph.
    """
    result = dict(state)
    nodes = after.context_features - before.context_features
    pairs = GRAPH_FEATURES * (after.graph - before.graph)
    for name, value in state.items():
        if name == "dynamics.network.embed.weight" and nodes:  # the time comes last
            result[name] = torch.cat([value[:, :-1], value.new_zeros(len(value), nodes), value[:, -1:]], dim=1)
        elif name.endswith("messages.edge_in.weight") and name.startswith("dynamics.") and pairs:
            result[name] = torch.cat([value, value.new_zeros(len(value), pairs)], dim=1)
    return result


def _check_same_data(config: TrainConfig, known: ENFConfig, data: MoleculeSet) -> None:
    """Makes sure that settings and data give the model of the run again."""
    counts = _counts(data, known.mode)
    expected = dataclasses.replace(known, **counts) if config.init_from else model_config(config, data, known.species)
    if not agree(dataclasses.asdict(expected), dataclasses.asdict(known)):
        raise ValueError(
            f"{config.out}: the run was made for another model or other data; resume with those of the run"
        )


def _assemble(
    config: TrainConfig, data: MoleculeSet, valid: MoleculeSet, model: ENF, ranks: Ranks, source: str | None
) -> Run:
    """Puts model, objective and optimizers together, on the device."""
    device = ranks.device(config.device)
    model = model.to(device).requires_grad_(True).train()
    model.use_backend(_backend(config, device))
    objective = build_objective(config)
    # Copied before products are rounded: validation computes with exact ones.
    averages = tuple(moving_average(model, decay) for decay in config.ema_decays)
    if config.precision == "bf16":
        model.dynamics.network.multiply_in(torch.bfloat16)
    optimizer = build_optimizers(
        model.dynamics.network,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        config.optimizer,
        config.learning_rate,
        config.muon_learning_rate,
        config.muon_weight_decay,
        config.weight_decay,
        amsgrad=config.objective == "nll",  # as in the paper; flow matching does better without
    )
    on_device = stays_on_device(config, ranks, device)
    stepper: torch.nn.Module = Step(model, objective)
    if config.compile and not on_device:  # there, layer by layer
        model.dynamics.network.compile()
    if ranks.world > 1:
        stepper = DistributedDataParallel(stepper)
    return Run(
        config=config,
        ranks=ranks,
        device=device,
        source=source,
        data=data,
        valid=valid,
        model=model,
        objective=objective,
        stepper=stepper,
        averages=averages,
        optimizer=optimizer,
        clip=Clipper(),
        device_steps=DeviceSteps(capture=device.type == "cuda") if on_device else None,
    )


def _backend(config: TrainConfig, device: torch.device) -> str:
    """Returns the backend of the pairs: torch where the compiled kernel does not help, else the requested one."""
    if config.objective == "nll" or config.compile:
        return "torch"
    if device.type == "cpu":
        # The threads of the kernel and those of torch's own operations get in each other's way.
        crowded = config.backend == "auto" and torch.get_num_threads() > 1
        if crowded or config.precision != "float32":
            return "torch"
    return config.backend


def start_folder(run: Run, lock: FolderLock) -> None:
    """Writes the first files of a run."""
    if run.out is None:
        return
    run.ranks.wait()  # no process writes before all have looked
    if run.ranks.main:
        lock.take(run.out)
        check_no_run(run.out)  # another run may have saved in the meantime
        save_config(run)
        truncate_log(run.out / LOG_FILE, -1)
