import math

import pytest
import torch

from mmdistill_ext.hooks.networks_validation import NetworksValidation
from mmdistill_ext.policies.second_predictions import General, MinLoss, ValidationWeighted


def made(metrics=None, errors=None):
    return NetworksValidation(['a', 'b'], metrics or {}, errors)


@pytest.mark.parametrize('value', [None, math.nan, math.inf])
def test_scores_are_finite_or_none(value):
    metrics = {'a/mIoU': 3, 'ensemble/mIoU': 5.0}
    if value is not None:
        metrics['b/mIoU'] = value
    validation = made(metrics)
    assert validation.scores('mIoU') == [3.0, None]
    assert validation.score('ensemble', 'mIoU') == 5.0


def test_errors_are_measured_only_for_a_policy_that_asks():
    asked = []

    def measure():
        asked.append(1)
        return torch.eye(2, dtype=torch.float64)

    validation = made({'a/mIoU': 1.0, 'b/mIoU': 1.0}, measure)
    assert MinLoss().find_weights(validation) is None
    assert ValidationWeighted('mIoU', 1.0).find_weights(validation).tolist() == [0.5, 0.5]
    assert not asked
    assert General().find_weights(validation).tolist() == [0.5, 0.5]
    assert asked == [1]
