import itertools

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import simple_images, simple_units
from mmdistill_ext.losses import KDLoss, SelectiveLoss
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from tests.two_ranks import in_two_ranks

LOSSES = {
    'kd': lambda: KDLoss(temperature=2.0, class_weight=[1.0, 2.0, 0.0, 0.5]),
    'selected': lambda: SelectiveLoss(temperature=2.0),
    'valid': lambda: SelectiveLoss(temperature=2.0, average='valid'),
}
SPLITS = {by: SplitRule(by, threshold=0.5, hard_weight=0.3) for by in ('unit', 'image')}
TASKS = {
    'all': FusedCrossEntropy(loss_weight=0.4),
    'valid': FusedCrossEntropy(avg_non_ignore=True),
    'weighed': FusedCrossEntropy(name='loss_x', loss_weight=2.0, class_weight=(1.0, 0.0, 3.0, 0.2)),
}
CASES = list(itertools.product(LOSSES, SPLITS))


def make(split=None, task=None, part=slice(None)):
    """Random units of four images; the teacher knows the second and the fourth."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4, 12, 14), generator=generator)
    student = torch.randn(4, 4, 6, 7, generator=generator)
    teacher = torch.randn(4, 4, 12, 14, generator=generator)
    teacher[1::2] += 2 * F.one_hot(labels[1::2], 4).movedim(-1, 1)
    labels[0, :5] = 255
    student = student[part].requires_grad_()
    return Units(student, teacher[part], labels[part], fused=task, split=split)


def gradient(losses, units):
    names = [name for name in losses if name.startswith('loss')]
    total = sum(losses[name] for name in names)
    return torch.autograd.grad(total, units.student, retain_graph=True)[0]


def is_simple(units, by):
    if by == 'unit':
        return simple_units(units.teacher, units.labels)
    images = simple_images(units.teacher, units.labels, 0.5).view(-1, 1, 1)
    return images & (units.labels != 255)


@pytest.mark.parametrize('task', TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(('loss', 'by'), CASES)
def test_the_loss_is_soft_plus_f_times_hard(loss, by, task):
    split = SPLITS[by]
    expected = LOSSES[loss]()(make(None, task), 0.7)
    units = make(split, task)
    found = LOSSES[loss]()(units, 0.7)
    assert found.keys() - expected.keys() == {'l_soft', 'l_hard'}
    soft, hard = found['l_soft'], found['l_hard']
    assert min(soft, hard) > 0
    assert not soft.requires_grad
    assert not hard.requires_grad
    torch.testing.assert_close(soft + hard, (expected['loss'] + expected[task.name]).detach())
    torch.testing.assert_close(soft + 0.3 * hard, (found['loss'] + found[task.name]).detach())
    for key in expected.keys() - {'loss', task.name}:  # what is not a loss does not change
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize('task', TASKS.values(), ids=TASKS)
@pytest.mark.parametrize('by', SPLITS)
def test_both_losses_are_weighed_over_all_units(by, task):
    units = make(SPLITS[by], task)
    found = KDLoss(temperature=2.0)(units, 0.7)
    student = F.interpolate(units.student, (12, 14), mode='bilinear')
    simple, valid = is_simple(units, by), units.labels != 255
    f = torch.where(simple, 1.0, 0.3) * valid
    weight = None if task.class_weight is None else torch.tensor(task.class_weight)
    log = [(x / 2).log_softmax(1) for x in (student, units.teacher)]
    kl = 4 * F.kl_div(*log, reduction='none', log_target=True).sum(1)
    ce = F.cross_entropy(student, units.labels, weight, reduction='none', ignore_index=255)
    total = valid.sum()
    if weight is not None:
        total = weight[units.labels[valid]].sum()
    elif not task.avg_non_ignore:
        total = units.labels.numel()
    expected = {
        'loss': 0.7 * (kl * f).sum() / valid.sum(),
        task.name: task.loss_weight * (ce * f).sum() / total,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        own, other = (
            torch.autograd.grad(x, units.student, retain_graph=True)[0]
            for x in (found[name], value)
        )
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize('task', TASKS.values(), ids=TASKS)
@pytest.mark.parametrize('by', SPLITS)
def test_fit_sums_are_the_task_before_f_and_the_simple_samples(by, task):
    loss, units = SelectiveLoss(), make(SPLITS[by], task)
    assert loss.records.pop_fit_sums() is None
    loss(units)
    sums = loss.records.pop_fit_sums()
    assert loss.records.pop_fit_sums() is None
    assert not sums.requires_grad
    valid = units.labels != 255
    weight = torch.ones(4) if task.class_weight is None else torch.tensor(task.class_weight)
    student = F.interpolate(units.student, (12, 14), mode='bilinear')
    ce = F.cross_entropy(student, units.labels, weight, reduction='sum', ignore_index=255)
    if by == 'unit':
        simple, samples = simple_units(units.teacher, units.labels).sum(), valid.sum()
    else:
        simple, samples = simple_images(units.teacher, units.labels, 0.5).sum(), 4
    expected = [ce.item(), weight[units.labels[valid]].sum(), simple, samples]
    torch.testing.assert_close(sums, torch.tensor([float(value) for value in expected]))


def test_fit_sums_need_a_split_and_the_task():
    loss, task = KDLoss(), TASKS['all']
    loss(make(None, task))
    assert loss.records.pop_fit_sums() is None
    found = loss(make(SPLITS['unit']))
    assert loss.records.pop_fit_sums() is None
    assert found.keys() == {'loss', 'l_soft', 'l_hard'}
    torch.testing.assert_close(found['l_soft'] + 0.3 * found['l_hard'], found['loss'].detach())


def test_fit_sums_are_those_of_the_last_forward():
    loss, task = KDLoss(), TASKS['all']
    first, second = (make(SPLITS['unit'], task, part) for part in (slice(0, 2), slice(2, 4)))
    loss(first)
    alone = loss.records.pop_fit_sums()
    loss(second)
    loss(first)
    assert torch.equal(loss.records.pop_fit_sums(), alone)


def test_f_is_no_factor_of_the_sums_and_the_parts():
    task = TASKS['weighed']
    found = []
    for f in (0.0, 1.0, 2.0):
        loss = KDLoss()
        losses = loss(make(SplitRule('unit', 0.5, f), task))
        found.append(
            torch.stack((losses['l_soft'], losses['l_hard'], *loss.records.pop_fit_sums()))
        )
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(('loss', 'by'), CASES)
def test_f_of_1_gives_the_gradient_of_no_split(loss, by):
    task = TASKS['all']
    results = []
    for split in (None, SplitRule(by, 0.5, 1.0)):
        units = make(split, task)
        results.append(gradient(LOSSES[loss]()(units), units))
    assert torch.equal(*results)


@pytest.mark.parametrize(('loss', 'by'), CASES)
def test_all_ignored_is_exactly_zero(loss, by):
    units = make(SPLITS[by], TASKS['valid'])
    units.labels.fill_(255)
    module = LOSSES[loss]()
    found = module(units)
    for name in ('loss', 'loss_ce', 'l_soft', 'l_hard'):
        assert found[name] == 0
    assert torch.equal(gradient(found, units), torch.zeros_like(units.student))
    assert module.records.pop_fit_sums().tolist() == [0, 0, 0, 0]


def worker(rank):
    """One of two ranks: each has half of the batch."""
    found = {}
    for name, by in CASES:
        loss = LOSSES[name]()
        units = make(SPLITS[by], TASKS['all'], slice(2 * rank, 2 * rank + 2))
        losses = loss(units)
        found[name, by] = (
            {key: value.detach() for key, value in losses.items() if key != 'acc_seg'},
            gradient(losses, units),
            loss.records.pop_fit_sums(),
        )
    return found


def test_two_ranks_are_one():
    first, second = in_two_ranks(worker)
    for name, by in CASES:
        loss, units = LOSSES[name](), make(SPLITS[by], TASKS['all'])
        losses = loss(units)
        (losses_a, gradient_a, sums_a), (losses_b, gradient_b, sums_b) = (
            found[name, by] for found in (first, second)
        )
        assert torch.equal(sums_a, sums_b)
        torch.testing.assert_close(sums_a, loss.records.pop_fit_sums())
        for key in ('loss', 'loss_ce', 'l_soft', 'l_hard'):  # what the log averages over ranks
            mean = (losses_a[key] + losses_b[key]) / 2
            torch.testing.assert_close(mean, losses[key].detach(), msg=f'{name} {by} {key}')
        mean = torch.cat((gradient_a, gradient_b)) / 2
        torch.testing.assert_close(mean, gradient(losses, units), rtol=1e-5, atol=1e-8)
