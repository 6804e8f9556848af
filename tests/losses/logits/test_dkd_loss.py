import math

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import Labels, standardize_logits, unit_distillation
from mmdistill_ext.functional.logits.dkd import DKD, decouple
from mmdistill_ext.losses import DKDLoss, KDLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.units.base import Units
from tests.losses.contract import heads


def make(classes=5, units=40, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(2, classes, units, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    target = torch.randint(0, classes, (2, units), generator=generator)
    target[torch.rand(2, units, generator=generator) < 0.2] = 255
    return student.requires_grad_(), teacher, target


def paper(student, teacher, label):
    """One unit in probabilities, as the paper writes it: TCKD, NCKD."""
    p, q = teacher.softmax(0), student.softmax(0)
    others = [c for c in range(len(p)) if c != label]
    binary = [
        torch.stack((x[label], sum(x[c] for c in others))) for x in (p, q)
    ]  # (p_t, p_without_t)
    tckd = sum(a * (a / b).log() for a, b in zip(*binary, strict=True))
    rest, student_rest = (x[others] / sum(x[c] for c in others) for x in (p, q))
    return tckd, (rest * (rest / student_rest).log()).sum()


def reference(student, teacher, target, alpha, beta, temperature, weight=None):
    """Weighted mean over the valid units, unit by unit."""
    total, weights = 0.0, 0.0
    for image, unit in (target != 255).nonzero().tolist():
        label = target[image, unit].item()
        x, y = (z[image, :, unit] / temperature for z in (student, teacher))
        tckd, nckd = paper(x, y, label)
        factor = 1.0 if weight is None else weight[label]
        total = total + factor * temperature**2 * (alpha * tckd + beta * nckd)
        weights += factor
    return total / weights


@pytest.mark.parametrize('class_weight', [None, [1.0, 0.5, 0.0, 2.0, 1.0]])
@pytest.mark.parametrize(
    ('alpha', 'beta', 'temperature'), [(1, 8, 4.0), (1, 0, 1.0), (0, 1, 2.0), (0.3, 0.7, 0.5)]
)
def test_equals_the_paper_unit_by_unit(alpha, beta, temperature, class_weight):
    student, teacher, target = make()
    loss = DKDLoss(alpha, beta, temperature, class_weight=class_weight)
    found = loss(Units(student, teacher, target))['loss']
    expected = reference(student, teacher, target, alpha, beta, temperature, class_weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0]
    )


@pytest.mark.parametrize('classes', [2, 3, 19])
def test_plain_distillation_is_tckd_and_a_share_of_nckd(classes):
    student, teacher, target = make(classes)
    labels = Labels(target)
    tckd, nckd = decouple(student, teacher, labels)
    share = 1 - teacher.softmax(1).gather(1, labels.index.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(tckd + share * nckd, unit_distillation(student, teacher, 'kl'))
    if classes == 2:
        assert not nckd.any()


def test_golden_values():
    """Of ``softmax = (0.7, 0.2, 0.1)`` and ``(0.5, 0.25, 0.25)``, by hand."""
    teacher = torch.tensor([[0.7], [0.2], [0.1]]).log()[None]
    student = torch.tensor([[0.5], [0.25], [0.25]]).log()[None]
    tckd = 0.7 * math.log(1.4) + 0.3 * math.log(0.6)
    nckd = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    found = decouple(student, teacher, Labels(torch.tensor([[0]])))
    assert [x.item() for x in found] == pytest.approx([tckd, nckd], abs=1e-6)
    units = DKD(alpha=2.0, beta=3.0)(student, teacher, Labels(torch.tensor([[0]])))
    assert units.item() == pytest.approx(2 * tckd + 3 * nckd, abs=1e-6)


@pytest.mark.parametrize('scale', [1e2, 1e4])
def test_sure_models_have_finite_losses_and_gradients(scale):
    """The probability of all other classes underflows."""
    student, teacher, target = make(scale=scale)
    student = student.detach().float().requires_grad_()
    found = DKDLoss(temperature=1.0)(Units(student, teacher.float(), target))['loss']
    found.backward()
    assert found.isfinite()
    assert student.grad.isfinite().all()
    expected = DKDLoss(temperature=1.0)(Units(student.double(), teacher, target))['loss']
    torch.testing.assert_close(found, expected.float())


def test_standardised_logits_are_those_of_mean_0_and_deviation_1():
    student, teacher, target = make()
    plain, standardised = DKDLoss(), DKDLoss(standardize=True)
    found = standardised(Units(student, teacher, target))['loss']
    z = [
        (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        for x in (student, teacher)
    ]
    torch.testing.assert_close(found, plain(Units(*z, target))['loss'])
    shifted = standardised(Units(3 * student + 5, 0.1 * teacher - 2, target))['loss']
    torch.testing.assert_close(found, shifted)


@pytest.mark.parametrize('value', [0.0, 0.3, -1e4])
def test_equal_logits_have_a_finite_gradient(value):
    student = torch.full((1, 7, 3), value, requires_grad=True)
    assert not standardize_logits(student.detach()).abs().gt(2e-3).any()  # rounding of the mean
    teacher = torch.arange(21.0).view(1, 7, 3)
    target = torch.tensor([[0, 1, 255]])
    for loss in (DKDLoss(standardize=True), KDLoss(standardize=True)):
        found = loss(Units(student, teacher, target))['loss']
        (gradient,) = torch.autograd.grad(found, student)
        assert found.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 100


def test_maps_are_upsampled_and_weighed():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 5, 6, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 4, 10, 12, generator=generator)
    target = torch.randint(0, 4, (2, 10, 12), generator=generator)
    found = DKDLoss()(Units(student, teacher, target), weight=0.5)
    full = F.interpolate(student, (10, 12), mode='bilinear')
    units = DKD(temperature=4.0)(full, teacher, Labels(target))
    assert list(found) == ['loss']
    torch.testing.assert_close(found['loss'], 0.5 * units.mean())


def test_is_registered():
    loss = MODELS.build(dict(type='mmdistill_ext.DKDLoss', beta=2.0))
    assert isinstance(loss, DKDLoss)
    assert 'beta=2.0' in repr(loss)


def test_sigmoid_heads_are_refused_by_name():
    with pytest.raises(ValueError, match="`DKDLoss` is for softmax heads.*type='KDLoss'"):
        DKDLoss().check(heads(sigmoid=True))
    with pytest.raises(ValueError, match='channels=1'):
        DKDLoss()(Units(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), torch.zeros(1, 3).long()))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(alpha=-1.0), '`alpha` should be .*alpha=-1.0'),
        (dict(beta=math.nan), 'beta=nan'),
        (dict(temperature=0), 'temperature=0'),
        (dict(average='selected'), "average='selected'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DKDLoss(**arguments)
