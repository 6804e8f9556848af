"""Registered losses: shells around :mod:`mmdistill_ext.functional`."""

from mmdistill_ext.losses.features.cwd_loss import CWDLoss
from mmdistill_ext.losses.features.feature_loss import FeatureLoss
from mmdistill_ext.losses.logits.dkd_loss import DKDLoss
from mmdistill_ext.losses.logits.kd_loss import KDLoss
from mmdistill_ext.losses.logits.selective_loss import SelectiveLoss

__all__ = ['CWDLoss', 'DKDLoss', 'FeatureLoss', 'KDLoss', 'SelectiveLoss']
