"""Registered hooks: what a run checks, counts and shows besides training."""

from mmdistill_ext.hooks.box_comparison_hook import BoxComparisonHook
from mmdistill_ext.hooks.collaboration_hook import CollaborationHook
from mmdistill_ext.hooks.contrast_mask_hook import ContrastMaskHook
from mmdistill_ext.hooks.fit_hook import FitHook
from mmdistill_ext.hooks.skip_non_finite_hook import SkipNonFiniteHook
from mmdistill_ext.hooks.start_check_hook import StartCheckHook
from mmdistill_ext.hooks.teacher_share_hook import TeacherShareHook
from mmdistill_ext.hooks.validation_check_hook import ValidationCheckHook

__all__ = [
    'BoxComparisonHook',
    'CollaborationHook',
    'ContrastMaskHook',
    'FitHook',
    'SkipNonFiniteHook',
    'StartCheckHook',
    'TeacherShareHook',
    'ValidationCheckHook',
]
