"""What the hooks share."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.logging import MessageHub
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner


def unwrapped_model(runner: Runner) -> BaseModel:
    """The runner's model without its wrapper for distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def publish(hub: MessageHub, scalars: Mapping[str, float | None]) -> None:
    """Make scalars the message hub's current values.

    A value replaces its history: the log processor averages over the history of every scalar with
    'loss' or 'time' in its name, which the name of a class may contain.
    """
    for key, value in scalars.items():
        hub.log_scalars.pop(key, None)
        if value is not None:
            hub.update_scalar(key, value)
