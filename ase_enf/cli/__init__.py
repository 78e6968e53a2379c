"""The command ``ase-enf``: :mod:`ase_enf.cli.command` parses and runs it, and each verb has its own file."""

from __future__ import annotations

from ase_enf.cli.command import main

__all__ = ["main"]
