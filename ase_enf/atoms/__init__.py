"""Conversion between ``Atoms`` and tensors, sets of molecules, and files."""
