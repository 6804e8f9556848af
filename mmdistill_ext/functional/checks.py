"""What every function of this package demands of its arguments, each rule written once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

AVERAGES = ('selected', 'valid')
TEMPERATURES = (0.001, 1000)
MOST = 1e6

T = TypeVar('T')


def num_label_classes(channels: int, background: bool = False) -> int:
    """Number of label values of logits with so many channels.

    With ``background`` there is one more than channels, else one channel is a binary head.
    """
    return channels + 1 if background else max(channels, 2)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f'`{name}` should be one of {", ".join(allowed)}. Found {name}={value!r}.')


def check_temperature(temperature: float, name: str = 'temperature') -> None:
    """Raise ``ValueError`` unless the temperature of a softmax is in [0.001, 1000].

    Logits that differ by 1 give, at ``T`` = 1000, probabilities that differ by 1e-3 and a
    divergence of 5e-7: above, it drowns in the rounding of float32 (1.2e-7). At ``T`` = 0.001 the
    softmax is one-hot and its gradient, times ``T^2``, nothing: below, nothing is learned.
    """
    low, high = TEMPERATURES
    if not _is_number(temperature) or not low <= temperature <= high:
        raise ValueError(
            f'`{name}` should be a finite number > 0, in [{low}, {high}]. Found '
            f'{name}={temperature!r}.'
        )


def check_base(b: float) -> None:
    """Raise ``ValueError`` unless the base of an evaluation function is a finite number above 1."""
    if not _is_number(b) or b <= 1:
        raise ValueError(f'`b` should be a finite number > 1. Found b={b!r}.')


def check_threshold(threshold: float, name: str = 'threshold') -> None:
    """Raise ``ValueError`` unless the threshold is in (0, 1]."""
    if not _is_number(threshold) or not 0 < threshold <= 1:
        raise ValueError(f'`{name}` should be in (0, 1]. Found {name}={threshold!r}.')


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless the value is a finite number above 0."""
    if not _is_number(value) or value <= 0:
        raise ValueError(f'`{name}` should be a finite number > 0. Found {name}={value!r}.')


def check_images(shape: Sequence[int]) -> None:
    """Raise ``ValueError`` unless every image has units to be split by."""
    if len(shape) < 2:
        raise ValueError(
            "`split='image'` needs images of units, labels (B, ...). Found labels of shape "
            f"{tuple(shape)}: use split='unit'."
        )


def check_factor(name: str, value: float) -> None:
    """Raise ``ValueError`` unless a factor of losses is in [0, 1e6].

    The largest weights of published losses are some 3e4. From 2^24 = 1.7e7 on, the sum of losses in
    float32 does not see the other ones any more.
    """
    if not _is_number(value) or not 0 <= value <= MOST:
        raise ValueError(
            f'`{name}` should be a finite number >= 0, at most {MOST:.0e}. Found {name}={value!r}.'
        )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def given(value: T | None, name: str) -> T:
    """The value; ``RuntimeError`` for None, where only a caller's mistake can leave it out."""
    if value is None:
        raise RuntimeError(f'`{name}` is needed here and was not given.')
    return value


def check_logits(name: str, logits: Tensor, target: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless logits are floating ``(B, C, ...)`` of the target's rank."""
    if not logits.is_floating_point() or logits.ndim < 2 or logits.shape[1] == 0:
        raise ValueError(
            f'`{name}` should be floating point logits (B, C, ...) with C >= 1. '
            f'Found {logits.dtype} of shape {tuple(logits.shape)}.'
        )
    if target is None:
        return
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise ValueError(f'`target` should hold integer class indices. Found {target.dtype}.')
    if target.ndim != logits.ndim - 1 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f'`target` should have the shape (B, ...) of `{name}` without its classes. '
            f'Found {tuple(target.shape)} for logits of shape {tuple(logits.shape)}.'
        )


def check_levels(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor] | Tensor,
    target: Tensor,
    names: tuple[str, str] = ('student', 'teacher'),
) -> None:
    """Raise ``ValueError`` unless both have the same levels, with one label per unit."""
    shapes, other = ([tuple(level.shape) for level in levels] for levels in (student, teacher))
    floating = all(level.is_floating_point() for level in (*student, *teacher))
    alike = {(len(shape), *shape[:3:2]) for shape in shapes}
    if not floating or len(alike) != 1 or next(iter(alike))[0] != 4 or not shapes[0][2]:
        raise ValueError(
            'Levels should be floating point logits (B, A, C, n) of equal B and C >= 1. '
            f'Found {shapes}.'
        )
    if shapes != other:
        raise ValueError(
            f'`{names[0]}` and `{names[1]}` should have the same levels. '
            f'Found {shapes} and {other}.'
        )
    units = (shapes[0][0], sum(shape[1] * shape[3] for shape in shapes))
    if target.dtype == torch.bool or target.is_floating_point() or tuple(target.shape) != units:
        raise ValueError(
            f'`target` should hold integer class indices of shape {units}. '
            f'Found {target.dtype} of shape {tuple(target.shape)}.'
        )


def check_same_size(name: str, logits: Tensor, target: Tensor) -> None:
    """Raise ``ValueError`` unless there is one label per unit of the logits."""
    check_logits(name, logits, target)
    if logits.shape[2:] != target.shape[1:]:
        raise ValueError(
            f'`target` should have one label per unit of `{name}`. '
            f'Found {tuple(target.shape)} for logits of shape {tuple(logits.shape)}.'
        )


def check_same_classes(
    student: Tensor, teacher: Tensor, names: tuple[str, str] = ('student', 'teacher')
) -> None:
    """Raise ``ValueError`` unless student and teacher agree in batch and classes."""
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f'`{names[0]}` and `{names[1]}` should have the same batch size and number of classes. '
            f'Found {tuple(student.shape)} and {tuple(teacher.shape)}.'
        )


def check_units(name: str, values: Tensor | None, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` unless there is one value per unit."""
    if values is not None and values.shape != shape:
        raise ValueError(
            f'`{name}` should have the shape of the labels, {tuple(shape)}. '
            f'Found {tuple(values.shape)}.'
        )


def check_class_weight(class_weight: Tensor | None, classes: int) -> None:
    """Raise ``ValueError`` unless there is one weight per class."""
    if class_weight is not None and tuple(class_weight.shape) != (classes,):
        raise ValueError(
            f'`class_weight` should hold one weight per class, shape {(classes,)}. '
            f'Found shape {tuple(class_weight.shape)}.'
        )


def check_labels(target: Tensor, num_classes: int, ignore_index: int = 255) -> None:
    """Raise ``ValueError`` when a label is neither a class nor ignored.

    Looks at the values, which on a GPU is a host sync: for the start of a run, not for every step.

    Args:
        target: Class indices of any shape.
        num_classes: Number of classes of the labels; 2 for a binary head with one channel.
        ignore_index: Label of units that are ignored.

    Raises:
        ValueError: Names the offending values.
    """
    values = target.unique()
    wrong = values[((values < 0) | (values >= num_classes)) & (values != ignore_index)].tolist()
    if wrong:
        shown = ', '.join(map(str, wrong[:10])) + (', ...' if len(wrong) > 10 else '')
        raise ValueError(
            f'Labels should be in [0, {num_classes}) or ignore_index={ignore_index}. '
            f'Found the values {shown}.'
        )
