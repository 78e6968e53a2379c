"""Sets of samples of particle systems: drawn, described, written and read."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ase_enf.atoms.files import atomic_write, brief
from ase_enf.data import DataError, DataNotFoundError, mcmc
from ase_enf.data.particles import Array, System, flat_atoms, resolve

_LEAST_SWEEPS = 100  # of a run; its diagnostics need as many


@dataclass(frozen=True)
class Samples:
    """Configurations of a system in random order, so that the first k are also a sample.

    ``info`` holds ``system``, ``seed``, ``sha256`` (see ``fingerprint``), ``diagnostics`` (the fields of
    ``Diagnostics``) and the settings of the run, all as JSON values.
    """

    positions: Array  # (N, M, n), zero mean
    energies: Array  # (N,), kT
    ladder: NDArray[np.int64]  # (N,), the independent ladder that each comes from
    info: dict[str, Any]

    def __len__(self) -> int:
        return len(self.positions)

    def to_atoms(self) -> list[Atoms]:
        """Returns the configurations as ``Atoms``, see ``ase_enf.data.particles.flat_atoms``."""
        return flat_atoms(self.positions)


def fingerprint(positions: Array) -> str:
    """Returns the SHA-256 of positions rounded to 1e-6, as little-endian 64-bit integers.

    Args:
        positions: Any shape.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> fingerprint(np.zeros((1, 4, 2)))[:8]
        'f5a5fd42'
    """
    return hashlib.sha256(np.rint(np.asarray(positions) * 1e6).astype("<i8").tobytes()).hexdigest()


def sample(
    system: System | str,
    n: int,
    seed: int | tuple[int, ...] = 0,
    *,
    ladders: int = mcmc.LADDERS,
    burn_in: int = mcmc.BURN_IN,
    thin: int = 10,
    progress: bool | None = None,
) -> Samples:
    """Draws samples of ``exp(−U)`` without duplicates, by the method of ``ase_enf.data.mcmc``.

    Args:
        system: A system or its name.
        n: Number of samples.
        seed: Seed of all random numbers; it gives the same bits with the same numpy on the same kind of machine.
        ladders: Number of independent chains; each gives about n / ladders of the samples.
        burn_in: Number of first sweeps that are left out.
        thin: Smallest number of sweeps between two samples of a ladder; the correlation time of U of LJ13 is about 7.
        progress: Whether to show a progress bar; by default on a terminal.

    Returns:
        The samples, with a warning if chains disagree or miss equipartition.

    Raises:
        DataError: If there is no such system, a number is out of range, or chains do not move.

    Example:
        >>> drawn = sample("dw4", 100, seed=1, ladders=8, burn_in=100)
        >>> drawn.positions.shape, len(np.unique(drawn.energies))
        ((100, 4, 2), 100)
    """
    system = resolve(system)
    if n < 1 or ladders < 2 or thin < 1:
        raise DataError(f"n={n}, ladders={ladders}, thin={thin}: at least 1, 2 and 1")
    each = -(-n // ladders) + 1  # one to spare, for duplicates
    thin = max(thin, -(-_LEAST_SWEEPS // each))
    settings = {"sweeps": each * thin, "ladders": ladders, "burn_in": burn_in, "thin": thin}
    run = mcmc.run(system, seed, **settings, progress=progress)
    positions = run.positions.reshape(-1, system.n_atoms, system.dimension)
    _, rows = np.unique(_rows(positions), return_index=True)
    if len(rows) < n:
        raise DataError(f"{system.name}: {len(rows)} different samples of {n}; use a longer burn_in or a larger thin")
    shuffle = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])  # not the stream of the run
    rows = shuffle.permutation(np.sort(rows))[:n]
    diagnostics = run.diagnostics()
    if trouble := diagnostics.trouble(system.degrees_of_freedom):
        warnings.warn(f"{system.name}: {trouble}; these are not samples of exp(−U); use a longer burn_in", stacklevel=2)
    info = {
        "system": system.name,
        "seed": seed,
        "sha256": fingerprint(positions[rows]),
        **settings,
        "diagnostics": diagnostics._asdict(),
    }
    energies = system.evaluate(positions[rows]).energy
    return Samples(positions[rows], energies, rows % ladders, json.loads(json.dumps(info)))


def _rows(positions: Array) -> NDArray[np.void]:
    """Each configuration, rounded as in ``fingerprint``, as one comparable item."""
    whole = np.rint(positions.reshape(len(positions), -1) * 1e6).astype("<i8")
    return np.ascontiguousarray(whole).view(np.dtype((np.void, whole.itemsize * whole.shape[1]))).ravel()


def dataset(system: System | str, sizes: Mapping[str, int], seed: int = 0, **settings: Any) -> dict[str, Samples]:
    """Draws one set of samples for each name, each from ladders of its own.

    Args:
        system: A system or its name.
        sizes: Name → number of samples. A set depends on its own name and size and on the seed, not on other sets.
        seed: Seed of all sets.
        settings: Options of ``sample``.

    Returns:
        Name → samples.

    Raises:
        DataError: See ``sample``.

    Example:
        >>> sets = dataset("dw4", {"train": 50, "test": 20}, ladders=8, burn_in=50)
        >>> {name: len(samples) for name, samples in sets.items()}
        {'train': 50, 'test': 20}
    """
    return {name: sample(system, n, (seed, *name.encode()), **settings) for name, n in sizes.items()}


def save(path: str | Path, sets: Mapping[str, Samples]) -> None:
    """Writes sets of samples to one ``.npz`` without pickle, which appears only when it is complete.

    Args:
        path: The file.
        sets: Name → samples.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/dw4.npz", {"test": sample("dw4", 5, ladders=4, burn_in=5)})
        ...     len(load(f"{folder}/dw4.npz")["test"])
        5
    """
    arrays = {}
    for name, samples in sets.items():
        arrays |= {f"{name}/{key}": getattr(samples, key) for key in ("positions", "energies", "ladder")}
        arrays[f"{name}/info"] = np.array(json.dumps(samples.info))
    with atomic_write(path) as handle:
        np.savez(handle, **arrays)


def load(path: str | Path) -> dict[str, Samples]:
    """Reads what ``save`` wrote, and checks the hash of the positions.

    Args:
        path: The file.

    Returns:
        Name → samples.

    Raises:
        DataNotFoundError: If there is no such file.
        DataError: If the file is damaged, or was not written by ``save``.
    """
    if not Path(path).is_file():
        raise DataNotFoundError(
            f"{path}: no such file of samples; ase_enf.data.samples.dataset draws and save writes them"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        names = [key.removesuffix("/info") for key in arrays if key.endswith("/info")]
        fields = ("positions", "energies", "ladder")
        sets = {
            name: Samples(*(arrays[f"{name}/{key}"] for key in fields), json.loads(str(arrays[f"{name}/info"])))
            for name in names
        }
        intact = all(fingerprint(s.positions) == s.info["sha256"] for s in sets.values())
    except Exception as error:  # zip, numpy and json have errors of their own for a damaged file
        raise DataError(f"{path}: not a file of samples ({brief(error)}); draw them again") from error
    if not sets:
        raise DataError(f"{path}: holds no samples of ase_enf.data.samples.save")
    if not intact:
        raise DataError(f"{path}: positions differ from their hash; draw them again")
    return sets
