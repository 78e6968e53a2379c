"""Structures as a batch, with everything that conditions a flow: properties, given or from ``info``, and bonds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_enf.atoms.batch import Batch, to_batch
from ase_enf.chem.convert import PerceptionError
from ase_enf.chem.graph import BONDS_KEY, bonds_of
from ase_enf.data.properties import property_table
from ase_enf.flow.model import ENF
from ase_enf.sampling.properties import PropertyRequest


def conditioned_batch(flow: ENF, atoms: Sequence[Atoms], properties: Mapping[str, Any] | None = None) -> Batch:
    """Converts structures to a batch on the device of a flow, with its conditions.

    Args:
        flow: A flow.
        atoms: Structures; checked, never modified.
        properties: Values of the conditions by name, for all structures; conditions that are not named are unknown.
            With None each structure has its own from ``info``, and those that are missing there are unknown.

    Returns:
        The batch; for a flow of graphs, bonds come from ``info["enf_bonds"]`` or are perceived from the positions.

    Raises:
        ValueError: See ``atoms.batch.check_atoms``; also for a property that the flow does not know, and, if the flow
            needs one, for a structure without a molecular graph.

    Example:
        >>> from ase.build import molecule
        >>> from ase_enf.flow.config import ENFConfig
        >>> flow = ENF(ENFConfig(features="given", species=("H", "O"), graph=True, hidden=8, layers=1))
        >>> conditioned_batch(flow, [molecule("H2O")]).bonds[0].tolist()
        [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    config = flow.config
    batch = to_batch(atoms, flow.species, config.dimension, dtype=flow.dtype)
    if config.conditions:
        batch = batch._replace(conditions=torch.from_numpy(_values(flow, atoms, properties)).to(flow.dtype))
    elif properties:
        PropertyRequest(flow, properties)  # which raises the right error
    if config.graph:
        batch = batch._replace(bonds=torch.from_numpy(_padded_bonds(atoms, batch.mask.shape[1])))
    return batch.to(flow.device)


def _values(flow: ENF, atoms: Sequence[Atoms], properties: Mapping[str, Any] | None) -> np.ndarray:
    """Returns the value of every condition of every structure, NaN where unknown, shape (B, C)."""
    names = [condition.name for condition in flow.config.conditions]
    if properties is None:
        return property_table(atoms, names)
    ranges = PropertyRequest(flow, properties).ranges
    for name, (low, high) in ranges.items():
        if low != high:
            raise ValueError(f"property {name}={low:g}:{high:g}: a score takes one value, not a range")
    row = [ranges[name][0] if name in ranges else math.nan for name in names]
    return np.tile(row, (len(atoms), 1))


def _padded_bonds(atoms: Sequence[Atoms], width: int) -> np.ndarray:
    bonds = np.zeros((len(atoms), width, width), dtype=np.uint8)
    for row, item in enumerate(atoms):
        try:
            bonds[row, : len(item), : len(item)] = bonds_of(item)
        except PerceptionError as error:
            raise ValueError(
                f"structure {row}: {error}; a flow of molecular graphs scores neutral closed-shell molecules, or give "
                f"the bonds by info[{BONDS_KEY!r}]"
            ) from None
    return bonds
