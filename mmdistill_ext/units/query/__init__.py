"""Queries of DETRs."""
