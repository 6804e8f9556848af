"""Units of detectors with queries: those that predict the same object (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.detector_pair import IGNORED, DetectorPair, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.query.find import check_alike, find_queries
from mmdistill_ext.units.query.split import QuerySplit
from mmdistill_ext.units.query.step import QueryStep


class QueryPair(DetectorPair):
    """Pairs the queries of student and teacher that were matched to the same object.

    The student's queries are matched by its own loss, the teacher's by its own assigner; both on
    the layer that they predict with. Queries without an object have no partner; they learn from
    labels alone.

    Args:
        student: The student, an mmdet DETR, Conditional, DAB, Deformable or DDQ-DETR, DINO, Sparse
            R-CNN or QueryInst.
        teacher: The teacher, any of these; the number of queries may differ.
        head: Path of the student's head, ``'bbox_head'`` or ``'roi_head.bbox_head'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    split_class = QuerySplit

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = find_queries(student, head, f'{key}.head')
        self.teacher = find_queries(teacher, teacher_head, f'{key}.teacher_head')
        self.head = self.student.head
        self.sigmoid = self.student.sigmoid
        names = {
            f"the student's {type(self.head).__name__}": self.student,
            f"the teacher's {type(self.teacher.head).__name__}": self.teacher,
        }
        check_alike(names, 'Student and teacher', key)
        self.heads = self.student.path, self.teacher.path
        self.student_taps, self.student_tap = self.student.taps, self.student.loss_tap
        self.teacher_tap = self.teacher.teacher_tap
        self.predicts = self.student.predicts
        name = self.student.path.removeprefix('roi_head.').replace('_head', '')
        self.prefix = name.replace('.', '_')

    @property
    def label_kinds(self) -> str:
        """Boxes, and masks where the student has a mask head: its losses are formed in one go."""
        return 'boxes and masks' if self._needs_masks else 'boxes'

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the boxes and masks that :meth:`gt_loss` needs."""
        instances = sample['data_samples'].get('gt_instances', {})
        return super().has_labels(sample) and ('masks' in instances or not self._needs_masks)

    @property
    def _needs_masks(self) -> bool:
        return getattr(self.student.model, 'with_mask', False)

    def own_losses(self, call: Call) -> Mapping[str, Tensor | list[Tensor]]:
        """The head's own losses on matched queries by name, without those on denoising ones."""
        losses: dict[str, Any] = self.student.own_losses(call.output)
        return {name: value for name, value in losses.items() if 'loss' in name}

    def step(self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]) -> QueryStep:
        """What is known of one step; the student's calls may be recorded later."""
        return QueryStep(self.student, self.teacher, taps, teacher_call, data_samples)

    def build(self, step: QueryStep) -> Units:
        """The units, one object each (SEL-1)."""
        compared = step.compared
        return Units(
            student=compared.logits(step.student, step.student_queries),
            teacher=compared.logits(step.teacher, step.teacher_queries),
            labels=compared.labels,
            ignore_index=IGNORED,
            sigmoid=self.sigmoid,
            background=self.sigmoid,
            boxes=Boxes(
                index=compared.index,
                student=compared.boxes(step.student, step.student_queries),
                teacher=compared.boxes(step.teacher, step.teacher_queries),
                target=compared.target_boxes,
                scale=compared.scale,
            ),
            paint=BoxRegions(
                size_of(step.samples), len(step.samples), compared.index, compared.target_boxes
            ),
        )
