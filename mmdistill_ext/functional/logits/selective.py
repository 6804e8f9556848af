"""Selective teacher: distil only where the teacher beats the student.

Method of CN115310277A (Alibaba), requirements SEL-2 to SEL-6 of the documentation. Plain PyTorch
through autograd, for any ``(B, C, ...)`` logits with ``(B, ...)`` labels; results are float32
whatever the logits' type (float64 stays float64). :mod:`mmdistill_ext.functional.blockwise` runs
the same functions block by block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.checks import (
    AVERAGES,
    check_choice,
    check_class_weight,
    check_difference,
    check_distance,
    check_labels,
    check_same_classes,
    check_same_size,
    check_temperature,
)

__all__ = [
    'check_labels',
    'contrast_mask',
    'select_units',
    'selective_distillation',
    'unit_difference',
    'unit_distillation',
]


def full_precision(logits: Tensor) -> Tensor:
    """The logits in the type that losses are formed in: float32, or float64 as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def unit_difference(
    logits: Tensor,
    target: Tensor,
    kind: str = 'ce',
    ignore_index: int = 255,
    background: bool = False,
) -> Tensor:
    """Difference between a prediction and its label, per unit (SEL-2).

    ``ce``: ``-log softmax(x)_y``. ``bce``: ``sum_c BCE(sigmoid(x_c), [c = y])``; the label ``C`` is
    background, no class at all, as detectors have it. With one channel and labels of a binary
    segmenter (``background=False``) it is 0 (background) or 1 (foreground).

    Args:
        logits: ``(B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        kind: ``'ce'`` or ``'bce'``.
        ignore_index: Label of units that are not valid.
        background: With ``bce``: labels go from 0 to ``C``, which is background.

    Returns:
        ``(B, ...)``, >= 0, and 0 (with gradient 0) on units that are not valid.

    Raises:
        ValueError: On another kind, or shapes and types that do not fit.

    Example:
        >>> unit_difference(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 255]]))
        tensor([[0.6931, 0.6931, 0.0000]])
    """
    check_same_size('logits', logits, target)
    check_difference(kind, logits.shape[1], background)
    logits, target = full_precision(logits), target.long()
    valid = target != ignore_index
    if logits.requires_grad:  # values are safe without; a gradient of 0 times NaN is not
        logits = logits.masked_fill(~valid.unsqueeze(1), 0)
    if kind == 'ce':
        return F.cross_entropy(logits, target, reduction='none', ignore_index=ignore_index)
    label = target.where(valid, 0).unsqueeze(1)
    if background:
        at_label = logits.gather(1, label.clamp(max=logits.shape[1] - 1))
        at_label = at_label.masked_fill(label == logits.shape[1], 0)
    else:
        at_label = logits * label if logits.shape[1] == 1 else logits.gather(1, label)
    return (F.softplus(logits).sum(1) - at_label.squeeze(1)).where(valid, 0)


def select_units(teacher_difference: Tensor, student_difference: Tensor, valid: Tensor) -> Tensor:
    """Where the teacher wins: the smaller difference, a tie goes to the student (SEL-3).

    Args:
        teacher_difference: ``(B, ...)``, first difference.
        student_difference: ``(B, ...)``, second difference.
        valid: ``(B, ...)``, bool.

    Returns:
        ``(B, ...)``, bool; False on units that are not valid.
    """
    return (teacher_difference < student_difference) & valid


def unit_distillation(
    student: Tensor, teacher: Tensor, kind: str = 'kl', temperature: float = 1.0
) -> Tensor:
    """Distance of the student's prediction from the teacher's, per unit (SEL-5).

    With ``p = softmax(x / T)`` and, for ``bce``, ``q = sigmoid(x / T)``:
    ``kl``: ``T^2 KL(p_teacher || p_student)``; ``reverse_kl``: ``T^2 KL(p_student || p_teacher)``;
    ``mse``: mean over the classes of ``(x_student - x_teacher)^2``, without temperature;
    ``bce``: ``T^2 sum_c KL(Bernoulli(q_teacher,c) || Bernoulli(q_student,c))``.

    Args:
        student: ``(B, C, ...)``.
        teacher: ``(B, C, ...)``, taken as constant.
        kind: ``'kl'``, ``'reverse_kl'``, ``'mse'`` or ``'bce'``.
        temperature: > 0.

    Returns:
        ``(B, ...)``, >= 0 up to rounding, 0 where the two are equal.

    Raises:
        ValueError: On another kind, a temperature <= 0 or shapes that do not fit.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            '`student` and `teacher` should have the same shape. '
            f'Found {tuple(student.shape)} and {tuple(teacher.shape)}.'
        )
    check_temperature(temperature)
    check_distance(kind, student.shape[1])
    student, teacher = full_precision(student), full_precision(teacher.detach())
    if kind == 'mse':
        return (student - teacher).square().mean(1)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    if kind == 'bce':
        distance = F.softplus(student) - F.softplus(teacher)
        distance = distance + teacher.sigmoid() * (teacher - student)
    else:
        student, teacher = student.log_softmax(1), teacher.log_softmax(1)
        first, second = (teacher, student) if kind == 'kl' else (student, teacher)
        distance = first.exp() * (first - second)
    return distance.sum(1) * temperature**2


def contrast_mask(
    wins: Tensor, valid: Tensor, teacher: int = 255, student: int = 0, void: int = 128
) -> Tensor:
    """Contrast mask: who won each unit, as an image (SEL-4).

    Args:
        wins: ``(B, ...)``, bool, where the teacher wins.
        valid: ``(B, ...)``, bool.
        teacher: Value where the teacher wins, 0 to 255.
        student: Value where the student wins, 0 to 255.
        void: Value where the label is void, 0 to 255.

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
        difference: What decides who wins, see :func:`unit_difference`.
        distance: What is distilled, see :func:`unit_distillation`.
        temperature: > 0.
        ignore_index: Label of units that are not valid.
        class_weight: ``(C,)``, >= 0, weight of each label class; 1 when absent.
        average: ``'selected'`` or ``'valid'``.

    Returns:
        A scalar; exactly 0, with gradient 0, when no unit is selected.

    Raises:
        ValueError: On unknown kinds, a temperature <= 0 or shapes that do not fit.
    """
    check_choice('average', average, AVERAGES)
    check_same_classes(student, teacher)
    check_class_weight(class_weight, student.shape[1])
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
