"""Heads of two-stage detectors, and what the units of all of them have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import Tensor, nn

from mmdistill_ext.taps import Call, resolve
from mmdistill_ext.units.detector_pair import DetectorPair

RUNS = ('_bbox_forward', '_mask_forward')
"""Methods of a RoI head that run its parts on given RoIs."""
TRAINS = (*RUNS, 'loss', 'bbox_loss', 'predict')
"""Those that a student's should have from Faster or Cascade R-CNN. Others sample by rules of their
own or change them while they train (PISA, Dynamic R-CNN), or see each image several times (Trident,
whose `predict` tells).
"""


class RoIHead:
    """A box or mask head of a detector's RoI head, and how to run it on given RoIs.

    Args:
        model: A two-stage detector.
        path: ``'roi_head.bbox_head'``, ``'roi_head.mask_head'``; ``'roi_head.bbox_head.0'`` for
            the first stage of a cascade.
        kind: What the head should be.
        key: The config key to name in errors.
        methods: Those of the RoI head that should be mmdet's plain ones.

    Raises:
        ValueError: The path leads to no such head.
    """

    def __init__(
        self, model: nn.Module, path: str, kind: type, key: str, methods: Sequence[str] = RUNS
    ) -> None:
        self.head, method = resolve(model, path, key)
        if isinstance(self.head, nn.ModuleList):
            stages = ', '.join(f"'{path}.{stage}'" for stage in range(len(self.head)))
            raise ValueError(
                f"`{key}` should name one stage of a cascade: {stages}. Found '{path}'."
            )
        self.roi_head = getattr(model, 'roi_head', None)
        known = any(
            all(getattr(type(self.roi_head), m, None) is getattr(base, m) for m in methods)
            for base in (StandardRoIHead, CascadeRoIHead)
        )
        own = all(
            getattr(type(self.head), name, None) is getattr(kind, name, None)
            for name in ('get_targets', 'loss_and_target', 'loss')
        )
        if not (known and isinstance(self.head, kind) and own and method == 'forward'):
            raise ValueError(
                f'`{key}` should lead to a {kind.__name__} in the RoI head of Faster, Mask or '
                f"Cascade R-CNN. Found '{path}', a {type(self.head).__name__} in a "
                f'{type(self.roi_head).__name__}.'
            )
        last = path.rsplit('.', 1)[-1]
        self.stage = (int(last),) if last.isdigit() else ()
        self.loss_weight = self.roi_head.stage_loss_weights[self.stage[0]] if self.stage else 1.0

    @property
    def is_last(self) -> bool:
        """The detector predicts with this stage."""
        return not self.stage or self.stage[0] == self.roi_head.num_stages - 1

    @torch.no_grad()
    def run(self, method: str, features: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor]:
        """Run it on RoIs ``(n, 5)``."""
        return getattr(self.roi_head, method)(*self.stage, features, rois)


class RoIHeadPair(DetectorPair):
    """What box and mask heads share.

    Args:
        student: The student, an mmdet two-stage detector.
        teacher: The teacher.
        head: Path of the student's head.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    kind: type
    output: str  # where `loss_and_target` puts the losses
    teacher_tap = 'extract_feat'

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = RoIHead(student, head, self.kind, f'{key}.head', TRAINS)
        self.teacher = RoIHead(teacher, teacher_head, self.kind, f'{key}.teacher_head')
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
        self.student_tap = f'{head}.loss_and_target'
        self.targets_tap = f'{head}.get_targets'
        self.student_taps = (self.student_tap, self.targets_tap)
        self.prefix = head.removeprefix('roi_head.').replace('_head', '').replace('.', '_')

    @property
    def label_kinds(self) -> str:
        """What labels the student's losses need."""
        return 'boxes and masks' if self.student.roi_head.with_mask else 'boxes'

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has what :meth:`gt_loss` needs."""
        instances = sample['data_samples'].get('gt_instances', {})
        masks = 'masks' in instances or not self.student.roi_head.with_mask
        return masks and super().has_labels(sample)

    def own_losses(self, call: Call) -> dict[str, Tensor]:
        """The head's losses, times the stage's weight, from the call of :attr:`student_tap`."""
        losses = call.output[self.output].items()
        return {name: self.student.loss_weight * x for name, x in losses if 'loss' in name}
