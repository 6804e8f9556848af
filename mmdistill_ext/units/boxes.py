"""Boxes of a detector's positive units, and how they overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FARTHEST_TARGET = 1e5
"""Largest coordinate, in pixels, of a box that is distilled from: larger than any input. Heads that
exponentiate sizes (YOLOX, FCOS, RTMDet) predict larger ones now and then."""
FARTHEST = 1e9
"""Largest coordinate, in pixels, of a box that is trained: in float32 areas are finite up to it."""


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


def within(boxes: Tensor, farthest: float) -> Tensor:
    """Which boxes ``(..., 4)`` have no coordinate beyond ``farthest`` pixels; NaN is beyond."""
    return (boxes.detach().abs() <= farthest).all(-1)


def overlaps(first: Tensor, second: Tensor, mode: str = 'iou') -> Tensor:
    """IoU or GIoU of each box with its counterpart, ``(P, 4)`` twice -> ``(P,)``, in float32.

    A box beyond :data:`FARTHEST`, or NaN, overlaps nothing: its IoU is 0, its GIoU -1, its gradient
    0.
    """
    from mmdet.structures.bbox import bbox_overlaps

    first, second = first.float(), second.float()
    usable = within(first, FARTHEST) & within(second, FARTHEST)
    # Made equal and finite before they are compared: a gradient of 0 times infinity is NaN.
    first, second = (x.where(usable.unsqueeze(-1), 0) for x in (first, second))
    found = bbox_overlaps(first, second, mode=mode, is_aligned=True)
    return found.where(usable, 0 if mode == 'iou' else -1)


def decode_safely(decode: Callable[[Tensor], Tensor], predicted: Tensor) -> Tensor:
    """Decode predictions ``(P, n)`` into boxes ``(P, 4)``; what overflows gets no gradient.

    The derivative of an exponential that overflows is infinite, and NaN even after its box has
    been left out of a loss: 0 times infinity.
    """
    boxes = decode(predicted)
    if predicted.requires_grad:
        usable = within(boxes, FARTHEST).unsqueeze(-1)
        predicted.register_hook(lambda gradient: gradient.where(usable, 0))
    return boxes


@torch.no_grad()
def box_ious(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """IoU of the student's and of the teacher's boxes with the assigned boxes, two of ``(P,)``.

    A teacher's box that is not distilled from (:data:`FARTHEST_TARGET`) overlaps nothing.
    """
    student, teacher = (overlaps(x, boxes.target) for x in (boxes.student, boxes.teacher))
    return student, teacher.where(within(boxes.teacher, FARTHEST_TARGET), 0)
