"""Checks of what was typed, before torch is imported, which takes seconds."""

from __future__ import annotations

import argparse
from typing import Any

from ase_enf.values import BACKENDS, SOLVERS, check_choice, check_device, check_dtype, check_whole


def check_model(options: argparse.Namespace) -> dict[str, Any]:
    """Checks device, floating type and backend by their names, and the header of the weights file.

    Args:
        options: Options of the command.

    Returns:
        The configuration in the header.

    Raises:
        FileNotFoundError: If there is neither a shipped model nor a file of that name.
        ValueError: If a name is unknown, or the file is no weights file.
    """
    from ase_enf.flow.weights import read_header, weights_path

    check_device(options.device)
    check_dtype(options.dtype)
    check_choice("backend", options.backend, BACKENDS)
    config = read_header(weights_path(options.model)).get("config")
    return config if isinstance(config, dict) else {}  # a damaged one is reported when the weights are loaded


def check_solver(options: argparse.Namespace) -> None:
    """Raises ``ValueError`` for an unknown solver, or a number of steps below 1."""
    if options.solver is not None:
        check_choice("solver", options.solver, SOLVERS)
    if options.steps is not None:
        check_whole("solver steps", options.steps, 1)


def check_drawable(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Checks what molecules are asked of a model that knows elements.

    Args:
        options: Options of ``ase-enf generate``.
        config: Configuration of the model.

    Raises:
        ValueError: If the formula is none, or has elements that the model does not know.
    """
    from ase_enf.sampling.compositions import check_formula

    if options.formula is not None and config.get("species"):
        even = options.closed_shell or "closed_shell" in (options.require or "")
        check_formula(options.formula, config["species"], options.n_atoms, even)
