"""Experts larger than memory: packed records in a file, the hot ones resident in an arena of fixed size."""
