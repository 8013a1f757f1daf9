"""Chips, links and clusters as data files, each figure with its source. Torch-free."""
