"""RDKit's MMFF94 force field (Halgren 1996) as an ASE calculator, and starting conformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed, Calculator, CalculatorSetupError, all_changes
from numpy.typing import NDArray

from ase_enf.chem.bonds import structures
from ase_enf.chem.convert import PerceptionError, bond_graph, quiet_rdkit, sanitise, to_mol
from ase_enf.chem.topology import Topology

if TYPE_CHECKING:
    from rdkit.Chem import Mol

VARIANTS = ("MMFF94", "MMFF94s")
KCAL = units.kcal / units.mol  # eV


class MMFF94(Calculator):
    """Energies and forces of one molecule by MMFF94, in eV and eV/Å.

    A force field belongs to one bond graph: that of ``atoms``, or of the first structure that is computed. A structure
    with the same graph is computed whatever the order of its atoms. One with other bonds (by distance, see
    ``ase_enf.chem.topology``) raises ``CalculationFailed``: in the ensemble of the molecule its Boltzmann weight is
    zero.

    Args:
        atoms: The molecule; the first structure that is computed when None.
        orders: Its bond orders 0 to 3, shape (M, M); when None, RDKit perceives them from the positions of a neutral
            molecule.
        variant: "MMFF94", or "MMFF94s", in which delocalised nitrogen is planar.

    Raises:
        ValueError: If the variant is unknown, or ``orders`` is not a symmetric matrix with a row for each atom.
        CalculatorSetupError: If no bonds are found or an atom has no parameters; raised when the energy is first
            requested.
        CalculationFailed: If a structure has other bonds than the molecule; raised when its energy is requested.

    Reference:
        Halgren 1996, J. Comput. Chem. 17, 490; Tosco, Stiefl & Landrum 2014, J. Cheminform. 6, 37.

    Example:
        >>> from ase.build import molecule
        >>> ethanol = molecule("CH3CH2OH")
        >>> ethanol.calc = MMFF94()
        >>> round(ethanol.get_potential_energy(), 3), ethanol.get_forces().shape
        (-0.048, (9, 3))
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 (ASE's interface)

    def __init__(
        self, atoms: Atoms | None = None, orders: NDArray[np.integer] | None = None, variant: str = "MMFF94"
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: choose one of {', '.join(VARIANTS)}")
        if orders is not None:
            orders = np.asarray(orders)
            if atoms is None:
                raise ValueError("orders without atoms: give the molecule that they belong to as well")
            if orders.shape != (len(atoms), len(atoms)) or not np.array_equal(orders, orders.T):
                raise ValueError(f"orders of shape {orders.shape}: need a symmetric matrix, one row for each atom")
        self.orders, self.variant = orders, variant
        self.molecule = None if atoms is None else atoms.copy()
        self.topology: Topology | None = None
        self._field: Any = None  # RDKit's object, which cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_field": None, "topology": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> MMFF94:
        return type(self)(self.molecule, self.orders, self.variant)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Computes energy and forces; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        if self._field is None:
            self._build()
        order = self.topology.match(self.atoms)
        if order is None:
            raise CalculationFailed(
                f"{self.atoms.get_chemical_formula()} does not have the bonds of the molecule that MMFF94 was set up "
                "for; a new MMFF94() takes another molecule"
            )
        energy, ordered = self._at(self.atoms.positions[order])
        self.results["energy"] = self.results["free_energy"] = energy
        if "forces" in properties:
            forces = np.empty((len(order), 3))
            forces[order] = ordered
            self.results["forces"] = forces

    def surface(self, positions: NDArray[np.floating]) -> tuple[float, NDArray[np.float64]]:
        """Returns energy and forces of the molecule, thirty times faster than through ``Atoms``.

        Args:
            positions: Positions, shape (M, 3), Å, atoms in the order of the molecule; its bonds are not checked.

        Returns:
            Energy, eV, and forces, shape (M, 3), eV/Å.

        Raises:
            CalculatorSetupError: If the calculator has no molecule yet, or MMFF94 cannot describe it.

        Example:
            >>> from ase.build import molecule
            >>> ethanol = molecule("CH3CH2OH")
            >>> round(MMFF94(ethanol).surface(ethanol.positions)[0], 3)
            -0.048
        """
        if self._field is None:
            if self.molecule is None:
                raise CalculatorSetupError("MMFF94() has no molecule yet; give it one, MMFF94(atoms)")
            self._build()
        return self._at(positions)

    def _at(self, positions: NDArray[np.floating]) -> tuple[float, NDArray[np.float64]]:
        """Returns energy and forces, energy first: RDKit's gradient uses the distances of its last energy."""
        flat = positions.ravel().tolist()
        energy = KCAL * self._field.CalcEnergy(flat)
        return energy, -KCAL * np.reshape(self._field.CalcGrad(flat), (-1, 3))

    def _build(self) -> None:
        from rdkit.Chem import rdForceFieldHelpers as helpers

        if self.molecule is None:
            self.molecule = self.atoms.copy()
        name = self.molecule.get_chemical_formula()
        mol = _bonded(self.molecule, self.orders)
        with quiet_rdkit():
            parameters = helpers.MMFFGetMoleculeProperties(mol, mmffVariant=self.variant)
            if parameters is None:
                raise CalculatorSetupError(
                    f"{self.variant} has no parameters for an atom of {name}; use another calculator"
                )
            self._field = helpers.MMFFGetMoleculeForceField(mol, parameters, ignoreInterfragInteractions=False)
        self.topology = Topology(self.molecule)


def _bonded(atoms: Atoms, orders: NDArray[np.integer] | None = None) -> Mol:
    """Returns a sanitised molecule with the positions as its conformer."""
    from rdkit import Chem

    name = atoms.get_chemical_formula()
    try:
        if orders is None:
            mol = to_mol(atoms, "rdkit")
        else:
            structures(atoms)
            mol = Chem.Mol(bond_graph(atoms.numbers, orders))
            conformer = Chem.Conformer(len(atoms))
            conformer.SetPositions(np.array(atoms.positions, dtype=np.float64))
            mol.AddConformer(conformer)
    except PerceptionError as error:
        raise CalculatorSetupError(f"{error}; give bond orders") from error
    sound = sanitise(mol)
    if sound is None:
        raise CalculatorSetupError(f"{name}: RDKit rejects its bond orders; correct them")
    return sound


def _seed(seed: int) -> int:
    """Returns a seed for RDKit, which embeds attempt k from k times its seed: all from the same numbers with zero."""
    return 1 + int(np.random.SeedSequence(seed).generate_state(1)[0]) % 2**19


def conformers(atoms: Atoms, n: int, seed: int = 0) -> list[Atoms]:
    """Returns conformers of a molecule by RDKit's distance geometry, relaxed by MMFF94 where it has parameters.

    Args:
        atoms: A molecule; its bonds are perceived from the positions.
        n: Number of attempts.
        seed: Seed of RDKit, not negative.

    Returns:
        At most n conformers, several of which may be alike, with atoms in the order of the molecule; the molecule
        itself if there is none.

    Raises:
        ValueError: If n is below 1 or the structure is periodic.
        CalculatorSetupError: If no bonds are found.

    Reference:
        Riniker & Landrum 2015, J. Chem. Inf. Model. 55, 2562.

    Example:
        >>> from ase.build import molecule
        >>> [found.get_chemical_formula() for found in conformers(molecule("CH3CH2OH"), 2)]
        ['C2H6O', 'C2H6O']
    """
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    if n < 1:
        raise ValueError(f"n={n}: must be at least 1")
    mol = _bonded(atoms)
    with quiet_rdkit():
        found = list(rdDistGeom.EmbedMultipleConfs(mol, n, randomSeed=_seed(seed)))
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol)
    made = [Atoms(atoms.numbers, mol.GetConformer(k).GetPositions()) for k in found]
    topology = Topology(atoms)
    return [conformer for conformer in made if topology.holds(conformer.positions)] or [atoms.copy()]
