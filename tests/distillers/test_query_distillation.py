import copy
import math

import pytest
import torch

from mmdistill_ext.distillers.fit import build_fit
from mmdistill_ext.distillers.teacher_student import DistilledModel
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.taps import Taps
from tests import tiny_zoo

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou', weight=0.5))
SEL = dict(KD, type='SelectiveLoss')
LOSSES = dict(kd=KD, sel=SEL, joint=dict(SEL, together=True, weight=2.0))
NAMES = tiny_zoo.QUERY


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Name -> student and teacher; ``same``: equal to each other."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name, same=False):
        key = name, same
        if key not in made:
            seeds = (1, 1) if same else (2, 1)
            made[key] = tiny_zoo.distil(folder, name, LOSSES, seeds=seeds)
        made[key].distillation.fit = None
        return made[key]

    return get


def plain(model):
    """The same weights without a teacher."""
    student = copy.deepcopy(model)
    student.__class__ = type(model).__mro__[2]
    assert not isinstance(student, DistilledModel)
    del student.distillation
    return student


def fit(model, by, c, score=0.99):
    """Let the model split by the teacher."""
    function = dict(type='ConstantFit', c=c)
    model.distillation.fit = build_fit(dict(function=function, split=by, iou=0.05, score=score))
    model.distillation.fit.has_hook = True
    return model


@pytest.mark.parametrize('name', NAMES)
def test_losses_are_the_sums_of_the_definition(name, models):
    model = models(name)
    model.distillation.losses['sel'].pop_counts()
    found = tiny_zoo.step(model, tiny_zoo.crowd(model))
    for key, selective, joint, weight in (
        ('kd', False, False, 1),
        ('sel', True, False, 1),
        ('joint', True, True, 2),
    ):
        expected = tiny_zoo.reference(found.units[0], selective, joint)
        got = found.logged[f'bbox.loss_{key}'], found.logged[f'bbox.loss_{key}_box']
        assert got[0] == pytest.approx(weight * expected['classes'] / 8, rel=1e-3, abs=1e-6)
        assert got[1] == pytest.approx(weight * expected['boxes'] / 16, rel=1e-3, abs=1e-6)
    wins = tiny_zoo.reference(found.units[0], True)['wins']
    assert 0 < wins.sum() < 8
    labels = found.units[0].labels
    counts = torch.stack([torch.bincount(labels[x], minlength=4) for x in (labels != -1, wins)])
    assert torch.equal(model.distillation.losses['sel'].pop_counts(), counts)


@pytest.mark.parametrize('name', NAMES)
def test_the_students_own_losses_and_draws_are_untouched(name, models):
    model = models(name)
    data = tiny_zoo.crowd(model)
    found, expected = tiny_zoo.step(model, data), tiny_zoo.step(plain(model), data)
    for key in expected.losses:
        assert torch.equal(found.losses[key], expected.losses[key]), key
    added = {key for key in found.losses if key not in expected.losses}
    assert all(key.startswith('bbox.') for key in added)
    assert found.logged['loss'] == pytest.approx(
        sum(value for key, value in found.logged.items() if 'loss' in key and key != 'loss'),
        rel=1e-5,
    )


@pytest.mark.parametrize('name', NAMES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, models):
    """DINO's queries see the denoising ones while they train, behind a mask."""
    model = models(name, same=True)
    found = tiny_zoo.step(model, tiny_zoo.crowd(model))
    for key in ('kd', 'kd_box'):
        assert found.logged[f'bbox.loss_{key}'] == pytest.approx(0, abs=1e-4)
    for loss in model.distillation.losses.values():
        loss.pop_counts()
    for boxes in found.units[0].boxes.student, found.units[0].boxes.teacher:
        assert boxes.isfinite().all()
    torch.testing.assert_close(found.units[0].student, found.units[0].teacher, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_a_batch_without_any_object_gives_exact_zeros(name, by, models):
    model = models(name)
    if by:
        fit(model, by, 0.5)
    found = tiny_zoo.step(model, tiny_zoo.batch(model, boxes=False))
    ours = [key for key in found.logged if key.startswith('bbox.') and '.l_' not in key]
    assert len(ours) == 7
    assert all(found.logged[key] == 0 for key in ours)
    assert all(math.isfinite(value) for value in found.logged.values())
    assert all(g.isfinite().all() for g in found.gradients.values() if g is not None)


@pytest.mark.parametrize('name', NAMES)
def test_the_terms_alone_teach_the_student(name, models):
    model = models(name)
    inputs, samples = tiny_zoo.crowd(model)
    losses = model(inputs, samples, mode='loss')
    model.zero_grad()
    sum(value for key, value in losses.items() if key.startswith('bbox.loss')).backward()
    for part in (model.backbone, model.decoder, model.bbox_head):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in model.distillation.teacher.parameters())


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_matched_or_run_twice(name, by, models):
    model = models(name)
    teacher = model.distillation.teacher.model
    paths = dict(match='bbox_head.assigner.assign', features='backbone')
    data = tiny_zoo.crowd(model)
    student = plain(model)
    with Taps(student, paths) as taps:
        tiny_zoo.step(student, data)
        expected = {key: len(taps.all(key)) for key in paths}
    if by:
        fit(model, by, 0.5)
    with Taps(model, paths) as taps, Taps(teacher, paths) as others:
        tiny_zoo.step(model, data)
        assert {key: len(taps.all(key)) for key in paths} == expected
        assert {key: len(others.all(key)) for key in paths} == dict(match=3, features=1)


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_fit_is_linear_in_f_and_1_changes_no_bit(name, by, models):
    model = models(name)
    data = tiny_zoo.crowd(model)
    without = tiny_zoo.step(model, data)
    steps = {c: tiny_zoo.step(fit(model, by, c), data) for c in (0.0, 0.25, 1.0)}
    for key, gradient in without.gradients.items():
        for c, found in steps.items():
            assert (found.gradients[key] is None) == (gradient is None), (key, c)
        if gradient is not None:
            assert torch.equal(steps[1.0].gradients[key], gradient), key
            none, some = (steps[c].gradients[key] for c in (0.0, 0.25))
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                some, none + 0.25 * (gradient - none), rtol=1e-3, atol=1e-5 + 1e-4 * scale
            )
    for key, value in without.losses.items():
        if key.startswith('bbox.'):  # summed up in two parts
            torch.testing.assert_close(steps[1.0].losses[key], value)
        else:
            assert torch.equal(steps[1.0].losses[key], value), key
    for c, found in steps.items():
        split = sum(
            value
            for key, value in found.logged.items()
            if 'loss' in key and key != 'loss' and 'dn_' not in key
        )
        soft, hard = found.logged['bbox.l_soft'], found.logged['bbox.l_hard']
        assert split == pytest.approx(soft + c * hard, rel=1e-3), c
        assert soft == pytest.approx(steps[1.0].logged['bbox.l_soft'], rel=1e-4)
        assert hard == pytest.approx(steps[1.0].logged['bbox.l_hard'], rel=1e-4)
        assert soft > 0
        assert hard > 0
    assert steps[0.0].logged['loss'] < steps[1.0].logged['loss']
    for key, value in without.losses.items():
        if 'dn_' in key:
            assert torch.equal(steps[0.0].losses[key], value), key


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_the_recorded_sums_are_the_heads_own_loss(name, by, models):
    model = fit(models(name), by, 0.25)
    data = tiny_zoo.crowd(model)
    expected = tiny_zoo.step(plain(model), data).logged
    own = sum(v for k, v in expected.items() if 'loss' in k and k != 'loss' and 'dn_' not in k)
    found = tiny_zoo.step(model, data)
    (sums,) = model.distillation.fit.pop_records()
    units = found.units[0]
    simple = units.simple.sum() if by == 'unit' else units.simple[:, 0].sum()
    assert sums[:2].tolist() == pytest.approx([3 * own, 3], rel=1e-4)
    assert sums[2:].tolist() == [simple, 8 if by == 'unit' else 3]


@pytest.mark.parametrize('name', NAMES)
def test_the_second_gt_loss_is_the_first_and_changes_nothing(name, models):
    model = models(name)
    pair = model.distillation.main_term.pair
    data = tiny_zoo.tiny_det.raw()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with isolated_rng(7), eval_mode(model):
        inside = [module.training for module in model.modules()]
        total, images = pair.gt_loss(model, copy.deepcopy(data))
        assert inside == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not total.requires_grad
    assert images == 3
    # No layer of these differs between the modes (no dropout, fixed statistics).
    batch = model.data_preprocessor(data, False)
    found = tiny_zoo.step(plain(model), (batch['inputs'], batch['data_samples'])).logged
    own = sum(v for k, v in found.items() if 'loss' in k and k != 'loss' and 'dn_' not in k)
    assert total.item() == pytest.approx(3 * own, rel=1e-3)


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_autocast_is_near_full_precision(name, by, models):
    model = models(name)
    if by:
        fit(model, by, 0.5)
    data = tiny_zoo.crowd(model)
    torch.manual_seed(5)
    with torch.autocast('cpu', torch.bfloat16):
        half = model(data[0], copy.deepcopy(data[1]), mode='loss')
    for key, value in half.items():
        values = value if isinstance(value, list) else [value]
        assert all(x.isfinite().all() for x in values), key
        if key.startswith('bbox.'):
            assert value.dtype == torch.float32
    total, _ = model.parse_losses(half)
    model.zero_grad()
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if name == 'detr':  # elsewhere other proposals are chosen, other queries matched
        full = tiny_zoo.step(model, data).logged
        assert half['bbox.loss_kd'].item() == pytest.approx(full['bbox.loss_kd'], rel=0.2)


@pytest.mark.parametrize('name', NAMES)
def test_copies_of_the_student_do_as_it_does(name, models):
    model = models(name)
    data = tiny_zoo.crowd(model)
    copied = copy.deepcopy(model)
    assert copied.distillation is model.distillation
    for by in (None, 'unit', 'image'):
        if by:
            fit(model, by, 0.25)
        own, other = tiny_zoo.step(model, data), tiny_zoo.step(copied, data)
        assert own.logged == other.logged
    model.distillation.fit = None


@pytest.mark.parametrize(('name', 'teacher'), [('deformable', 'dino'), ('dino', 'two_stage')])
def test_another_family_teaches(name, teacher, tmp_path):
    model = tiny_zoo.distil(tmp_path, name, LOSSES, teacher, seeds=(2, 1))
    found = tiny_zoo.step(fit(model, 'unit', 0.5), tiny_zoo.crowd(model))
    assert all(math.isfinite(value) for value in found.logged.values())
    assert found.logged['bbox.loss_kd'] > 0 < found.logged['bbox.loss_kd_box']


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', ['detr', 'dino'])
def test_fewer_queries_than_objects(name, by, tmp_path):
    """Two of five objects have a query; the rest has no part in the distillation."""
    model = tiny_zoo.distil(tmp_path, name, dict(kd=KD), name, seeds=(2, 1), num_queries=2)
    if by:
        fit(model, by, 0.5)
    found = tiny_zoo.step(model, tiny_zoo.crowd(model))
    units = found.units[0]
    assert (units.labels != -1).sum(1).tolist() == [2, 0, 2]
    expected = tiny_zoo.reference(units, False)
    if by is None:
        assert found.logged['bbox.loss_kd'] == pytest.approx(expected['classes'] / 4, rel=1e-3)
        assert found.logged['bbox.loss_kd_box'] == pytest.approx(expected['boxes'] / 8, rel=1e-3)
    assert all(g.isfinite().all() for g in found.gradients.values() if g is not None)
