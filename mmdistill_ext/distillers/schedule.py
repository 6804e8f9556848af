"""When a distillation term counts, and how much."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.logging import print_log

from mmdistill_ext.arguments import check_arguments
from mmdistill_ext.functional.checks import check_factor

LEAST = 0.01
"""Share of its weight that a term has to reach in a run; below, nobody would see that it is on."""


@dataclass(frozen=True)
class Schedule:
    """Weight of a term over the iterations.

    Args:
        weight: Weight after the warm-up, in [0, 1e6] (see
            :func:`~mmdistill_ext.functional.checks.check_factor`).
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
        check_factor(f'{self.key}.weight', self.weight)
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

    def check_run(self, iterations: int) -> None:
        """Refuse a run in which the term never counts; warn if its warm-up does not end there.

        Args:
            iterations: Length of the run.

        Raises:
            ValueError: The term begins after the run, or reaches less than a hundredth of its
                weight.
        """
        end = iterations if self.stop is None else min(self.stop, iterations)
        length = f'{iterations} iterations' if end == iterations else f'stop={self.stop}'
        if end <= self.begin:
            raise ValueError(
                f'`{self.key}.begin` should come before the end of the run, or the loss never '
                f'counts. Found {self.begin}, and {length}.'
            )
        reached = (end - self.begin) / self.warmup if self.warmup else 1.0
        if reached < LEAST:
            raise ValueError(
                f'`{self.key}.warmup` should end within the run, or the loss hardly counts. Found '
                f'{self.warmup} after begin={self.begin}, and {length}: the weight grows to '
                f'{reached:.2g} of {self.weight}.'
            )
        if reached < 1:
            print_log(
                f'`{self.key}.warmup`={self.warmup} ends after {length}: the weight grows to '
                f'{reached:.2g} of {self.weight}.',
                logger='current',
                level=logging.WARNING,
            )


def build_schedule(cfg: Mapping, key: str) -> Schedule:
    """Build the schedule of a term from the keys that are of it.

    Args:
        cfg: ``weight``, ``begin``, ``warmup`` and ``stop``; any may be left out.
        key: The config key of the term.

    Raises:
        ValueError: A value is of another type or out of range.
    """
    check_arguments(Schedule, cfg, key, left_out=('key',))
    return Schedule(**cfg, key=key)
