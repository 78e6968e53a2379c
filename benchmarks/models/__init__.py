"""What the shipped models are worth, and what was tried on the way to them."""
