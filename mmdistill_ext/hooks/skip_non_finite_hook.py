"""Leaves out steps whose loss is not finite, instead of ending the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from mmdistill_ext.distillers.loss_guard import LossGuard
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.registry import HOOKS
from mmdistill_ext.taps import wrapped


@HOOKS.register_module()
class SkipNonFiniteHook(Hook):
    """Leaves out steps whose loss is not finite; without this hook such a loss ends the run.

    Weights, buffers (running statistics), the optimizer's state and the scale of a ``GradScaler``
    stay as they are, on all ranks; with accumulated gradients the whole update is left out. Each
    time a warning names terms, iteration and images. Before every update the buffers are copied.

    Args:
        limit: So many steps left out in a row, >= 1, end the run.

    Raises:
        ValueError: The limit is out of range, or the model is no distiller.
    """

    guard: LossGuard

    def __init__(self, limit: int = 10) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(
                f'`SkipNonFiniteHook.limit` should be an integer >= 1. Found {limit!r}.'
            )
        self.limit = limit
        self.skipped_in_a_row = 0
        self._undo = ExitStack()
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._updated = True  # the next iteration is the first of an update
        self._answer: tuple[int, str | None] = (-1, None)

    def before_train(self, runner: Runner) -> None:
        """Ask the model's guard before each step of the optimizer."""
        model = unwrapped_model(runner)
        guard = getattr(model, 'loss_guard', None)
        if guard is None:
            raise ValueError(
                '`SkipNonFiniteHook` needs a distiller as model, e.g. '
                f"type='mmdistill_ext.TeacherStudentDistiller'. Found {type(model).__name__}."
            )
        self.guard = guard
        guard.defers = True
        self._buffers = list(model.buffers())
        self._copies = [buffer.clone() for buffer in self._buffers]
        for wrapper in _wrappers(runner):
            self._undo.enter_context(wrapped(wrapper, 'step', self._guarded(runner)))

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Copy the buffers, which a forward pass changes, before each update."""
        if self._updated:
            self._updated = False
            _copy(self._buffers, self._copies)

    def after_train(self, runner: Runner) -> None:
        """Leave optimizer and guard as they were."""
        self._undo.close()
        self.guard.defers = False

    def _guarded(self, runner: Runner) -> Callable:
        def wrap(step: Callable) -> Callable:
            @wraps(step)  # the schedulers look for an attribute of it
            def step_if_finite(**kwargs: Any) -> None:
                if self._failure(runner) is None:
                    step(**kwargs)

            return step_if_finite

        return wrap

    def _failure(self, runner: Runner) -> str | None:
        """What was not finite before this update; asked once, however many optimizers step."""
        if self._answer[0] != runner.iter:
            self._answer = runner.iter, self.guard.failure()
            self._updated = True
            self._count(self._answer[1])
        return self._answer[1]

    def _count(self, failure: str | None) -> None:
        self.skipped_in_a_row = 0 if failure is None else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.limit:
            raise FloatingPointError(
                f'Losses should be finite. Found {failure}; that is {self.skipped_in_a_row} steps '
                'in a row (`SkipNonFiniteHook.limit`).'
            )
        if failure is not None:
            _copy(self._copies, self._buffers)
            print_log(
                f'A step is left out, its loss is not finite: {failure}.',
                logger='current',
                level=logging.WARNING,
            )


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    if source:
        torch._foreach_copy_(target, source)


def _wrappers(runner: Runner) -> Iterator[OptimWrapper]:
    """The wrapper of each optimizer."""
    wrapper = runner.optim_wrapper
    yield from wrapper.values() if isinstance(wrapper, OptimWrapperDict) else (wrapper,)
