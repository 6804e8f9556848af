"""Units of single-stage detectors: anchors and points (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from mmdet.models.dense_heads import FCOSHead
from torch import nn

from mmdistill_ext.taps import Call, Taps, resolve
from mmdistill_ext.units.base import SplitRule, Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.dense.families import FAMILIES, DenseFamily, find_family
from mmdistill_ext.units.dense.step import DenseSplit, DenseStep
from mmdistill_ext.units.detector_pair import IGNORED, DetectorPair, ground_truth

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample


class DensePair(DetectorPair):
    """Pairs a single-stage head of the student with one of the teacher, location by location.

    The student's predictions are the arguments of its own ``loss_by_feat`` while it computes its
    loss, the labels and boxes those that its own target assignment gave then; nothing is assigned
    twice. The heads may be of different families as long as they have the same locations. Levels
    that only one of them has are left to the labels.

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

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = _find(student, head, f'{key}.head')
        self.teacher = _find(teacher, teacher_head, f'{key}.teacher_head')
        self.head = self.student.head
        _check_pair(self.student.head, self.teacher.head, key)
        self.student_levels, self.teacher_levels = _common_levels(self.student, self.teacher, key)
        self.sigmoid = self.head.use_sigmoid_cls
        self.predicts = True
        self.heads = head, teacher_head
        self.student_tap = f'{head}.loss_by_feat'
        self.targets_tap = f'{head}.{self.student.targets}'
        self.student_taps = (self.student_tap, self.targets_tap)
        self.teacher_tap = teacher_head
        self.prefix = head.replace('_head', '')

    @property
    def box_distances(self) -> tuple[str, ...]:
        """Distances that there are between the boxes of the two."""
        bins = [getattr(family.head, 'reg_max', None) for family in (self.student, self.teacher)]
        return ('iou', 'l1', 'distribution') if bins[0] and bins[0] == bins[1] else ('iou', 'l1')

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: SplitRule | None = None,
        own: DenseSplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        found = self.known(own) or DenseStep(self, taps, teacher_call)
        mine = found.student_boxes(*found.index)
        with torch.no_grad():
            its = found.teacher_boxes(*found.index)
        labels, classified = found.assigned.labels, found.assigned.classified
        if not self.teacher.knows_background:
            classified = classified & (labels < self.num_classes)
        labels = labels.where(classified, IGNORED)
        return Units(
            student=found.student_scores,
            teacher=found.teacher_scores,
            labels=labels,
            ignore_index=IGNORED,
            sigmoid=self.sigmoid,
            background=self.sigmoid,
            boxes=Boxes(
                index=found.index,
                student=self.student.decode(*mine),
                teacher=found.teacher_decoded,
                target=found.target_boxes,
                scale=mine[1],
                student_distribution=self.student.distribution(mine[2]),
                teacher_distribution=self.teacher.distribution(its[2]),
            ),
            paint=found.levels,
            split=split,
            simple=own.simple if own else None,
            own=own.result(self.own_losses(taps[self.student_tap])) if own else None,
        )

    @contextmanager
    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: SplitRule
    ) -> Iterator[DenseSplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""
        pairing = DenseStep(self, taps, teacher_call)
        own = DenseSplit(pairing, ground_truth(data_samples), split)
        family = type(self.student)(taps.owner(self.student_tap))
        with own.loss(), family.rows(own.loss, lambda: own.levels):
            yield own


def _find(model: nn.Module, path: str, key: str) -> DenseFamily:
    head, method = resolve(model, path, key)
    family = find_family(head) if method == 'forward' else None
    if family is None:
        known = ', '.join(kin.kind.__name__ for kin in FAMILIES)
        raise ValueError(
            f'`{key}` should lead to one of {known}, or to a subclass with their target assignment '
            f"and loss. Found '{path}', a {type(head).__name__}."
        )
    return family


def _refuse(
    rule: str, key: str, student: nn.Module, teacher: nn.Module, own: object, other: object
) -> None:
    raise ValueError(
        f"Student and teacher should have {rule} (`{key}`). Found {own} in the student's "
        f"{type(student).__name__}, {other} in the teacher's {type(teacher).__name__}."
    )


def _check_pair(student: nn.Module, teacher: nn.Module, key: str) -> None:
    if not (isinstance(student, FCOSHead) or hasattr(student, 'assigner')):
        raise ValueError(
            f"The student's {type(student).__name__} should have an assigner (`{key}`): its config "
            'needs `train_cfg`. Found none.'
        )

    def refuse(rule: str, own: object, other: object) -> None:
        _refuse(rule, key, student, teacher, own, other)

    if student.num_classes != teacher.num_classes:
        refuse('the same `num_classes`', student.num_classes, teacher.num_classes)
    if student.use_sigmoid_cls != teacher.use_sigmoid_cls:
        refuse(
            'both sigmoid or both softmax scores', student.use_sigmoid_cls, teacher.use_sigmoid_cls
        )
    own, other = student.prior_generator, teacher.prior_generator
    if set(own.num_base_priors) != set(other.num_base_priors):
        refuse(
            'as many priors per location: heads with one (ATSS, GFL, FCOS, RTMDet, YOLOX) pair '
            'among each other, RetinaNet with RetinaNet',
            own.num_base_priors,
            other.num_base_priors,
        )


def _common_levels(
    student: DenseFamily, teacher: DenseFamily, key: str
) -> tuple[list[int], list[int]]:
    """Places of the levels of equal stride in either."""
    heads = student.head, teacher.head
    common = [stride for stride in student.strides if stride in teacher.strides]
    if not common:
        _refuse(
            'at least one level of the same stride: pair it with a teacher of such levels',
            key,
            *heads,
            student.strides,
            teacher.strides,
        )
    places = tuple([family.strides.index(s) for s in common] for family in (student, teacher))
    generators = [head.prior_generator for head in heads]
    if generators[0].num_base_priors[0] > 1:
        mine, its = (
            torch.cat([generator.base_anchors[i] for i in chosen]).cpu()
            for generator, chosen in zip(generators, places, strict=True)
        )
        differs = (mine != its).any(1)
        if differs.any():
            _refuse(
                'the same anchors', key, *heads, mine[differs][0].tolist(), its[differs][0].tolist()
            )
    return places
