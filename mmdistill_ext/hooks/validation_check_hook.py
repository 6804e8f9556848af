"""Look at what the first validation needs before the first iteration."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdistill_ext.error_keys import errors_of_part
from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.metric_names import check_monitored
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.registry import HOOKS


@HOOKS.register_module()
class ValidationCheckHook(Hook):
    """Refuses to start when the first validation would fail, thousands of iterations later.

    ``tools/train.py`` adds it to every run. ``save_best`` has to name a metric that the validation
    gives (known beforehand for mmseg's ``IoUMetric`` and mmdet's ``CocoMetric``), and the model
    predicts on the first validation image, which changes nothing of the training.

    Raises:
        ValueError: ``save_best`` of a ``CheckpointHook``, or ``monitor`` of an
            ``EarlyStoppingHook``, is no metric of the validation, or a model cannot predict; the
            message names the key.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        """Look at the hooks of the run, and predict once."""
        model = unwrapped_model(runner)
        check_monitored(runner, getattr(model, 'names', ()))
        if runner.val_loop is None:
            return
        loader = runner.val_dataloader
        with isolated_rng(), eval_mode(model), torch.no_grad():
            batch = loader.collate_fn([loader.dataset[0]])
            for key, network in networks_of(model):
                with errors_of_part(key):
                    predict(network, batch)


def networks_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Config key of each model that predicts on its own, and the model."""
    if hasattr(model, 'students'):
        for name, network in model.students.items():
            yield f'students.{name}', network
    else:
        yield 'student' if hasattr(model, 'distillation') else 'model', model


def predict(network: Any, batch: dict) -> None:
    """Predict on a batch of the loader, and forget the prediction."""
    batch = deepcopy(batch)  # a preprocessor pads the labels of the samples in place
    network(**network.data_preprocessor(batch, False), mode='predict')
