"""Validation-aware fit loss: learn less from what the teacher gets wrong when overfitting shows.

Method of CN115082920B (Baidu), requirements FIT-2 to FIT-5 and FIT-8 of the documentation. The
source's formula for Loss(x) is an image that its text lost: :func:`fit_loss` and the evaluation
functions are ours. Plain PyTorch through autograd, for any ``(B, C, ...)`` logits;
:mod:`mmdistill_ext.functional.blockwise` does the same block by block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.checks import (
    check_base,
    check_choice,
    check_factor,
    check_images,
    check_positive,
    check_same_classes,
    check_same_size,
    check_threshold,
)
from mmdistill_ext.functional.logits.differences import unit_difference
from mmdistill_ext.functional.logits.distances import unit_distillation
from mmdistill_ext.functional.precision import full_precision

__all__ = [
    'SPLITS',
    'FitParts',
    'exponential_fit',
    'fit_loss',
    'fit_parts',
    'fitting_error',
    'logistic_fit',
    'simple_images',
    'simple_units',
    'weigh_rows',
]

SPLITS = ('unit', 'image')


def fitting_error(train_gt_loss: float, val_gt_loss: float) -> float:
    """``x``, mean first GT loss minus mean second GT loss (FIT-2); below 0 means overfitting.

    Args:
        train_gt_loss: Mean own loss of the student on training samples.
        val_gt_loss: Mean of the same loss on validation samples.

    Raises:
        ValueError: One of them is not finite.
    """
    for name, value in (('train_gt_loss', train_gt_loss), ('val_gt_loss', val_gt_loss)):
        if not math.isfinite(value):
            raise ValueError(f'`{name}` should be finite. Found {value}.')
    return train_gt_loss - val_gt_loss


def exponential_fit(x: float, b: float = 10.0, f_max: float = 2.0) -> float:
    """``F(x) = min(b^x, f_max)``, one choice for FIT-5 (ours).

    Args:
        x: Fitting error.
        b: Base, > 1: the larger, the faster F falls when overfitting shows.
        f_max: Upper bound, finite and > 0.

    Raises:
        ValueError: ``b`` is not above 1 or ``f_max`` not above 0.
    """
    check_base(b)
    check_positive('f_max', f_max)
    return math.exp(x * math.log(b)) if x * math.log(b) < math.log(f_max) else float(f_max)


def logistic_fit(x: float, b: float = 10.0) -> float:
    """``F(x) = 2 / (1 + b^-x)``, in (0, 2), another choice for FIT-5 (ours).

    Args:
        x: Fitting error.
        b: Base, > 1.

    Raises:
        ValueError: ``b`` is not above 1.
    """
    check_base(b)
    small = math.exp(-abs(x) * math.log(b))  # in (0, 1], never overflows
    return 2 / (1 + small) if x >= 0 else 2 * small / (1 + small)


def simple_units(teacher: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Units that the teacher gets right: no logit is larger than the label's (FIT-3).

    With one channel (a binary head) the label is 1 where the logit is above 0.

    Args:
        teacher: ``(B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        ignore_index: Label of units that are ignored.

    Returns:
        ``(B, ...)`` bool; False on units that are ignored.
    """
    check_same_size('teacher', teacher, target)
    valid = target != ignore_index
    label = target.long().where(valid, 0)
    if teacher.shape[1] == 1:
        logit = teacher.squeeze(1)
        return ((logit > 0) == (label == 1)) & ~logit.isnan() & valid
    return (teacher.gather(1, label.unsqueeze(1)).squeeze(1) == teacher.amax(1)) & valid


def simple_images(
    teacher: Tensor, target: Tensor, threshold: float, ignore_index: int = 255
) -> Tensor:
    """Images of which the teacher gets at least a share ``threshold`` of the units right (FIT-3).

    Args:
        teacher: ``(B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        threshold: Accuracy in (0, 1].
        ignore_index: Label of units that are ignored.

    Returns:
        ``(B,)`` bool; True for an image without a valid unit.

    Raises:
        ValueError: The threshold is outside (0, 1], or an image is a single unit ``(B, C)``.
    """
    check_threshold(threshold)
    check_images(target.shape)
    right = simple_units(teacher, target, ignore_index).flatten(1).sum(1)
    return is_simple(right, (target != ignore_index).flatten(1).sum(1), threshold)


def is_simple(right: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Whether images with so many right units among so many valid ones are simple."""
    return (right.double() / valid.double() >= threshold) | (valid == 0)


class FitParts(NamedTuple):
    """The two parts of a loss, both over the number of all valid units (FIT-4)."""

    soft: Tensor
    hard: Tensor


def fit_parts(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    split: str = 'unit',
    threshold: float = 0.9,
    distance: str = 'kl',
    temperature: float = 1.0,
    weight: float = 1.0,
    ignore_index: int = 255,
) -> FitParts:
    """L_soft and L_hard: ``weight`` * distillation + cross-entropy on either kind of unit (FIT-4).

    Their sum is the loss of plain distillation.

    Args:
        student: ``(B, C, ...)``.
        teacher: ``(B, C, ...)``, taken as constant.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        split: By ``'unit'`` (:func:`simple_units`) or ``'image'`` (:func:`simple_images`).
        threshold: Accuracy in (0, 1] from which on an image is simple.
        distance: What is distilled, see
            :func:`~mmdistill_ext.functional.logits.distances.unit_distillation`.
        temperature: > 0.
        weight: Factor of the distillation, >= 0.
        ignore_index: Label of units that are ignored.

    Returns:
        Two scalars; exactly 0 where there is no unit.

    Raises:
        ValueError: On unknown kinds, impossible values, or shapes that do not fit.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> teacher = torch.tensor([[[5.0, 5.0], [0.0, 0.0]]])
        >>> fit_parts(student, teacher, torch.tensor([[0, 1]]), weight=0.0)
        FitParts(soft=tensor(0.3466), hard=tensor(0.3466))
    """
    check_choice('split', split, SPLITS)
    check_threshold(threshold)
    check_factor('weight', weight)
    check_same_classes(student, teacher)
    check_same_size('student', student, target)
    valid = target != ignore_index
    if split == 'unit':
        simple = simple_units(teacher, target, ignore_index)
    else:
        simple = simple_images(teacher, target, threshold, ignore_index)
        simple = simple.view(-1, *[1] * (target.ndim - 1)).expand(target.shape) & valid
    dropped = ~valid.unsqueeze(1)
    student, teacher = student.masked_fill(dropped, 0), teacher.masked_fill(dropped, 0)
    units = weight * unit_distillation(student, teacher, distance, temperature)
    units = (units + unit_difference(student, target, 'ce', ignore_index)).where(valid, 0)
    total = valid.sum().clamp(min=1).to(full_precision(student).dtype)
    return FitParts(units.where(simple, 0).sum() / total, units.where(~simple, 0).sum() / total)


def fit_loss(parts: FitParts, f: float | Tensor) -> Tensor:
    """``Loss(x) = L_soft + F(x) L_hard`` (FIT-5; the form is ours, the source's is lost)."""
    return parts.soft + f * parts.hard


def weigh_rows(
    rows: Tensor, simple: Tensor, hard_weight: float, scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """``scale * (sum of simple rows + F(x) * sum of hard rows)``.

    Args:
        rows: ``(n, ...)``, what each row has lost.
        simple: ``(n, ...)`` bool, the rows that count in full; its later dimensions may be missing.
        hard_weight: ``F(x)``, >= 0; with 0 hard rows are left out, whatever is in them.
        scale: Factor of everything.

    Returns:
        The loss, and ``(2,)`` its parts before ``F(x)``, without gradient.
    """
    simple = simple.reshape(*simple.shape, *[1] * (rows.ndim - simple.ndim))
    if hard_weight == 1:
        total = rows.sum()
    elif hard_weight == 0:
        total = rows.where(simple, 0).sum()
    else:
        factor = torch.where(simple, torch.ones_like(simple, dtype=rows.dtype), hard_weight)
        total = (rows * factor).sum()
    with torch.no_grad():
        parts = torch.stack((rows.where(simple, 0).sum(), rows.where(~simple, 0).sum())) * scale
    return scale * total, parts
