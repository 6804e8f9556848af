"""Losses of features, one method per file."""
