"""What one prediction is, whatever the head: the common currency between models and losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TaskLoss:
    """The head's own cross-entropy, to be formed in the same pass as the distillation.

    Mirrors mmseg's ``CrossEntropyLoss(use_sigmoid=False)`` with ``reduction='mean'``.
    """

    name: str = 'loss_ce'
    loss_weight: float = 1.0
    class_weight: tuple[float, ...] | None = None
    avg_non_ignore: bool = False


@dataclass(frozen=True)
class Split:
    """How the losses are split into simple and hard samples, and what the hard ones weigh (FIT).

    Args:
        by: ``'unit'`` or ``'image'``.
        threshold: Share of units in (0, 1] that the teacher gets right in a simple image.
        hard_weight: ``F(x)``, >= 0.
    """

    by: str
    threshold: float
    hard_weight: float


@dataclass(frozen=True)
class Units:
    """Predictions of student and teacher for the same units, with their labels.

    Args:
        student: Logits of the student, ``(B, C, ...)``. Two spatial dimensions may be coarser
            than the labels': they are upsampled bilinearly, block by block, where they are used.
        teacher: Logits of the teacher, ``(B, C, ...)``, at any stride of its own, no gradient.
        labels: Class indices, ``(B, ...)``, int64 in ``[0, C)`` or ``ignore_index``.
        ignore_index: Label of units that are not valid.
        sigmoid: The head predicts independent sigmoids instead of one softmax.
        student_align_corners: ``align_corners`` of the student's head.
        teacher_align_corners: ``align_corners`` of the teacher's head.
        classes: Names of the classes, for logs and pictures.
        task: Set when the loss is to form the head's own cross-entropy in the same pass.
        split: Set when both are to be split into simple and hard samples.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    ignore_index: int = 255
    sigmoid: bool = False
    student_align_corners: bool = False
    teacher_align_corners: bool = False
    classes: tuple[str, ...] = ()
    task: TaskLoss | None = None
    split: Split | None = None
