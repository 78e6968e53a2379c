"""Noise to Atoms."""
