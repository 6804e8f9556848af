"""Losses of logits, one method per file."""
