"""The split of a box head's own loss into simple and hard RoIs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.units.boxes import overlaps
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.roi.step import RoIStep
from mmdistill_ext.units.split.correctness import correct_images, correct_units
from mmdistill_ext.units.split.head_split import HeadSplit


class RoISplit(HeadSplit):
    """Splits the loss by RoIs, or by images (FIT-3, FIT-4).

    RoIs are the student's, among them the labels' own boxes. Images are judged by what the teacher
    detects in them by itself.
    """

    step: RoIStep

    @contextmanager
    def tell_rows(self) -> Iterator[None]:
        """Classes have a row for every RoI, boxes for the positive ones."""
        self.loss.row_mask = self._row_mask
        yield

    def _row_mask(self, name: str) -> Tensor | None:
        step = self.step
        if not step.has_targets:
            return None
        every = torch.arange(len(step.flat_labels), device=step.flat_labels.device)
        flat = self.simple[step.place(every)]
        return flat if name in step.student.reader.all_rows else flat[step.positive]

    @property
    def valid(self) -> Tensor:
        """Units that the head's loss counts, ``(B, N)`` bool."""
        return self.step.labels != IGNORED

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """What the teacher has right: units ``(B, N)`` or images ``(B,)``, bool."""
        step, rule = self.step, self.rule
        if rule.by == 'image':
            samples = step.samples[: step.images]
            seen = step.teacher.detect(step.teacher_call, samples, rule.score)
            looks = len(step.samples) // step.images
            return correct_images(seen * looks, step.truth, rule.iou)
        count = step.student.head.num_classes
        scores = full_precision(step.teacher_logits).softmax(1).transpose(1, 2)
        ious = overlaps(step.teacher_boxes, step.target_boxes)
        right = correct_units(scores, step.labels, count, step.index, ious, rule.iou, rule.score)
        return right & self.valid
