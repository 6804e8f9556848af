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
    valid = result.counts[0].sum().to(dtype)
    loss = task_scale(result, labels, task) * result.task_sum
    accuracy = (result.correct.to(dtype) + eps) * (100 / (valid + eps))
    if labels.shape[0] == 0:
        accuracy = torch.zeros_like(accuracy)
    return {task.name: loss, 'acc_seg': accuracy.reshape(1)}


def task_scale(result: BlockwiseResult, labels: Tensor, task: TaskLoss) -> Tensor:
    """What the pass's sum is multiplied by in that loss: its weight over its denominator."""
    total = task_weight(result, task)
    if task.class_weight is None and not task.avg_non_ignore:
        total = torch.full_like(total, labels.numel())
    return task.loss_weight / (total + torch.finfo(torch.float32).eps)


def task_weight(result: BlockwiseResult, task: TaskLoss) -> Tensor:
    """Sum of the valid units' class weights (their number without class weights)."""
    units = result.counts[0].to(result.task_sum.dtype)
    if task.class_weight is None:
        return units.sum()
    return (units * units.new_tensor(task.class_weight)).sum()
