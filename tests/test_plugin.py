"""The calculator as a plugin of ASE: found by its entry point, imported on use, and harmless with older ASE."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import ase_enf
from ase_enf.scoring import plugin

ROOT = Path(ase_enf.__file__).parents[1]


def entry_point() -> EntryPoint:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, value = config["options.entry_points"]["ase.plugins"].strip().split(" = ")
    return EntryPoint(name, value, "ase.plugins")


def test_the_entry_point_leads_to_the_calculator(monkeypatch):
    collection = pytest.importorskip("ase._4.plugins.plugin_collection")
    monkeypatch.setattr(collection, "entry_points", lambda group: [entry_point()] if group == "ase.plugins" else [])
    (found,) = collection.PluginCollection.from_entry_points()
    assert (found.name, found.module.__name__) == ("enf", "ase_enf.scoring.plugin")
    assert found() is ase_enf.ENFCalculator
    assert found.package == "ase_enf"


def test_listing_imports_no_torch():
    code = "import sys, ase_enf.scoring.plugin; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_an_ase_without_plugins_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ase._4.plugins.plugin", None)
    assert plugin.plugins() == set()
