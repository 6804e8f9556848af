import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.losses import KDLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.units.base import Units


@pytest.mark.parametrize('class_weight', [None, [0.5, 2.0, 0.0, 1.0]])
def test_is_the_mean_divergence_of_all_valid_units(class_weight):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 5, 5, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 4, 10, 10, generator=generator)
    labels = torch.randint(0, 4, (2, 10, 10), generator=generator)
    labels[0, 3:] = 255
    loss = MODELS.build(
        dict(type='mmdistill_ext.KDLoss', temperature=3.0, class_weight=class_weight)
    )
    found = loss(Units(student, teacher, labels), weight=2.0)

    full = F.interpolate(student, (10, 10), mode='bilinear')
    p, q = (teacher / 3).softmax(1), (full / 3).softmax(1)
    units = 9 * (p * (p / q).log()).sum(1)
    weight = torch.tensor(class_weight or [1.0] * 4)[labels.where(labels != 255, 0)]
    weight = weight * (labels != 255)
    expected = 2 * (units * weight).sum() / weight.sum()
    assert list(found) == ['loss']
    assert isinstance(loss, KDLoss)
    torch.testing.assert_close(found['loss'], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found['loss'], student)[0],
        torch.autograd.grad(expected, student)[0],
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.parametrize('distance', [None, 'reverse_kl'])
def test_standardised_logits_are_those_of_mean_0_and_deviation_1(distance):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 4, 30, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, 4, (2, 30), generator=generator)
    found = KDLoss(distance, 2.0, standardize=True)(Units(student, teacher, labels))['loss']
    z = [
        (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        for x in (student, teacher)
    ]
    torch.testing.assert_close(found, KDLoss(distance, 2.0)(Units(*z, labels))['loss'])
    other = KDLoss(distance, 2.0)(Units(student, teacher, labels))['loss']
    assert (found - other).abs() > 0.01


def test_standardised_logits_gradcheck():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.zeros(1, 5, dtype=torch.long)
    loss = KDLoss(standardize=True)
    assert torch.autograd.gradcheck(
        lambda x: loss(Units(x, teacher, labels))['loss'], student.requires_grad_()
    )
