"""Which units are distilled, and with which weight (SEL-3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.values import Labels
from mmdistill_ext.functional.checks import check_choice

__all__ = ['SELECTIONS', 'All', 'Block', 'Selection', 'TeacherBetter', 'find_selection']


class Block(NamedTuple):
    """What a selection sees of one block of units, all without gradient."""

    student_difference: Tensor  # (1, n)
    teacher_difference: Tensor  # (1, n)
    wins: Tensor  # (1, n) bool, the teacher's difference is smaller
    teacher: Tensor  # (1, C, n) logits
    labels: Labels  # (1, n)


class Selection(ABC):
    """Chooses the units that are distilled, and the boxes of a detector."""

    name: ClassVar[str]
    """What errors call it."""
    compares_boxes: ClassVar[bool] = False
    """:meth:`boxes` looks at the IoUs, or at ``wins``."""

    @abstractmethod
    def __call__(self, block: Block) -> Tensor:
        """Weight of each unit of a block.

        Args:
            block: Units of both models; ignored ones never count, whatever their weight.

        Returns:
            ``(1, n)``, bool or >= 0.
        """

    @abstractmethod
    def boxes(self, student_iou: Tensor, teacher_iou: Tensor, wins: Tensor | None = None) -> Tensor:
        """Which boxes of ``P`` positive units are distilled.

        Args:
            student_iou: ``(P,)``, IoU of the student's boxes with the assigned ones; anything
                unless :attr:`compares_boxes`.
            teacher_iou: ``(P,)``, that of the teacher's.
            wins: ``(P,)`` bool, the teacher wins these units, where class and box are selected
                together; else None.

        Returns:
            ``(P,)`` bool.
        """


class TeacherBetter(Selection):
    """Where the teacher's difference from the label is the smaller one."""

    name = 'teacher_better'
    compares_boxes = True

    def __call__(self, block: Block) -> Tensor:
        """Units that the teacher wins."""
        return block.wins

    def boxes(self, student_iou: Tensor, teacher_iou: Tensor, wins: Tensor | None = None) -> Tensor:
        """Boxes with the larger IoU, so the smaller 1 - IoU; or ``wins``."""
        return teacher_iou > student_iou if wins is None else wins


class All(Selection):
    """Every unit that is not ignored, and every box."""

    name = 'all'

    def __call__(self, block: Block) -> Tensor:
        """All units."""
        return block.labels.valid

    def boxes(self, student_iou: Tensor, teacher_iou: Tensor, wins: Tensor | None = None) -> Tensor:
        """All boxes."""
        return torch.ones_like(student_iou, dtype=torch.bool)


SELECTIONS: dict[str, Selection] = {x.name: x for x in (TeacherBetter(), All())}


def find_selection(name: str) -> Selection:
    """The selection of that name.

    Raises:
        ValueError: There is none.
    """
    check_choice('selection', name, tuple(SELECTIONS))
    return SELECTIONS[name]
