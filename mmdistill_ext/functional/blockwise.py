"""Distillation, its gradient and the head's own cross-entropy in one pass, block by block.

The plain composition (:func:`~mmdistill_ext.functional.selective_distillation`) keeps some
ten tensors of the size of the full-resolution logits. Here each block of units is upsampled,
compared, and turned into loss and gradient while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.distillation_pass import DistillationPass
from mmdistill_ext.functional.blocks.reader import BlockReader
from mmdistill_ext.functional.blocks.splitting import PassSplit
from mmdistill_ext.functional.blocks.sums import PassSums
from mmdistill_ext.functional.blocks.values import (
    CrossEntropy,
    Labels,
    Side,
    Split,
    compute_dtype,
)
from mmdistill_ext.functional.checks import check_class_weight
from mmdistill_ext.functional.logits.differences import (
    CrossEntropyDifference,
    Difference,
    find_difference,
)
from mmdistill_ext.functional.logits.distances import Distance, make_distance
from mmdistill_ext.functional.selections import Block, Selection, find_selection

__all__ = ['BlockwiseResult', 'blockwise_distillation']


@dataclass(frozen=True)
class BlockwiseResult:
    """Sums of one pass; to normalise them is the caller's, who knows the other ranks' sums.

    Attributes:
        distill_sum: Scalar, ``sum_u weight_u * distance_u``; differentiable.
        distill_weight: Scalar, ``sum_u weight_u``.
        counts: ``(2, classes)`` int64: valid units, and units where the teacher wins, per label.
        wins: ``(B, ...)`` bool, where the teacher wins; with ``keep_wins``.
        own_sum: Scalar, ``sum_u class_weight_u * cross_entropy_u``, differentiable; with ``own``.
        correct: Scalar int64, units whose label has the student's largest logit; with ``own``.
        distill_parts: ``(2,)``, the distillation's sum over simple and over hard units, without
            ``hard_weight`` and without gradient; with ``split``.
        own_parts: ``(2,)``, the own loss's sum over simple and over hard units, without
            ``hard_weight`` and without gradient; with ``own`` and ``split``.
        simple_counts: ``(2,)`` int64, number of simple samples and of all valid ones, which are
            units or images; with ``split``.
    """

    distill_sum: Tensor
    distill_weight: Tensor
    counts: Tensor
    wins: Tensor | None = None
    own_sum: Tensor | None = None
    correct: Tensor | None = None
    distill_parts: Tensor | None = None
    own_parts: Tensor | None = None
    simple_counts: Tensor | None = None


def blockwise_distillation(
    student: Side,
    teacher: Side,
    labels: Labels,
    *,
    difference: str | Difference | Callable[[Tensor, Labels], Tensor] = 'ce',
    selection: str | Selection | Callable[[Block], Tensor] = 'teacher_better',
    distance: str | Distance | Callable[[Tensor, Tensor, Labels], Tensor] = 'kl',
    class_weight: Tensor | None = None,
    own: CrossEntropy | None = None,
    split: Split | None = None,
    keep_wins: bool = False,
    block_bytes: int | None = None,
) -> BlockwiseResult:
    """Compare, select, split and distil without full-resolution logits in memory.

    Requirements SEL-2 to SEL-6 and FIT-3 to FIT-5.

    Values and gradients are those of the plain composition after
    :func:`torch.nn.functional.interpolate`, in float32 (float64 for a float64 student), also under
    autocast. There is no host sync. On a GPU, a run that allows TF32 allows it here too.

    Args:
        student: Logits of the student, ``(B, C, ...)`` or levels; gradients go to these.
        teacher: Logits of the teacher, taken as constant; a map may have a size of its own.
        labels: Of all units.
        difference: What decides who wins: ``'ce'``, ``'bce'``, or logits ``(1, C, n)`` and labels
            of a block -> ``(1, n)``.
        selection: Which units are distilled: ``'teacher_better'``, ``'all'``, or a block -> weight
            of each unit, ``(1, n)``, bool or >= 0; ignored units never count.
        distance: What is distilled: ``'kl'``, ``'reverse_kl'``, ``'mse'``, ``'bce'`` (with
            temperature 1), or logits of student and teacher, ``(1, C, n)``, and labels of a block
            -> ``(1, n)``.
        class_weight: ``(classes,)``, >= 0, multiplies the weight of each unit by that of its label.
        own: Form the head's own loss and the number of correct units too.
        split: Split both losses into simple and hard parts, and weigh the hard ones.
            ``distill_weight`` and ``counts`` do not know of it.
        keep_wins: Return where the teacher wins.
        block_bytes: Size of one block of logits; by default 2 MiB on a CPU, 32 MiB on others.

    Returns:
        The sums, see :class:`BlockwiseResult`.

    Raises:
        ValueError: On unknown names, or shapes, types and values that do not fit.

    Example:
        >>> import torch
        >>> student = torch.zeros(1, 2, 3, requires_grad=True)
        >>> teacher = torch.tensor([[[2.0, 0.0, 5.0], [0.0, 1.0, 0.0]]])
        >>> labels = Labels(torch.tensor([[0, 0, 255]]))
        >>> result = blockwise_distillation(Side(student), Side(teacher), labels)
        >>> result.counts[1]  # of both classes, units that the teacher wins
        tensor([1, 0])
        >>> result.distill_sum / result.distill_weight
        tensor(0.3278, grad_fn=<DivBackward0>)
    """
    leaves = student.leaves
    reader = BlockReader(
        (student, teacher), labels, block_bytes, compute_dtype(leaves[:1]), ('student', 'teacher')
    )
    difference = find_difference(difference) if isinstance(difference, str) else difference
    selection = find_selection(selection) if isinstance(selection, str) else selection
    distance = make_distance(distance) if isinstance(distance, str) else distance
    if isinstance(difference, Difference):
        difference.check(reader.channels, reader.background)
    if isinstance(distance, Distance):
        distance.check(reader.channels)
    check_class_weight(class_weight, reader.classes)
    if own is not None:
        CrossEntropyDifference().check(reader.channels)
        check_class_weight(own.class_weight, reader.classes)
    pass_split = None if split is None else PassSplit(split, reader)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    block_pass = DistillationPass(
        reader, difference, selection, distance, class_weight, own, pass_split, differentiate
    )
    with torch.autocast(reader.target.device.type, enabled=False):
        sums = PassSums.apply(block_pass, *leaves)
    return _result(block_pass, sums, keep_wins)


def _result(
    block_pass: DistillationPass, sums: tuple[Tensor, ...], keep_wins: bool
) -> BlockwiseResult:
    own, split = block_pass.own, block_pass.split
    return BlockwiseResult(
        distill_sum=sums[0],
        distill_weight=block_pass.distill_weight,
        counts=block_pass.counts,
        wins=block_pass.reader.from_blocks(block_pass.wins) if keep_wins else None,
        own_sum=sums[1] if own else None,
        correct=block_pass.correct if own else None,
        distill_parts=block_pass.distill.parts.sum(0) if split else None,
        own_parts=own.parts.sum(0) if own and split else None,
        simple_counts=split.simple_counts.sum(0) if split else None,
    )
