"""Units of single-stage detectors: anchors and points (SEL-1, SEL-7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mmdistill_ext.functional.selective import full_precision
from mmdistill_ext.taps import Call, resolve
from mmdistill_ext.units.base import Boxes, Split, TaskLoss, Units
from mmdistill_ext.units.dense_families import FAMILIES, DenseFamily, find_family

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample

IGNORED = -1
"""Label of units that take no part in the student's loss."""


class DenseDetectionUnits:
    """Pairs a single-stage head of the student with one of the teacher, location by location.

    The student's predictions are the arguments of its own ``loss_by_feat`` while it computes its
    loss, the labels and boxes those that its own ``get_targets`` assigns then; nothing is assigned
    twice. The heads may be of different families as long as they have the same locations.

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

    ignore_index = IGNORED
    default_head = 'bbox_head'
    background = True

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = _find(student, head, f'{key}.head')
        self.teacher = _find(teacher, teacher_head, f'{key}.teacher_head')
        self.head = self.student.head
        _check_pair(self.student.head, self.teacher.head, key)
        self.sigmoid = self.head.use_sigmoid_cls
        self.predicts = True
        self.student_tap = f'{head}.loss_by_feat'
        self.targets_tap = f'{head}.get_targets'
        self.student_taps = (self.student_tap, self.targets_tap)
        self.teacher_tap = teacher_head
        self.prefix = head.replace('_head', '')

    @property
    def box_distances(self) -> tuple[str, ...]:
        """Distances that there are between the boxes of the two."""
        bins = [getattr(family.head, 'reg_max', None) for family in (self.student, self.teacher)]
        return ('iou', 'l1', 'distribution') if bins[0] and bins[0] == bins[1] else ('iou', 'l1')

    @property
    def num_classes(self) -> int:
        """Number of label classes, background not counted."""
        return self.head.num_classes

    def task_loss(self, key: str) -> TaskLoss:
        """Refused: a detector's own loss is no plain cross-entropy.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f'`{key}` needs a head whose loss is one softmax CrossEntropyLoss, as segmenters have. '
            f'Found {type(self.head).__name__}.'
        )

    def __call__(
        self,
        student_calls: dict[str, Call],
        teacher_call: Call,
        data_samples: list[DetDataSample],
        task: TaskLoss | None = None,
        split: Split | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        scores, boxes = student_calls[self.student_tap].args[:2]
        teacher_scores, teacher_boxes = teacher_call.output[:2]
        sizes = [level.shape[-2:] for level in scores]
        _check_sizes(sizes, [level.shape[-2:] for level in teacher_scores])
        # Priors and boxes are in full precision under AMP too: half of it is pixels off.
        boxes = full_precision(self.student.flatten(boxes, self.student.box_channels()))
        priors = self.student.priors(sizes, boxes)
        strides = self.student.strides(sizes, boxes)
        targets = student_calls[self.targets_tap].output
        with torch.no_grad():
            assigned = self.student.assigned(targets, priors, strides)
            flat = self.teacher.flatten(teacher_boxes, self.teacher.box_channels())
            teacher_boxes = full_precision(flat)
            teacher_priors = self.teacher.priors(sizes, teacher_boxes)
            decoded = self.teacher.decode(teacher_priors, strides, teacher_boxes)
        channels = self.head.cls_out_channels
        return Units(
            student=self.student.flatten(scores, channels).transpose(1, 2),
            teacher=self.teacher.flatten(teacher_scores, channels).transpose(1, 2),
            labels=assigned.labels.where(assigned.valid, IGNORED),
            ignore_index=IGNORED,
            sigmoid=self.sigmoid,
            background=self.sigmoid,
            boxes=Boxes(
                student=self.student.decode(priors, strides, boxes),
                teacher=decoded,
                target=assigned.boxes,
                positive=assigned.valid & (assigned.labels < self.num_classes),
                scale=strides,
                levels=self.student.levels(sizes),
                student_distribution=self.student.distribution(boxes),
                teacher_distribution=self.teacher.distribution(teacher_boxes),
            ),
        )


def _find(model: nn.Module, path: str, key: str) -> DenseFamily:
    head, _ = resolve(model, path, key)
    family = find_family(head)
    if family is None:
        known = ', '.join(kin.kind.__name__ for kin in FAMILIES)
        raise ValueError(
            f'`{key}` should lead to one of {known}, or to a subclass with their target assignment '
            f"and loss. Found '{path}', a {type(head).__name__}."
        )
    return family


def _check_pair(student: nn.Module, teacher: nn.Module, key: str) -> None:
    def refuse(rule: str, own: object, other: object) -> None:
        raise ValueError(
            f'Student and teacher should have {rule} (`{key}`). Found {own} in the '
            f"student's {type(student).__name__}, {other} in the teacher's "
            f'{type(teacher).__name__}.'
        )

    if student.num_classes != teacher.num_classes:
        refuse('the same `num_classes`', student.num_classes, teacher.num_classes)
    if student.use_sigmoid_cls != teacher.use_sigmoid_cls:
        refuse(
            'both sigmoid or both softmax scores', student.use_sigmoid_cls, teacher.use_sigmoid_cls
        )
    own, other = student.prior_generator, teacher.prior_generator
    if [tuple(s) for s in own.strides] != [tuple(s) for s in other.strides]:
        refuse('the same strides, level by level', own.strides, other.strides)
    if own.num_base_priors != other.num_base_priors:
        refuse(
            'as many priors per location: heads with one (ATSS, GFL, FCOS, RTMDet) pair among each '
            'other, RetinaNet with RetinaNet',
            own.num_base_priors,
            other.num_base_priors,
        )
    if own.num_base_priors[0] > 1:
        mine, its = (torch.cat(list(generator.base_anchors)) for generator in (own, other))
        differs = (mine.cpu() != its.cpu()).any(1)
        if differs.any():
            refuse('the same anchors', mine[differs][0].tolist(), its[differs][0].tolist())


def _check_sizes(student: list, teacher: list) -> None:
    if student != teacher:
        raise ValueError(
            'Student and teacher should have feature maps of the same sizes, level by level. '
            f'Found {[tuple(s) for s in student]} and {[tuple(s) for s in teacher]}.'
        )
