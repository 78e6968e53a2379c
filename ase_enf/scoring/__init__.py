"""Atoms to numbers: log likelihoods, energies and forces, reweighted averages."""
