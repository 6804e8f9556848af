"""What is known of one step of two mask heads."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.roi.head import RoIHead
from mmdistill_ext.units.roi.step import in_images


class MaskStep:
    """One step of two mask heads on ``P`` positive RoIs, each part worked out when asked for.

    Args:
        student: The student's head.
        teacher: The teacher's head.
        taps: Calls of the student's head.
        teacher_call: Call of the teacher's ``extract_feat``.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: RoIHead,
        teacher: RoIHead,
        taps: Taps,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        self.student: Any = student
        self.teacher: Any = teacher
        self.taps = taps
        self.teacher_call, self.count = teacher_call, len(samples)
        self.samples = samples * student.family.looks

    @cached_property
    def student_call(self) -> dict:
        """Arguments of the student's ``loss_and_target``."""
        return self.taps[self.student.loss_tap].kwargs

    @cached_property
    def rois(self) -> Tensor:
        """Image and corners of each RoI, ``(P, 5)``."""
        results = self.student_call['sampling_results']
        return bbox2roi([get_box_tensor(result.pos_priors) for result in results])

    @cached_property
    def images(self) -> Tensor:
        """Image of each RoI, ``(P,)``."""
        return self.rois[:, 0].long()

    @cached_property
    def labels(self) -> Tensor:
        """1 inside of the assigned object, 0 outside, ``(P, h, w)``."""
        return self.taps[self.student.targets_tap].output.round().long()

    @property
    def student_logits(self) -> Tensor:
        """The student's mask logits for the assigned classes, ``(P, 1, h, w)``."""
        call = self.student_call
        return masks_of(self.student.head, call['mask_preds'], call['sampling_results'])

    @cached_property
    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        """The teacher's mask logits for the assigned classes, ``(P, 1, h, w)``, at its own size."""
        masks = self.teacher.run(self.teacher_call, in_images(self.rois, self.count))['mask_preds']
        return masks_of(self.teacher.head, masks, self.student_call['sampling_results'])


def masks_of(head: nn.Module, masks: Tensor, sampling_results: list) -> Tensor:
    """Masks of the assigned classes, ``(P, 1, h, w)``.

    Args:
        head: The head that predicted them.
        masks: ``(P, C, h, w)``.
        sampling_results: Of each image.
    """
    classes = torch.cat([result.pos_gt_labels for result in sampling_results])
    if head.class_agnostic:
        classes = torch.zeros_like(classes)
    return masks[torch.arange(len(masks), device=masks.device), classes].unsqueeze(1)
