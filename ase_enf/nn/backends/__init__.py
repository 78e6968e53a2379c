"""Compiled kernels of the networks."""
