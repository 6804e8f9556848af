"""The pass over all blocks: compare, weigh, and sum up losses and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.blocks.reader import BlockReader, Place
from mmdistill_ext.functional.blocks.splitting import PassSplit
from mmdistill_ext.functional.blocks.values import CrossEntropy, Labels
from mmdistill_ext.functional.blocks.weighted_sum import WeightedSum
from mmdistill_ext.functional.logits.selective import select_units
from mmdistill_ext.functional.selections import Block


class DistillationPass:
    """One pass over student and teacher; :meth:`run` leaves sums and gradients in the attributes.

    Args:
        reader: Reads the student first, then the teacher.
        difference: Logits ``(1, C, n)`` and labels -> ``(1, n)``: who wins.
        selection: :class:`Block` -> weight of each unit, ``(1, n)``.
        distance: Logits of student and teacher, and labels -> ``(1, n)``: what is distilled.
        class_weight: ``(classes,)``, of the distillation.
        own: The head's own loss, if it is to be formed.
        split: The split into simple and hard units, if there is one.
        differentiate: Form gradients.

    Attributes:
        distill: Sum of the distillation.
        own: Sum of the own loss, or None.
        distill_weight: Scalar, sum of the weights of the distillation.
        correct: Scalar int64, units whose label has the student's largest logit; with ``own``.
        wins: ``(rows, units)`` bool, where the teacher wins.
        counts: ``(2, classes)`` int64: valid units, and units where the teacher wins, per label.
    """

    def __init__(
        self,
        reader: BlockReader,
        difference: Callable[[Tensor, Labels], Tensor],
        selection: Callable[[Block], Tensor],
        distance: Callable[[Tensor, Tensor, Labels], Tensor],
        class_weight: Tensor | None,
        own: CrossEntropy | None,
        split: PassSplit | None,
        differentiate: bool,
    ) -> None:
        self.reader, self.differentiate = reader, differentiate
        self.difference, self.selection, self.distance = difference, selection, distance
        self.split = split
        self.class_weight = self._to_type(class_weight)
        self.own_class_weight = None if own is None else self._to_type(own.class_weight)
        hard_weight = 1.0 if split is None else split.hard_weight
        arguments = (reader.readers[0], len(reader.target), hard_weight, differentiate)
        self.distill = WeightedSum(*arguments)
        self.own = None if own is None else WeightedSum(*arguments)
        zeros = reader.target.new_zeros
        self.distill_weight = zeros((), dtype=reader.dtype)
        self.correct = zeros((), dtype=torch.int64)
        self.wins = zeros(reader.target.shape, dtype=torch.bool)
        self._histogram = zeros(2 * reader.classes + 1, dtype=torch.int64)  # ignored, lost, won

    def run(self) -> None:
        """Go through all blocks."""
        for place in self.reader.places():
            self._block(place)
        sums = [x for x in (self.distill, self.own) if x is not None]
        if self.split is not None:
            self.split.finish(sums)
        self.sums = [x.total for x in sums]
        self.gradients = [x.gradient for x in sums]
        lost, won = self._histogram[1:].view(2, self.reader.classes)
        self.counts = torch.stack((lost + won, won))

    def _block(self, place: Place) -> None:
        student_reader, teacher_reader = self.reader.readers
        student = student_reader.read(*place, self.differentiate)
        teacher = teacher_reader.read(*place).values
        labels = self.reader.labels(place)
        block = self._compare(student.values, teacher, labels, place)
        self._count(block, place)
        simple = None if self.split is None else self.split.mask(place, teacher, labels)

        weight = self._weigh(self.selection(block), self.class_weight, labels)
        self.distill_weight += weight.sum()
        self.distill.add(
            place.row, student, lambda x: self.distance(x, teacher, labels), weight, simple
        )
        if self.own is not None:
            weight = self._weigh(labels.valid, self.own_class_weight, labels)
            self.own.add(place.row, student, lambda x: _cross_entropy(x, labels), weight, simple)
            at_label = student.values.gather(1, labels.index.unsqueeze(1)).squeeze(1)
            self.correct += ((at_label == student.values.amax(1)) & labels.valid).sum()

    def _compare(self, student: Tensor, teacher: Tensor, labels: Labels, place: Place) -> Block:
        second, first = (
            self.difference(logits, labels) + (0 if extra is None else extra[place.slices])
            for logits, extra in zip((student, teacher), self.reader.extras, strict=True)
        )
        wins = select_units(first, second, labels.valid)
        return Block(second, first, wins, teacher, labels)

    def _count(self, block: Block, place: Place) -> None:
        self.wins[place.slices] = block.wins
        bins = 1 + block.labels.index + self.reader.classes * block.wins
        bins = bins.where(block.labels.valid, 0)
        self._histogram.scatter_add_(0, bins[0], torch.ones_like(bins[0]))

    def _weigh(self, weight: Tensor, class_weight: Tensor | None, labels: Labels) -> Tensor:
        weight = weight.to(self.reader.dtype).where(labels.valid, 0)
        return weight if class_weight is None else weight * class_weight[labels.index]

    def _to_type(self, class_weight: Tensor | None) -> Tensor | None:
        target = self.reader.target
        return None if class_weight is None else class_weight.to(target.device, self.reader.dtype)


def _cross_entropy(logits: Tensor, labels: Labels) -> Tensor:
    return F.cross_entropy(
        logits, labels.target, reduction='none', ignore_index=labels.ignore_index
    )
