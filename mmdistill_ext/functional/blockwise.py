"""Distillation, its gradient and the task's cross-entropy in one pass, block by block.

The plain composition (:func:`~mmdistill_ext.functional.selective_distillation`) keeps some
ten tensors of the size of the full-resolution logits. Here each block of units is upsampled,
compared, and turned into loss and gradient while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.distillation_pass import (
    SELECTIONS,
    Block,
    BlockPass,
    Selection,
)
from mmdistill_ext.functional.blocks.readers import LevelOrder, UnitOrder, logits_reader
from mmdistill_ext.functional.blocks.sums import PassSums
from mmdistill_ext.functional.checks import (
    check_choice,
    check_class_weight,
    check_difference,
    check_distance,
    check_factor,
    check_images,
    check_levels,
    check_logits,
    check_same_classes,
    check_temperature,
    check_threshold,
    check_units,
    num_label_classes,
)
from mmdistill_ext.functional.fit import SPLITS

__all__ = [
    'SELECTIONS',
    'Block',
    'BlockwiseResult',
    'Selection',
    'blockwise_distillation',
]

CPU_BLOCK_BYTES = 2**21
DEVICE_BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class BlockwiseResult:
    """Sums of one pass; to normalise them is the caller's, who knows the other ranks' sums.

    Attributes:
        distill_sum: Scalar, ``sum_u weight_u * distance_u``; differentiable.
        distill_weight: Scalar, ``sum_u weight_u``.
        counts: ``(2, classes)`` int64: valid units, and units where the teacher wins, per label.
        wins: ``(B, ...)`` bool, where the teacher wins; if asked for.
        task_sum: Scalar, ``sum_u class_weight_u * cross_entropy_u``, differentiable; if asked for.
        correct: Scalar int64, units whose label has the student's largest logit; with the task.
        distill_parts: ``(2,)``, the distillation's sum over simple and over hard units, without
            ``hard_weight`` and without gradient; if split.
        task_parts: ``(2,)``, the same of the task's.
        simple: ``(2,)`` int64, number of simple samples and of all valid ones; if split.
    """

    distill_sum: Tensor
    distill_weight: Tensor
    counts: Tensor
    wins: Tensor | None = None
    task_sum: Tensor | None = None
    correct: Tensor | None = None
    distill_parts: Tensor | None = None
    task_parts: Tensor | None = None
    simple: Tensor | None = None


def blockwise_distillation(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    selection: str | Selection = 'teacher_better',
    difference: str = 'ce',
    distance: str = 'kl',
    temperature: float = 1.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    background: bool = False,
    student_extra: Tensor | None = None,
    teacher_extra: Tensor | None = None,
    student_align_corners: bool = False,
    teacher_align_corners: bool = False,
    task: bool = False,
    task_class_weight: Tensor | None = None,
    split: str | None = None,
    simple: Tensor | None = None,
    threshold: float = 0.9,
    hard_weight: float = 1.0,
    keep_contrast: bool = False,
    block_bytes: int | None = None,
) -> BlockwiseResult:
    """Compare, select, split and distil without full-resolution logits in memory.

    Requirements SEL-2 to SEL-6 and FIT-3 to FIT-5.

    Values and gradients are those of the plain composition after
    :func:`torch.nn.functional.interpolate`, in float32 (float64 for a float64 student), also under
    autocast. Nothing waits for the device. On a GPU, a run that allows TF32 allows it here too.

    Args:
        student: ``(B, C, ...)``; a map ``(B, C, h, w)`` may have another size than the labels. Or
            the levels of a detector, ``(B, A, C, n)`` each: ``A`` priors at ``n`` locations.
        teacher: The same, taken as constant; a map may have a size of its own.
        target: ``(B, ...)``, class indices or ``ignore_index``; of a detector ``(B, N)``, counted
            by level, location and prior.
        selection: ``'teacher_better'``, ``'all'``, or a function of a :class:`Block` that gives
            the weight of each unit.
        difference: What decides who wins, see
            :func:`~mmdistill_ext.functional.logits.selective.unit_difference`.
        distance: What is distilled, see
            :func:`~mmdistill_ext.functional.logits.selective.unit_distillation`.
        temperature: > 0.
        ignore_index: Label of units that are not valid.
        class_weight: ``(classes,)``, >= 0, multiplies the weight of each unit by that of its label.
        background: With ``difference='bce'``: the label ``C`` is background, as detectors have it.
        student_extra: ``(B, ...)``, added to the student's difference (that of its box).
        teacher_extra: The same of the teacher.
        student_align_corners: How the student's map is upsampled.
        teacher_align_corners: How the teacher's map is upsampled.
        task: Form the task's cross-entropy and the number of correct units too.
        task_class_weight: ``(classes,)``, class weights of that cross-entropy.
        split: Split both losses into simple and hard parts (FIT-3), by ``'unit'`` or ``'image'``,
            and weigh the hard ones by ``hard_weight`` (FIT-5). ``distill_weight`` and the task's
            denominators do not know of it.
        simple: ``(B, ...)`` bool, the simple units, where more than the logits decides; ``split``
            is then of no account.
        threshold: Share of units in (0, 1] that the teacher gets right in a simple image.
        hard_weight: ``F(x)``, >= 0.
        keep_contrast: Return where the teacher wins.
        block_bytes: Size of one block of logits; by default 2 MiB on a CPU, 32 MiB on others.

    Returns:
        The sums, see :class:`BlockwiseResult`.

    Raises:
        ValueError: On unknown kinds, a temperature <= 0, or shapes and types that do not fit.
    """
    leaves = (student,) if isinstance(student, Tensor) else tuple(student)
    if isinstance(student, Tensor):
        check_logits('student', student, target)
        check_logits('teacher', teacher, target)
        check_same_classes(student, teacher)
        order, channels, size = UnitOrder(), student.shape[1], target.shape[1:]
    else:
        check_levels(student, teacher, target)
        order, channels, size = LevelOrder(leaves), leaves[0].shape[2], target.shape[1:]
    check_difference(difference, channels, background)
    check_units('student_extra', student_extra, target)
    check_units('teacher_extra', teacher_extra, target)
    check_distance(distance, channels)
    check_temperature(temperature)
    check_class_weight(class_weight, channels, background)
    if task:
        check_difference('ce', channels)
        check_class_weight(task_class_weight, channels)
    if split is not None:
        check_choice('split', split, SPLITS)
        check_threshold(threshold)
        check_factor('hard_weight', hard_weight)
        if simple is not None:
            check_units('simple', simple, target)
            split = 'unit'
        elif background or isinstance(order, LevelOrder):
            raise ValueError(
                '`split` of a detector needs `simple`: the logits do not say whether a box is '
                'right. Found None.'
            )
        if split == 'image':
            check_images(target)
    if isinstance(selection, str):
        check_choice('selection', selection, tuple(SELECTIONS))
        selection = SELECTIONS[selection]

    def extra(values: Tensor | None) -> Tensor | None:
        return None if values is None else order.to_blocks(values.detach())

    dtype = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    on_cpu = target.device.type == 'cpu'
    block_pass = BlockPass(
        student=logits_reader(student, size, student_align_corners, dtype),
        teacher=logits_reader(teacher, size, teacher_align_corners, dtype),
        target=order.to_blocks(target),
        classes=num_label_classes(channels, background),
        background=background,
        extras=(extra(student_extra), extra(teacher_extra)),
        selection=selection,
        difference=difference,
        distance=distance,
        temperature=temperature,
        ignore_index=ignore_index,
        class_weight=None if class_weight is None else class_weight.to(target.device, dtype),
        task=task,
        task_class_weight=(
            None if task_class_weight is None else task_class_weight.to(target.device, dtype)
        ),
        split=split,
        given=extra(simple),
        threshold=threshold,
        hard_weight=hard_weight,
        block_bytes=block_bytes or (CPU_BLOCK_BYTES if on_cpu else DEVICE_BLOCK_BYTES),
        differentiate=torch.is_grad_enabled() and any(x.requires_grad for x in leaves),
    )
    with torch.autocast(target.device.type, enabled=False):
        distill_sum, task_sum = PassSums.apply(block_pass, *leaves)
    return BlockwiseResult(
        distill_sum=distill_sum,
        distill_weight=block_pass.distill_weight,
        counts=block_pass.counts,
        wins=order.from_blocks(block_pass.wins, target) if keep_contrast else None,
        task_sum=task_sum if task else None,
        correct=block_pass.correct if task else None,
        distill_parts=block_pass.distill_parts.sum(0) if split else None,
        task_parts=block_pass.task_parts.sum(0) if split and task else None,
        simple=block_pass.simple.sum(0) if split else None,
    )
