"""Units of two-stage detectors: proposals that the student sampled (SEL-1, SEL-7)."""

from __future__ import annotations

from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import nn

from mmdistill_ext.units.base import Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.roi.head_pair import RoIHeadPair
from mmdistill_ext.units.roi.split import RoISplit
from mmdistill_ext.units.roi.step import RoIStep


class RoIPair(RoIHeadPair):
    """Pairs box heads on the proposals that the student sampled for its own loss.

    The teacher's RoI head looks at the same boxes in the teacher's features. Images with fewer
    samples than others are filled up with ignored units.
    """

    head_type = BBoxHead
    losses_at = 'loss_bbox'
    step_class = RoIStep
    split_class = RoISplit
    sigmoid = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        super().__init__(student, teacher, head, teacher_head, key)
        self.predicts = self.student.is_last
        for side, box_head in (('student', self.student.head), ('teacher', self.teacher.head)):
            loss = box_head.loss_cls
            if getattr(loss, 'use_sigmoid', False) or box_head.custom_cls_channels:
                raise ValueError(
                    f"The {side}'s box head should have one softmax over classes and background "
                    f'(`{key}`). Found {type(loss).__name__}.'
                )
            if not (box_head.with_cls and box_head.with_reg):
                raise ValueError(
                    f"The {side}'s box head should predict classes and boxes (`{key}`). Found "
                    f'with_cls={box_head.with_cls}, with_reg={box_head.with_reg}.'
                )

    def build(self, step: RoIStep) -> Units:
        """The units, one RoI each (SEL-1)."""
        student_boxes = step.student_boxes
        return Units(
            student=step.pad(step.student_call['cls_score']).transpose(1, 2),
            teacher=step.pad(step.teacher_outputs['cls_score']).transpose(1, 2),
            labels=step.labels,
            ignore_index=IGNORED,
            sigmoid=False,
            boxes=Boxes(
                index=step.index,
                student=student_boxes,
                teacher=step.teacher_boxes,
                target=step.target_boxes,
                scale=step.scale,
            ),
            paint=BoxRegions(
                size_of(step.samples), len(step.samples), step.index, step.target_boxes
            ),
        )
