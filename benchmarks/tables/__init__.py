"""The tables and figures of the paper, each by one command; run again, it continues where it stopped."""
