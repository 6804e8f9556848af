import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import selective_distillation
from mmdistill_ext.losses import SelectiveLoss
from mmdistill_ext.registry import MODELS
from mmdistill_ext.units.base import Units


def make(shape=(2, 5, 6, 7), size=(12, 14), **others):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator, requires_grad=True)
    teacher = torch.randn(shape, generator=generator)
    labels = torch.randint(0, max(shape[1], 2), (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return Units(student, teacher, labels, **others)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('average', ['selected', 'valid'])
def test_equals_the_plain_composition_on_upsampled_logits(average, align_corners):
    units = make(student_align_corners=align_corners, teacher_align_corners=align_corners)
    class_weight = [1.0, 0.5, 0.0, 2.0, 1.0]
    loss = SelectiveLoss(temperature=2.0, average=average, class_weight=class_weight)
    found = loss(units, weight=0.5)
    full = [
        F.interpolate(x, (12, 14), mode='bilinear', align_corners=align_corners)
        for x in (units.student, units.teacher)
    ]
    expected = 0.5 * selective_distillation(
        *full,
        units.labels,
        temperature=2.0,
        average=average,
        class_weight=torch.tensor(class_weight),
    )
    torch.testing.assert_close(found['loss'], expected, rtol=1e-5, atol=0)
    for own in (found['loss'], expected):
        own.backward()
    first = torch.autograd.grad(loss(units, weight=0.5)['loss'], units.student)[0]
    torch.testing.assert_close(2 * first, units.student.grad, rtol=1e-5, atol=1e-8)


def test_sigmoid_heads_are_compared_and_distilled_with_bce():
    units = make((2, 1, 6, 7), (6, 7), sigmoid=True)
    expected = selective_distillation(
        units.student, units.teacher, units.labels, difference='bce', distance='bce'
    )
    torch.testing.assert_close(SelectiveLoss()(units)['loss'], expected)


def test_the_share_of_units_where_the_teacher_is_better():
    units = make()
    student, teacher = (
        F.cross_entropy(
            F.interpolate(x, (12, 14), mode='bilinear'),
            units.labels,
            reduction='none',
            ignore_index=255,
        )
        for x in (units.student, units.teacher)
    )
    found = SelectiveLoss()(units)
    assert set(found) == {'loss', 'teacher_better'}
    share = (teacher < student).sum() / (units.labels != 255).sum()
    assert found['teacher_better'].item() == pytest.approx(share.item())
    assert not found['teacher_better'].requires_grad


@pytest.mark.parametrize('average', ['selected', 'valid'])
@pytest.mark.parametrize('void', [False, True])
def test_an_empty_selection_is_exactly_zero(average, void):
    units = make()
    labels = torch.full_like(units.labels, 255) if void else units.labels
    student = units.teacher.clone().requires_grad_()
    found = SelectiveLoss(average=average)(Units(student, units.teacher, labels))
    found['loss'].backward()
    assert found['loss'] == found['teacher_better'] == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (1, 3, 9), (8, 3)])
def test_small_and_flat_units(shape):
    student = make(shape, shape[2:]).student
    teacher, labels = -student.detach(), student.argmin(1)  # the teacher is better
    expected = selective_distillation(student, teacher, labels)
    assert expected > 0
    torch.testing.assert_close(SelectiveLoss()(Units(student, teacher, labels))['loss'], expected)


def test_float32_under_autocast():
    units = make()
    expected = SelectiveLoss()(units)['loss']
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        found = SelectiveLoss()(units)['loss']
    assert found.dtype == torch.float32
    assert found == expected


def test_is_registered():
    loss = MODELS.build(dict(type='mmdistill_ext.SelectiveLoss', temperature=2.0, average='valid'))
    assert isinstance(loss, SelectiveLoss)
    assert 'temperature=2.0' in repr(loss)
    with pytest.raises(ValueError, match="average='all'"):
        SelectiveLoss(average='all')
    with pytest.raises(ValueError, match="difference='iou'"):
        SelectiveLoss(difference='iou')
