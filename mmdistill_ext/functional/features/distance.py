"""Distances between features, location by location."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.functional.features.checks import check_features
from mmdistill_ext.functional.precision import full_precision

FEATURE_DISTANCES = ('mse', 'cosine')


def feature_distance(student: Tensor, teacher: Tensor, distance: str = 'mse') -> Tensor:
    """Distance between two feature vectors at every location (FitNets, arXiv:1412.6550, eq. 3).

    ``mse``: mean over the channels of ``(s - t)^2``. ``cosine``: ``1 - s.t / (|s| |t|)``.

    Args:
        student: ``(B, C, h, w)``.
        teacher: ``(B, C, h, w)``, taken as constant.
        distance: ``'mse'`` or ``'cosine'``.

    Returns:
        ``(B, 1, h, w)`` float32 (float64 for float64), >= 0 up to rounding.

    Raises:
        ValueError: On another distance, or shapes that do not fit.

    Example:
        >>> import torch
        >>> feature_distance(torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)).item()
        1.0
    """
    check_choice('distance', distance, FEATURE_DISTANCES)
    check_features(student, teacher)
    student, teacher = full_precision(student), full_precision(teacher.detach())
    if distance == 'mse':
        return (student - teacher).square().mean(1, keepdim=True)
    return 1 - F.cosine_similarity(student, teacher, dim=1).unsqueeze(1)
