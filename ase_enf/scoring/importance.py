"""The importance-weighted bound (Burda et al. 2016): from log weights to a log-likelihood and its error."""

from __future__ import annotations

import math

import numpy as np


def combine(weights: np.ndarray, integration_error: float) -> tuple[float, float]:
    """Combines log weights into an importance-weighted log-likelihood and its error.

    log p̂ = log 1/K Σ_k w_k, where log w_k is a mean over probes. The squares of three errors are added: over the K
    draws of q, over the probes, and of the integration. The first is the larger of two estimates: the delta method,
    which is right for many draws but never exceeds one nat, and the standard error of the mean of log w, which is right
    if one draw outweighs the others. For many draws with a wide spread, both are too small.

    Args:
        weights: Log weights by probe and draw, shape (P, K).
        integration_error: Nats.

    Returns:
        Log-likelihood and standard error, nats.

    Example:
        >>> round(combine(np.log([[1.0, 3.0]]), 0.0)[0], 6)  # log 2
        0.693147
    """
    probes, samples = weights.shape
    log_w = weights.mean(axis=0)
    peak = log_w.max()
    ratio = np.exp(log_w - peak)
    value = peak + math.log(ratio.mean())
    variance = integration_error**2
    if samples > 1:
        by_ratio = float(ratio.var(ddof=1) / samples / ratio.mean() ** 2)
        variance += max(by_ratio, float(log_w.var(ddof=1) / samples))
    if probes > 1:
        share = ratio / ratio.sum()
        variance += float((weights @ share).var(ddof=1) / probes)
    return float(value), math.sqrt(variance)
