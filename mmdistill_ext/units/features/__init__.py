"""Features of student and teacher: what is tapped in both, and how it is brought together."""

from mmdistill_ext.units.features.base import Features

__all__ = ['Features']
