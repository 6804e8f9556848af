"""Weights on the simplex that make a mixture of predictions fit its labels best."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmdistill_ext.functional.checks import check_choice, check_same_size
from mmdistill_ext.functional.interior_point import interior_point
from mmdistill_ext.functional.interval_search import interval_search
from mmdistill_ext.functional.logits.differences import check_difference
from mmdistill_ext.functional.mixture_problem import MixtureProblem

__all__ = ['GRANULARITIES', 'SimplexWeights', 'simplex_weights']

GRANULARITIES = ('unit', 'image')


class SimplexWeights(NamedTuple):
    """Weights of N predictions, and how far they may be from the best."""

    weights: Tensor  # (N, B, ...) or, by image, (N, B); >= 0, the sum over N is 1
    gap: Tensor  # (B, ...) or (B,), the loss is at most so much above its minimum


def simplex_weights(
    logits: Tensor,
    target: Tensor,
    *,
    per: str = 'unit',
    difference: str = 'ce',
    ignore_index: int = 255,
    background: bool = False,
    iterations: int = 20,
) -> SimplexWeights:
    """Minimise the loss of ``sum_n w_n logits_n`` over the simplex, for all units at once (COL-3).

    The loss is convex in the weights. Those of two predictions lie on an interval, where Newton's
    method with bisection finds them; those of more by a primal-dual interior-point method, the
    Hessian being ``N x N``. The gap is the Frank-Wolfe gap ``sum_n w_n g_n - min_n g_n`` of the
    gradient ``g``. There is no host sync.

    Args:
        logits: ``(N, B, C, ...)``, N >= 1.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        per: Weights for each ``'unit'``, or for each ``'image'`` by the mean over its valid units.
        difference: The loss, ``'ce'`` or ``'bce'``; see
            :func:`~mmdistill_ext.functional.logits.differences.unit_difference`.
        ignore_index: Label of units that are not valid; they get equal weights.
        background: With ``'bce'``: the label ``C`` is background, as detectors have it.
        iterations: Newton steps; of two predictions a few bisections more.

    Returns:
        The weights and their gap, without gradient; float64 for float64 logits, else float32.

    Raises:
        ValueError: On unknown kinds, or shapes and types that do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0], [0.0]], [[0.0], [2.0]]]).unsqueeze(1)  # N=2, B=1, C=2
        >>> simplex_weights(logits, torch.tensor([[0]])).weights.squeeze().round(decimals=4)
        tensor([1., 0.])
    """
    check_choice('per', per, GRANULARITIES)
    if logits.ndim < 3 or not len(logits):
        raise ValueError(
            f'`logits` should be (N, B, C, ...) with N >= 1. Found shape {tuple(logits.shape)}.'
        )
    check_same_size('logits', logits[0], target)
    check_difference(difference, logits.shape[2], background)
    by_image = per == 'image'
    problem = MixtureProblem(logits, target, by_image, difference, ignore_index, background)
    search = interval_search if len(logits) == 2 else interior_point
    weights, gap = search(problem, iterations)
    if by_image:
        return SimplexWeights(weights.squeeze(-1), gap.squeeze(-1))
    return SimplexWeights(weights.view(len(logits), *target.shape), gap.view(target.shape))
