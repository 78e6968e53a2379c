"""Accuracy of likelihoods, quadratures, samplers, forces and published weights."""
