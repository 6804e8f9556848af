"""Units of two-stage detectors: proposals that the student sampled (SEL-1, SEL-7)."""

from __future__ import annotations

from torch import nn

from mmdistill_ext.units.base import FusedCrossEntropy, Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.roi.head_pair import RoIHeadPair
from mmdistill_ext.units.roi.heads import BoxHead
from mmdistill_ext.units.roi.split import RoISplit
from mmdistill_ext.units.roi.step import RoIStep


class RoIPair(RoIHeadPair):
    """Pairs box heads on the proposals that the student sampled for its own loss.

    The teacher's RoI head looks at the same boxes in the teacher's features. Images with fewer
    samples than others are filled up with ignored units. Where one of the heads predicts no boxes
    (Grid R-CNN), classes alone are compared and distilled.
    """

    head_class = BoxHead
    losses_at = 'loss_bbox'
    step_class = RoIStep
    split_class = RoISplit
    sigmoid = False
    student: BoxHead
    teacher: BoxHead

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        super().__init__(student, teacher, head, teacher_head, key)
        self.student_tap = self.student.sampled_tap
        self.student_taps = (self.student_tap, self.student.targets_tap)
        self.predicts = self.student.is_last
        self.has_boxes = self.student.reader.has_boxes and self.teacher.reader.has_boxes

    @property
    def box_distances(self) -> tuple[str, ...]:
        """``'iou'`` and ``'l1'``; none where one of the heads predicts no boxes."""
        return super().box_distances if self.has_boxes else ()

    def fused_loss(self, key: str) -> FusedCrossEntropy | None:
        """None: the head forms its own loss, which ``fit`` can split (FIT-4).

        Raises:
            ValueError: On ``fuse_task_loss``; on losses that cannot be split; on a teacher without
                boxes, which nobody can tell right from wrong.
        """
        fused = super().fused_loss(key)
        if not self.teacher.reader.has_boxes:
            raise ValueError(
                f'`{key}` needs a teacher whose box head predicts boxes. Found '
                f'{type(self.teacher.head).__name__} in a {type(self.teacher.roi_head).__name__}.'
            )
        return fused

    def build(self, step: RoIStep) -> Units:
        """The units, one RoI each (SEL-1)."""
        boxes = None
        if self.has_boxes:
            student_boxes = step.student_boxes
            boxes = Boxes(
                index=step.index,
                student=student_boxes,
                teacher=step.teacher_boxes,
                target=step.target_boxes,
                scale=step.scale,
            )
        return Units(
            student=step.student_logits,
            teacher=step.teacher_logits,
            labels=step.labels,
            ignore_index=IGNORED,
            sigmoid=False,
            boxes=boxes,
            paint=BoxRegions(size_of(step.samples), step.images, step.index, step.target_boxes),
        )
