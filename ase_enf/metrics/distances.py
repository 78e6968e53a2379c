"""Distances: is their distribution that of the reference?"""

from __future__ import annotations

from collections.abc import Iterable

from ase import Atoms

from ase_enf.metrics.histogram import MAX_DISTANCE, N_BINS, js_divergence, js_stderr
from ase_enf.metrics.metric import Metric
from ase_enf.metrics.reference import Reference, as_reference
from ase_enf.metrics.surveys import Structures, survey


def distance_js(atoms: Structures, reference: str | Reference | Iterable[Atoms]) -> Metric:
    """Jensen-Shannon divergence between the histograms of interatomic distances, in nats.

    JS = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q), where p and q are the normalised histograms of 100 bins on [0, 13] Å
    with 1e-10 added to every bin. Distances are those between different atoms of one structure; the last bin includes
    longer ones. The standard error is that of the linearised JS for independent structures and an exact reference; near
    JS = 0, where the linear term vanishes, it is too small.

    Args:
        atoms: Structures, or their survey.
        reference: Name of a shipped reference ("qm9"), or structures.

    Returns:
        The metric; its denominator is the number of distances (ordered pairs).

    Raises:
        ValueError: If the reference has no distances.

    Reference:
        Satorras et al. 2021 (E-NF), section 5.2, figure 4.

    Example:
        >>> from ase.build import molecule
        >>> abs(distance_js(molecule("CH4"), [molecule("CH4")]).value) < 1e-9
        True
    """
    counts = survey(atoms).distances
    known = as_reference(reference)
    if known.distances is None:
        raise ValueError(f"the reference ({known.name}) has no distances: give structures, or the name 'qm9'")
    return Metric(
        "distance_js",
        js_divergence(counts.sum(axis=0), known.distances),
        js_stderr(counts, known.distances),
        int(counts.sum()),
        f"Jensen-Shannon divergence of distances, {N_BINS} bins on [0, {MAX_DISTANCE:g}] Å, nats; linearised stderr",
    )
