"""Raw QM9 files (``dsgdb9nsd_*.xyz``) as ``Atoms``, and the plug-in that lets ``ase.io.read`` open them.

The layout, with M the number of atoms (Ramakrishnan et al., Sci. Data 1, 140022 (2014), table 2)::

    M
    gdb <index> <15 properties>
    <symbol> <x> <y> <z> <Mulliken charge>              M lines, Å and e
    <harmonic frequencies>                              cm⁻¹
    <SMILES of GDB-17> <SMILES of the relaxed geometry>
    <InChI of the initial geometry> <InChI of the relaxed geometry>

Where each entry is found, in its published unit (nothing is converted):

=========================================================  =================  ========================================
place                                                      unit               meaning
=========================================================  =================  ========================================
``positions``                                              Å                  B3LYP/6-31G(2df,p) minimum
``arrays["qm9_mulliken"]``                                 e                  Mulliken partial charges
``info["qm9_index"]``                                      –                  1-based number in GDB-9
``info["qm9_A"]``, ``["qm9_B"]``, ``["qm9_C"]``            GHz                rotational constants
``info["qm9_mu"]``                                         D                  dipole moment
``info["qm9_alpha"]``                                      a₀³                isotropic polarisability
``info["qm9_homo"]``, ``["qm9_lumo"]``, ``["qm9_gap"]``    Hartree            orbital energies
``info["qm9_r2"]``                                         a₀²                electronic spatial extent
``info["qm9_zpve"]``                                       Hartree            zero point vibrational energy
``info["qm9_U0"]``                                         Hartree            internal energy at 0 K
``info["qm9_U"]``, ``["qm9_H"]``, ``["qm9_G"]``            Hartree            U, H and G at 298.15 K
``info["qm9_Cv"]``                                         cal mol⁻¹ K⁻¹      heat capacity at 298.15 K
``info["qm9_frequencies"]``                                cm⁻¹               3M − 6 (or 3M − 5) of them
``info["qm9_smiles"]``, ``["qm9_inchi"]``                  –                  of the relaxed geometry: these positions
``info["qm9_smiles_gdb17"]``                               –                  the molecule of GDB-17 it started from
``info["qm9_inchi_initial"]``                              –                  of the geometry it started from
=========================================================  =================  ========================================

Thanks to the prefix no energy has the key ``energy``, which ASE's extxyz reader moves into a calculator.

ASE loads this module with every ``import ase.io``, and it imports nothing that ASE has not imported already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.utils.plugins import ExternalIOFormat
from numpy.typing import NDArray

from ase_enf.data import DataError

PROPERTIES = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv")
"""The published order of the 15 scalar properties, each ``info["qm9_<name>"]``."""

format = ExternalIOFormat(
    desc="Raw QM9 file (GDB-9)",
    code="+F",
    module=__name__,
    # Anchored at the first line, because a glob such as b"*\ngdb " would claim any file with such a line in its first
    # 50 kB.
    magic_regex=rb"\s*\d+[ \t]*\r?\ngdb[ \t]+\d+[ \t]+-?\d",
)
"""The object of the entry point ``ase.ioformats: gdb9-xyz = ase_enf.data.gdb9:format``."""


class Record(NamedTuple):
    """One molecule of a raw QM9 file, in the published units (see the table of the module)."""

    index: int
    numbers: NDArray[np.int64]  # (M,)
    positions: NDArray[np.float64]  # (M, 3), Å
    mulliken: NDArray[np.float64]  # (M,), e
    properties: dict[str, float]  # the 15 of PROPERTIES
    frequencies: NDArray[np.float64]  # (3M − 6,) or (3M − 5,), cm⁻¹
    smiles: tuple[str, str]  # GDB-17, relaxed
    inchi: tuple[str, str]  # initial, relaxed

    def to_atoms(self) -> Atoms:
        """Returns the molecule as ``Atoms``, with all published values under the names of the module's table.

        Returns:
            A non-periodic molecule.

        Example:
            >>> positions, charges, frequencies = np.array([[0, 0, 0], [0, 0, 0.74]]), np.zeros(2), np.array([4401.0])
            >>> smiles, inchi = ("[HH]", "[HH]"), ("InChI=1S/H2/h1H", "InChI=1S/H2/h1H")
            >>> h2 = Record(1, np.array([1, 1]), positions, charges, {"U0": -1.17}, frequencies, smiles, inchi)
            >>> atoms = h2.to_atoms()
            >>> atoms.get_chemical_formula(), atoms.info["qm9_U0"], atoms.info["qm9_smiles"]
            ('H2', -1.17, '[HH]')
        """
        info = {"qm9_index": self.index}
        info |= {f"qm9_{name}": value for name, value in self.properties.items()}
        info["qm9_frequencies"] = self.frequencies
        info["qm9_smiles_gdb17"], info["qm9_smiles"] = self.smiles
        info["qm9_inchi_initial"], info["qm9_inchi"] = self.inchi
        atoms = Atoms(numbers=self.numbers, positions=self.positions, info=info)
        atoms.set_array("qm9_mulliken", self.mulliken)
        return atoms


def parse_number(text: str) -> float:
    """Returns the number of a token of a raw file, which may have an exponent in the style of Mathematica.

    Args:
        text: A token, such as ``-0.0126981359`` or ``2.1997*^-6``.

    Returns:
        Its value.

    Raises:
        ValueError: If the token is not a finite number.

    Example:
        >>> parse_number("2.1997*^-6")
        2.1997e-06
    """
    value = float(text.replace("*^", "e"))
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def parse_record(lines: Sequence[str], name: str = "<text>") -> Record:
    """Reads one molecule.

    Args:
        lines: The M + 5 lines of the molecule.
        name: The name of the source in error messages.

    Returns:
        The molecule.

    Raises:
        DataError: If the lines are not one complete molecule.

    Example:
        >>> text = '''3
        ... gdb 3 799.588 437.9 282.9 1.8511 6.31 -.293 .069 .362 19.0 .021375 -76.404702 -76.402 -76.401 -76.422 6.0
        ... O\t-0.0343604951\t 0.9775395708\t 0.0076015923\t-0.589706
        ... H\t 0.0647664923\t 0.0205721989\t 0.0015346341\t 0.294853
        ... H\t 0.8717903737\t 1.3007924048\t 6.931*^-7\t 0.294853
        ... 1671.4222\t3803.6305\t3907.698
        ... O\tO\t
        ... InChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2'''
        >>> water = parse_record(text.splitlines())
        >>> water.index, water.numbers.tolist(), water.smiles[0], water.properties["U0"], float(water.positions[2, 2])
        (3, [8, 1, 1], 'O', -76.404702, 6.931e-07)
    """
    n = _count(lines[0], name)
    if len(lines) < n + 5:
        raise DataError(f"{name}: ends after {len(lines)} of the {n + 5} lines of a molecule of {n} atoms (truncated?)")
    rows = [line.split() for line in lines[: n + 5]]
    step = 1
    try:
        index, properties = _header(rows[1])
        numbers, values = np.empty(n, dtype=np.int64), np.empty((n, 4))
        for atom in range(n):
            step = 2 + atom
            symbol, *numerals = rows[step]
            numbers[atom] = atomic_numbers[symbol]
            values[atom] = [parse_number(numeral) for numeral in _exactly(numerals, 4)]
        step = n + 2
        frequencies = np.array([parse_number(numeral) for numeral in rows[step]])
        step = n + 3
        smiles = _exactly(rows[step], 2)
        step = n + 4
        inchi = _exactly(rows[step], 2)
    except (ValueError, KeyError) as error:
        raise DataError(f"{name}: line {step + 1} of the molecule is wrong: {error}: {lines[step][:60]!r}") from error
    return Record(
        index, numbers, values[:, :3].copy(), values[:, 3].copy(), properties, frequencies, tuple(smiles), tuple(inchi)
    )


def parse(text: str, name: str = "<text>") -> list[Record]:
    """Reads all molecules of a raw file: one in a published file, several if files were joined.

    Args:
        text: The file's text.
        name: Its name in error messages.

    Returns:
        The molecules, in the order of the file.

    Raises:
        DataError: If the text is empty, or a molecule is damaged or cut short.

    Example:
        >>> parse("")
        Traceback (most recent call last):
        ...
        ase_enf.data.DataError: <text>: is empty
    """
    lines = text.strip().splitlines()
    if not lines:
        raise DataError(f"{name}: is empty")
    records, start = [], 0
    while start < len(lines):
        stop = start + _count(lines[start], name) + 5
        records.append(parse_record(lines[start:stop], name))
        start = stop
    return records


def read_gdb9_xyz(fd: IO[str], index: slice | int = -1) -> Iterator[Atoms]:
    """Reads raw QM9 files for ``ase.io.read``, which finds this function by its name.

    Args:
        fd: An open file.
        index: Index of the molecules; a published file has one.

    Yields:
        The molecules with all published values; see the table of the module.

    Raises:
        DataError: If the file is not a complete raw QM9 file.

    Example:
        >>> from ase.io import read
        >>> read("dsgdb9nsd_000005.xyz").info["qm9_smiles"]  # doctest: +SKIP
        'C#N'
    """
    records = parse(fd.read(), getattr(fd, "name", "<text>"))
    chosen = records[index] if isinstance(index, slice) else [records[index]]
    yield from (record.to_atoms() for record in chosen)


def _count(line: str, name: str) -> int:
    """Returns the number of atoms, with which a molecule begins."""
    try:
        n = int(line)
    except ValueError:
        n = 0
    if n < 1:
        raise DataError(f"{name}: a molecule must open with its number of atoms, found {line[:60]!r}")
    return n


def _header(tokens: list[str]) -> tuple[int, dict[str, float]]:
    """Returns the index and the properties of a line ``gdb <index> <15 properties>``."""
    if tokens[:1] != ["gdb"]:
        raise ValueError("expected 'gdb <index> <15 properties>'")
    _, index, *numerals = _exactly(tokens, 2 + len(PROPERTIES))
    return int(index), dict(zip(PROPERTIES, map(parse_number, numerals), strict=True))


def _exactly(tokens: list[str], n: int) -> list[str]:
    """Returns the tokens, after checking that there are n of them."""
    if len(tokens) != n:
        raise ValueError(f"expected {n} values, found {len(tokens)}")
    return tokens
