"""Preparation of ``Atoms`` for extended xyz, so that what is read back equals what was written."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.constraints import FixAtoms, FixCartesian
from ase.io.extxyz import (
    REV_PROPERTY_NAME_MAP,
    SPECIAL_3_3_KEYS,
    key_val_dict_to_str,
    key_val_str_to_dict,
    per_config_properties,
)
from ase.spacegroup import Spacegroup
from numpy.typing import NDArray

from ase_enf.atoms.plain import as_plain, shown, text_keys

# Names with a special meaning in extended xyz, which no entry of info and no column may have.
_XYZ_KEYS = ("Lattice", "Properties", "pbc")
_XYZ_COLUMNS = ("symbols", "species", "pos", "Z", "move_mask")


def extended(atoms: Atoms, lost: dict[str, None]) -> Atoms:
    """Returns atoms in a form from which extended xyz reads back all that they hold.

    Args:
        atoms: A structure; it is not modified.
        lost: Receives, as keys, descriptions of what the format does not keep.

    Returns:
        The same object, or a copy if an entry must be written in another form.

    Raises:
        ValueError: If the format has no column for one of the arrays.

    Example:
        >>> lost = {}
        >>> extended(Atoms("H", info={"smiles": "[H]", "Lattice": "mine"}), lost).info, list(lost)
        ({'smiles': '[H]'}, ["keeps no info['Lattice']"])
    """
    kept = {FixAtoms.__name__, FixCartesian.__name__}
    lost |= {f"keeps no {kind}": None for kind in constraint_kinds(atoms) if kind not in kept}
    results = getattr(atoms.calc, "results", {})
    named = text_keys(atoms.info, "info")
    known = [f"info[{key!r}]" for key in named if key in results]
    known += [f"arrays[{name!r}]" for name in atoms.arrays if _property(name) in results]
    lost |= {f"keeps no {name} beside the calculator's": None for name in known}
    written = {key: _written(key, value) for key, value in named.items() if key not in results}
    info = {key: value for key, value in written.items() if value is not None}
    arrays = {name: _column(name, array) for name, array in atoms.arrays.items() if _property(name) not in results}
    lost |= {f"keeps no info[{key!r}]": None for key, value in written.items() if value is None}
    moved = [f"info[{key!r}]" for key in info if key in per_config_properties and key not in SPECIAL_3_3_KEYS]
    moved += [f"arrays[{name!r}]" for name in arrays if _property(name) in all_properties]
    lost |= {f"moves {name} to a calculator's results": None for name in moved}
    return with_content(atoms, info, arrays)


def constraint_kinds(atoms: Atoms) -> list[str]:
    """Returns the names of the classes of the constraints.

    Example:
        >>> constraint_kinds(Atoms("H", constraint=FixAtoms([0])))
        ['FixAtoms']
    """
    return [type(constraint).__name__ for constraint in atoms.constraints]


def with_content(atoms: Atoms, info: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Atoms:
    """Returns atoms with the given ``info`` and arrays: the same object, or a copy if anything differs.

    Example:
        >>> hydrogen = Atoms("H")
        >>> with_content(hydrogen, {}, hydrogen.arrays) is hydrogen
        True
    """
    same_info = info.keys() == atoms.info.keys() and all(info[key] is value for key, value in atoms.info.items())
    if same_info and arrays.keys() == atoms.arrays.keys() and all(arrays[k] is v for k, v in atoms.arrays.items()):
        return atoms
    copy = atoms.copy()
    copy.info, copy.arrays, copy.calc = info, arrays, atoms.calc
    return copy


def _property(name: str) -> str:
    """Returns the name under which extended xyz reads a column."""
    return REV_PROPERTY_NAME_MAP.get(name, name)


def _column(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array in the form that extended xyz reads back."""
    if _property(name) in all_properties and array.dtype.kind not in "iuf":
        problem = f"under the name of a result the type {array.dtype}"
    elif re.search(r"""[\s:=\\"'{}\[\]]|^$""", name) or name in _XYZ_COLUMNS:
        problem = "a column of that name"
    elif array.ndim > 2 or 0 in array.shape[1:]:
        problem = f"the shape {array.shape}"
    elif array.dtype.kind not in "biufOSU":
        problem = f"the type {array.dtype}"
    elif array.dtype.kind in "OSU" and (bad := [text for text in array.flat if not _is_word(text)]):
        problem = f"{shown(bad[0])}, only texts without blanks"
    elif array.dtype.kind in "iu" and (bad := array[np.abs(array.astype(float)) >= 2**31]).size:
        problem = f"{bad[0]}, only numbers of 32 bits"
    else:
        return array.astype(np.int64) if array.dtype.kind == "u" else array
    raise ValueError(f"arrays[{name!r}]: extended xyz cannot hold {problem}; remove or rename it, or write .db")


def _is_word(text: Any) -> bool:
    """Whether a text is a single column."""
    return isinstance(text, str) and text.split() == [text]


def _written(key: str, value: Any) -> Any:
    """Returns an entry of ``info`` in the form that extended xyz reads back, or None if there is none."""
    if key in _XYZ_KEYS or not (key in SPECIAL_3_3_KEYS or _holds_key(key)):
        return None
    try:
        plain = value.symbol if isinstance(value, Spacegroup) else as_plain(value, key)
        if key in per_config_properties and np.asarray(plain).dtype.kind not in "iuf":
            return None  # the file could not be read again: ASE takes it for a result
        if key in SPECIAL_3_3_KEYS:
            return _matrix(key, np.asarray(plain))
        if plain is None or isinstance(plain, str):
            return _read_back(plain)
        if isinstance(plain, float) or (isinstance(plain, int) and abs(plain) < 2**63) or _is_row(plain):
            return value
        written = _encoded(plain)
        key_val_str_to_dict(key_val_dict_to_str({"key": written}))
    except (TypeError, ValueError):  # what JSON does not know, and lists that are no array
        return None
    return written


def _matrix(key: str, value: NDArray[Any]) -> NDArray[Any] | None:
    """Returns a value that extended xyz reads as a 3 x 3 matrix, or None if it has another shape."""
    shapes = ((3, 3), (6,)) if key == "stress" else ((3, 3),)  # ASE writes the six of a stress as nine
    return value if value.dtype.kind in "if" and value.shape in shapes else None


def _is_row(value: Any) -> bool:
    """Whether ASE can write an array as it is: an empty one swallows the next entry, one of length 1 loses its axis."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "bif":
        return False
    return value.ndim == 0 or (value.ndim == 1 and len(value) > 1)


@functools.lru_cache(maxsize=4096)
def _holds_key(key: str) -> bool:
    """Whether extended xyz reads a key of ``info`` back."""
    entry = {key: "x", "next": "y"}
    return key.splitlines() == [key] and key_val_str_to_dict(key_val_dict_to_str(entry)) == entry


def _encoded(value: Any) -> str:
    """Returns a value as text that extended xyz reads as JSON."""
    return f"_JSON {json.dumps(value, default=np.ndarray.tolist)}".replace("\\", "\\\\")


@functools.lru_cache(maxsize=4096)  # most molecules of a file say the same
def _read_back(value: str | None) -> str | None:
    """Returns the form in which a text, or None, is read back unchanged; None if there is no such form.

    Without it, "007" would become a number, "F" False and None True; an empty string would swallow the next entry, and
    backslashes, as in SMILES, would vanish.
    """
    encoded = _encoded(value)
    verbatim = value is not None and "\\" not in value and value.splitlines() == [value]
    for written in (value, encoded) if verbatim else (encoded,):
        try:
            back = key_val_str_to_dict(key_val_dict_to_str({"key": written}))["key"]
        except (KeyError, ValueError):  # ASE's parser cannot read some quotes and words
            continue
        if type(back) is type(value) and back == value:
            return written
    return None
