"""What one prediction is, whatever the head: what pairs build and losses take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.units.boxes import Boxes

Painter = Callable[[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]
"""Takes which units the teacher wins and which are valid; gives suffix of a file name -> both as
maps ``(B, H, W)``."""


@dataclass(frozen=True)
class FusedCrossEntropy:
    """The head's own loss, to be formed in the same pass as the distillation.

    It is mmseg's ``CrossEntropyLoss(use_sigmoid=False)`` with ``reduction='mean'``.

    Args:
        name: What the head calls the loss in the log.
        loss_weight: Factor of the loss.
        class_weight: Weight of each class; None for 1.
        avg_non_ignore: The mean is over pixels that are not ignored, instead of all.
    """

    name: str = 'loss_ce'
    loss_weight: float = 1.0
    class_weight: tuple[float, ...] | None = None
    avg_non_ignore: bool = False


@dataclass(frozen=True)
class SplitRule:
    """How losses are split into simple and hard samples, and what the hard ones weigh (FIT-3).

    Args:
        by: What a sample is, ``'unit'`` or ``'image'``.
        threshold: An image is simple when the teacher gets this share of its units right, (0, 1].
        hard_weight: ``F(x)``, >= 0, the factor of hard samples (FIT-5).
        iou: Detectors: IoU with the assigned box from which on the teacher's box is right, (0, 1].
        score: Detectors: score above which the teacher sees an object, [0, 1).
    """

    by: str
    threshold: float
    hard_weight: float
    iou: float = 0.5
    score: float = 0.3


@dataclass(frozen=True)
class SplitResult:
    """How the own loss of a head was split, where the head formed it itself (FIT-4).

    Args:
        samples: ``(2,)``, number of simple samples and of all samples.
        parts: ``(2,)``, own loss of the simple and of the hard samples, before ``F(x)``.
        images: Number of images in the batch.
    """

    samples: Tensor
    parts: Tensor
    images: int

    @property
    def sums(self) -> Tensor:
        """``(2,)``: the own loss times the number of images, and that number (FIT-2)."""
        total = self.parts.sum() * self.images
        return torch.stack((total, torch.full_like(total, self.images)))


@dataclass(frozen=True)
class Units:
    """Predictions of student and teacher for the same units, with their labels.

    Args:
        student: Logits of the student, ``(B, C, ...)``. Two spatial dimensions may be coarser
            than the labels': they are upsampled bilinearly, block by block, where they are used.
            For a single-stage detector the levels, ``(B, A, C, n)`` each, with labels ``(B, N)``.
        teacher: Logits of the teacher, in the same form, at any stride, without gradient.
        labels: Class indices, ``(B, ...)``, int64 in ``[0, C)`` or ``ignore_index``.
        ignore_index: Label of units that are ignored.
        sigmoid: The head predicts independent sigmoids instead of one softmax.
        student_align_corners: ``align_corners`` of the student's head.
        teacher_align_corners: ``align_corners`` of the teacher's head.
        fused: The head's own loss, when the loss is to form it in the same pass; else None.
        split: How losses are split into simple and hard samples; None for not at all.
        background: Labels of sigmoid heads go from 0 to C, and C is background.
        boxes: Boxes of the positive units; None for heads without boxes.
        simple: ``(B, ...)`` bool, the simple units, of heads that split their own loss; None where
            the loss finds them itself.
        own: What the split of the head's own loss gave, of heads that split it; else None.
        paint: Turns wins and validity of the units into maps; None where units are pixels.
    """

    student: Tensor | tuple[Tensor, ...]
    teacher: Tensor | tuple[Tensor, ...]
    labels: Tensor
    ignore_index: int = 255
    sigmoid: bool = False
    student_align_corners: bool = False
    teacher_align_corners: bool = False
    fused: FusedCrossEntropy | None = None
    split: SplitRule | None = None
    background: bool = False
    boxes: Boxes | None = None
    simple: Tensor | None = None
    own: SplitResult | None = None
    paint: Painter | None = None


class Contrast(NamedTuple):
    """Where the teacher beat the student in one step (SEL-3)."""

    wins: Tensor  # (B, ...) bool, the teacher beats the student
    valid: Tensor  # (B, ...) bool, the unit is not ignored
    paint: Painter | None = None

    def maps(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Wins and validity as maps ``(B, H, W)``, by suffix of a file name (SEL-4).

        Pixels are a map already; a detector's units are painted where they lie.
        """
        return self.paint(self.wins, self.valid) if self.paint else {'': (self.wins, self.valid)}
