"""The split of a single-stage head's own loss into simple and hard units."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor

from mmdistill_ext.units.boxes import overlaps
from mmdistill_ext.units.dense.step import DenseStep
from mmdistill_ext.units.split.correctness import correct_images, correct_units, seen_units
from mmdistill_ext.units.split.head_split import HeadSplit


class DenseSplit(HeadSplit):
    """Splits the loss by anchors or points, or by images (FIT-3, FIT-4)."""

    step: DenseStep

    def tell_rows(self) -> AbstractContextManager:
        """Tell the head's loss modules which units are simple, in the order of their rows."""
        family = type(self.step.student.family)(self.head)
        return family.tell_rows(self.loss, lambda: self.levels)

    @property
    def valid(self) -> Tensor:
        """Units that the head's loss counts, ``(B, N)`` bool."""
        return self.step.targets.assigned.valid

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """What the teacher has right: units ``(B, N)`` or images ``(B,)``, bool."""
        teacher, targets = self.step.teacher, self.step.targets
        classes = self.step.student.family.num_classes
        labels, limits = targets.assigned.labels, (self.rule.iou, self.rule.score)
        if self.rule.by == 'unit':
            ious = overlaps(self.step.teacher_boxes, targets.boxes)
            right = correct_units(teacher.confidence, labels, classes, targets.index, ious, *limits)
            has_label = targets.assigned.classified | (labels == classes)
            return right & self.valid & has_label

        def boxes_of(image: int, units: Tensor, classes: Tensor) -> Tensor:
            return teacher.decode(torch.full_like(units, image), units)

        scores = teacher.confidence[..., :classes]
        seen = seen_units(scores, self.valid, boxes_of, self.rule.score)
        return correct_images(seen, self.step.truth, self.rule.iou)

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor]]:
        """Simple and positive units ``(B, n)`` of each of the student's levels.

        Units of levels that the teacher lacks are as simple as their image; split by unit, they
        are simple.
        """
        student = self.step.student
        counts = student.all_levels.sizes
        labels = self.step.targets.all_assigned.labels
        positive = (labels < student.family.num_classes).split(counts, 1)
        if self.rule.by == 'image':
            return [(self.right[:, None].expand(x.shape), x) for x in positive]
        parts = self.simple.split([counts[place] for place in student.places], 1)
        common = dict(zip(student.places, parts, strict=True))
        return [(common.get(i, torch.ones_like(x)), x) for i, x in enumerate(positive)]
