import pytest
import torch
import torch.nn.functional as F
from mmseg.models.losses import CrossEntropyLoss, accuracy

from mmdistill_ext.losses import KDLoss, SelectiveLoss
from mmdistill_ext.units.base import FusedCrossEntropy, Units

CLASS_WEIGHT = (1.0, 0.3, 0.0, 2.0)


@pytest.mark.parametrize('ignored', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    'arguments',
    [
        dict(),
        dict(avg_non_ignore=True),
        dict(class_weight=CLASS_WEIGHT),
        dict(loss_weight=0.4, name='loss_seg'),
    ],
)
@pytest.mark.parametrize('loss', [SelectiveLoss(temperature=2.0), KDLoss()])
def test_is_what_the_head_itself_gives(loss, arguments, ignored):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 5, 5, generator=generator, requires_grad=True)
    labels = torch.randint(0, 4, (2, 9, 11), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    task = FusedCrossEntropy(**arguments)
    if task.class_weight:  # mmseg 1.2 fails on void labels with class weights
        labels.clamp_(max=3)
    units = Units(student, student.detach().flip(0), labels, fused=task)
    found = loss(units, weight=7.0)

    criterion = CrossEntropyLoss(
        loss_weight=task.loss_weight,
        class_weight=task.class_weight and list(task.class_weight),
        avg_non_ignore=task.avg_non_ignore,
        loss_name=task.name,
    )
    full = F.interpolate(student, (9, 11), mode='bilinear')
    expected = criterion(full, labels, ignore_index=255)
    torch.testing.assert_close(found[task.name], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(found[task.name], student, retain_graph=True)[0],
        torch.autograd.grad(expected, student)[0],
        rtol=1e-5,
        atol=1e-7,
    )
    torch.testing.assert_close(found['acc_seg'], accuracy(full, labels, ignore_index=255))
    alone = loss(Units(student, units.teacher, labels), weight=7.0)
    assert found['loss'] == alone['loss']


def test_an_empty_batch_has_no_accuracy():
    student = torch.randn(0, 4, 5, 5, requires_grad=True)
    labels = torch.zeros(0, 5, 5, dtype=torch.long)
    found = KDLoss()(Units(student, student.detach(), labels, fused=FusedCrossEntropy()))
    assert found['acc_seg'].tolist() == accuracy(student, labels).view(1).tolist() == [0.0]
    assert found['loss'] == found['loss_ce'] == 0
