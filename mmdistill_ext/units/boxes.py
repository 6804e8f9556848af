"""Boxes of a detector's positive units, and how they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """Boxes of a detector's ``P`` positive units, ``(x1, y1, x2, y2)`` in pixels of the input.

    Args:
        index: Image and unit of each box, two of ``(P,)``; none for boxes on their own.
        student: Boxes that the student predicts, ``(P, 4)``, with gradient.
        teacher: Boxes that the teacher predicts, ``(P, 4)``, without gradient.
        target: Assigned boxes, ``(P, 4)``.
        scale: Unit of length for differences, ``(P,)``, in pixels: stride of the location, side of
            the RoI, size of the image.
        student_distribution: The student's logits over the distances of the four sides,
            ``(P, 4, n)``; None for heads that predict no distribution.
        teacher_distribution: The teacher's logits over the distances of the four sides,
            ``(P, 4, n)``; None for heads that predict no distribution.
    """

    index: tuple[Tensor, ...]
    student: Tensor
    teacher: Tensor
    target: Tensor
    scale: Tensor
    student_distribution: Tensor | None = None
    teacher_distribution: Tensor | None = None


def overlaps(first: Tensor, second: Tensor, mode: str = 'iou') -> Tensor:
    """IoU or GIoU of each box with its counterpart, ``(P, 4)`` twice -> ``(P,)``, in float32."""
    from mmdet.structures.bbox import bbox_overlaps

    return bbox_overlaps(first.float(), second.float(), mode=mode, is_aligned=True)


@torch.no_grad()
def box_ious(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """IoU of the student's and of the teacher's boxes with the assigned boxes, two of ``(P,)``."""
    student, teacher = (overlaps(x, boxes.target) for x in (boxes.student, boxes.teacher))
    return student, teacher
