"""The block-wise pass over the units of two heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmdistill_ext.functional import (
    BlockwiseResult,
    CrossEntropy,
    Labels,
    Side,
    Split,
    blockwise_distillation,
)
from mmdistill_ext.functional.checks import given
from mmdistill_ext.units.base import Units

Ious = tuple[Tensor, Tensor]
"""Of the student's and of the teacher's boxes with the assigned ones, ``(P,)`` each."""


def distil_units(units: Units, ious: Ious | None = None, **options: Any) -> BlockwiseResult:
    """Distil units, form the head's own loss if it is fused, and split both if they are to be.

    Args:
        units: Predictions of both models, with labels.
        ious: Add 1 - IoU to the differences of the positive units.
        options: What is compared and distilled, as
            :func:`~mmdistill_ext.functional.blockwise_distillation` takes it.
    """
    student_extra, teacher_extra = _extras(units, ious)
    own = split = None
    if units.fused is not None:
        own = CrossEntropy(_as_tensor(units.fused.class_weight))
    if units.split is not None:
        rule = units.split
        split = Split(rule.by, rule.threshold, rule.hard_weight, units.simple)
    return blockwise_distillation(
        Side(units.student, units.student_align_corners, student_extra),
        Side(units.teacher, units.teacher_align_corners, teacher_extra),
        Labels(units.labels, units.ignore_index, units.background),
        own=own,
        split=split,
        **options,
    )


def _extras(units: Units, ious: Ious | None) -> tuple[Tensor | None, Tensor | None]:
    if ious is None:
        return None, None
    zeros = torch.zeros_like(units.labels, dtype=torch.float32)
    index = given(units.boxes, 'boxes').index
    student, teacher = (zeros.index_put(index, 1 - iou) for iou in ious)
    return student, teacher


def _as_tensor(class_weight: Sequence[float] | None) -> Tensor | None:
    return None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
