"""Tracking: what is sent to Weights & Biases once a cell has ended."""
