"""How right the numbers are: likelihoods, quadratures, samplers, forces, published weights."""
