"""Logits read, compared and differentiated block by block."""
