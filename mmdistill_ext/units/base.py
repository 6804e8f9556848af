"""What one prediction is, whatever the head: the common currency between models and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.units.boxes import Boxes

Painter = Callable[[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]
"""Wins and validity of units -> suffix of a name -> maps ``(B, H, W)`` of both."""


@dataclass(frozen=True)
class FusedCrossEntropy:
    """The head's own cross-entropy, to be formed in the same pass as the distillation.

    Mirrors mmseg's ``CrossEntropyLoss(use_sigmoid=False)`` with ``reduction='mean'``.
    """

    name: str = 'loss_ce'
    loss_weight: float = 1.0
    class_weight: tuple[float, ...] | None = None
    avg_non_ignore: bool = False


@dataclass(frozen=True)
class SplitRule:
    """How the losses are split into simple and hard samples, and what the hard ones weigh (FIT).

    Args:
        by: ``'unit'`` or ``'image'``.
        threshold: Share of units in (0, 1] that the teacher gets right in a simple image.
        hard_weight: ``F(x)``, >= 0.
        iou: Detectors: overlap from which on the teacher's box is right.
        score: Detectors: score above which the teacher sees an object.
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
        samples: ``(2,)``, number of simple samples and of all.
        parts: ``(2,)``, the own loss of the simple and of the hard units, before ``F(x)``.
        images: Number of images that the own loss is of.
    """

    samples: Tensor
    parts: Tensor
    images: int

    @property
    def sums(self) -> Tensor:
        """``(2,)``: the own loss times the images, and their number (FIT-2)."""
        total = self.parts.sum() * self.images
        return torch.stack((total, torch.full_like(total, self.images)))


@dataclass(frozen=True)
class Units:
    """Predictions of student and teacher for the same units, with their labels.

    Args:
        student: Logits of the student, ``(B, C, ...)``. Two spatial dimensions may be coarser
            than the labels': they are upsampled bilinearly, block by block, where they are used.
            Of a single-stage detector the levels, ``(B, A, C, n)`` each, with labels ``(B, N)``.
        teacher: Logits of the teacher, the same, at any stride of its own, no gradient.
        labels: Class indices, ``(B, ...)``, int64 in ``[0, C)`` or ``ignore_index``.
        ignore_index: Label of units that are not valid.
        sigmoid: The head predicts independent sigmoids instead of one softmax.
        student_align_corners: ``align_corners`` of the student's head.
        teacher_align_corners: ``align_corners`` of the teacher's head.
        classes: Names of the classes, for logs and pictures.
        fused: Set when the loss is to form the head's own cross-entropy in the same pass.
        split: Set when both are to be split into simple and hard samples.
        background: Sigmoid heads: labels go from 0 to C, which is background.
        boxes: Boxes of the positive units; None where there are none.
        simple: ``(B, ...)`` bool, with ``split``: the simple units, of heads that know them.
        own: Set when the head formed its own loss in two parts.
        paint: How wins and validity of the units become maps (see :class:`Contrast`).
    """

    student: Tensor | tuple[Tensor, ...]
    teacher: Tensor | tuple[Tensor, ...]
    labels: Tensor
    ignore_index: int = 255
    sigmoid: bool = False
    student_align_corners: bool = False
    teacher_align_corners: bool = False
    classes: tuple[str, ...] = ()
    fused: FusedCrossEntropy | None = None
    split: SplitRule | None = None
    background: bool = False
    boxes: Boxes | None = None
    simple: Tensor | None = None
    own: SplitResult | None = None
    paint: Painter | None = None


class Contrast(NamedTuple):
    """Who won which unit in one step (SEL-3)."""

    wins: Tensor  # (B, ...) bool, the teacher
    valid: Tensor  # (B, ...) bool
    paint: Painter | None = None

    def maps(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Wins and validity as images ``(B, H, W)``, by suffix of their names.

        Pixels are a map already; a detector's units are painted where they lie.
        """
        return self.paint(self.wins, self.valid) if self.paint else {'': (self.wins, self.valid)}
