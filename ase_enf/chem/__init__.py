"""Chemistry of ``Atoms``: bonds from distances, valences, RDKit molecules and SMILES.

``bonds`` needs numpy and ASE only. ``convert`` imports RDKit and Open Babel inside the functions that use them, so that
importing ``ase_enf.chem`` is fast.
"""

from __future__ import annotations

from ase_enf.chem.bonds import Stability as Stability
from ase_enf.chem.bonds import bond_orders as bond_orders
from ase_enf.chem.bonds import stability as stability
from ase_enf.chem.convert import to_mol as to_mol
from ase_enf.chem.convert import to_smiles as to_smiles

__all__ = ["Stability", "bond_orders", "stability", "to_mol", "to_smiles"]
