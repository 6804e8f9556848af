"""Losses of units: shells around the block-wise pass."""
