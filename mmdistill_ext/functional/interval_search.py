"""The best mixture of two predictions, by a search on an interval."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdistill_ext.functional.mixture_problem import MixtureProblem

BISECTIONS = 6
"""Of large logits, so many steps find the interval that Newton's method is at home in."""


def interval_search(problem: MixtureProblem, iterations: int) -> tuple[Tensor, Tensor]:
    """Minimise the loss over the weights ``(w, 1 - w)`` of two predictions (COL-3).

    The loss is convex in ``w``: its slope changes sign once, or an end of the interval is best.
    Newton's method on the slope, which bisects where a step leaves the interval that the minimum
    is known to lie in, or is not half as long as the one before. The middle comes first, then the
    end that the loss falls to from there.

    Args:
        problem: Of two predictions.
        iterations: Newton steps, beside a few bisections.

    Returns:
        Weights ``(2, B, U or 1)`` and their gap ``(B, U or 1)``.
    """
    search = _Search(problem)
    search.look(iterations)
    return torch.stack((search.best, 1 - search.best)), search.least


class _Search:
    """The interval that holds the minimum, and the best weight so far; ``(B, U or 1)`` each.

    Args:
        problem: Of two predictions.

    Attributes:
        best: Weight of the first prediction.
        least: Its gap; NaN where the logits are not finite.
    """

    def __init__(self, problem: MixtureProblem) -> None:
        self.problem = problem
        first, self.second = problem.logits
        self.along = first - self.second
        self.mixture = torch.empty_like(self.along)
        middle = first.new_full(problem.shape[1:], 0.5)
        self.low, self.high = torch.zeros_like(middle), torch.ones_like(middle)
        self.best, self.least = middle, torch.full_like(middle, torch.inf)
        self.rounding = problem.rounding()

    def look(self, iterations: int) -> None:
        """Search for the minimum."""
        share, moved = self.best, torch.ones_like(self.best)
        for iteration in range(iterations + BISECTIONS):
            slope, curvature = self.problem.slope_and_curvature_(self._mix(share), self.along)
            if iteration == 0:
                self._begin(share, slope)
            else:
                self._learn(share, slope)
            following = share - slope / curvature
            close = (following - share).abs() < moved / 2
            newton = close & (following > self.low) & (following < self.high)
            following = following.where(newton, (self.low + self.high) / 2)
            share, moved = following, (following - share).abs()

    def _begin(self, middle: Tensor, slope: Tensor) -> None:
        """Compare the middle and the end that the loss falls to; the other is no better."""
        gap = _gap(middle, slope)
        self.least = gap.where(gap.isfinite(), torch.nan)
        self._learn(middle, slope)
        end = (slope < 0).to(slope)
        self._learn(end, self.problem.slope_(self._mix(end), self.along))

    def _learn(self, share: Tensor, slope: Tensor) -> None:
        """Keep the best weight, and the part of the interval that holds the minimum."""
        gap = _gap(share, slope)
        better = (gap < self.least) & (self.least > self.rounding)  # of a flat loss the middle
        self.best, self.least = share.where(better, self.best), gap.where(better, self.least)
        falls = slope < 0
        self.low, self.high = share.where(falls, self.low), self.high.where(falls, share)

    def _mix(self, share: Tensor) -> Tensor:
        """Logits of the mixture, in memory that the next ones use again."""
        return torch.addcmul(self.second, self.along, share.unsqueeze(1), out=self.mixture)


def _gap(share: Tensor, slope: Tensor) -> Tensor:
    """Frank-Wolfe gap of the weights ``(share, 1 - share)``, >= 0."""
    return torch.maximum(share * slope, (share - 1) * slope)
