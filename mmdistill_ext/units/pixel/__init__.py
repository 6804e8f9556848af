"""Pixels of segmenters."""
