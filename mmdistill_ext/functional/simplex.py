"""Weights on the simplex that make a mixture of predictions fit its labels best."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.checks import check_choice, check_same_size
from mmdistill_ext.functional.logits.differences import check_difference
from mmdistill_ext.functional.precision import full_precision

__all__ = ['GRANULARITIES', 'SimplexWeights', 'simplex_weights']

GRANULARITIES = ('unit', 'image')
CENTRING = 0.1
"""How far a step lowers the barrier; smaller is bolder."""
INSIDE = 0.99
"""Share of the way to the boundary that a step may go."""
SEARCHES = 6
"""Bisections of a step."""
ROUNDING = 4
"""A gap of so many units in the last place of the logits is none."""


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

    A primal-dual interior-point method: the loss is convex in the weights, its Hessian is
    ``N x N``. The gap is the Frank-Wolfe gap ``sum_n w_n g_n - min_n g_n`` of the gradient ``g``.
    Nothing waits for the device.

    Args:
        logits: ``(N, B, C, ...)``, N >= 1.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        per: Weights for each ``'unit'``, or for each ``'image'`` by the mean over its valid units.
        difference: The loss, ``'ce'`` or ``'bce'``; see
            :func:`~mmdistill_ext.functional.logits.differences.unit_difference`.
        ignore_index: Label of units that are not valid; they get equal weights.
        background: With ``'bce'``: the label ``C`` is background, as detectors have it.
        iterations: Newton steps.

    Returns:
        The weights and their gap, without gradient; float64 for float64 logits, else float32.

    Raises:
        ValueError: On unknown kinds, or shapes and types that do not fit.

    Example:
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
    problem = _Problem(logits, target, per, difference, ignore_index, background)
    weights, gap = _interior_point(problem, iterations)
    if per == 'image':
        return SimplexWeights(weights.squeeze(-1), gap.squeeze(-1))
    return SimplexWeights(weights.view(len(logits), *target.shape), gap.view(target.shape))


class _Problem:
    """The loss's gradient and Hessian with respect to the weights, ``(N, B, U or 1)``.

    Logits are shifted so that the label's is 0, or with ``'bce'`` turned so that every channel's
    target is 0: on the simplex the losses stay what they are, and no longer need the labels.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        per: str,
        difference: str,
        ignore_index: int,
        background: bool,
    ) -> None:
        count, images, channels = logits.shape[:3]
        units = math.prod(target.shape[1:])
        target = target.reshape(images, 1, units)
        valid = target != ignore_index
        logits = full_precision(logits.detach()).reshape(count, images, channels, units)
        self.softmax = difference == 'ce'
        if self.softmax:
            label = target.long().where(valid, 0).expand(count, *target.shape)
            logits = logits - logits.gather(2, label)
        else:
            binary = channels == 1 and not background
            classes = torch.arange(channels, device=target.device).view(-1, 1) + binary
            logits = torch.where(target == classes, -logits, logits)  # the label C has no channel
        self.logits = logits.masked_fill(~valid, 0)  # which adds nothing to any sum
        if per == 'image':
            self.share = 1 / valid.sum(-1, keepdim=True).clamp(min=1).to(self.logits)
        self.by_image = per == 'image'
        self.shape = (count, images, 1 if self.by_image else units)

    def __call__(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``(N, B, U)`` and Hessian ``(N, N, B, U)``."""
        mixture = self.mix(weights)
        away = self.logits - mixture  # smaller numbers, the same derivatives on the simplex
        residual = self.residual(mixture)
        gradient = (away * residual).sum(2)
        spread = residual if self.softmax else residual * (-mixture).sigmoid()
        hessian = torch.stack([(away * (spread * part)).sum(2) for part in away])
        if self.softmax:
            hessian = hessian - gradient.unsqueeze(0) * gradient.unsqueeze(1)
        return self._reduce(gradient), self._reduce(hessian)

    def mix(self, weights: Tensor) -> Tensor:
        """``sum_n w_n logits_n``, ``(B, C, U)``."""
        return (weights.unsqueeze(2) * self.logits).sum(0)

    def slope(self, mixture: Tensor, along: Tensor) -> Tensor:
        """Derivative of the loss at logits ``mixture`` in the direction ``along``, ``(B, U)``."""
        return self._reduce((self.residual(mixture) * along).sum(1).unsqueeze(0)).squeeze(0)

    def residual(self, mixture: Tensor) -> Tensor:
        """Derivative of the loss with respect to its logits, ``(B, C, U)``; the label's is free."""
        return mixture.softmax(1) if self.softmax else mixture.sigmoid()

    def rounding(self) -> Tensor:
        """Size of a gap that is no more than rounding, ``(B, U)``."""
        largest = self.logits.abs().amax((0, 2)).unsqueeze(0)
        return ROUNDING * torch.finfo(largest.dtype).eps * self._reduce(largest).squeeze(0)

    def _reduce(self, values: Tensor) -> Tensor:
        if not self.by_image:
            return values
        return values.sum(-1, keepdim=True) * self.share.squeeze(1).unsqueeze(0)


def _interior_point(problem: _Problem, iterations: int) -> tuple[Tensor, Tensor]:
    """Weights ``(N, B, U)`` and gap ``(B, U)``."""
    count = problem.shape[0]
    weights = problem.logits.new_full(problem.shape, 1 / count)
    gradient, hessian = problem(weights)
    slack = (gradient - gradient.amin(0) + 1).clamp(min=1)  # of the bounds w >= 0
    best, least = weights, _gap(weights, gradient)
    rounding = problem.rounding()
    for _ in range(iterations):
        barrier = CENTRING * (weights * slack).sum(0) / count
        step = _newton_step(weights, slack, gradient, hessian, barrier)
        change = barrier / weights - slack - slack / weights * step
        length = _search(problem, weights, step, barrier)
        weights = weights + length * step
        weights = weights / weights.sum(0)
        slack = slack + torch.minimum(length, _reach(slack, change)) * change
        gradient, hessian = problem(weights)
        gap = _gap(weights, gradient)
        better = (gap < least) & (least > rounding)  # of a flat loss's weights the first
        best, least = weights.where(better, best), gap.where(better, least)
    return best, least


def _newton_step(
    weights: Tensor, slack: Tensor, gradient: Tensor, hessian: Tensor, barrier: Tensor
) -> Tensor:
    """Of the weights; their sum stays. Solves the two conditions that the slack leaves."""
    diagonal = torch.diag_embed((slack / weights).movedim(0, -1))
    matrix = hessian.movedim((0, 1), (-2, -1)) + diagonal
    right = torch.stack((barrier / weights - gradient, torch.ones_like(gradient)), 0)
    solved = torch.linalg.solve_ex(matrix, right.movedim((0, 1), (-1, -2)))[0]
    free, level = solved.movedim((-1, -2), (0, 1))  # (N, B, U) each
    return free - free.sum(0) / level.sum(0) * level


def _search(problem: _Problem, weights: Tensor, step: Tensor, barrier: Tensor) -> Tensor:
    """Length ``(B, U)`` that about minimises the loss and its barrier along a step, by bisection.

    A loss of large logits is so far from a parabola that whole Newton steps would go in circles.
    """
    low, high = torch.zeros_like(barrier), _reach(weights, step)
    start, along = problem.mix(weights), problem.mix(step)

    def rises(length: Tensor) -> Tensor:
        slope = problem.slope(torch.addcmul(start, length.unsqueeze(1), along), along)
        return slope - barrier * (step / (weights + length * step)).sum(0) > 0

    length = high
    for _ in range(SEARCHES):
        up = rises(length)
        low, high = torch.where(up, low, length), torch.where(up, length, high)
        length = (low + high) / 2
    return length


def _reach(values: Tensor, step: Tensor) -> Tensor:
    """Length of a step that keeps all N values above 0."""
    limits = torch.where(step < 0, -INSIDE * values / step, 1)
    return limits.amin(0).clamp(max=1)


def _gap(weights: Tensor, gradient: Tensor) -> Tensor:
    """``(B, U)``, >= 0 up to rounding."""
    return (weights * gradient).sum(0) - gradient.amin(0)
