import pytest
import torch

from mmdistill_ext.functional.features.cwd import channel_distillation
from mmdistill_ext.losses import CWDLoss
from mmdistill_ext.units.features import Features


def test_it_is_the_mean_over_the_images():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    found = CWDLoss(2.0)(Features(student, teacher), 50.0)['loss']
    expected = 50 * channel_distillation(student, teacher, 2.0).mean()
    torch.testing.assert_close(found, expected)


def test_temperature_has_to_be_positive():
    with pytest.raises(ValueError, match='`temperature`.*Found temperature=0'):
        CWDLoss(temperature=0)
