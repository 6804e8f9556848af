"""Channel-wise distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_ext.functional.checks import check_temperature
from mmdistill_ext.functional.features.checks import check_features
from mmdistill_ext.functional.precision import full_precision


def channel_distillation(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, weight: Tensor | None = None
) -> Tensor:
    """KL divergence of the channels' spatial distributions (CWD, arXiv:2011.13256, eq. 4).

    ``T^2 / C sum_c KL(softmax_i(t_ci / T) || softmax_i(s_ci / T))``, ``i`` over the locations of an
    image. It does not grow with the image: a softmax over the locations sums to 1.

    Args:
        student: ``(B, C, h, w)``.
        teacher: ``(B, C, h, w)``, taken as constant.
        temperature: > 0.
        weight: ``(B, 1, h, w)``, >= 0: each location counts in both distributions as if it were
            there so many times; with 0 it is left out, whatever is in it.

    Returns:
        ``(B,)`` float32 (float64 for float64); exactly 0 for an image without a location.

    Raises:
        ValueError: A temperature <= 0, or shapes that do not fit.

    Example:
        >>> import torch
        >>> features = torch.randn(2, 3, 4, 4)
        >>> loss = channel_distillation(features, features + 1)  # a shift changes nothing
        >>> torch.allclose(loss, torch.zeros(2), atol=1e-5)
        True
    """
    check_temperature(temperature)
    check_features(student, teacher, weight)
    student, teacher = (
        full_precision(x).flatten(2) / temperature for x in (student, teacher.detach())
    )
    if weight is not None:
        weight = full_precision(weight).flatten(2)
        none = (weight > 0).sum(-1, keepdim=True) == 0  # an image without a location: all count
        dropped = (weight <= 0) & ~none
        log_weight = weight.masked_fill(weight <= 0, 1).log()
        student, teacher = (
            (x.masked_fill(weight <= 0, 0) + log_weight).masked_fill(dropped, -torch.inf)
            for x in (student, teacher)
        )
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    difference = teacher - student
    if weight is not None:
        difference = difference.masked_fill(dropped, 0)
        difference = difference.masked_fill(none, 0)
    return (teacher.exp() * difference).sum(-1).mean(1) * temperature**2
