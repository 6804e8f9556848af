"""Units of single-stage detectors: anchors and points (SEL-1, SEL-7)."""

from __future__ import annotations

import torch
from mmdet.structures import DetDataSample
from torch import nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.dense.alike import common_levels, find_family
from mmdistill_ext.units.dense.outputs import DenseOutputs, DenseTargets
from mmdistill_ext.units.dense.split import DenseSplit
from mmdistill_ext.units.dense.step import DenseStep
from mmdistill_ext.units.detector_pair import IGNORED, DetectorPair, size_of


class DensePair(DetectorPair):
    """Pairs a single-stage head of the student with one of the teacher, location by location.

    The student's predictions are the arguments of its own ``loss_by_feat`` while it computes its
    loss, labels and boxes come from its own target assignment in that loss: nothing is assigned
    twice. The heads may be of different families as long as they have the same locations. Levels
    that only one of them has learn from the labels alone.

    Args:
        student: The student, an mmdet single-stage detector.
        teacher: The teacher.
        head: Path of the student's head, ``'bbox_head'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why and
            what can.
    """

    split_class = DenseSplit
    predicts = True

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = find_family(student, head, f'{key}.head')
        self.teacher = find_family(teacher, teacher_head, f'{key}.teacher_head')
        self.head = self.student.head
        names = {
            f"the student's {type(self.head).__name__}": self.student,
            f"the teacher's {type(self.teacher.head).__name__}": self.teacher,
        }
        self.student_levels, self.teacher_levels = common_levels(names, 'Student and teacher', key)
        self.sigmoid = self.student.sigmoid
        self.heads = head, teacher_head
        self.student_tap = f'{head}.loss_by_feat'
        self.student_taps = (self.student_tap, *(f'{head}.{name}' for name in self.student.taps))
        self.teacher_tap = teacher_head
        self.teacher_training = (teacher_head,) if self.teacher.teacher_trains else ()
        self.prefix = head.replace('_head', '')

    @property
    def num_classes(self) -> int:
        """Number of classes, background not counted."""
        return self.student.num_classes

    @property
    def box_distances(self) -> tuple[str, ...]:
        """Distances that both heads allow: ``'distribution'`` if both have as many bins."""
        same = self.student.bins is not None and self.student.bins == self.teacher.bins
        if not (self.student.has_boxes and self.teacher.has_boxes):
            return ()
        return ('iou', 'l1', 'distribution') if same else ('iou', 'l1')

    def fused_loss(self, key: str) -> None:
        """None, because the head forms its own loss, which ``fit`` can split (FIT-4).

        Raises:
            ValueError: On ``fuse_task_loss``; on a head whose loss cannot be split.
        """
        if key == 'fit' and self.student.unsplit:
            raise ValueError(
                f'`{key}` needs a head whose loss is a sum over units: {self.student.unsplit}. '
                f'Found {type(self.head).__name__}. It learns from a teacher by `losses` alone.'
            )
        super().fused_loss(key)

    def step(self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]) -> DenseStep:
        """What is known of one step; the student's calls may be recorded later."""
        student = DenseOutputs(
            self.student, self.student_levels, lambda: taps[self.student_tap].args
        )
        teacher = DenseOutputs(self.teacher, self.teacher_levels, lambda: teacher_call.output)
        heads = {'the student': student, 'the teacher': teacher}
        targets = DenseTargets(heads, lambda name: taps.all(f'{self.heads[0]}.{name}'))
        return DenseStep(student, teacher, targets, data_samples)

    def build(self, step: DenseStep) -> Units:
        """The units, level by level as the heads give them (SEL-1)."""
        return Units(
            student=step.student.scores,
            teacher=step.teacher.scores,
            labels=step.targets.labels,
            ignore_index=IGNORED,
            sigmoid=self.sigmoid,
            background=self.sigmoid,
            boxes=self._boxes(step) if self.box_distances else None,
            paint=self.student.painter(step.student.levels, size_of(step.samples)),
        )

    def _boxes(self, step: DenseStep) -> Boxes:
        """Boxes of the positive units."""
        index = step.targets.index
        own = step.student.encoded(*index)
        with torch.no_grad():
            other = step.teacher.encoded(*index)
        return Boxes(
            index=index,
            student=step.student.decode_encoded(*own),
            teacher=step.teacher_boxes,
            target=step.targets.boxes,
            scale=own[1],
            student_distribution=self.student.distribution(own[2]),
            teacher_distribution=self.teacher.distribution(other[2]),
        )
