"""What is known of one step of two mask heads."""

from __future__ import annotations

from functools import cached_property

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
        self.student, self.teacher, self.taps = student, teacher, taps
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
        return self._of_class(self.student.head, self.student_call['mask_preds'])

    @cached_property
    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        """The teacher's mask logits for the assigned classes, ``(P, 1, h, w)``, at its own size."""
        masks = self.teacher.run(self.teacher_call, in_images(self.rois, self.count))['mask_preds']
        return self._of_class(self.teacher.head, masks)

    def _of_class(self, head: nn.Module, masks: Tensor) -> Tensor:
        results = self.student_call['sampling_results']
        classes = torch.cat([result.pos_gt_labels for result in results])
        if head.class_agnostic:
            classes = torch.zeros_like(classes)
        return masks[torch.arange(len(masks), device=masks.device), classes].unsqueeze(1)
