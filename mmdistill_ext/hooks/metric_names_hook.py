"""Look at the names of metrics before the first iteration, not at the first validation."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdistill_ext.hooks.common import unwrapped_model
from mmdistill_ext.hooks.metric_names import check_monitored
from mmdistill_ext.registry import HOOKS


@HOOKS.register_module()
class MetricNamesHook(Hook):
    """Refuses to start when ``save_best`` names a metric that the validation does not give.

    ``tools/train.py`` adds it to every run. The names are known beforehand for mmseg's
    ``IoUMetric`` and mmdet's ``CocoMetric``; other metrics are taken as they are.

    Raises:
        ValueError: ``save_best`` of a ``CheckpointHook``, or ``monitor`` of an
            ``EarlyStoppingHook``, is no metric of the validation.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        """Look at the hooks of the run."""
        check_monitored(runner, getattr(unwrapped_model(runner), 'names', ()))
