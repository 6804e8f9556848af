"""Distillation and robust training for MMDetection and MMSegmentation."""

from mmdistill_ext import (  # noqa: F401  register everything
    compat,
    config_access,
    connectors,
    distillers,
    evaluation,
    hooks,
    losses,
    optim,
    policies,
    transforms,
)
from mmdistill_ext.version import __version__

__all__ = ['__version__']
