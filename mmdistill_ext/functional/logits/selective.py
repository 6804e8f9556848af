"""Selective teacher: distil only where the teacher beats the student.

Method of CN115310277A (Alibaba), requirements SEL-2 to SEL-6 of the documentation. Plain PyTorch
through autograd, for any ``(B, C, ...)`` logits with ``(B, ...)`` labels; results are float32
whatever the logits' type (float64 stays float64). :mod:`mmdistill_ext.functional.blockwise` runs
the same functions block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_ext.functional.checks import (
    AVERAGES,
    check_choice,
    check_class_weight,
    check_same_classes,
    num_label_classes,
)
from mmdistill_ext.functional.logits.differences import unit_difference
from mmdistill_ext.functional.logits.distances import unit_distillation
from mmdistill_ext.functional.precision import full_precision

__all__ = ['contrast_mask', 'select_units', 'selective_distillation']


def select_units(teacher_difference: Tensor, student_difference: Tensor, valid: Tensor) -> Tensor:
    """Where the teacher wins: the smaller difference, a tie goes to the student (SEL-3).

    Args:
        teacher_difference: ``(B, ...)``, first difference.
        student_difference: ``(B, ...)``, second difference.
        valid: ``(B, ...)``, bool.

    Returns:
        ``(B, ...)``, bool; False on units that are ignored.
    """
    return (teacher_difference < student_difference) & valid


def contrast_mask(
    wins: Tensor, valid: Tensor, teacher: int = 255, student: int = 0, void: int = 128
) -> Tensor:
    """Contrast mask: who won each unit, as an image (SEL-4).

    Args:
        wins: ``(B, ...)``, bool, where the teacher wins.
        valid: ``(B, ...)``, bool.
        teacher: Value where the teacher wins, 0 to 255.
        student: Value where the student wins, 0 to 255.
        void: Value where the label is ignored, 0 to 255.

    Returns:
        ``(B, ...)``, uint8.

    Raises:
        ValueError: When a value does not fit into 8 bits.
    """
    for name, value in (('teacher', teacher), ('student', student), ('void', void)):
        if not 0 <= value <= 255:
            raise ValueError(f'`{name}` should be in [0, 255]. Found {name}={value!r}.')
    mask = torch.full(wins.shape, student, dtype=torch.uint8, device=wins.device)
    return mask.masked_fill_(wins, teacher).masked_fill_(~valid, void)


def selective_distillation(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    difference: str = 'ce',
    distance: str = 'kl',
    temperature: float = 1.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    average: str = 'selected',
) -> Tensor:
    """Distillation on the units where the teacher wins, averaged (SEL-2 to SEL-6).

    ``sum_u w_u d_u / sum_v w_v``: ``u`` runs over the units where the teacher wins, ``v`` over the
    same or over all valid units, ``d`` is the distance and ``w`` the class weight of the label.

    Args:
        student: ``(B, C, ...)``.
        teacher: ``(B, C, ...)``, taken as constant.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        difference: What decides who wins, see
            :func:`~mmdistill_ext.functional.logits.differences.unit_difference`.
        distance: What is distilled, see
            :func:`~mmdistill_ext.functional.logits.distances.unit_distillation`.
        temperature: > 0.
        ignore_index: Label of units that are ignored.
        class_weight: ``(C,)``, >= 0, weight of each label class; 1 when absent.
        average: ``'selected'`` or ``'valid'``.

    Returns:
        A scalar; exactly 0, with gradient 0, when no unit is selected.

    Raises:
        ValueError: On unknown kinds, a temperature <= 0 or shapes that do not fit.
    """
    check_choice('average', average, AVERAGES)
    check_same_classes(student, teacher)
    check_class_weight(class_weight, num_label_classes(student.shape[1]))
    with torch.no_grad():
        valid = target != ignore_index
        selected = select_units(
            unit_difference(teacher, target, difference, ignore_index),
            unit_difference(student, target, difference, ignore_index),
            valid,
        )
        weight = valid.to(full_precision(student).dtype)
        if class_weight is not None:
            weight = weight * class_weight.to(weight)[target.long().where(valid, 0)]
        total = (weight.where(selected, 0) if average == 'selected' else weight).sum()
    dropped = ~selected.unsqueeze(1)
    student, teacher = student.masked_fill(dropped, 0), teacher.masked_fill(dropped, 0)
    units = unit_distillation(student, teacher, distance, temperature) * weight
    return torch.where(total > 0, units.where(selected, 0).sum() / total.where(total > 0, 1), 0.0)
