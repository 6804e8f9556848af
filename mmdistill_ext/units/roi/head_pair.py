"""What pairs of box heads and pairs of mask heads have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy
from mmdistill_ext.units.detector_pair import DetectorPair
from mmdistill_ext.units.roi.head import RoIHead, same_stage
from mmdistill_ext.units.roi.mask_step import MaskStep
from mmdistill_ext.units.roi.step import RoIStep
from mmdistill_ext.units.split.own_loss import loss_modules


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

    head_class: ClassVar[type[RoIHead]]
    """What reads the heads."""
    losses_at: ClassVar[str]
    """Key of the losses in what the method at :attr:`student_tap` returns."""
    step_class: ClassVar[type[RoIStep] | type[MaskStep]]
    """What is known of a step, with ``(student, teacher, taps, teacher_call, data_samples)``."""
    teacher_tap = 'extract_feat'

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student: Any = self.head_class(student, head, f'{key}.head', trains=True)
        self.teacher: Any = self.head_class(teacher, teacher_head, f'{key}.teacher_head')
        self.head = self.student.head
        if not self.student.roi_head.bbox_assigner:
            raise ValueError(
                f"The student's RoI head should have an assigner (`{key}`): its config needs "
                '`train_cfg`. Found none.'
            )
        if not self.teacher.family.teaches:
            raise ValueError(
                f'`{key}` needs a teacher that looks at each image once: name a '
                '`test_branch_idx` in its backbone and RoI head. Found -1.'
            )
        self.heads = self.student.path, self.teacher.path
        own, other = self.head.num_classes, self.teacher.head.num_classes
        if own != other:
            raise ValueError(
                f'Student and teacher should have the same `num_classes` (`{key}`). Found {own} in '
                f"the student's '{self.heads[0]}', {other} in the teacher's '{self.heads[1]}'."
            )
        self.student_tap = self.student.loss_tap
        self.student_taps = (self.student_tap, self.student.targets_tap)
        name = self.student.path.removeprefix('roi_head.').replace('_head', '')
        self.prefix = name.replace('.', '_')
        self.needs_semantic = any(
            getattr(owner, name, False)
            for owner, name in (
                (student, 'with_semantic_head'),
                (self.student.roi_head, 'with_semantic'),
            )
        )

    @classmethod
    def partner_head(cls, teacher: nn.Module, head: str) -> str:
        """The teacher's head for a student's: of the same stage, if it has that stage."""
        return same_stage(teacher, head)

    def fused_loss(self, key: str) -> FusedCrossEntropy | None:
        """None: the head forms its own loss, which ``fit`` can split (FIT-4).

        Raises:
            ValueError: On ``fuse_task_loss``; on losses that cannot be split.
        """
        fused = super().fused_loss(key)
        if self.student.family.unsplit:
            raise ValueError(
                f'`{key}` cannot split the losses of a {type(self.student.roi_head).__name__}: '
                f'{self.student.family.unsplit}. Distil without `fit`.'
            )
        return fused

    def step(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]
    ) -> RoIStep | MaskStep:
        """What is known of one step; the student's calls may be recorded later."""
        return self.step_class(self.student, self.teacher, taps, teacher_call, data_samples)

    @property
    def label_kinds(self) -> str:
        """Boxes, and what else the student's losses need: they are formed in one go."""
        masks = ['masks'] if self.student.roi_head.with_mask else []
        return ' and '.join(['boxes', *masks, *['semantic maps'] * self.needs_semantic])

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the labels that :meth:`gt_loss` needs."""
        instances = sample['data_samples'].get('gt_instances', {})
        masks = 'masks' in instances or not self.student.roi_head.with_mask
        semantic = 'gt_sem_seg' in sample['data_samples'] or not self.needs_semantic
        return masks and semantic and super().has_labels(sample)

    def own_losses(self, call: Call) -> dict[str, Tensor]:
        """The head's own losses by name, times the weight of its stage.

        A RoI head may add those of other heads to the same dict (Mask Scoring, PointRend, Grid).
        """
        losses = call.output[self.losses_at].items()
        own = loss_modules(self.head)
        return {name: self.student.loss_weight * x for name, x in losses if name in own}
