import dataclasses
import math

import pytest
import torch
from mmengine.config import ConfigDict

from mmdistill_ext.distillers.fit import Fit
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.functional import exponential_fit, fit_parts, logistic_fit, simple_units
from mmdistill_ext.policies import ConstantFit, ExponentialFit, LogisticFit
from mmdistill_ext.registry import FIT_FUNCTIONS
from mmdistill_ext.units.base import SplitRule
from tests import tiny_seg

KD = dict(type='KDLoss', temperature=2.0)
SEL = dict(type='SelectiveLoss', temperature=2.0)
CONSTANT = dict(type='ConstantFit')
HALVED = dict(type='ConstantFit', c=0.5)
TERMS = {'kd': dict(kd=KD), 'sel': dict(sel=SEL), 'both': dict(kd=KD, sel={**SEL, 'weight': 0.7})}


@pytest.fixture
def register():
    """Register evaluation functions of a user, for one test."""
    names = []

    def call(cls):
        names.append(cls.__name__)
        return FIT_FUNCTIONS.register_module()(cls)

    yield call
    for name in names:
        FIT_FUNCTIONS.module_dict.pop(name)


def test_functions_are_those_of_the_functional_package():
    for x in (-3.0, -0.2, 0.0, 0.2, 3.0):
        assert ExponentialFit(b=4, f_max=1.5)(x) == exponential_fit(x, 4, 1.5)
        assert LogisticFit(b=4)(x) == logistic_fit(x, 4)
        assert ConstantFit(c=0.3)(x) == 0.3
    assert isinstance(ConstantFit(c=1)(0.0), float)
    assert ExponentialFit()(-0.30103) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize('prefix', ['', 'mmdistill_ext.'])
@pytest.mark.parametrize('wrap', [dict, ConfigDict])
def test_fit_is_built_from_a_config(wrap, prefix):
    fit = Fit(wrap(type=f'{prefix}ExponentialFit', b=4.0), split='image', threshold=0.8)
    assert fit.function == ExponentialFit(b=4.0)
    assert (fit.by, fit.threshold, fit.error, fit.has_hook) == ('image', 0.8, 0.0, False)
    assert fit.weight == 1
    fit.error = -0.5
    assert fit.weight == 0.5
    fit.has_hook = True
    assert fit.split() == SplitRule('image', 0.8, 0.5)


def test_defaults():
    fit = Fit(CONSTANT)
    assert fit.split() == SplitRule('unit', 0.9, 1.0, iou=0.5, score=0.3)


def test_rules_of_detectors():
    assert Fit(CONSTANT, iou=1, score=0).split() == SplitRule('unit', 0.9, 1.0, 1, 0)
    assert Fit(CONSTANT, 'image', iou=0.7, score=0.1).split() == SplitRule(
        'image', 0.9, 1, 0.7, 0.1
    )


def test_a_function_of_ones_own(register):
    @register
    @dataclasses.dataclass
    class StepFit:
        below: float

        def __call__(self, x):
            return self.below if x < 0 else 1

    fit = Fit(dict(type='StepFit', below=0.25))
    assert fit.weight == 1
    fit.error = -0.1
    assert fit.weight == 0.25
    assert Fit(dict(type=StepFit, below=0.5)).function == StepFit(0.5)


@pytest.mark.parametrize('value', [math.nan, math.inf, -0.5, None])
def test_a_function_that_gives_no_weight_is_refused(register, value):
    @register
    @dataclasses.dataclass
    class OddFit:
        def __call__(self, x):
            return value

    fit = Fit(dict(type='OddFit'))
    fit.has_hook, fit.error = True, -0.25
    message = rf'`fit.function` should give a finite F\(x\) >= 0. Found {value} .*OddFit.*x=-0.25'
    with pytest.raises(ValueError, match=message):
        fit.split()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='pixel'), "`fit.split` should be one of unit, image. Found fit.split='pixel'"),
        (dict(threshold=0), r'`fit.threshold` should be in \(0, 1\]. Found fit.threshold=0'),
        (dict(threshold=1.01), 'fit.threshold=1.01'),
        (dict(threshold=math.nan), 'fit.threshold=nan'),
        (dict(threshold='0.9'), "fit.threshold='0.9'"),
        (dict(iou=0), r'`fit.iou` should be in \(0, 1\]. Found fit.iou=0'),
        (dict(iou=1.01), 'fit.iou=1.01'),
        (dict(iou=math.nan), 'fit.iou=nan'),
        (dict(iou='0.5'), "fit.iou='0.5'"),
        (dict(score=1), r'`fit.score` should be in \[0, 1\). Found 1'),
        (dict(score=-0.1), '`fit.score`.*Found -0.1'),
        (dict(score=math.nan), '`fit.score`.*Found nan'),
        (dict(score='0.3'), "`fit.score`.*Found '0.3'"),
        (dict(function='ExponentialFit'), "`fit.function` should be a config.*'ExponentialFit'"),
        (dict(function=None), '`fit.function` should be a config.*None'),
        (
            dict(function=dict(type='ExponentialFit', b=1)),
            '`fit.function.b` should be a finite number > 1. Found b=1',
        ),
        (
            dict(function=dict(type='ExponentialFit', b='10')),
            "`fit.function.b` should be a number. Found '10'",
        ),
        (dict(function=dict(type='ExponentialFit', f_max=0)), '`fit.function.f_max` .*f_max=0'),
        (dict(function=dict(type='LogisticFit', b=0.5)), '`fit.function.b` .*> 1. Found b=0.5'),
        (dict(function=dict(type='LogisticFit', b=math.nan)), '`fit.function.b` .*b=nan'),
        (dict(function=dict(type='ConstantFit', c=-1)), '`fit.function.c` .*>= 0, .*Found c=-1'),
        (dict(function=dict(type='ConstantFit', c=math.inf)), '`fit.function.c` .*c=inf'),
        (
            dict(function=dict(type='ConstantFit', b=1)),
            '`fit.function.b` should be an argument of ConstantFit: c. Found 1',
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fit(**dict(function=CONSTANT) | arguments)


def test_an_unknown_function_is_named():
    message = "`fit.function.type` should be a registered fit function: .*Found 'SquareFit'"
    with pytest.raises(ValueError, match=message):
        Fit(dict(type='SquareFit'))


def test_only_a_constant_needs_no_hook():
    assert Fit(HALVED).split().hard_weight == 0.5
    for name in ('ExponentialFit', 'LogisticFit'):
        fit = Fit(dict(type=name))
        with pytest.raises(ValueError, match=f'{name}.*needs the fitting error.*FitHook'):
            fit.split()
        fit.has_hook = True
        assert fit.split().hard_weight == 1


def test_records_are_kept_only_when_somebody_takes_them():
    fit = Fit(CONSTANT)
    fit.record(torch.ones(4))
    assert fit.pop_records() == []
    fit.has_hook = True
    fit.record(torch.ones(4, requires_grad=True))
    fit.record(torch.zeros(4))
    first, second = fit.pop_records()
    assert (first.sum(), second.sum()) == (4, 0)
    assert not first.requires_grad
    assert fit.pop_records() == []


def distilled(teacher, losses, student=None, fit=CONSTANT, **kwargs):
    torch.manual_seed(5)
    fit = dict(function=fit) if fit is not None and 'function' not in fit else fit
    model = build_teacher_student(student or tiny_seg.model(8), teacher, losses, fit=fit, **kwargs)
    model.init_weights()
    return model.train()


def with_auxiliary():
    student = tiny_seg.model(8)
    student['auxiliary_head'] = dict(student['decode_head'], in_channels=32, in_index=2)
    return student


def between(model, batch):
    """A threshold that only one of the two images reaches."""
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch[1]])
    teacher = upsample(model.distillation.teacher.model(batch[0]))
    right, valid = simple_units(teacher, labels), labels != 255
    first, second = (right.flatten(1).sum(1) / valid.flatten(1).sum(1)).tolist()
    assert first != second
    return (first + second) / 2


def upsample(logits):
    return torch.nn.functional.interpolate(logits, (32, 40), mode='bilinear')


def gradients(model, losses):
    total, _ = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('losses', TERMS.values(), ids=TERMS)
def test_f_of_1_is_bit_identical_to_no_fit(teacher, batch, losses, split):
    results = []
    for arguments in (dict(fit=None, fuse_task_loss=True), dict(fit=dict(function=CONSTANT))):
        model = distilled(teacher, losses, **arguments)
        if model.distillation.fit:
            model.distillation.fit.by = split
            model.distillation.fit.threshold = between(model, batch)
        found = model(*batch, mode='loss')
        results.append((found, gradients(model, found)))
    (plain, plain_grad), (found, found_grad) = results
    assert found.keys() - plain.keys() == {'decode.l_soft', 'decode.l_hard'}
    for key in plain:
        assert torch.equal(found[key], plain[key]), key
    for key in plain_grad:
        assert torch.equal(found_grad[key], plain_grad[key]), key


@pytest.mark.parametrize('split', ['unit', 'image'])
@pytest.mark.parametrize('losses', TERMS.values(), ids=TERMS)
def test_the_total_is_soft_plus_f_times_hard(teacher, batch, losses, split):
    model = distilled(teacher, losses, fit=dict(function=HALVED, split=split))
    model.distillation.fit.threshold = between(model, batch)
    found = model(*batch, mode='loss')
    soft, hard = found['decode.l_soft'], found['decode.l_hard']
    assert min(soft, hard) > 0
    total, logged = model.parse_losses(found)
    torch.testing.assert_close(total.detach(), soft + 0.5 * hard)
    assert {'decode.l_soft', 'decode.l_hard'} <= logged.keys()


def test_it_is_the_fit_loss_of_the_two_models(teacher, batch):
    fit = dict(function=dict(type='ConstantFit', c=0.3))
    student = tiny_seg.model(8)
    student['decode_head']['loss_decode'].update(avg_non_ignore=True)
    model = distilled(teacher, dict(kd={**KD, 'weight': 0.7}), student, fit).eval()
    labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch[1]])
    own, other = (upsample(net(batch[0])) for net in (model, model.distillation.teacher.model))
    expected = fit_parts(own, other, labels, temperature=2.0, weight=0.7)
    found = model(*batch, mode='loss')
    torch.testing.assert_close(found['decode.l_soft'], expected.soft.detach())
    torch.testing.assert_close(found['decode.l_hard'], expected.hard.detach())


def test_terms_on_one_head_share_its_own_loss(teacher, batch):
    model = distilled(teacher, TERMS['both'])
    model.distillation.fit.has_hook = True
    found = model(*batch, mode='loss')
    assert [key for key in found if 'loss_ce' in key] == ['decode.loss_ce']
    parts = 0
    for losses in (dict(kd=KD), dict(sel={**SEL, 'weight': 0.7})):
        alone = distilled(teacher, losses)(*batch, mode='loss')
        parts = parts + torch.stack((alone['decode.l_soft'], alone['decode.l_hard']))
    task = distilled(teacher, dict(kd={**KD, 'weight': 1e-30}))(*batch, mode='loss')
    task = torch.stack((task['decode.l_soft'], task['decode.l_hard']))
    both = torch.stack((found['decode.l_soft'], found['decode.l_hard']))
    torch.testing.assert_close(both, parts - task)
    assert len(model.distillation.fit.pop_records()) == 1


@pytest.mark.parametrize('losses', [dict(kd=KD, sel=SEL), dict(sel=SEL, kd=KD)])
def test_the_task_is_handed_to_the_next_active_term(teacher, batch, iteration, losses):
    """Two sets of terms; in each, the second goes on alone and the first comes back."""
    first, second = losses
    losses = {first: {**losses[first], 'begin': 2, 'stop': 4}, second: {**losses[second]}}
    losses[second]['stop'] = 3
    model = distilled(teacher, losses, fit=HALVED).eval()
    model.distillation.fit.has_hook = True
    tasks, records = [], []
    for value in range(5):
        iteration(value)
        found = model(*batch, mode='loss')
        tasks.append(found['decode.loss_ce'].detach())
        names = [name for name in ('kd', 'sel') if f'decode.loss_{name}' in found]
        records.append((len(model.distillation.fit.pop_records()), sorted(names)))
    both = sorted((first, second))
    assert records == [(1, [second]), (1, [second]), (1, both), (1, [first]), (0, [])]
    for task in tasks[1:4]:  # whoever forms it
        torch.testing.assert_close(task, tasks[0])
    assert tasks[4] > tasks[0]  # the student alone: nothing is hard


def test_records_are_the_task_loss_of_the_main_head(teacher, batch):
    losses = dict(aux={**KD, 'head': 'auxiliary_head'}, kd=KD)
    model = distilled(teacher, losses, with_auxiliary(), HALVED).eval()
    model.distillation.fit.has_hook = True
    found = model(*batch, mode='loss')
    (sums,) = model.distillation.fit.pop_records()
    plain = distilled(teacher, losses, with_auxiliary(), fit=None).eval()(*batch, mode='loss')
    # mmseg's own mean is over all pixels, void ones included
    torch.testing.assert_close(sums[0] / (2 * 32 * 40), plain['decode.loss_ce'].detach())
    assert sums[1] == sums[3] == 2 * 28 * 40
    assert found['decode.loss_ce'] < plain['decode.loss_ce']


def test_an_auxiliary_head_with_a_term_is_split_as_well(teacher, batch):
    losses = dict(kd=KD, aux={**KD, 'head': 'auxiliary_head'})
    model = distilled(teacher, losses, with_auxiliary(), dict(type='ConstantFit', c=0.3))
    found = model(*batch, mode='loss')
    for prefix, name in (('decode', 'kd'), ('aux', 'aux')):
        own = found[f'{prefix}.loss_{name}'] + found[f'{prefix}.loss_ce']
        soft, hard = found[f'{prefix}.l_soft'], found[f'{prefix}.l_hard']
        torch.testing.assert_close(own.detach(), soft + 0.3 * hard)


def test_an_auxiliary_head_without_a_term_keeps_its_own_loss(teacher, batch):
    results = []
    for fit in (None, dict(type='ConstantFit', c=0.3)):
        results.append(distilled(teacher, dict(kd=KD), with_auxiliary(), fit)(*batch, mode='loss'))
    plain, found = results
    assert 'aux.l_soft' not in found
    assert torch.equal(found['aux.loss_ce'], plain['aux.loss_ce'])
    assert found['decode.loss_ce'] < plain['decode.loss_ce']


def test_without_a_hook_the_first_step_is_refused(teacher, batch):
    model = distilled(teacher, dict(kd=KD), fit=dict(type='ExponentialFit'))
    with pytest.raises(ValueError, match='`fit.function`.*ExponentialFit.*FitHook.*custom_hooks'):
        model(*batch, mode='loss')
    model.distillation.fit.has_hook = True
    model.distillation.fit.error = -0.5
    assert model(*batch, mode='loss')['decode.l_hard'] > 0


def changed(**head):
    student = tiny_seg.model(8)
    student['decode_head'].update(head)
    return student


AUX = {**KD, 'head': 'auxiliary_head'}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(student=changed(loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.0))),
            "`fit` needs a student with a task loss: .*`loss_weight`.*> 0. Found 0.0 in 'loss_ce'",
        ),
        (
            dict(student=changed(loss_decode=dict(type='DiceLoss'))),
            r'`fit` needs a head whose loss is one softmax CrossEntropyLoss.*DiceLoss',
        ),
        (
            dict(student=with_auxiliary(), losses=dict(aux=AUX)),
            r'`fit` needs one of the `losses` on the head that the student predicts with.*'
            r"head='decode_head'.*Found none",
        ),
        (dict(fit=dict(function=CONSTANT, split='pixel')), "fit.split='pixel'"),
        (dict(fit=dict(function=dict(type='ExponentialFit', b=1.0))), '`fit.function.b` .*b=1.0'),
    ],
)
def test_errors_at_start_name_key_rule_and_value(teacher, change, message):
    arguments = dict(
        student=tiny_seg.model(8), teacher=teacher, losses=dict(kd=KD), fit=dict(function=CONSTANT)
    )
    with pytest.raises(ValueError, match=message):
        build_teacher_student(**{**arguments, **change})


@pytest.mark.parametrize('fit', [dict(), dict(split='unit'), dict(function=CONSTANT, colour=1)])
def test_arguments_that_fit_does_not_have_are_named(teacher, fit):
    with pytest.raises(ValueError, match=r'`fit\.(function|colour)`'):
        build_teacher_student(tiny_seg.model(8), teacher, dict(kd=KD), fit=fit)
