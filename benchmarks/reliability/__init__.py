"""Behaviour under malformed input, kills and long requests."""
