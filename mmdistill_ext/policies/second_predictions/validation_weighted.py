"""Second prediction of a mixture in which better networks count more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdistill_ext.functional import validation_weights
from mmdistill_ext.functional.checks import check_positive
from mmdistill_ext.policies.second_predictions.base import Validation, WeightedMean, warn
from mmdistill_ext.registry import SECOND_PREDICTIONS


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class ValidationWeighted(WeightedMean):
    """A mixture by each network's validation metric (COL-3; CN111598182A, with a formula of ours).

    ``z = sum_n w_n z_n`` with ``w = softmax(metric / temperature)``; equal weights before the first
    validation.

    Args:
        metric: Name of the metric as the evaluator gives it, e.g. ``'mIoU'`` or
            ``'coco/bbox_mAP'``; the larger the better.
        temperature: > 0, in the metric's unit: a network whose metric is larger by so much counts
            e times as much.

    Raises:
        ValueError: The temperature is not above 0.
    """

    metric: str
    temperature: float
    weights_from = 'metric'

    def __post_init__(self) -> None:
        check_positive('second.temperature', self.temperature)

    def find_weights(self, validation: Validation) -> Tensor | None:
        """``softmax(metric / temperature)``, ``(N,)``; None unless every network has the metric."""
        scores = validation.scores(self.metric)
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            warn(f'Not every network has a {self.metric} yet: the weights stay.')
            return None
        return validation_weights(known, self.temperature)
