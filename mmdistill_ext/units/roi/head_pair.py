"""What pairs of box heads and pairs of mask heads have in common."""

from __future__ import annotations

from typing import ClassVar

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.detector_pair import DetectorPair
from mmdistill_ext.units.roi.head import TRAINS, RoIHead
from mmdistill_ext.units.roi.mask_step import MaskStep
from mmdistill_ext.units.roi.step import RoIStep


class RoIHeadPair(DetectorPair):
    """What pairs of box heads and pairs of mask heads share.

    Args:
        student: The student, an mmdet two-stage detector.
        teacher: The teacher.
        head: Path of the student's head.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    head_type: ClassVar[type[nn.Module]]
    """Class of the heads."""
    losses_at: ClassVar[str]
    """Key of the losses in what ``loss_and_target`` returns."""
    step_class: ClassVar[type[RoIStep] | type[MaskStep]]
    """What is known of a step, with ``(student, teacher, taps, teacher_call, data_samples)``."""
    teacher_tap = 'extract_feat'

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = RoIHead(student, head, self.head_type, f'{key}.head', TRAINS)
        self.teacher = RoIHead(teacher, teacher_head, self.head_type, f'{key}.teacher_head')
        self.head = self.student.head
        if not self.student.roi_head.bbox_assigner:
            raise ValueError(
                f"The student's RoI head should have an assigner (`{key}`): its config needs "
                '`train_cfg`. Found none.'
            )
        own, other = self.head.num_classes, self.teacher.head.num_classes
        if own != other:
            raise ValueError(
                f'Student and teacher should have the same `num_classes` (`{key}`). Found {own} in '
                f"the student's '{head}', {other} in the teacher's '{teacher_head}'."
            )
        self.heads = head, teacher_head
        self.student_tap = self.student.loss_tap
        self.student_taps = (self.student_tap, self.student.targets_tap)
        self.prefix = head.removeprefix('roi_head.').replace('_head', '').replace('.', '_')

    def step(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]
    ) -> RoIStep | MaskStep:
        """What is known of one step; the student's calls may be recorded later."""
        return self.step_class(self.student, self.teacher, taps, teacher_call, data_samples)

    @property
    def label_kinds(self) -> str:
        """Boxes, and masks where the student has a mask head: its losses are formed in one go."""
        return 'boxes and masks' if self.student.roi_head.with_mask else 'boxes'

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the boxes and masks that :meth:`gt_loss` needs."""
        instances = sample['data_samples'].get('gt_instances', {})
        masks = 'masks' in instances or not self.student.roi_head.with_mask
        return masks and super().has_labels(sample)

    def own_losses(self, call: Call) -> dict[str, Tensor]:
        """The head's own losses by name, times the weight of its stage."""
        losses = call.output[self.losses_at].items()
        return {name: self.student.loss_weight * x for name, x in losses if 'loss' in name}
