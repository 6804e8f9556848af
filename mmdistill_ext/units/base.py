"""What one prediction is, whatever the head: the common currency between models and losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class Level(NamedTuple):
    """One level of a detector's units."""

    height: int
    width: int
    priors: int  # per location
    stride: int


@dataclass(frozen=True)
class Boxes:
    """The boxes of a detector's units, decoded: ``(x1, y1, x2, y2)`` in pixels of the input.

    Args:
        student: ``(B, N, 4)``, with gradient.
        teacher: ``(B, N, 4)``.
        target: ``(B, N, 4)``, the assigned boxes; without meaning where there is none.
        positive: ``(B, N)`` bool, where a box is assigned.
        scale: ``(N,)``, stride of each unit, in pixels.
        levels: Where the units lie: levels one after the other, within a level rows, columns,
            priors.
        student_distribution: ``(B, N, 4, n)``, logits over the distances of the four sides, of
            heads that predict them; else None.
        teacher_distribution: The same of the teacher.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    positive: Tensor
    scale: Tensor
    levels: tuple[Level, ...] = ()
    student_distribution: Tensor | None = None
    teacher_distribution: Tensor | None = None


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
        background: Sigmoid heads: labels go from 0 to C, which is background.
        boxes: The units' boxes; None where there are none.
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
    background: bool = False
    boxes: Boxes | None = None


class Contrast(NamedTuple):
    """Who won which unit in one step (SEL-3)."""

    wins: Tensor  # (B, ...) bool, the teacher
    valid: Tensor  # (B, ...) bool
    levels: tuple[Level, ...] = ()

    def maps(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Wins and validity as images ``(B, H, W)``.

        Units of an image are one map of its size. Those of a detector are one map per level, each
        location as large as its stride; there the teacher wins where it wins most of the valid
        priors.
        """
        if not self.levels:
            return {'': (self.wins, self.valid)}
        sizes = [level.height * level.width * level.priors for level in self.levels]
        maps = {}
        parts = zip(self.levels, self.wins.split(sizes, 1), self.valid.split(sizes, 1), strict=True)
        for level, wins, valid in parts:
            shape = (len(wins), level.height, level.width, level.priors)
            won, known = wins.view(shape).sum(-1), valid.view(shape).sum(-1)
            maps[f'_stride{level.stride}'] = tuple(
                x.repeat_interleave(level.stride, 1).repeat_interleave(level.stride, 2)
                for x in (2 * won > known, known > 0)
            )
        return maps
