import pytest
import torch

from mmdistill_ext.losses import FeatureLoss
from mmdistill_ext.units.features import Features


def features(weight=None):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    return Features(student, teacher, weight)


def test_it_is_the_mean_over_all_values():
    data = features()
    found = FeatureLoss()(data, 0.5)['loss']
    torch.testing.assert_close(found, 0.5 * (data.student - data.teacher).square().mean())


def test_locations_count_by_their_weights():
    weight = torch.rand(2, 1, 4, 5)
    data = features(weight)
    found = FeatureLoss('cosine')(data)['loss']
    cosine = torch.nn.functional.cosine_similarity(data.student, data.teacher, 1)
    expected = ((1 - cosine) * weight[:, 0]).sum() / weight.sum()
    torch.testing.assert_close(found, expected)


def test_no_location_is_exactly_0():
    data = features(torch.zeros(2, 1, 4, 5))
    data.student.requires_grad_()
    loss = FeatureLoss()(data)['loss']
    loss.backward()
    assert loss == 0
    assert not data.student.grad.any()


def test_unknown_distance_is_named():
    with pytest.raises(ValueError, match="`distance`.*'l7'"):
        FeatureLoss('l7')
