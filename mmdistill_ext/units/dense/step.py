"""One step of a pair of single-stage detectors: what is known of it, and the split of its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmdistill_ext.functional.logits.selective import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import SplitRule
from mmdistill_ext.units.boxes import overlaps
from mmdistill_ext.units.dense.families import Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels
from mmdistill_ext.units.split.correctness import correct_images, correct_units
from mmdistill_ext.units.split.head_split import HeadSplit

if TYPE_CHECKING:
    from mmdistill_ext.units.dense.pair import DensePair


class DenseStep:
    """What is known of one step, worked out when it is first asked for.

    Units are those of the levels that both heads have; ``all_`` stands before what is of all levels
    of the student.
    """

    def __init__(self, pair: DensePair, taps: Taps, teacher_call: Call) -> None:
        self.pair, self.taps, self.outputs = pair, taps, teacher_call.output
        self.student, self.teacher = pair.student, pair.teacher

    @cached_property
    def maps(self) -> tuple[list[Tensor], list[Tensor]]:
        """The student's scores and boxes, all levels."""
        return self.taps[self.pair.student_tap].args[:2]

    @cached_property
    def all_levels(self) -> Levels:
        """Where the student's units lie."""
        return self.student.levels([level.shape[-2:] for level in self.maps[0]])

    @cached_property
    def levels(self) -> Levels:
        """Where the units lie."""
        theirs = self._of_teacher([tuple(level.shape[-2:]) for level in self.outputs[0]])
        levels = Levels(self._of_student(self.all_levels))
        mine = [level[:2] for level in levels]
        if mine != theirs:
            raise ValueError(
                'Student and teacher should have feature maps of the same sizes, level by level. '
                f'Found {mine} and {theirs}.'
            )
        return levels

    @cached_property
    def all_assigned(self) -> Assigned:
        """The student's assignment."""
        with torch.no_grad():
            return self.student.assigned(self.taps.all(self.pair.targets_tap), self.all_levels)

    @cached_property
    def assigned(self) -> Assigned:
        """The units' assignment."""
        if len(self.levels) == len(self.all_levels):
            return self.all_assigned
        sizes = self.all_levels.sizes
        return Assigned(
            *(torch.cat(self._of_student(part.split(sizes, 1)), 1) for part in self.all_assigned)
        )

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and unit of the positive ones."""
        found = self.assigned
        positive = found.classified & (found.labels < self.pair.num_classes)
        return positive.nonzero(as_tuple=True)

    @property
    def student_scores(self) -> tuple[Tensor, ...]:
        """``(B, A, C, n)`` of each level."""
        return _by_prior(self._of_student(self.maps[0]), self.student.head.cls_out_channels)

    @property
    def teacher_scores(self) -> tuple[Tensor, ...]:
        """``(B, A, C, n)`` of each level."""
        return _by_prior(self._of_teacher(self.outputs[0]), self.teacher.head.cls_out_channels)

    @cached_property
    def confidence(self) -> Tensor:
        """The teacher's scores in [0, 1], ``(B, N, classes)``, perhaps with background."""
        outputs = [self._of_teacher(output) for output in self.outputs]
        scores = self.teacher.flatten(outputs[0], self.teacher.head.cls_out_channels)
        return self.teacher.confidence(outputs, full_precision(scores))

    @cached_property
    def strides(self) -> Tensor:
        """Stride of each unit in pixels, ``(N,)``."""
        like = self.maps[1][0].new_zeros((), dtype=torch.float32)
        parts = zip(self.levels.sizes, self.levels, strict=True)
        return torch.cat([like.new_full((count,), level.stride) for count, level in parts])

    @cached_property
    def priors(self) -> Tensor:
        """The student's, ``(N, 2 or 4)``."""
        return self._priors(
            self.student, [level[:2] for level in self.all_levels], self._of_student
        )

    @cached_property
    def teacher_priors(self) -> Tensor:
        """The teacher's, ``(N, 2 or 4)``."""
        sizes = [level.shape[-2:] for level in self.outputs[0]]
        return self._priors(self.teacher, sizes, self._of_teacher)

    @cached_property
    def target_boxes(self) -> Tensor:
        """Of the positive units, ``(P, 4)``."""
        places = self.index[1]
        targets = self.assigned.targets[self.index]
        return self.student.decode_targets(self.priors[places], self.strides[places], targets)

    @cached_property
    def teacher_decoded(self) -> Tensor:
        """The teacher's boxes of the positive units, ``(P, 4)``."""
        with torch.no_grad():
            return self.teacher.decode(*self.teacher_boxes(*self.index))

    def student_boxes(self, images: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Priors, strides and predictions ``(K, ...)`` of some units, to be decoded."""
        flat = self.student.flatten(self._of_student(self.maps[1]), self.student.box_channels())
        # In full precision under AMP too: half of it is pixels off.
        return self.priors[units], self.strides[units], full_precision(flat[images, units])

    def teacher_boxes(self, images: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the teacher."""
        predicted = full_precision(self.teacher_flat[images, units])
        return self.teacher_priors[units], self.strides[units], predicted

    @cached_property
    def teacher_flat(self) -> Tensor:
        """The teacher's box predictions, ``(B, N, D)``."""
        boxes = self._of_teacher(self.outputs[1])
        return self.teacher.flatten(boxes, self.teacher.box_channels())

    def _priors(self, family: DenseFamily, sizes: list, choose: Callable) -> Tensor:
        like = self.maps[1][0].new_zeros((), dtype=torch.float32)
        return torch.cat(choose(family.priors(sizes, like)))

    def _of_student(self, levels: list) -> list:
        return [levels[place] for place in self.pair.student_levels]

    def _of_teacher(self, levels: list) -> list:
        return [levels[place] for place in self.pair.teacher_levels]


def _by_prior(maps: list[Tensor], channels: int) -> tuple[Tensor, ...]:
    """``(B, A * channels, H, W)`` -> ``(B, A, channels, H * W)``."""
    return tuple(scores.unflatten(1, (-1, channels)).flatten(3) for scores in maps)


class DenseSplit(HeadSplit):
    """The split of a single-stage head's own loss."""

    def __init__(self, pairing: DenseStep, truth: list, split: SplitRule) -> None:
        super().__init__(pairing.taps.owner(pairing.pair.student_tap), split, len(truth))
        self.pairing, self.truth = pairing, truth

    @property
    def valid(self) -> Tensor:
        """``(B, N)`` bool."""
        return self.pairing.assigned.valid

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """``(B, N)`` or ``(B,)``, what the teacher has right."""
        found, split = self.pairing, self.split
        labels = found.assigned.labels
        classes = found.pair.num_classes
        if split.by == 'unit':
            ious = overlaps(found.teacher_decoded, found.target_boxes)
            right = correct_units(
                found.confidence, labels, classes, found.index, ious, split.iou, split.score
            )
            known = found.assigned.classified | (labels == classes)
            return right & self.valid & known

        def boxes_of(image: int, units: Tensor, classes: Tensor) -> Tensor:
            places = torch.full_like(units, image), units
            return found.teacher.decode(*found.teacher_boxes(*places))

        return correct_images(
            found.confidence[..., :classes],
            labels,
            self.valid,
            boxes_of,
            self.truth,
            split.iou,
            split.score,
        )

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor]]:
        """Simple and positive units ``(B, n)`` of each of the student's levels.

        Units that no teacher sees are as simple as their image, and simple when units are split.
        """
        found = self.pairing
        counts = found.all_levels.sizes
        positive = (found.all_assigned.labels < found.pair.num_classes).split(counts, 1)
        if self.split.by == 'image':
            return [(self.right[:, None].expand(x.shape), x) for x in positive]
        parts = self.simple.split([counts[i] for i in found.pair.student_levels], 1)
        known = dict(zip(found.pair.student_levels, parts, strict=True))
        return [(known.get(i, torch.ones_like(x)), x) for i, x in enumerate(positive)]
