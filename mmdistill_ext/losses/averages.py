"""What the sums over units are divided by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor

from mmdistill_ext.functional import BlockwiseResult
from mmdistill_ext.functional.checks import check_factor

AVERAGES = ('selected', 'valid', 'positive')


def denominators(result: BlockwiseResult, average: str, class_weight: Tensor | None) -> Tensor:
    """This rank's part of what the distillation is divided by, and of the positive units.

    Args:
        result: Sums of a pass; background is the last label of a detector.
        average: ``'selected'``, ``'valid'`` or ``'positive'``.
        class_weight: ``(classes,)``, or None.

    Returns:
        ``(2,)``.
    """
    units = result.counts[0].to(result.distill_weight)
    positives = units[:-1].sum()
    if average == 'selected':
        return torch.stack((result.distill_weight, positives))
    if average == 'positive':
        return torch.stack((positives, positives))
    return torch.stack(((units if class_weight is None else units * class_weight).sum(), positives))


def scale_of(total: Tensor, average: str) -> Tensor:
    """Factor of a rank's sum, given all ranks' denominator: 0 without units to divide by.

    Detectors divide by at least one positive unit, so that an image without any still counts.
    """
    if average == 'positive':
        return get_world_size() / total.clamp(min=1)
    return torch.where(total > 0, get_world_size() / total, 0)


def class_weight_tensor(values: Sequence[float] | None) -> Tensor | None:
    """Class weights as a tensor.

    Raises:
        ValueError: They are not in [0, 1e6], or all are 0: then nothing would be learned.
    """
    if values is None:
        return None
    weights = [float(value) for value in values]
    for weight in weights:
        check_factor('class_weight', weight)
    if not any(weights):
        raise ValueError(
            f'`class_weight` should have a weight above 0. Found {list(values)}: nothing would be '
            'learned.'
        )
    return torch.tensor(weights, dtype=torch.float32)


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of values by weights over all ranks, as a loss whose gradients DDP averages.

    Args:
        values: ``(B, 1, h, w)``, with gradient.
        weight: Of the same shape, >= 0; None: all count alike. Other ranks may have weights.

    Returns:
        A scalar; exactly 0, with gradient 0 for finite values, when all weights are 0.
    """
    if weight is None:
        total, weighted = values.new_tensor(values.numel()), values
    else:
        weight = weight.to(values)
        total, weighted = weight.sum(), (values * weight).where(weight > 0, 0)
    all_reduce(total)
    return weighted.sum() * scale_of(total, 'selected')
