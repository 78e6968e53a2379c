"""What happens when things go wrong: malformed input, kills, and long streams."""
