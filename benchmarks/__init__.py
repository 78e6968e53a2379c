"""Scripts that reproduce the tables, figures and timings; run them as ``python -m benchmarks.NAME``."""
