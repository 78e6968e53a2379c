"""How good are these molecules? Stability, validity, uniqueness, novelty and distances, as one table.

Metrics see structures, never models: everything here takes `Atoms`, from wherever they come. Each metric is a
function that returns a `Metric` (value, standard error, denominator, definition); `evaluate` puts all of them in a
`pandas.DataFrame`. Bonds are those of the published distance table (`ase_enf.chem.bonds`).

"Valid" has three published meanings, and figures in the literature mix them; here each has its name:

=================  ====================================================  ===========================
name               a structure counts when                               among
=================  ====================================================  ===========================
stable             it is stable, and RDKit can sanitise it               the stable structures
largest_fragment   RDKit can sanitise it; its largest fragment stands    all structures
                   for it from then on
strict             RDKit can sanitise it, it is one fragment, and no     all structures
                   atom lacks a bond (no implicit hydrogens)
=================  ====================================================  ===========================

The first is that of the E-NF paper, the second that of EDM (Hoogeboom et al. 2022) and most papers since, the third
ours. No structure is dropped: what cannot be read counts as a failure in every denominator it belongs to.
"""

from __future__ import annotations

import importlib.metadata
import lzma
import warnings
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import ase
import numpy as np
import pandas as pd
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.chem.bonds import (
    Stability,
    bond_orders,
    n_fragments,
    pair_distances,
    size_groups,
    stable_atoms,
    structures,
)
from ase_enf.chem.convert import Reading, normalise_smiles, rdkit_version, read_graph

N_BINS = 100
MAX_DISTANCE = 13.0  # Å
_TINY = 1e-10  # added to every bin of both histograms, as published

VALIDITY = {
    "stable": "stable by the distance table and sanitised by RDKit",
    "largest_fragment": "sanitised by RDKit, represented by its largest fragment",
    "strict": "sanitised by RDKit, one fragment, no implicit hydrogens",
}
_AMONG = {"stable": "stable structures", "largest_fragment": "all structures", "strict": "all structures"}

REFERENCES = {"qm9": "qm9_reference.npz"}  # shipped references, in ase_enf/data


class Metric(NamedTuple):
    """One row of the report.

    Attributes:
        metric: Name.
        value: The figure; NaN when the denominator is 0.
        stderr: One standard error of it, over the structures; NaN where it cannot be estimated.
        denominator: What was divided by: the number of structures, atoms or distances.
        definition: Numerator, denominator and standard error in words.
    """

    metric: str
    value: float
    stderr: float
    denominator: int
    definition: str


class Survey(NamedTuple):
    """Everything the metrics need to know of N structures, found in one pass.

    Attributes:
        stability: counts of stable atoms and verdicts, arrays of shape (N,).
        fragments: shape (N,), number of connected fragments of the bond graph.
        readings: N readings of the bond graphs by RDKit.
        distances: shape (N, 100), distances between different atoms, counted over ordered pairs, in bins on [0, 13] Å;
            what is longer is in the last bin.
    """

    stability: Stability
    fragments: NDArray[np.int64]
    readings: tuple[Reading, ...]
    distances: NDArray[np.int64]


class Reference(NamedTuple):
    """What generated structures are compared with.

    Attributes:
        name: What it is, in a word or two.
        smiles: Canonical SMILES of the known molecules.
        distances: shape (100,), histogram of distances as in `Survey`; None when only SMILES are known.
        n_structures: Number of structures or SMILES it was made from.
    """

    name: str
    smiles: frozenset[str]
    distances: NDArray[np.int64] | None
    n_structures: int


Structures = Survey | Atoms | Iterable[Atoms]


def evaluate(
    atoms: Structures,
    reference: str | Reference | Iterable[str] | Iterable[Atoms] | None = None,
) -> pd.DataFrame:
    """All metrics of a set of structures.

    Args:
        atoms: One structure or several, positions in Å; or their `survey`. They are not modified.
        reference: What novelty and distances are measured against: a shipped name ("qm9"), SMILES strings, or
            structures. Without it there is no novelty; with SMILES alone there is no `distance_js`.

    Returns:
        A row a metric with the columns metric, value, stderr, denominator, definition. `.attrs` holds what has to be
        printed with the figures: the versions of RDKit, ASE and this package, the bond table and the reference.

    Raises:
        ValueError: There are no structures, one is periodic or has an atomic number of no element, or the reference is
            unknown, empty or unreadable.
        TypeError: An item is neither `Atoms` nor, in the reference, a SMILES.

    Reference:
        Satorras et al. 2021 (E-NF), sections 5.2, 5.3 and appendix A.3; Hoogeboom et al. 2022 (EDM).

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


def survey(atoms: Structures) -> Survey:
    """Bonds, stability, fragments, SMILES and distances of structures, in one pass.

    Every metric takes a survey in place of the structures: several metrics of one set then share the work.

    Args:
        atoms: One structure or several; a survey is returned as it is.

    Returns:
        The survey; what it says of a structure does not depend on the others. One with a position that is not finite
        has no stable atom, no fragment, no SMILES and no distances.

    Raises:
        ValueError: There are no structures, or one is periodic or has an atomic number of no element.
        TypeError: An item is not an `Atoms`.

    >>> from ase.build import molecule
    >>> seen = survey(molecule("CH3CHO"))
    >>> seen.readings[0].smiles, int(seen.fragments[0])
    ('CC=O', 1)
    """
    if isinstance(atoms, Survey):
        return atoms
    listed = structures(atoms)
    if not listed:
        raise ValueError("there are no structures to evaluate: the list is empty")
    fragments = np.zeros(len(listed), dtype=np.int64)
    distances = np.zeros((len(listed), N_BINS), dtype=np.int64)
    readings: list[Reading] = [Reading(None, None, False)] * len(listed)
    stable = np.zeros(len(listed), dtype=np.int64)
    finite = np.array([place for place, item in enumerate(listed) if np.isfinite(item.positions).all()], dtype=np.int64)
    for group, numbers, positions in size_groups([listed[place] for place in finite]):
        index = finite[group]
        orders = bond_orders(numbers, positions)
        stable[index] = stable_atoms(numbers, orders).sum(axis=1)
        fragments[index] = n_fragments(orders)
        distances[index] = distance_counts(positions)
        for place, elements, matrix in zip(index, numbers, orders, strict=True):
            readings[place] = read_graph(elements, matrix)
    sizes = np.array([len(item) for item in listed], dtype=np.int64)
    verdicts = Stability(stable, sizes, (stable == sizes) & (sizes > 0))
    return Survey(verdicts, fragments, tuple(readings), distances)


def atom_stability(atoms: Structures) -> Metric:
    """Fraction of atoms whose bond orders sum exactly to their valence, R = Σ_i s_i / Σ_i n_i over structures i.

    The atoms of a structure stand or fall together: the standard error is that of a ratio of sums over structures
    (Cochran 1977, Sampling Techniques, section 6.3), √(N/(N−1) Σ_i (s_i − R n_i)²) / Σ_i n_i.

    Args:
        atoms: Structures, or their survey.

    Returns:
        The metric; its denominator is the number of atoms.

    >>> from ase.build import molecule
    >>> atom_stability([molecule("CH4"), molecule("CH3")]).value  # 5 of 5 and 3 of 4 atoms
    0.8888888888888888
    """
    stable, sizes, _ = survey(atoms).stability
    return Metric(
        "atom_stability",
        _ratio(stable.sum(), sizes.sum()),
        _ratio_stderr(stable, sizes),
        int(sizes.sum()),
        "atoms whose bond orders sum to their valence / atoms; stderr of a ratio, structures independent",
    )


def molecule_stability(atoms: Structures) -> Metric:
    """Fraction of structures all of whose atoms are stable.

    Args:
        atoms: Structures, or their survey.

    Returns:
        The metric; its denominator is the number of structures, its standard error binomial.

    >>> from ase.build import molecule
    >>> molecule_stability([molecule("CH4"), molecule("CH3")]).value
    0.5
    """
    definition = "structures all of whose atoms are stable / all structures"
    return _fraction("molecule_stability", survey(atoms).stability.stable, definition)


def connected(atoms: Structures) -> Metric:
    """Fraction of structures whose bond graph is connected.

    Args:
        atoms: Structures, or their survey.

    Returns:
        The metric; its denominator is the number of structures, its standard error binomial.

    >>> from ase.build import molecule
    >>> connected([molecule("CH4"), molecule("LiF")]).value  # Li is not in the table: two fragments
    0.5
    """
    return _fraction("connected", survey(atoms).fragments == 1, "structures of one fragment / all structures")


def validity(atoms: Structures, definition: str = "strict") -> Metric:
    """Fraction of valid structures, under one of the three definitions of this module.

    Args:
        atoms: Structures, or their survey.
        definition: "stable" (E-NF paper), "largest_fragment" (EDM) or "strict".

    Returns:
        The metric; its denominator is the number of stable structures ("stable") or of all, its standard error
        binomial.

    Raises:
        ValueError: The definition is unknown.

    >>> from ase.build import molecule
    >>> [validity([molecule("CH4"), molecule("CH3")], name).value for name in VALIDITY]
    [1.0, 1.0, 0.5]
    """
    seen = survey(atoms)
    valid = np.array([smiles is not None for smiles in valid_smiles(seen, definition)])
    if definition == "stable":
        valid = valid[seen.stability.stable]
    return _fraction(f"validity_{definition}", valid, f"{VALIDITY[definition]} / {_AMONG[definition]}")


def uniqueness(atoms: Structures, definition: str = "strict", over: str = "valid") -> Metric:
    """Number of different molecules among the valid ones, as a fraction of the valid structures or of all.

    Molecules are the same when their canonical SMILES are (hydrogens and stereochemistry left out). The number of
    different ones depends on how many were generated: compare like with like. Its standard error is the jackknife's
    (leave one structure out), which here has the closed form √(f (1 − f) / (n − 1)) with f the fraction of the n
    structures whose molecule occurs once.

    Args:
        atoms: Structures, or their survey.
        definition: What is valid: "stable", "largest_fragment" or "strict".
        over: "valid" or "all": the denominator.

    Returns:
        The metric, named `uniqueness_<definition>`, with `_of_all` when that is the denominator.

    Raises:
        ValueError: The definition or the denominator is unknown.

    >>> from ase.build import molecule
    >>> uniqueness([molecule("CH4"), molecule("CH4"), molecule("H2O")]).value
    0.6666666666666666
    """
    smiles = valid_smiles(atoms, definition)
    valid = [text for text in smiles if text is not None]
    occurrences = Counter(valid)
    n = len(smiles) if _of_all(over) else len(valid)
    once = _ratio(sum(count == 1 for count in occurrences.values()), n)
    return Metric(
        f"uniqueness_{definition}" + "_of_all" * _of_all(over),
        _ratio(len(occurrences), n),
        float(np.sqrt(once * (1 - once) / (n - 1))) if n > 1 else np.nan,
        n,
        f"different SMILES among the valid / {over} structures; valid: {VALIDITY[definition]}; jackknife stderr",
    )


def novelty(
    atoms: Structures,
    reference: str | Reference | Iterable[str] | Iterable[Atoms],
    definition: str = "strict",
    over: str = "valid",
) -> Metric:
    """Valid structures whose molecule is not in the reference, as a fraction of the valid structures or of all.

    Structures are counted, not different molecules: this is the paper's figure (415 novel of 491 stable).

    Args:
        atoms: Structures, or their survey.
        reference: A shipped name ("qm9"), SMILES strings, or structures.
        definition: What is valid: "stable", "largest_fragment" or "strict".
        over: "valid" or "all": the denominator.

    Returns:
        The metric, named `novelty_<definition>`, with `_of_all` when that is the denominator; standard error
        binomial.

    Raises:
        ValueError: The definition or the denominator is unknown, or the reference is.

    >>> from ase.build import molecule
    >>> novelty([molecule("CH4"), molecule("H2O")], reference=["C"]).value
    0.5
    """
    known = as_reference(reference).smiles
    smiles = valid_smiles(atoms, definition)
    counted = smiles if _of_all(over) else [text for text in smiles if text is not None]
    return _fraction(
        f"novelty_{definition}" + "_of_all" * _of_all(over),
        np.array([text is not None and text not in known for text in counted], dtype=bool),
        f"valid structures whose SMILES is not in the reference / {over} structures; valid: {VALIDITY[definition]}",
    )


def distance_js(atoms: Structures, reference: str | Reference | Iterable[Atoms]) -> Metric:
    """Jensen-Shannon divergence between the histograms of interatomic distances, in nats.

    JS = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q), with p and q the normalised histograms of 100 bins on [0, 13] Å,
    1e-10 added to every bin. Distances are those between different atoms of one structure; longer ones are in the
    last bin. The standard error is that of the linearised JS, structures independent and the reference taken as
    exact; at JS ≈ 0 the linear term vanishes, and so does it.

    Args:
        atoms: Structures, or their survey.
        reference: A shipped name ("qm9") or structures.

    Returns:
        The metric; its denominator is the number of distances (ordered pairs).

    Raises:
        ValueError: The reference has no distances.

    Reference:
        Satorras et al. 2021 (E-NF), section 5.2, figure 4.

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
        _js_stderr(counts, known.distances),
        int(counts.sum()),
        f"Jensen-Shannon divergence of distances, {N_BINS} bins on [0, {MAX_DISTANCE:g}] Å, nats; linearised stderr",
    )


def valid_smiles(atoms: Structures, definition: str = "strict") -> list[str | None]:
    """The SMILES under which each structure counts, None where it is not valid.

    Args:
        atoms: Structures, or their survey.
        definition: "stable", "largest_fragment" or "strict".

    Returns:
        One entry a structure, in order.

    Raises:
        ValueError: The definition is unknown.

    >>> from ase.build import molecule
    >>> valid_smiles([molecule("CH3OH"), molecule("CH3")])
    ['CO', None]
    """
    if definition not in VALIDITY:
        raise ValueError(f"unknown definition {definition!r}: choose one of {', '.join(map(repr, VALIDITY))}")
    seen = survey(atoms)
    if definition == "largest_fragment":
        return [reading.largest for reading in seen.readings]
    if definition == "stable":
        counts = seen.stability.stable
    else:
        counts = (seen.fragments == 1) & np.array([reading.complete for reading in seen.readings])
    return [reading.smiles if count else None for reading, count in zip(seen.readings, counts, strict=True)]


def distance_counts(
    positions: NDArray[np.floating],  # (B, M, 3), Å
) -> NDArray[np.int64]:  # (B, 100)
    """Histogram of the distances between different atoms of each structure, over ordered pairs.

    Args:
        positions: shape (B, M, 3), Å, without padding.

    Returns:
        shape (B, 100), counts in equal bins on [0, 13] Å; what is longer is in the last bin.

    >>> distance_counts(np.array([[[0.0, 0, 0], [1.0, 0, 0]]]))[0, :9].tolist()
    [0, 0, 0, 0, 0, 0, 0, 2, 0]
    """
    batch, size = positions.shape[:2]
    i, j = np.triu_indices(size, 1)
    scaled = pair_distances(positions)[:, i, j] / MAX_DISTANCE * N_BINS
    bins = np.minimum(scaled, N_BINS - 1).astype(np.int64) + N_BINS * np.arange(batch)[:, None]
    return 2 * np.bincount(bins.ravel(), minlength=N_BINS * batch).reshape(batch, N_BINS)


def js_divergence(counts: NDArray[np.number], others: NDArray[np.number]) -> float:
    """Jensen-Shannon divergence of two histograms, ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), in nats.

    Args:
        counts: shape (K,), not normalised.
        others: shape (K,), not normalised.

    Returns:
        A number in [0, log 2] up to 1e-8; NaN when a histogram is empty.

    >>> round(js_divergence(np.array([1, 0]), np.array([0, 1])), 6)  # log 2
    0.693147
    """
    if not (counts.sum() and others.sum()):
        return np.nan
    p, q = counts / counts.sum() + _TINY, others / others.sum() + _TINY
    m = (p + q) / 2
    return float(p @ np.log(p / m) + q @ np.log(q / m)) / 2


def load_reference(name: str = "qm9") -> Reference:
    """A shipped reference: SMILES and distances of a training set.

    "qm9" is the official training split (100,000 molecules) as the distance table reads it. Canonical SMILES belong
    to a version of RDKit: when the installed one is not that of the file, they are made anew (some ten seconds).

    Args:
        name: "qm9".

    Returns:
        The reference.

    Raises:
        ValueError: There is no such reference.

    >>> reference = load_reference("qm9")
    >>> reference.n_structures, "CC(C)=O" in reference.smiles
    (100000, True)
    """
    if name not in REFERENCES:
        raise ValueError(
            f"unknown reference {name!r}: shipped are {', '.join(map(repr, REFERENCES))}; "
            "SMILES are given as a list of strings, structures as a list of Atoms"
        )
    return read_reference(resources.files("ase_enf") / "data" / REFERENCES[name])


def read_reference(path: str | Path | Traversable) -> Reference:
    """Read a reference that `write_reference` wrote.

    Args:
        path: The .npz file.

    Returns:
        The reference, its SMILES canonical by the installed RDKit.

    >>> read_reference(resources.files("ase_enf") / "data" / "qm9_reference.npz").distances.shape
    (100,)
    """
    source = Path(path) if isinstance(path, str) else path
    with source.open("rb") as file, np.load(file, allow_pickle=False) as data:
        smiles = lzma.decompress(data["smiles_xz"].tobytes()).decode("ascii").split("\n")
        written_by = str(data["rdkit_version"])
        name, n_structures, distances = str(data["name"]), int(data["n_structures"]), data["distances"]
    distances.flags.writeable = False
    return Reference(name, frozenset(_with_this_rdkit(smiles, written_by)), distances, n_structures)


def write_reference(reference: Reference, path: str | Path) -> None:
    """Write a reference as a compact .npz without pickles: xz-compressed SMILES, histogram, RDKit version.

    Args:
        reference: A reference with distances.
        path: The .npz file; the same reference gives the same bytes.

    Raises:
        ValueError: The reference has no distances.

    >>> import tempfile
    >>> from ase.build import molecule
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_reference(as_reference([molecule("CH4")]), folder + "/methane.npz")
    ...     sorted(read_reference(folder + "/methane.npz").smiles)
    ['C']
    """
    if reference.distances is None:
        raise ValueError(f"the reference ({reference.name}) has no distances to write")
    text = "\n".join(sorted(reference.smiles)).encode("ascii")
    with Path(path).open("wb") as file:
        np.savez(
            file,
            smiles_xz=np.frombuffer(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME), dtype=np.uint8),
            distances=np.asarray(reference.distances, dtype=np.int64),
            rdkit_version=np.array(rdkit_version()),
            name=np.array(reference.name),
            n_structures=np.array(reference.n_structures),
        )


def as_reference(reference: str | Reference | Survey | Iterable[str] | Atoms | Iterable[Atoms]) -> Reference:
    """What a user may call a reference, as a `Reference`.

    Args:
        reference: A shipped name, SMILES strings, structures or their survey, or a `Reference`. Of structures, the
            molecule and its largest fragment are both known.

    Returns:
        The reference. SMILES that RDKit cannot read are kept as they are, with a warning that counts them.

    Raises:
        ValueError: The name is unknown, or there is nothing in it that can be read.
        TypeError: It mixes SMILES and structures, or holds something else.

    >>> sorted(as_reference(["OCC", "C"]).smiles)
    ['C', 'CCO']
    """
    if isinstance(reference, Reference):
        return reference
    if isinstance(reference, str):
        return load_reference(reference)
    if isinstance(reference, Survey):
        return _reference_of_structures(reference)
    items = [reference] if isinstance(reference, Atoms) else list(reference)
    if not items:
        raise ValueError("the reference is empty: give SMILES or structures, or leave it out")
    if all(isinstance(item, str) for item in items):
        return _reference_of_smiles(items)
    if all(isinstance(item, Atoms) for item in items):
        return _reference_of_structures(survey(items))
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise TypeError(f"a reference holds SMILES strings only or Atoms only, this one holds {kinds}")


def _reference_of_structures(seen: Survey) -> Reference:
    smiles = chain.from_iterable((reading.smiles, reading.largest) for reading in seen.readings)
    n = len(seen.readings)
    known = frozenset(text for text in smiles if text is not None)
    return Reference("structures", known, seen.distances.sum(axis=0), n)


def _reference_of_smiles(smiles: list[str]) -> Reference:
    normalised = {text: normalise_smiles(text) for text in set(smiles)}
    unread = [text for text, canonical in normalised.items() if canonical is None]
    if len(unread) == len(normalised):
        raise ValueError(
            f"RDKit cannot read any of the {len(unread)} different SMILES of the reference, such as {min(unread)!r}: "
            "give SMILES, or leave the reference out"
        )
    if unread:
        warnings.warn(
            f"RDKit cannot read {len(unread)} of {len(normalised)} different SMILES of the reference, "
            f"such as {min(unread)!r}: nothing will match them",
            stacklevel=4,
        )
    known = frozenset(canonical or text for text, canonical in normalised.items())
    return Reference("SMILES", known, None, len(smiles))


def _with_this_rdkit(smiles: list[str], written_by: str) -> list[str]:
    """The SMILES as they are when this RDKit wrote them, otherwise made canonical anew, with a word on the change."""
    if written_by == rdkit_version():
        return smiles
    anew = [normalise_smiles(text) for text in smiles]
    changed = sum(text != before for text, before in zip(anew, smiles, strict=True))
    if changed:
        warnings.warn(
            f"the reference was written by RDKit {written_by}, this is {rdkit_version()}: {changed} of {len(smiles)} "
            f"SMILES changed ({anew.count(None)} cannot be read any more and are kept as they were)",
            stacklevel=4,
        )
    return [text or before for text, before in zip(anew, smiles, strict=True)]


def _of_all(over: str) -> bool:
    if over not in ("valid", "all"):
        raise ValueError(f"unknown denominator {over!r}: choose 'valid' or 'all'")
    return over == "all"


def _fraction(name: str, successes: NDArray[np.bool_], definition: str) -> Metric:
    """A fraction of independent structures, with the binomial standard error √(p (1 − p) / n)."""
    n = len(successes)
    p = _ratio(successes.sum(), n)
    return Metric(name, p, float(np.sqrt(p * (1 - p) / n)) if n else np.nan, n, f"{definition}; binomial stderr")


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else np.nan


def _ratio_stderr(sums: NDArray[np.number], sizes: NDArray[np.number]) -> float:
    """Standard error of Σ_i s_i / Σ_i n_i over independent i; NaN for fewer than two."""
    n, total = len(sums), sizes.sum()
    if n < 2 or not total:
        return np.nan
    residual = sums - sums.sum() / total * sizes
    return float(np.sqrt(n / (n - 1) * np.sum(residual**2)) / total)


def _js_stderr(counts: NDArray[np.integer], others: NDArray[np.integer]) -> float:
    """Standard error of JS by the delta method: ∂JS/∂p_k = ½ log(p_k / m_k) weighs the counts of each structure."""
    total = counts.sum()
    if not (total and others.sum()):
        return np.nan
    p, q = counts.sum(axis=0) / total + _TINY, others / others.sum() + _TINY
    gradient = np.log(2 * p / (p + q)) / 2
    return _ratio_stderr(counts @ gradient, counts.sum(axis=1))


def _provenance(n_structures: int, reference: Reference | None) -> dict[str, str | int]:
    """What has to be printed with the figures."""
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
