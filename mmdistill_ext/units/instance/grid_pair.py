"""Units of SOLO's masks: the pixels of the masks of cells (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.detector_pair import IGNORED, size_of
from mmdistill_ext.units.instance.grid_masks import GridMasks, grid_masks
from mmdistill_ext.units.instance.masks_pair import LocationMaskPair
from mmdistill_ext.units.painters import MaskRegions


class GridStep:
    """One step of two heads of SOLO, each part worked out when it is first asked for.

    Masks of all levels are brought to the size of the largest, as the head does to predict.

    Args:
        student: How the student's head gives masks.
        taps: Calls of the student's head.
        paths: Paths of the head's methods for its loss and for its targets.
        teacher: What the teacher's head returned.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: GridMasks,
        taps: Taps,
        paths: tuple[str, str],
        teacher: Sequence,
        samples: list[DetDataSample],
    ) -> None:
        self.student, self.taps, self.paths = student, taps, paths
        self.teacher, self.samples = teacher, samples

    @property
    def predicted(self) -> Sequence:
        """What the student's head gave to its loss."""
        return self.taps[self.paths[0]].args

    @cached_property
    def places(self) -> list[tuple[int, int, Tensor]]:
        """Image, level and cells of the compared masks, where there are some."""
        levels = range(len(self.student.head.num_grids))
        calls = enumerate(self.taps.all(self.paths[1]))
        every = ((i, n, self.student.cells(call, n)) for i, call in calls for n in levels)
        return [place for place in every if len(place[2])]

    @cached_property
    def targets(self) -> list[list[Tensor]]:
        """Targets of the masks, ``(K, h, w)``, of each image and level."""
        return [call.output[0] for call in self.taps.all(self.paths[1])]

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest targets."""
        height, width = max(tuple(target.shape[-2:]) for target in self.targets[0])
        return height, width

    def logits(self, masks: GridMasks, predicted: Sequence, levels: Sequence[int]) -> Tensor:
        """Mask logits of the compared cells, ``(P, 1, h, w)``.

        Args:
            masks: How the head gives masks.
            predicted: What it gave.
            levels: Its level for each of the student's.
        """
        parts = [
            masks.masks(predicted, image, levels[level], cells)[:, None]
            for image, level, cells in self.places
        ]
        resized = [F.interpolate(x, self.size, mode='bilinear') for x in parts]
        return torch.cat(resized or [predicted[0][0].new_zeros(0, 1, *self.size)])

    def labels(self) -> Tensor:
        """1 inside of the object, 0 outside, ``(P, h, w)``."""
        parts = [self.targets[image][level][None] for image, level, _ in self.places]
        resized = [F.interpolate(x.float(), self.size)[0] for x in parts]
        return torch.cat(resized or [self.targets[0][0].new_zeros(0, *self.size)]).long()

    def images(self) -> Tensor:
        """Image of each mask, ``(P,)``."""
        parts = [torch.full_like(cells, image) for image, _, cells in self.places]
        return torch.cat(parts or [self.targets[0][0].new_zeros(0, dtype=torch.long)])


class GridMaskPair(LocationMaskPair):
    """Pairs the masks that student and teacher predict for a cell of SOLO's grids, by pixels.

    Cells are those that the student's own loss gives an object, with the targets that it compares
    them with.

    Args:
        student: The student, an mmdet SOLO or SOLOv2.
        teacher: The teacher, either, with all grids of the student.
        head: Path of the loss of the masks, ``'mask_head.loss_mask'``: the head itself stands for
            the classes.
        teacher_head: Path of that loss of the teacher.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why and
            what can.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        own, other = head.rpartition('.')[0], teacher_head.rpartition('.')[0]
        self.pair_classes(student, teacher, own, other, key)
        self.head = self.dense.head
        self.heads = head, teacher_head
        self.masks = grid_masks(self.head), grid_masks(self.dense.teacher.head)
        self.student_taps, self.student_tap = self.dense.student_taps, self.dense.student_tap
        self.teacher_tap = self.dense.teacher_tap
        self.prefix = 'mask_pixels'

    def step(self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]) -> GridStep:
        """What is known of one step; the student's calls may be recorded later."""
        paths = self.student_taps[0], self.student_taps[1]
        return GridStep(self.masks[0], taps, paths, teacher_call.output, data_samples)

    def build(self, step: GridStep) -> Units:
        """The units, one pixel of a cell's mask each (SEL-1)."""
        with torch.no_grad():
            teacher = step.logits(self.masks[1], step.teacher, self.dense.teacher_levels)
        return Units(
            student=step.logits(self.masks[0], step.predicted, self.dense.student_levels),
            teacher=teacher,
            labels=step.labels(),
            ignore_index=IGNORED,
            sigmoid=True,
            paint=MaskRegions(size_of(step.samples), len(step.samples), (step.images(),)),
        )
