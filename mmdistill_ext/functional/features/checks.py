"""What the losses of features demand of their arguments."""

from __future__ import annotations

from torch import Tensor


def check_features(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> None:
    """Raise ``ValueError`` unless features are floating ``(B, C, h, w)`` of one shape.

    Args:
        student: ``(B, C, h, w)``.
        teacher: ``(B, C, h, w)``.
        weight: ``(B, 1, h, w)``, or None.
    """
    if student.ndim != 4 or student.shape != teacher.shape or not student.is_floating_point():
        raise ValueError(
            '`student` and `teacher` should be floating point features (B, C, h, w) of one shape. '
            f'Found {student.dtype} of {tuple(student.shape)} and {tuple(teacher.shape)}.'
        )
    expected = (len(student), 1, *student.shape[2:])
    if weight is not None and tuple(weight.shape) != expected:
        raise ValueError(f'`weight` should have the shape {expected}. Found {tuple(weight.shape)}.')
