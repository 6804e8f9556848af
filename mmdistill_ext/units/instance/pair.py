"""Units of masks that locations predict: the pixels of objects (SEL-1, SEL-7)."""

from __future__ import annotations

import torch
from mmdet.structures import DetDataSample
from torch import nn

import mmdistill_ext.units.instance.families  # noqa: F401  (registers mmdet's)
from mmdistill_ext.taps import Call, Taps, resolve
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.instance.family import INSTANCE_FAMILIES, InstanceFamily
from mmdistill_ext.units.instance.masks_pair import LocationMaskPair
from mmdistill_ext.units.instance.step import InstanceStep
from mmdistill_ext.units.painters import MaskRegions


class InstanceMaskPair(LocationMaskPair):
    """Pairs the masks that student and teacher predict for an object, pixel by pixel.

    Of the locations that the student's own target assignment gives to an object, the likeliest in
    the student predicts the mask in both models.

    Args:
        student: The student, an mmdet detector that predicts masks of its locations.
        teacher: The teacher, one of the same family, with all levels of the student.
        head: Path of the part that predicts masks.
        teacher_head: Path of that part of the teacher.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = _find(student, head, f'{key}.head')
        self.teacher = _find(teacher, teacher_head, f'{key}.teacher_head')
        if type(self.student) is not type(self.teacher):
            raise ValueError(
                f'Student and teacher should predict masks in the same way (`{key}`). Found '
                f'{type(self.student.head).__name__} and {type(self.teacher.head).__name__}.'
            )
        self.pair_classes(student, teacher, self.student.dense, self.teacher.dense, key)
        self.head = self.student.head
        self.heads = head, teacher_head
        self.student_tap = f'{self.student.owner}.{self.student.loss}'
        paths = (*self.dense.student_taps, *self.student.paths, self.student_tap)
        self.student_taps = tuple(dict.fromkeys(paths))
        self.teacher_tap = self.teacher.dense
        self.prefix = 'mask'

    def step(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]
    ) -> InstanceStep:
        """What is known of one step; the student's calls may be recorded later."""
        dense = self.dense.step(taps, teacher_call, data_samples)
        return InstanceStep(dense, taps, teacher_call, self.student.objects)

    def build(self, step: InstanceStep) -> Units:
        """The units, one pixel of an object each (SEL-1)."""
        with torch.no_grad():
            teacher = self.teacher.teacher(step, self.student)
        return Units(
            student=self.student.student(step),
            teacher=teacher,
            labels=self.student.labels(step),
            ignore_index=IGNORED,
            sigmoid=True,
            paint=MaskRegions(size_of(step.samples), len(step.samples), (step.images,)),
        )


def _find(model: nn.Module, path: str, key: str) -> InstanceFamily:
    head = resolve(model, path, key)[0]
    bases = (base for base in type(head).__mro__ if base in INSTANCE_FAMILIES)
    family = INSTANCE_FAMILIES.get(next(bases, nn.Module))
    if family is None or family.refused:
        known = ', '.join(of.__name__ for of, own in INSTANCE_FAMILIES.items() if not own.refused)
        why = f': {family.refused}' if family else ''
        raise ValueError(
            f"`{key}` should lead to what predicts masks, one of {known}. Found '{path}', a "
            f"{type(head).__name__}{why}. A loss of features, such as `dict(type='CWDLoss', "
            "tap='neck')`, takes any."
        )
    return family(model, path)
