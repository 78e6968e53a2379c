"""Datasets as lists of ``Atoms``: QM9 in every form in use, and the particle systems DW4 and LJ13."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message is one line with the source, the value found and the remedy."""


class DataNotFoundError(DataError, FileNotFoundError):
    """There is no such source of data, or nothing in it."""
