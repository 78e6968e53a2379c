"""Quality of molecules: stability, validity, uniqueness, novelty and distances, as one table.

Metrics depend on structures, never on models: everything here takes ``Atoms``, wherever they come from. Each metric is
a function that returns a ``Metric`` (value, standard error, denominator, definition); ``evaluate`` collects them in a
``pandas.DataFrame``. Bonds are those of the published distance table (``ase_enf.chem.bonds``).

"Valid" has several meanings, which figures in the literature mix; here each has its own name:

=================  ====================================================  ===========================
name               a structure is valid if                               denominator
=================  ====================================================  ===========================
stable             it is stable, and RDKit can sanitise it               the stable structures
largest_fragment   RDKit can sanitise it; from then on it is             all structures
                   represented by its largest fragment
strict             RDKit can sanitise it, it is one fragment, and no     all structures
                   atom lacks a bond (no implicit hydrogens)
=================  ====================================================  ===========================

The first is that of the E-NF paper, the second that of EDM (Hoogeboom et al. 2022) and most papers since, and the third
that of this package. No structure is dropped: one that cannot be read counts as a failure in every denominator.
"""

from __future__ import annotations

from ase_enf.metrics.distances import distance_js as distance_js
from ase_enf.metrics.fragments import connected as connected
from ase_enf.metrics.histogram import MAX_DISTANCE as MAX_DISTANCE
from ase_enf.metrics.histogram import N_BINS as N_BINS
from ase_enf.metrics.histogram import distance_counts as distance_counts
from ase_enf.metrics.histogram import js_divergence as js_divergence
from ase_enf.metrics.metric import Metric as Metric
from ase_enf.metrics.novel import novelty as novelty
from ase_enf.metrics.reference import REFERENCES as REFERENCES
from ase_enf.metrics.reference import Reference as Reference
from ase_enf.metrics.reference import as_reference as as_reference
from ase_enf.metrics.reference import load_reference as load_reference
from ase_enf.metrics.reference import read_reference as read_reference
from ase_enf.metrics.reference import write_reference as write_reference
from ase_enf.metrics.report import evaluate as evaluate
from ase_enf.metrics.stable import atom_stability as atom_stability
from ase_enf.metrics.stable import molecule_stability as molecule_stability
from ase_enf.metrics.stable import stability_by_element as stability_by_element
from ase_enf.metrics.surveys import Structures as Structures
from ase_enf.metrics.surveys import Survey as Survey
from ase_enf.metrics.surveys import survey as survey
from ase_enf.metrics.unique import uniqueness as uniqueness
from ase_enf.metrics.valid import VALIDITY as VALIDITY
from ase_enf.metrics.valid import valid_smiles as valid_smiles
from ase_enf.metrics.valid import validity as validity

__all__ = [
    "MAX_DISTANCE",
    "Metric",
    "N_BINS",
    "REFERENCES",
    "Reference",
    "Structures",
    "Survey",
    "VALIDITY",
    "as_reference",
    "atom_stability",
    "connected",
    "distance_counts",
    "distance_js",
    "evaluate",
    "js_divergence",
    "load_reference",
    "molecule_stability",
    "novelty",
    "read_reference",
    "stability_by_element",
    "survey",
    "uniqueness",
    "valid_smiles",
    "validity",
    "write_reference",
]
