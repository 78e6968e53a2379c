"""Table 1 in rooms: what its cells are, how they are run, what they say, and how that is shown."""
