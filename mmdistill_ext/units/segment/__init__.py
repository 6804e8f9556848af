"""Queries of MaskFormers, each with a class and a mask."""
