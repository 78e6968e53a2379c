"""Atoms and tensors: batches, sets of molecules, structures and other files on disk."""
