"""Distillation and robust training for MMDetection and MMSegmentation."""

from mmdistill_ext import compat  # noqa: F401  mends the stack, so it comes first
from mmdistill_ext import distillers, hooks, losses  # noqa: F401  register everything
from mmdistill_ext.version import __version__

__all__ = ['__version__']
