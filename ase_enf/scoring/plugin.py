"""The entry point ``ase.plugins``: it offers the calculator to ASE, for ``ase info --plugins``.

Versions of ASE without plugins do not look for the entry point, and this module is empty for them.
"""

from __future__ import annotations

from typing import Any

CALCULATOR = "ase_enf.scoring.calculator.ENFCalculator"
"""Imported when the plugin is used, not when it is listed."""


def plugins() -> set[Any]:
    """Returns the plugins of this package; none if ASE has no plugins for calculators.

    Example:
        >>> sorted(plugin.name for plugin in plugins()) in ([], ["enf"])
        True
    """
    try:
        from ase._4.plugins.plugin import CalculatorPlugin  # experimental, and the only place so far
    except ImportError:
        return set()
    citation = "Satorras, Hoogeboom, Fuchs, Posner, Welling, E(n) Equivariant Normalizing Flows, NeurIPS 2021"
    return {CalculatorPlugin("enf", citation=citation, implementation=CALCULATOR)}


__ase_plugins__ = plugins()
