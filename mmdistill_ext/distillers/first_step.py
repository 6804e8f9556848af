"""What is checked in the first step of a run, and how its errors are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from mmengine.logging import MessageHub

from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.error_keys import errors_of_part

P = ParamSpec('P')
T = TypeVar('T')


def check_schedules(schedules: Sequence[Schedule]) -> None:
    """Refuse terms that never count in the run that starts, where its length is known.

    Raises:
        ValueError: A term never counts; the message names its key.
    """
    iterations = MessageHub.get_current_instance().get_info('max_iters', None)
    if isinstance(iterations, int):
        for schedule in schedules:
            schedule.check_run(iterations)


def named_at_first(key: str, call: Callable[P, T]) -> Callable[P, T]:
    """A call whose errors name a config key; for the first step, where configs show their faults.

    Later errors stay what they are: a config that took the first step is not to blame.
    """

    @wraps(call, updated=())
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        with errors_of_part(key):
            return call(*args, **kwargs)

    return named
