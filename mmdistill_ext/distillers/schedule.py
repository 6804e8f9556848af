"""When a distillation term counts, and how much."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Weight of a term over the iterations.

    Args:
        weight: Weight after the warm-up, >= 0.
        begin: First iteration (from 0) at which the term counts.
        warmup: Iterations over which the weight grows linearly, from ``weight / warmup``; or 0.
        stop: First iteration at which it counts no more; None for never.

    Raises:
        ValueError: A value is out of range; ``key`` says of which term.
    """

    weight: float = 1.0
    begin: int = 0
    warmup: int = 0
    stop: int | None = None
    key: str = 'losses'

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f'`{self.key}.weight` should be >= 0. Found {self.weight}.')
        for name in ('begin', 'warmup'):
            if getattr(self, name) < 0:
                raise ValueError(
                    f'`{self.key}.{name}` should be >= 0. Found {getattr(self, name)}.'
                )
        if self.stop is not None and self.stop <= self.begin:
            raise ValueError(
                f'`{self.key}.stop` should come after `begin`={self.begin}. Found {self.stop}.'
            )

    def at(self, iteration: int) -> float:
        """Weight at an iteration, counted from 0."""
        if iteration < self.begin or (self.stop is not None and iteration >= self.stop):
            return 0.0
        if not self.warmup:
            return float(self.weight)
        return self.weight * min(1.0, (iteration - self.begin + 1) / self.warmup)
