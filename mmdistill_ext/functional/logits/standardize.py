"""Logit standardisation, before any softened comparison of logits."""

from __future__ import annotations

import torch
from torch import Tensor


def standardize_logits(logits: Tensor) -> Tensor:
    """Z-score over the classes (LSKD, Sun et al., CVPR 2024, https://arxiv.org/abs/2403.01427).

    ``(x - mean(x)) / std(x)``, where ``std`` divides by ``C`` (the authors' code divides by
    ``C - 1``, which is the same as another temperature). The student then learns how the teacher
    ranks and spaces the classes, not the size of its logits. Where all logits of a unit are equal,
    up to rounding, they only lose their mean: the result is 0 and the gradient is finite.

    Args:
        logits: ``(B, C, ...)``, float32 or float64.

    Returns:
        The same shape.

    Example:
        >>> import torch
        >>> standardize_logits(torch.tensor([[1.0, 3.0], [4.0, 4.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    variance, mean = torch.var_mean(logits, 1, correction=0, keepdim=True)
    equal = variance <= (16 * torch.finfo(logits.dtype).eps * mean).square()
    return (logits - mean) * variance.masked_fill(equal, 1).rsqrt()
