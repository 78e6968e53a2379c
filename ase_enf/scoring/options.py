"""The options of a score and the columns of its table; importing it needs no torch."""

from __future__ import annotations

from ase_enf.values import TRACES, check_choice, check_whole

COLUMNS = ("log_likelihood", "stderr", "kind", "trace", "probes", "importance_samples", "nfe", "n_atoms", "formula")
# Keywords and columns that have been renamed, by their earlier names.
RENAMED = {"draws": "importance_samples", "tolerance": "max_stderr"}


def check_options(trace: str, probes: int, importance_samples: int, batch_size: int, max_stderr: float) -> None:
    """Raises ``ValueError`` for an option that :func:`ase_enf.score` refuses whatever the flow and the structures.

    Example:
        >>> check_options("exact", 4, 0, 32, 0.2)
        Traceback (most recent call last):
        ValueError: importance_samples=0: must be at least 1
    """
    check_choice("trace", trace, TRACES)
    for name, value in (("probes", probes), ("importance_samples", importance_samples), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    if not max_stderr > 0:
        raise ValueError(f"max_stderr={max_stderr}: must be a positive number of nats")
