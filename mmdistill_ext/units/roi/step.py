"""What is known of one step of two box heads."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.detector_pair import Truth, ground_truth
from mmdistill_ext.units.roi.heads import BoxHead
from mmdistill_ext.units.roi.sampled import SampledRoIs


class RoIStep(SampledRoIs):
    """One step of two box heads on the RoIs that the student sampled.

    Args:
        student: The student's head.
        teacher: The teacher's head.
        taps: Calls of the student's head.
        teacher_call: Call of the teacher's ``extract_feat``.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: BoxHead,
        teacher: BoxHead,
        taps: Taps,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        super().__init__(student, taps)
        self.teacher, self.teacher_call, self.images = teacher, teacher_call, len(samples)
        self.samples = samples * student.family.looks

    @cached_property
    def truth(self) -> list[Truth]:
        """Boxes, classes and ignored boxes of each image."""
        return ground_truth(self.samples)

    @cached_property
    @torch.no_grad()
    def teacher_outputs(self) -> dict[str, Any]:
        """The teacher's scores ``(n, ...)`` and box predictions for the student's RoIs."""
        return self.teacher.run(self.teacher_call, in_images(self.call.rois, self.images))

    @property
    def student_logits(self) -> Tensor:
        """The student's logits, ``(B, C + 1, N)``."""
        return self.logits(self.student, self.call.scores)

    @cached_property
    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        """The teacher's logits, ``(B, C + 1, N)``."""
        return self.logits(self.teacher, self.teacher_outputs['cls_score'])

    @property
    def student_boxes(self) -> Tensor:
        """The student's boxes of the positive RoIs, for their classes, ``(P, 4)``."""
        return self.decode(self.student, self.call.boxes)

    @cached_property
    @torch.no_grad()
    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes of the positive RoIs, for their classes, ``(P, 4)``."""
        return self.decode(self.teacher, self.teacher_outputs['bbox_pred'])


def in_images(rois: Tensor, images: int) -> Tensor:
    """RoIs ``(n, 5)`` of a student that sees ``images`` several times, in one look at them."""
    return torch.cat((rois[:, :1] % images, rois[:, 1:]), 1)
