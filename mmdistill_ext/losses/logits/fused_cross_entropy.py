"""A head's own cross-entropy and accuracy, from the sums of the block-wise pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_ext.functional import BlockwiseResult
from mmdistill_ext.functional.checks import given
from mmdistill_ext.units.base import FusedCrossEntropy


def own_losses(
    result: BlockwiseResult, labels: Tensor, fused: FusedCrossEntropy
) -> dict[str, Tensor]:
    """What mmseg's ``CrossEntropyLoss`` with ``reduction='mean'`` and ``accuracy`` would give.

    The mean is over all units, ignored ones included, unless ``avg_non_ignore`` is set; with class
    weights it is weighted by them, over the valid units.

    Args:
        result: Sums of a pass with ``own``.
        labels: ``(B, ...)``.
        fused: The head's loss.

    Returns:
        The loss under its own name, and ``acc_seg`` in percent, shape ``(1,)``.
    """
    own_sum, correct = given(result.own_sum, 'own_sum'), given(result.correct, 'correct')
    dtype = own_sum.dtype
    eps = torch.finfo(torch.float32).eps
    valid = result.counts[0].sum().to(dtype)
    loss = own_scale(result, labels, fused) * own_sum
    accuracy = (correct.to(dtype) + eps) * (100 / (valid + eps))
    if labels.shape[0] == 0:
        accuracy = torch.zeros_like(accuracy)
    return {fused.name: loss, 'acc_seg': accuracy.reshape(1)}


def own_scale(result: BlockwiseResult, labels: Tensor, fused: FusedCrossEntropy) -> Tensor:
    """What the pass's sum is multiplied by in that loss: its weight over its denominator."""
    total = own_weight(result, fused)
    if fused.class_weight is None and not fused.avg_non_ignore:
        total = torch.full_like(total, labels.numel())
    return fused.loss_weight / (total + torch.finfo(torch.float32).eps)


def own_weight(result: BlockwiseResult, fused: FusedCrossEntropy) -> Tensor:
    """Sum of the valid units' class weights (their number without class weights)."""
    units = result.counts[0].to(given(result.own_sum, 'own_sum').dtype)
    if fused.class_weight is None:
        return units.sum()
    return (units * units.new_tensor(fused.class_weight)).sum()
