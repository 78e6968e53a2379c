"""All metrics of a set of structures as one table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

import ase
import pandas as pd
from ase import Atoms

from ase_enf.chem.convert import rdkit_version
from ase_enf.metrics.distances import distance_js
from ase_enf.metrics.fragments import connected
from ase_enf.metrics.metric import Metric
from ase_enf.metrics.novel import novelty
from ase_enf.metrics.reference import Reference, as_reference
from ase_enf.metrics.stable import atom_stability, molecule_stability
from ase_enf.metrics.surveys import Structures, survey
from ase_enf.metrics.unique import uniqueness
from ase_enf.metrics.valid import VALIDITY, validity


def evaluate(
    atoms: Structures,
    reference: str | Reference | Iterable[str] | Iterable[Atoms] | None = None,
) -> pd.DataFrame:
    """Computes all metrics of a set of structures.

    Args:
        atoms: One or several structures, positions in Å, or their ``survey``; they are not modified.
        reference: Reference for novelty and distances: a shipped name ("qm9"), SMILES strings, or structures. Without
            it there is no novelty; with SMILES only there is no ``distance_js``.

    Returns:
        One row for each metric with the columns metric, value, stderr, denominator and definition. ``.attrs`` holds
        what should be quoted with the values: the versions of RDKit, ASE and this package, the bond table and the
        reference.

    Raises:
        ValueError: If there are no structures, one is periodic or has an unknown atomic number, or the reference is
            unknown, empty or unreadable.
        TypeError: If an item is neither an ``Atoms`` nor, in the reference, a SMILES.

    Reference:
        Satorras et al. 2021 (E-NF), sections 5.2, 5.3 and appendix A.3; Hoogeboom et al. 2022 (EDM).

    Example:
        >>> from ase.build import molecule
        >>> report = evaluate([molecule("CH4"), molecule("CH3")], reference=["C"]).set_index("metric")
        >>> float(report.value["molecule_stability"]), float(report.value["novelty_stable"])
        (0.5, 0.0)
    """
    seen = survey(atoms)
    known = None if reference is None else as_reference(reference)
    rows = [atom_stability(seen), molecule_stability(seen), connected(seen)]
    rows += [validity(seen, name) for name in VALIDITY]
    rows += [uniqueness(seen, name, over) for name in VALIDITY for over in ("valid", "all")]
    if known is not None:
        rows += [novelty(seen, known, name, over) for name in VALIDITY for over in ("valid", "all")]
        if known.distances is not None:
            rows.append(distance_js(seen, known))
    table = pd.DataFrame(rows, columns=list(Metric._fields))
    table.attrs.update(_provenance(len(seen.readings), known))
    return table


def _provenance(n_structures: int, reference: Reference | None) -> dict[str, str | int]:
    """Returns what should be quoted with the values: versions, bond table and reference."""
    try:
        version = importlib.metadata.version("ase-enf")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    about: dict[str, str | int] = {
        "ase_enf": version,
        "rdkit": rdkit_version(),
        "ase": ase.__version__,
        "bonds": "distance table of E-NF (Satorras et al. 2021) with the wider one of EDM (Hoogeboom et al. 2022)",
        "n_structures": n_structures,
    }
    if reference is not None:
        about |= {
            "reference": reference.name,
            "reference_structures": reference.n_structures,
            "reference_smiles": len(reference.smiles),
        }
    return about
