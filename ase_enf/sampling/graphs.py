"""The molecular graph of a request: a SMILES, checked against what the flow knows."""

from __future__ import annotations

import warnings

from ase.data import chemical_symbols

from ase_enf.chem.graph import BONDS_KEY, Graph, graph_of_smiles, has_stereo, write_bonds
from ase_enf.flow.model import ENF

# Key in ``info`` of the canonical SMILES of the graph that a molecule was drawn for.
GRAPH_KEY = "enf_graph"


def requested_graph(flow: ENF, wanted: str | Graph | None, n_atoms: int | None, formula: str | None) -> Graph | None:
    """Returns the molecular graph to draw conformers of, None for a flow that knows no graphs.

    Args:
        flow: The flow.
        wanted: The graph, or a SMILES; stereochemistry of a SMILES is ignored with a warning.
        n_atoms: Size, if one was requested.
        formula: Composition, if one was requested.

    Raises:
        ValueError: For a SMILES that does not describe one neutral closed-shell molecule, has elements or a size that
            the flow does not know, is missing where one is needed, or is given to a flow that knows no graphs.
    """
    smiles = wanted.smiles if isinstance(wanted, Graph) else wanted
    if not flow.config.graph:
        if smiles is not None:
            raise ValueError(
                f"smiles={smiles!r}: this model knows no molecular graphs; use one that does, such as qm9-conformers"
            )
        return None
    if smiles is None:
        raise ValueError("this model draws conformers of a molecular graph; give its smiles, such as CCO")
    if formula is not None:
        raise ValueError(f"formula={formula!r}: the graph of smiles={smiles!r} has one already; leave formula out")
    graph = wanted if isinstance(wanted, Graph) else graph_of_smiles(smiles)
    unknown = sorted({chemical_symbols[number] for number in graph.numbers} - set(flow.species))
    if unknown:
        raise ValueError(
            f"smiles={smiles!r}: element(s) {', '.join(unknown)} unknown to this model, which knows "
            f"{', '.join(flow.species)}"
        )
    size, largest = len(graph.numbers), max(flow.size_prior.counts)
    if n_atoms is not None and n_atoms != size:
        raise ValueError(f"n_atoms={n_atoms}: smiles={smiles!r} has {size} atoms, hydrogens too; leave n_atoms out")
    if not 2 <= size <= largest:
        raise ValueError(f"smiles={smiles!r}: has {size} atom(s) with hydrogens; this model saw at most {largest}")
    if graph is not wanted and has_stereo(smiles):
        warnings.warn(
            f"smiles={smiles!r}: the model knows no stereochemistry and draws every stereoisomer", stacklevel=2
        )
    return graph


def graph_info(graph: Graph | None) -> dict[str, str]:
    """Returns the entries of ``info`` about the graph that a molecule was drawn for."""
    return {} if graph is None else {GRAPH_KEY: graph.smiles, BONDS_KEY: write_bonds(graph.bonds)}
