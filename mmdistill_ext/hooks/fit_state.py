"""The running means behind the fitting error, and their history (FIT-2, FIT-7)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import Any

from mmdistill_ext.functional import fitting_error


class FitState:
    """Sums over the last ``window`` iterations, and the history of the means (FIT-2, FIT-7).

    All numbers are sums over all ranks, so every rank has the same state.

    Args:
        window: Iterations, >= 1.

    Attributes:
        error: ``x``; None until both losses are known.
        history: One dict per measurement, ``iter`` and the scalars.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.train: deque[list[float]] = deque(maxlen=window)
        self.measured: dict[str, list[list[float]]] = {'val': [], 'train': []}
        self.error: float | None = None
        self.history: list[dict[str, float]] = []

    def add_steps(self, steps: list[list[float]]) -> None:
        """Add training steps, each ``[own loss, its weights, simple samples, valid samples]``.

        Steps that are not finite do not count: the model did not learn from them either (see
        :class:`~mmdistill_ext.hooks.skip_non_finite_hook.SkipNonFiniteHook`).
        """
        self.train.extend(step for step in steps if all(map(math.isfinite, step)))

    def add_measured(self, data: str, iteration: int, sums: list[float]) -> None:
        """Add a measurement ``[loss, weights]`` in eval mode on ``'val'`` or ``'train'`` data."""
        kept = [row for row in self.measured[data] if row[0] > iteration - self.window]
        self.measured[data] = [*kept, [iteration, *sums]]

    def update(self) -> dict[str, float]:
        """Recompute the fitting error ``x`` if both GT losses have samples (FIT-2).

        Returns:
            ``train_gt_loss``, ``train_gt_loss_eval``, ``val_gt_loss``, ``error`` and
            ``simple_share``; without samples for one of them, that one is left out.

        Raises:
            ValueError: A loss is not finite.
        """
        means = dict(
            train_gt_loss=_mean(self.train, 0, 1),
            train_gt_loss_eval=_mean(self.measured['train'], 1, 2),
            val_gt_loss=_mean(self.measured['val'], 1, 2),
            simple_share=_mean(self.train, 2, 3),
        )
        train, val = means['train_gt_loss_eval'], means['val_gt_loss']
        if train is None:
            train = means['train_gt_loss']
        if train is not None and val is not None:
            self.error = means['error'] = fitting_error(train, val)
        return {name: value for name, value in means.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        """The state as plain lists and numbers, for a checkpoint."""
        return dict(
            train=list(self.train), measured=self.measured, error=self.error, history=self.history
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.train = deque(state['train'], maxlen=self.window)
        self.measured, self.error = state['measured'], state['error']
        self.history = state['history']


def _mean(rows: Collection[list[float]], total: int, weight: int) -> float | None:
    weights = sum(row[weight] for row in rows)
    return sum(row[total] for row in rows) / weights if weights else None
