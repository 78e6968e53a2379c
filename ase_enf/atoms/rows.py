"""Structures as rows of an ASE database: which entries of ``info`` are keys, and which are data."""

from __future__ import annotations

from typing import Any

from ase import Atoms

from ase_enf.atoms.plain import as_plain

# Entries of this package by which rows can be selected; all others are only in the data of a row.
_KEYS = ("log_likelihood", "log_likelihood_stderr", "log_likelihood_kind", "seed", "index")
_PREFIX = "enf_"
_SCORE_KEYS = _KEYS[:3]

SQLITE = b"SQLite format 3\0"
"""The bytes that open a database file."""

ASE_ARRAYS = ("numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges")
"""The arrays that ASE's own formats keep."""


def database_row(atoms: Atoms) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the keys and the data under which a database keeps a structure's ``info`` and arrays.

    Args:
        atoms: A structure.

    Returns:
        The keys, by which rows can be selected, and the data: all of ``info``, and the arrays that have no column.

    Raises:
        ValueError: If an entry is of a kind that ASE's databases cannot hold, or two keys are equal as text.

    Example:
        >>> database_row(Atoms("H", info={"enf_seed": 3, "enf_model": "qm9"}))
        ({'seed': 3}, {'info': {'enf_seed': 3, 'enf_model': 'qm9'}})
    """
    info = as_plain(atoms.info, "info")
    arrays = {name: array for name, array in atoms.arrays.items() if name not in ASE_ARRAYS}
    own = {key: info[_PREFIX + key] for key in _KEYS if _PREFIX + key in info}
    # A score without the prefix, as rows of a database have it, is that of an earlier run: the new one replaces it.
    earlier = _SCORE_KEYS if _PREFIX + _SCORE_KEYS[0] in info else ()
    keys = {key: value for key, value in info.items() if not key.startswith(_PREFIX) and key not in earlier} | own
    data = {"info": info} | ({"arrays": as_plain(arrays, "arrays")} if arrays else {})
    return {key: value for key, value in keys.items() if _is_key(key, value)}, data


def _is_key(key: str, value: Any) -> bool:
    """Whether ase.db accepts an entry as a key, and its rows still work with an attribute of that name."""
    from ase.db.core import check
    from ase.db.row import AtomsRow

    if key.startswith("_") or hasattr(AtomsRow, key):
        return False
    try:
        check({key: value})
    except ValueError:
        return False
    return True
