"""Weights in fewer bits: one file for each scheme, each a different linear layer."""
