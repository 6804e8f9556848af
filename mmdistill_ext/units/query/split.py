"""The split of a DETR's own loss into simple and hard queries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import wrapped
from mmdistill_ext.units.boxes import overlaps
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.query.step import QueryStep
from mmdistill_ext.units.split.correctness import correct_images, correct_units, seen_units
from mmdistill_ext.units.split.head_split import HeadSplit


class QuerySplit(HeadSplit):
    """Splits the losses of all decoder layers, by objects or by images (FIT-3, FIT-4).

    The query for an object is as simple as the teacher's query for it; split by unit, queries
    without an object are simple. The losses of DINO's denoising queries are not split.
    """

    step: QueryStep

    @property
    def valid(self) -> Tensor:
        """Objects, ``(B, G)`` bool."""
        return self.step.all_labels != IGNORED

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """What the teacher has right: objects ``(B, G)`` or images ``(B,)``, bool."""
        head = self.step.teacher_head
        scores = full_precision(self.step.teacher_layer[0])
        scores = scores.sigmoid() if head.loss_cls.use_sigmoid else scores.softmax(-1)
        by_unit = self.rule.by == 'unit'
        return self._right_objects(scores) if by_unit else self._right_images(scores)

    def _right_objects(self, scores: Tensor) -> Tensor:
        step, classes = self.step, self.step.teacher_head.num_classes
        labels = step.all_labels.where(step.teacher_queries >= 0, IGNORED)
        index = (labels != IGNORED).nonzero(as_tuple=True)
        boxes = step.in_pixels(step.pick(step.teacher_layer[1], step.teacher_queries))[index]
        ious = overlaps(boxes, step.all_targets[index])
        scores = step.pick(scores, step.teacher_queries)
        right = correct_units(scores, labels, classes, index, ious, self.rule.iou, self.rule.score)
        return right & (labels != IGNORED)

    def _right_images(self, scores: Tensor) -> Tensor:
        step, classes = self.step, self.step.teacher_head.num_classes
        boxes = step.in_pixels(step.teacher_layer[1])
        scores = scores[..., :classes]
        every = torch.ones_like(scores[..., 0], dtype=torch.bool)
        seen = seen_units(scores, every, lambda image, at, _: boxes[image, at], self.rule.score)
        return correct_images(seen, step.truth, self.rule.iou)

    def tell_rows(self) -> AbstractContextManager:
        """Within the loss of a layer, each module has a row for every query."""
        return wrapped(self.head, 'loss_by_feat_single', self._tell_layer)

    def _tell_layer(self, single: Callable) -> Callable:
        def split_layer(*args: Any, **kwargs: Any) -> Any:
            self.loss.row_mask = lambda name: self._row_mask()
            try:
                return single(*args, **kwargs)
            finally:
                self.loss.row_mask = lambda name: None

        return split_layer

    def _row_mask(self) -> Tensor:
        """Simple queries of the layer that was matched last, ``(B * Q,)``."""
        step, rows = self.step, []
        calls = step.taps.all(step.paths.match)[-len(step.samples) :]
        for image, call in enumerate(calls):
            objects = call.output.gt_inds
            if self.rule.by == 'image':
                rows.append(self.right[image].expand(len(objects)))
            else:
                rows.append(torch.cat((self.right.new_ones(1), self.right[image]))[objects])
        return torch.cat(rows)
