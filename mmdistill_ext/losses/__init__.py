"""Registered losses: shells around :mod:`mmdistill_ext.functional`."""

from mmdistill_ext.losses.kd_loss import KDLoss
from mmdistill_ext.losses.selective_loss import SelectiveLoss

__all__ = ['KDLoss', 'SelectiveLoss']
