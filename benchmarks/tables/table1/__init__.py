"""Table 1: the definition of its cells, their runs, the conclusions, and the tables."""
