import math
from dataclasses import replace

import pytest
import torch

from mmdistill_ext.losses import KDLoss, SelectiveLoss
from mmdistill_ext.units.base import Units
from tests.losses.contract import heads
from tests.two_ranks import in_two_ranks

LOSSES = {
    'selected': lambda: SelectiveLoss(temperature=2.0, class_weight=[1.0, 2.0, 0.0, 0.5]),
    'valid': lambda: SelectiveLoss(temperature=2.0, average='valid'),
    'kd': lambda: KDLoss(temperature=2.0),
}


def make(images=4, seed=0):
    """Random units; in the last half of the images the student is the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(images, 4, 6, 7, generator=generator)
    student = torch.randn(images, 4, 6, 7, generator=generator)
    student[images // 2 :] = teacher[images // 2 :]
    labels = torch.randint(0, 4, (images, 12, 14), generator=generator)
    labels[0, :9] = 255
    return Units(student.requires_grad_(), teacher, labels)


def worker(rank):
    """One of two ranks: each has half of the batch; the second selects nothing."""
    part = slice(2 * rank, 2 * rank + 2)
    whole = make()
    found = {}
    for name, build in LOSSES.items():
        student = whole.student.detach()[part].clone().requires_grad_()
        loss = build()(Units(student, whole.teacher[part], whole.labels[part]))['loss']
        loss.backward()
        found[name] = loss.detach(), student.grad
    void = torch.full_like(whole.labels[part], 255)
    found['void'] = SelectiveLoss()(Units(student, whole.teacher[part], void))['loss'].detach()
    return found


def test_two_ranks_give_the_gradient_of_one():
    first, second = in_two_ranks(worker)
    for name, build in LOSSES.items():
        units = make()
        loss = build()(units)['loss']
        loss.backward()
        assert loss > 0
        (loss_a, gradient_a), (loss_b, gradient_b) = first[name], second[name]
        torch.testing.assert_close((loss_a + loss_b) / 2, loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.cat((gradient_a, gradient_b)) / 2, units.student.grad, rtol=1e-5, atol=1e-8
        )
    assert second['selected'][0] == 0
    assert first['void'] == second['void'] == 0


@pytest.mark.parametrize('build', LOSSES.values(), ids=LOSSES)
def test_nothing_goes_into_a_checkpoint(build):
    loss = build()
    loss(make())
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []


def test_counts_add_up_until_they_are_taken():
    loss, units = SelectiveLoss(), make()
    assert loss.records.pop_counts() is None
    loss(units)
    once = loss.records.pop_counts()
    assert once[0].tolist() == units.labels[units.labels != 255].bincount().tolist()
    assert (once[1] <= once[0]).all()
    assert 0 < once[1].sum() < once[0].sum()
    loss(units)
    loss(units)
    assert torch.equal(loss.records.pop_counts(), 2 * once)
    assert loss.records.pop_counts().sum() == 0


def test_contrast_is_kept_on_demand_and_given_once():
    loss, units = SelectiveLoss(), make()
    loss(units)
    assert loss.records.pop_contrast() is None
    loss.records.keep_contrast = True
    loss(units)
    wins, valid, _ = loss.records.pop_contrast()
    assert torch.equal(valid, units.labels != 255)
    assert wins.shape == units.labels.shape
    assert wins.sum() == loss.records.pop_counts()[1].sum() / 2
    assert loss.records.pop_contrast() is None


def test_contrast_is_painted_as_the_units_say():
    loss, units = SelectiveLoss(), make()
    loss.records.keep_contrast = True
    loss(units)
    ((_, pixels),) = loss.records.pop_contrast().maps().items()
    loss(replace(units, paint=lambda wins, valid: {'_a': (wins[:1], valid[:1])}))
    ((suffix, painted),) = loss.records.pop_contrast().maps().items()
    assert suffix == '_a'
    for own, other in zip(painted, pixels, strict=True):
        assert torch.equal(own, other[:1])


def test_counts_survive_a_change_of_type():
    loss, units = SelectiveLoss(), make()
    loss(units)
    loss.half()
    assert loss.records.pop_counts()[0].sum() == (units.labels != 255).sum()


def names(loss, sigmoid):
    return loss.difference.of(sigmoid).name, loss.distance.of(sigmoid).name


def test_difference_and_distance_follow_the_head():
    assert names(SelectiveLoss(), sigmoid=False) == ('ce', 'kl')
    assert names(SelectiveLoss(), sigmoid=True) == ('bce', 'bce')
    assert names(SelectiveLoss(distance='mse'), sigmoid=True) == ('bce', 'mse')
    assert names(KDLoss(distance='reverse_kl'), sigmoid=False) == ('ce', 'reverse_kl')


def test_check_compares_with_the_head():
    SelectiveLoss(class_weight=[1, 1, 1]).check(heads(3))
    SelectiveLoss(class_weight=[1, 1]).check(heads(1, sigmoid=True))
    SelectiveLoss(distance='mse').check(heads(3, sigmoid=True))
    KDLoss(standardize=True).check(heads(3))
    with pytest.raises(ValueError, match=r'`class_weight` should hold 4 weights.*Found 3'):
        KDLoss(class_weight=[1, 1, 1]).check(heads(4))
    with pytest.raises(ValueError, match=r"sigmoid head\. Found 'reverse_kl'"):
        KDLoss(distance='reverse_kl').check(heads(3, sigmoid=True))
    with pytest.raises(ValueError, match=r"sigmoid head\. Found 'ce'"):
        SelectiveLoss(difference='ce').check(heads(3, sigmoid=True))
    with pytest.raises(ValueError, match=r"sigmoid head\. Found 'kl' with standardize=True\."):
        KDLoss(standardize=True).check(heads(3, sigmoid=True))


def test_class_weights_are_compared_at_first_use_too():
    with pytest.raises(ValueError, match=r'\(3,\)'):
        KDLoss(class_weight=[1, 1, 1])(make())


@pytest.mark.parametrize('loss', [SelectiveLoss, KDLoss])
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(temperature=0), 'temperature=0'),
        (dict(temperature=-2.0), 'temperature=-2.0'),
        (dict(temperature='2'), "`temperature`.*'2'"),
        (dict(distance='js'), "distance='js'"),
        (dict(distance='mse', standardize=True), "needs a softmax.*distance='mse'"),
        (dict(class_weight=[1.0, -0.5]), 'class_weight=-0.5'),
        (dict(class_weight=[1.0, math.inf]), 'inf'),
        (dict(class_weight=[]), r'\[\]'),
    ],
)
def test_bad_arguments_are_named(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(**arguments)
