"""The best mixture of several predictions, by an interior-point method."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_ext.functional.mixture_problem import MixtureProblem

CENTRING = 0.1
"""How far a step lowers the barrier; smaller is bolder."""
INSIDE = 0.99
"""Share of the way to the boundary that a step may go."""
SEARCHES = 6
"""Bisections of a step."""


def interior_point(problem: MixtureProblem, iterations: int) -> tuple[Tensor, Tensor]:
    """Minimise the loss over the simplex by a primal-dual method, from equal weights (COL-3).

    Args:
        problem: Of N predictions.
        iterations: Newton steps.

    Returns:
        Weights ``(N, B, U or 1)`` and their gap ``(B, U or 1)``.
    """
    count = problem.shape[0]
    weights = problem.logits.new_full(problem.shape, 1 / count)
    gradient, hessian = _derivatives(problem, weights)
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
        gradient, hessian = _derivatives(problem, weights)
        gap = _gap(weights, gradient)
        better = (gap < least) & (least > rounding)  # of a flat loss's weights the first
        best, least = weights.where(better, best), gap.where(better, least)
    return best, least


def _derivatives(problem: MixtureProblem, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ``(N, B, U)`` and Hessian ``(N, N, B, U)`` of the loss."""
    mixture = problem.mix(weights)
    away = problem.logits - mixture  # smaller numbers, the same derivatives on the simplex
    spread = None if problem.softmax else (-mixture).sigmoid_()
    residual = problem.residual_(mixture)
    memory = torch.empty_like(residual), torch.empty_like(residual)
    gradient = torch.stack([torch.mul(part, residual, out=memory[0]).sum(1) for part in away])
    if spread is not None:
        residual.mul_(spread)
    hessian = gradient.new_empty((len(away), *gradient.shape))
    for row, part in enumerate(away):
        weighted = torch.mul(part, residual, out=memory[0])
        for column in range(row, len(away)):
            entry = torch.mul(weighted, away[column], out=memory[1]).sum(1)
            if problem.softmax:
                entry -= gradient[row] * gradient[column]
            hessian[row, column] = hessian[column, row] = entry
    return problem.reduce(gradient), problem.reduce(hessian)


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


def _search(problem: MixtureProblem, weights: Tensor, step: Tensor, barrier: Tensor) -> Tensor:
    """Length ``(B, U)`` that about minimises the loss and its barrier along a step, by bisection.

    A loss of large logits is so far from a parabola that whole Newton steps would go in circles.
    """
    length = _reach(weights, step)
    start, along = problem.mix(weights), problem.mix(step)
    mixture, ratio = torch.empty_like(start), weights / step

    def rise(length: Tensor) -> Tensor:
        torch.addcmul(start, length.unsqueeze(1), along, out=mixture)
        walls = (ratio + length).reciprocal_().sum(0)
        return problem.slope_(mixture, along).addcmul_(barrier, walls, value=-1)

    width = length * (rise(length) > 0)  # 0 where the whole length is not too long
    length = length - width / 2
    for _ in range(SEARCHES - 1):
        width = width / 2
        length = length.addcmul(rise(length).sign_(), width, value=-0.5)
    return length


def _reach(values: Tensor, step: Tensor) -> Tensor:
    """Length of a step that keeps all N values above 0."""
    limits = torch.where(step < 0, -INSIDE * values / step, 1)
    return limits.amin(0).clamp(max=1)


def _gap(weights: Tensor, gradient: Tensor) -> Tensor:
    """``(B, U)``, >= 0 up to rounding."""
    return (weights * gradient).sum(0) - gradient.amin(0)
