"""Compiled kernels of the networks, for CPUs and GPUs."""
