"""The pass over all blocks: compare, weigh, and sum up losses and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.blocks.readers import CoarseLogits, FullLogits, LevelLogits, Reading
from mmdistill_ext.functional.fit import is_simple, simple_units
from mmdistill_ext.functional.logits.selective import (
    select_units,
    unit_difference,
    unit_distillation,
)


class Block(NamedTuple):
    """What a selection sees of one block of units, all without gradient."""

    student_difference: Tensor  # (1, n)
    teacher_difference: Tensor  # (1, n)
    wins: Tensor  # (1, n) bool, the teacher's difference is smaller
    teacher: Tensor  # (1, C, n) logits
    labels: Tensor  # (1, n)
    valid: Tensor  # (1, n) bool


Selection = Callable[[Block], Tensor]
"""Block -> weight of each unit, ``(1, n)``, bool or >= 0; units that are not valid never count."""

SELECTIONS: dict[str, Selection] = {
    'teacher_better': lambda block: block.wins,
    'all': lambda block: block.valid,
}


@dataclass
class BlockPass:
    """Arguments of one pass; :meth:`run` leaves the sums and the gradients in its attributes.

    The loss of a block is differentiated by autograd with respect to the block's logits, so every
    kind of distance has one formula. The gradients are those of the sums, not yet normalised.

    With a split, every sum has two parts, simple and hard (FIT-4), and the gradients are those of
    ``simple + hard_weight * hard``. A unit is known to be hard in its own block. An image is only
    known after its last block: its gradient is scaled then.
    """

    student: FullLogits | CoarseLogits | LevelLogits
    teacher: FullLogits | CoarseLogits | LevelLogits
    target: Tensor  # (B, units), in the order of the readers
    classes: int
    background: bool
    extras: tuple[Tensor | None, Tensor | None]  # added to the differences of student, teacher
    selection: Selection
    difference: str
    distance: str
    temperature: float
    ignore_index: int
    class_weight: Tensor | None
    task: bool
    task_class_weight: Tensor | None
    split: str | None
    given: Tensor | None  # (B, units) bool, which are simple
    threshold: float
    hard_weight: float
    block_bytes: int
    differentiate: bool

    def run(self) -> None:
        """Go through all blocks."""
        new, dtype = self.target.new_zeros, self.student.dtype
        images = self.target.shape[0]
        self.distill_parts = new((images, 2), dtype=dtype)
        self.task_parts = new((images, 2), dtype=dtype)
        self.distill_weight = new((), dtype=dtype)
        self.correct = new((), dtype=torch.int64)
        self.simple = new((images, 2), dtype=torch.int64)  # units: the teacher right; valid
        self.wins = new(self.target.shape, dtype=torch.bool)
        self.histogram = new(2 * self.classes + 1, dtype=torch.int64)  # void, lost, won
        wanted = (self.differentiate, self.differentiate and self.task)
        gradients = [self.student.new_gradient() if want else None for want in wanted]
        for image, start, stop in self._places():
            self._block(image, start, stop, *gradients)
        if self.split == 'image':
            self._split_images(gradients)
        self.distill_sum = self._total(self.distill_parts)
        self.task_sum = self._total(self.task_parts)
        self.sums = [self.distill_sum, self.task_sum]
        self.gradients = [None if g is None else self.student.in_shape(g) for g in gradients]
        lost, won = self.histogram[1:].view(2, self.classes)
        self.counts = torch.stack((lost + won, won))

    def _places(self) -> Iterator[tuple[int, int, int]]:
        images, units = self.target.shape
        step = max(self.student.step, self.teacher.step)
        step_bytes = step * self.student.channels * self.student.dtype.itemsize
        size = max(1, self.block_bytes // step_bytes) * step
        for image in range(images):
            for start in range(0, units, size):
                yield image, start, min(start + size, units)

    def _block(
        self,
        image: int,
        start: int,
        stop: int,
        distill_gradient: Tensor | None,
        task_gradient: Tensor | None,
    ) -> None:
        student = self.student.read(image, start, stop, self.differentiate)
        teacher = self.teacher.read(image, start, stop).values
        labels = self.target[image : image + 1, start:stop].long()
        place = (slice(image, image + 1), slice(start, stop))
        block = self._compare(student.values, teacher, labels, place)
        label = labels.where(block.valid, 0)
        self.wins[image, start:stop] = block.wins[0]
        bins = (1 + label + self.classes * block.wins).where(block.valid, 0)
        self.histogram.scatter_add_(0, bins[0], torch.ones_like(bins[0]))

        simple = self._split(image, block, place)

        weight = self._weigh(self.selection(block), block.valid, self.class_weight, label)
        self.distill_weight += weight.sum()
        self.distill_parts[image] += self._differentiate(
            lambda x: unit_distillation(x, teacher, self.distance, self.temperature),
            student,
            weight,
            simple,
            distill_gradient,
        )
        if self.task:
            weight = self._weigh(block.valid, block.valid, self.task_class_weight, label)
            self.task_parts[image] += self._differentiate(
                lambda x: F.cross_entropy(
                    x, labels, reduction='none', ignore_index=self.ignore_index
                ),
                student,
                weight,
                simple,
                task_gradient,
            )
            at_label = student.values.gather(1, label.unsqueeze(1)).squeeze(1)
            self.correct += ((at_label == student.values.amax(1)) & block.valid).sum()

    def _compare(self, student: Tensor, teacher: Tensor, labels: Tensor, place: tuple) -> Block:
        valid = labels != self.ignore_index
        kind = (self.difference, self.ignore_index, self.background)
        second, first = (
            unit_difference(logits, labels, *kind) + (0 if extra is None else extra[place])
            for logits, extra in zip((student, teacher), self.extras, strict=True)
        )
        return Block(second, first, select_units(first, second, valid), teacher, labels, valid)

    def _split(self, image: int, block: Block, place: tuple) -> Tensor | None:
        """Count the teacher's right answers; where units are split, say which are simple."""
        if self.split is None:
            return None
        if self.given is not None:
            right = self.given[place] & block.valid
        else:
            right = simple_units(block.teacher, block.labels, self.ignore_index)
        self.simple[image, 0] += right.sum()
        self.simple[image, 1] += block.valid.sum()
        return right if self.split == 'unit' else None

    def _split_images(self, gradients: list[Tensor | None]) -> None:
        """Move what belongs to hard images into the second part, and scale their gradients."""
        right, valid = self.simple.unbind(1)
        hard = ~is_simple(right, valid, self.threshold)
        for parts in (self.distill_parts, self.task_parts):
            parts.copy_(torch.where(hard.unsqueeze(1), parts.flip(1), parts))
        self.simple = torch.stack((~hard & (valid > 0), valid > 0), dim=1).long()
        if self.hard_weight == 1:
            return
        for gradient in filter(lambda gradient: gradient is not None, gradients):
            hard = hard.view(-1, *[1] * (gradient.ndim - 1))
            if self.hard_weight:
                one = gradient.new_ones(())
                gradient.mul_(torch.where(hard, one * self.hard_weight, one))
            else:
                gradient.masked_fill_(hard, 0)

    def _total(self, parts: Tensor) -> Tensor:
        """``simple + hard_weight * hard``; a part of weight 0 is left out, whatever is in it."""
        simple, hard = parts.sum(0)
        return simple + self.hard_weight * hard if self.hard_weight else simple

    def _weigh(
        self, weight: Tensor, valid: Tensor, class_weight: Tensor | None, label: Tensor
    ) -> Tensor:
        weight = weight.to(self.student.dtype).where(valid, 0)
        return weight if class_weight is None else weight * class_weight[label]

    def _differentiate(
        self,
        loss: Callable[[Tensor], Tensor],
        student: Reading,
        weight: Tensor,
        simple: Tensor | None,
        gradient: Tensor | None,
    ) -> Tensor:
        """Weighted sum of a loss over simple and over hard units, (2,).

        The gradient goes into ``gradient``. Units of weight 0 are left out of both, whatever their
        logits (0 times NaN is NaN).
        """
        with torch.set_grad_enabled(gradient is not None):
            logits = student.values.detach().requires_grad_(gradient is not None)
            attached = loss(logits)
        units = (attached.detach() * weight).masked_fill_(weight == 0, 0)
        if gradient is not None:
            if simple is not None:
                weight = torch.where(simple, weight, weight * self.hard_weight)
            upstream = gradient_of_units(attached, logits, weight)
            self.student.add_gradient(gradient, student, upstream)
        if simple is None:
            total = units.sum()
            return torch.stack((total, total.new_zeros(())))
        return torch.stack((units.where(simple, 0).sum(), units.where(~simple, 0).sum()))


def gradient_of_units(units: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``sum(weight * units)``; of units of weight 0 it is 0, whatever their logits.

    Args:
        units: ``(..., n)``, losses of units, in a graph.
        logits: ``(..., C, n)``, what they were formed from.
        weight: ``(..., n)``, >= 0.
    """
    (upstream,) = torch.autograd.grad(units, logits, weight.expand_as(units))
    # A mask over the block would cost as much as the loss. Instead every NaN is cleared, then
    # units that count and have no finite loss get theirs back.
    factor = (units.detach() * 0 + 1).masked_fill_(weight == 0, 0)
    upstream.nan_to_num_(nan=0, posinf=torch.inf, neginf=-torch.inf)
    return upstream.mul_(factor.unsqueeze(-2))
