"""Averages of correlated series: the number of independent values, and the standard error of a mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Autocorrelations are summed up to this multiple of the time that the sum gives (Sokal 1997).
_WINDOW = 5.0


def autocorrelation_time(series: Array) -> Array:
    """Integrated autocorrelation time of observables along several chains of one process, in steps.

    τ = 1 + 2 Σ_{k=1}^{K} ρ_k,  K the smallest with K ≥ 5 max(1, τ(K))

    ρ_k is the autocorrelation about the mean of all chains, so that chains that stay apart make τ longer. Independent
    values have τ = 1; S C values of C chains count as S C / τ.

    Args:
        series: Shape (S, C, ...): S values of each of C chains.

    Returns:
        Shape (...); NaN for an observable that does not vary. A time that is not far below S is an underestimate.

    Reference:
        Sokal 1997, in Functional Integration (NATO ASI B 361), 131.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.zeros((20_000, 4))
        >>> for k in range(1, len(x)):  # τ = (1 + 0.8) / (1 − 0.8) = 9
        ...     x[k] = 0.8 * x[k - 1] + rng.standard_normal(4)
        >>> 8 < float(autocorrelation_time(x)) < 10
        True
    """
    length = len(series)
    centred = series - series.mean(axis=(0, 1))
    power = np.square(np.abs(np.fft.rfft(centred, n=2 * length, axis=0)))
    covariance = np.fft.irfft(power, axis=0)[:length].mean(axis=1) / length  # (S, ...)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = covariance / covariance[0]
    times = 2.0 * np.cumsum(correlation, axis=0) - 1.0
    lags = np.arange(length).reshape(-1, *[1] * (times.ndim - 1))
    enough = lags >= _WINDOW * np.maximum(times, 1.0)
    enough[-1] = True
    window = np.argmax(enough, axis=0)
    return np.take_along_axis(times, window[None], axis=0)[0]


def standard_error(series: Array) -> Array:
    """Standard error of the mean of correlated series, √(variance · τ / (S C)).

    Args:
        series: Shape (S, C, ...): S values of each of C chains.

    Returns:
        Shape (...), in the unit of the series; zero for an observable that does not vary.

    Example:
        >>> 0.02 < float(standard_error(np.random.default_rng(0).standard_normal((400, 4)))) < 0.03  # 1 / √1600
        True
    """
    spread = series.var(axis=(0, 1))
    times = np.where(spread > 0, autocorrelation_time(series), 1.0)
    return np.sqrt(spread * np.maximum(times, 1.0 / series.shape[0]) / (series.shape[0] * series.shape[1]))
