"""Registered transforms for the pipelines of data sets."""

from mmdistill_ext.transforms.make_views import MakeViews

__all__ = ['MakeViews']
