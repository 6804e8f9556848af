"""Boxes of a detector's positive units, and how they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boxes:
    """Boxes of a detector's ``P`` positive units, ``(x1, y1, x2, y2)`` in pixels of the input.

    Args:
        index: Image and unit of each, two of ``(P,)``.
        student: ``(P, 4)``, with gradient.
        teacher: ``(P, 4)``.
        target: ``(P, 4)``, the assigned boxes.
        scale: ``(P,)``, in pixels, what differences are measured in: stride of the location, side
            of the RoI, size of the image.
        student_distribution: ``(P, 4, n)``, logits over the distances of the four sides, of heads
            that predict them; else None.
        teacher_distribution: The same of the teacher.
    """

    index: tuple[Tensor, Tensor]
    student: Tensor
    teacher: Tensor
    target: Tensor
    scale: Tensor
    student_distribution: Tensor | None = None
    teacher_distribution: Tensor | None = None


def overlaps(first: Tensor, second: Tensor, mode: str = 'iou') -> Tensor:
    """Aligned IoU or GIoU of boxes ``(P, 4)``, ``(P,)``, in float32."""
    from mmdet.structures.bbox import bbox_overlaps

    return bbox_overlaps(first.float(), second.float(), mode=mode, is_aligned=True)


@torch.no_grad()
def box_ious(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """IoU of the student's and the teacher's boxes with the assigned ones, two of ``(P,)``."""
    return tuple(overlaps(predicted, boxes.target) for predicted in (boxes.student, boxes.teacher))
