"""A head's own cross-entropy and accuracy, from the sums of the block-wise pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_ext.functional import BlockwiseResult
from mmdistill_ext.units.base import TaskLoss


def task_losses(result: BlockwiseResult, labels: Tensor, task: TaskLoss) -> dict[str, Tensor]:
    """What mmseg's ``CrossEntropyLoss`` with ``reduction='mean'`` and ``accuracy`` would give.

    The mean is over all units, void ones included, unless ``avg_non_ignore`` is set; with class
    weights it is weighted by them, over the valid units.

    Args:
        result: Sums of a pass with ``task=True``.
        labels: ``(B, ...)``.
        task: The head's loss.

    Returns:
        The loss under its own name, and ``acc_seg`` in percent, shape ``(1,)``.
    """
    dtype = result.task_sum.dtype
    eps = torch.finfo(torch.float32).eps
    units = result.counts[0].to(dtype)
    valid = units.sum()
    if task.class_weight is not None:
        total = (units * units.new_tensor(task.class_weight)).sum()
    else:
        total = valid if task.avg_non_ignore else labels.numel()
    loss = task.loss_weight * result.task_sum / (total + eps)
    accuracy = (result.correct.to(dtype) + eps) * (100 / (valid + eps))
    if labels.shape[0] == 0:
        accuracy = torch.zeros_like(accuracy)
    return {task.name: loss, 'acc_seg': accuracy.reshape(1)}
