"""Losses of a detector's boxes."""
