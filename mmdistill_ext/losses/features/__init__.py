"""Losses of features that were tapped in both models."""
