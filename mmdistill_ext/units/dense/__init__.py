"""Anchors and points of single-stage detectors."""
