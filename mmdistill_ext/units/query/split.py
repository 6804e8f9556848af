"""The split of the own loss of a head with queries into simple and hard ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.units.boxes import overlaps
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.query.family import padded
from mmdistill_ext.units.query.step import QueryStep, pick
from mmdistill_ext.units.split.correctness import correct_images, correct_units, seen_units
from mmdistill_ext.units.split.head_split import HeadSplit


class QuerySplit(HeadSplit):
    """Splits the losses on queries, by objects or by images (FIT-3, FIT-4).

    The query for an object is as simple as the teacher's query for it; split by unit, queries
    without an object are simple.
    """

    step: QueryStep

    @property
    def valid(self) -> Tensor:
        """Objects, ``(B, G)`` bool."""
        return self.step.objects.all_labels != IGNORED

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """What the teacher has right: objects ``(B, G)`` or images ``(B,)``, bool."""
        scores = full_precision(self.step.teacher.scores)
        scores = scores.sigmoid() if self.step.families[1].sigmoid else scores.softmax(-1)
        by_unit = self.rule.by == 'unit'
        return self._right_objects(scores) if by_unit else self._right_images(scores)

    def _right_objects(self, scores: Tensor) -> Tensor:
        step, classes = self.step, self.step.families[1].num_classes
        labels = step.objects.all_labels.where(step.teacher_queries >= 0, IGNORED)
        index = (labels != IGNORED).nonzero(as_tuple=True)
        boxes = pick(step.teacher.boxes, step.teacher_queries)[index]
        ious = overlaps(boxes, step.objects.all_targets[index])
        scores = pick(scores, step.teacher_queries)
        right = correct_units(scores, labels, classes, index, ious, self.rule.iou, self.rule.score)
        return right & (labels != IGNORED)

    def _right_images(self, scores: Tensor) -> Tensor:
        step, classes = self.step, self.step.families[1].num_classes
        matches = step.teacher.objects
        valid = padded([torch.ones_like(match, dtype=torch.bool) for match in matches])
        boxes = step.teacher.boxes
        scores = scores[..., :classes]
        seen = seen_units(scores, valid, lambda image, at, _: boxes[image, at], self.rule.score)
        return correct_images(seen, step.objects.truth, self.rule.iou)

    def tell_rows(self) -> AbstractContextManager:
        """Tell the head's loss modules which queries are simple, in the order of their rows."""
        step = self.step
        return step.families[0].tell_rows(
            self.head, self.loss, step.taps, self.images, self._simple_rows
        )

    def _simple_rows(self, matches: Sequence[Tensor]) -> list[Tensor]:
        """Simple queries of each image ``(Q_i,)``, bool, by the objects of the queries."""
        rows = []
        for image, objects in enumerate(matches):
            if self.rule.by == 'image':
                rows.append(self.right[image].expand(len(objects)))
            else:
                rows.append(torch.cat((self.right.new_ones(1), self.right[image]))[objects])
        return rows
