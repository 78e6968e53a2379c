"""The paper's tables and figures, each one command that goes on where it stopped."""
