"""Sampling: from noise to ``Atoms``."""
