"""Feature modes: a likelihood has exactly the terms of its mode, and what conditions does not flow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import ase_enf
from ase_enf.flow.modes import MODES, feature_mode
from ase_enf.training.config import TrainConfig

PACKAGE = Path(ase_enf.__file__).parent


def test_a_likelihood_has_the_terms_of_its_mode(flow, batch_of, methane, water):
    batch = batch_of([methane, water], flow)
    found = flow.log_prob(batch)
    terms = set(flow.config.mode.terms)
    for name in ("log_base", "ladj", "log_q", "log_size"):
        assert bool(getattr(found, name).abs().max() > 0) == (name in terms), name
    assert flow.config.mode.exact == torch.equal(found.log_prob, flow.log_prob(batch).log_prob)


def test_types_condition_or_flow_or_are_not_there(flow, batch_of, water):
    mode, batch = flow.config.mode, batch_of([water], flow)
    assert flow.config.flow_features == flow.encode(batch).h.shape[-1] == (4 if mode.types_flow else 0)
    context = flow.context(batch)
    assert (context is not None) == mode.types_given
    assert context is None or context.shape[-1] == flow.config.context_features
    assert mode.knows_types == bool(flow.species)
    assert TrainConfig(features=flow.features).mode is mode


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="features 'both' is unknown; choose one of joint, none, given"):
        feature_mode("both")
    with pytest.raises(ValueError, match="features 'both' is unknown; choose one of joint, none, given"):
        TrainConfig(features="both")


def test_no_other_file_asks_for_the_name_of_a_mode():
    """No other file contains ``x.features == "joint"`` or ``x.features in (...)``."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                named = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & MODES.keys()
                asked = any(isinstance(part, ast.Attribute) and part.attr == "features" for part in ast.walk(node))
                if named and asked:
                    found.append(f"{path.name}:{node.lineno}")
    assert not found
