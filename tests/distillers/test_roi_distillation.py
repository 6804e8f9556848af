import copy
import math
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from mmdistill_ext.distillers.fit import build_fit
from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.distillers.teacher_student import DistilledModel, build_teacher_student
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.taps import Taps, wrapped
from tests import tiny_zoo

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou', weight=0.5))
SEL = dict(KD, type='SelectiveLoss')
MASK = dict(type='SelectiveLoss', average='valid')
KINDS = dict(kd=KD, sel=SEL, joint=dict(SEL, together=True, weight=2.0))
STAGE = {
    f'{name}{stage}': dict(cfg, head=f'roi_head.bbox_head.{stage}')
    for stage in (0, 2)
    for name, cfg in KINDS.items()
}
LOSSES = dict(
    faster=KINDS,
    mask=dict(KINDS, mask=dict(MASK, head='roi_head.mask_head')),
    cascade=dict(STAGE, mask1=dict(MASK, head='roi_head.mask_head.1')),
)
NAMES = list(LOSSES)
HEADS = dict(faster=['bbox'], mask=['bbox', 'mask'], cascade=['bbox_0', 'bbox_2', 'mask_1'])
OWN = dict(
    faster=dict(bbox=['loss_cls', 'loss_bbox']),
    mask=dict(bbox=['loss_cls', 'loss_bbox'], mask=['loss_mask']),
    cascade=dict(
        bbox_0=['s0.loss_cls', 's0.loss_bbox'],
        bbox_2=['s2.loss_cls', 's2.loss_bbox'],
        mask_1=['s1.loss_mask'],
    ),
)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Name -> student and teacher; ``same``: equal to each other."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name, same=False):
        key = name, same
        if key not in made:
            seeds = (11, 11) if same else (12, 11)
            made[key] = tiny_zoo.distil(folder, name, LOSSES[name], seeds=seeds)
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


def fit(model, by, c, score=0.6):
    """Let the model split by the teacher."""
    function = dict(type='ConstantFit', c=c)
    cfg = dict(function=function, split=by, iou=0.6, score=score, threshold=0.5)
    model.distillation.fit = build_fit(cfg)
    model.distillation.fit.has_hook = True
    return model


@pytest.mark.parametrize('name', NAMES)
def test_losses_are_the_sums_of_the_definition(name, models):
    model = models(name)
    for loss in model.distillation.losses.values():
        loss.pop_counts()
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    terms = zip(model.distillation.terms, found.units, strict=True)
    for term, units in terms:
        key = f'{term.pair.prefix}.loss_{term.name}'
        joint, selective = 'joint' in term.name, 'kd' not in term.name
        if 'mask' in term.name:  # a pixel is a unit: too many for one by one
            truth = units.labels.double()
            student, teacher = (x[:, 0].detach().double() for x in (units.student, units.teacher))
            bce = nn.BCEWithLogitsLoss(reduction='none')
            wins = bce(teacher, truth) < bce(student, truth)
            distance = bce(student, teacher.sigmoid()) - bce(teacher, teacher.sigmoid())
            expected = (distance * wins).sum().item() / wins.numel()
            assert found.logged[key] == pytest.approx(expected, rel=1e-3)
        else:
            expected = tiny_zoo.reference(units, selective, joint)
            wins, objects = expected['wins'], len(units.boxes.target)
            weight = term.schedule.weight / objects
            got = found.logged[key], found.logged[f'{key}_box']
            assert got[0] == pytest.approx(weight * expected['classes'], rel=1e-3, abs=1e-6)
            assert got[1] == pytest.approx(weight * expected['boxes'] / 2, rel=1e-3, abs=1e-6)
        counts = term.loss.pop_counts()
        assert counts[0].sum() == (units.labels != -1).sum()
        if selective:
            assert counts[1].sum() == wins.sum()
            assert 0 < wins.sum() < counts[0].sum()


@pytest.mark.parametrize('name', NAMES)
def test_the_students_own_losses_and_samples_are_untouched(name, models):
    model = models(name)
    data = tiny_zoo.batch(model)
    found, expected = tiny_zoo.step(model, data), tiny_zoo.step(plain(model), data)
    for key, value in expected.losses.items():
        got = found.losses[key]
        pairs = zip(got, value, strict=True) if isinstance(value, list) else [(got, value)]
        assert all(torch.equal(own, other) for own, other in pairs), key
    added = {key for key in found.losses if key not in expected.losses}
    assert {key.split('.')[0] for key in added} == set(HEADS[name])


@pytest.mark.parametrize('name', NAMES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, models):
    model = models(name, same=True)
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    for key, value in found.logged.items():
        if key.split('.')[0] in HEADS[name]:
            bound = 0.05 if 'teacher_better' in key else 1e-4  # but for rounding
            assert abs(value) < bound, key


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_a_batch_without_any_object_is_finite(name, by, models):
    model = models(name)
    if by:
        fit(model, by, 0.5)
    found = tiny_zoo.step(model, tiny_zoo.batch(model, boxes=False))
    assert all(math.isfinite(value) for value in found.logged.values())
    assert all(g.isfinite().all() for g in found.gradients.values() if g is not None)
    for key, value in found.logged.items():
        if key.endswith('_box') or '.loss_mask' in key:
            assert value == 0, key
    prefix = HEADS[name][0]
    assert found.logged[f'{prefix}.loss_kd{prefix.removeprefix("bbox_").replace("bbox", "")}'] > 0


@pytest.mark.parametrize('name', NAMES)
def test_proposals_in_ignored_regions_are_not_compared(name, models):
    """The batch has ignored boxes: with the switch for them on, the student samples others."""
    model = models(name)
    assigners = model.roi_head.bbox_assigner
    assigners = assigners if isinstance(assigners, list) else [assigners]
    data = tiny_zoo.batch(model)
    head = 'roi_head.bbox_head.0' if name == 'cascade' else 'roi_head.bbox_head'
    before = tiny_zoo.step(model, data).units[0]
    try:
        for assigner in assigners:
            assigner.ignore_iof_thr, assigner.ignore_wrt_candidates = 0.5, True
        with Taps(model, dict(own=f'{head}.loss')) as taps:
            found = tiny_zoo.step(model, data)
            rois = taps['own'].args[2]
    finally:
        for assigner in assigners:
            assigner.ignore_iof_thr = -1
    valid = (found.units[0].labels != -1).sum()
    assert valid == len(rois) < (before.labels != -1).sum()
    assert all(math.isfinite(value) for value in found.logged.values())


@pytest.mark.parametrize('name', NAMES)
def test_the_terms_alone_teach_the_student(name, models):
    model = models(name)
    losses = model(*tiny_zoo.batch(model), mode='loss')
    model.zero_grad()
    ours = [v for k, v in losses.items() if k.split('.')[0] in HEADS[name] and '.loss_' in k]
    sum(ours).backward()
    for part in (model.backbone, model.neck, model.roi_head):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.rpn_head.parameters())
    assert all(p.grad is None for p in model.distillation.teacher.parameters())


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_assigned_or_run_twice(name, by, models):
    model = models(name)
    teacher = model.distillation.teacher.model
    data = tiny_zoo.batch(model)
    calls = []

    def count(forward):
        return lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]

    assigners = model.roi_head.bbox_assigner
    first = assigners[0] if isinstance(assigners, list) else assigners
    if by:
        fit(model, by, 0.5)
    stages = {'faster': ['bbox_head'], 'mask': ['bbox_head', 'mask_head']}.get(
        name, ['bbox_head.0', 'bbox_head.2', 'mask_head.1']
    )
    silent = {'faster': [], 'mask': []}.get(name, ['bbox_head.1', 'mask_head.0', 'mask_head.2'])
    paths = ['backbone', 'neck', 'rpn_head', *(f'roi_head.{x}' for x in (*stages, *silent))]
    with wrapped(first, 'assign', count), Taps(teacher, {p: p for p in paths}) as taps:
        tiny_zoo.step(model, data)
        runs = {path: len(taps.all(path)) for path in paths}
    assert len(calls) == 3
    assert runs.pop('rpn_head') == 0
    assert all(runs.pop(f'roi_head.{path}') == 0 for path in silent)
    assert set(runs.values()) == {1}


def test_only_the_heads_that_count_now_are_run(models):
    model = models('mask')
    teacher = model.distillation.teacher.model
    term = next(term for term in model.distillation.terms if term.name == 'mask')
    schedule, term.schedule = term.schedule, Schedule(weight=0.0)
    try:
        with Taps(teacher, dict(box='roi_head.bbox_head', mask='roi_head.mask_head')) as taps:
            found = tiny_zoo.step(model, tiny_zoo.batch(model))
            assert (len(taps.all('box')), len(taps.all('mask'))) == (1, 0)
    finally:
        term.schedule = schedule
    assert not any(key.startswith('mask.') for key in found.losses)


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_fit_is_linear_in_f_and_1_changes_no_bit(name, by, models):
    model = models(name)
    data = tiny_zoo.batch(model)
    without = tiny_zoo.step(model, data)
    steps = {c: tiny_zoo.step(fit(model, by, c), data) for c in (0.0, 0.25, 1.0)}
    for key, gradient in without.gradients.items():
        if gradient is None:
            assert all(found.gradients[key] is None for found in steps.values()), key
            continue
        assert torch.equal(steps[1.0].gradients[key], gradient), key
        none, some = (steps[c].gradients[key] for c in (0.0, 0.25))
        none = torch.zeros_like(gradient) if none is None else none
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            some, none + 0.25 * (gradient - none), rtol=1e-3, atol=1e-6 + 1e-4 * scale
        )
    for key, value in without.logged.items():
        ours = key.split('.')[0] in HEADS[name] or key == 'loss'  # summed up in two parts
        got = steps[1.0].logged[key]
        assert got == pytest.approx(value, rel=1e-5) if ours else got == value, key
    for c, found in steps.items():
        for prefix, own in OWN[name].items():
            keys = [key for key in found.logged if key.startswith(f'{prefix}.loss_')]
            split = sum(found.logged[key] for key in (*own, *keys))
            soft, hard = (found.logged[f'{prefix}.l_{kind}'] for kind in ('soft', 'hard'))
            assert split == pytest.approx(soft + c * hard, rel=1e-3, abs=1e-6), (prefix, c)
            assert soft == pytest.approx(steps[1.0].logged[f'{prefix}.l_soft'], rel=1e-4)
            assert hard == pytest.approx(steps[1.0].logged[f'{prefix}.l_hard'], rel=1e-4)
    prefix = 'bbox_2' if name == 'cascade' else 'bbox'
    assert steps[1.0].logged[f'{prefix}.l_hard'] > 0
    untouched = {'s1.loss_cls', 's1.loss_bbox', 's0.loss_mask', 'loss_rpn_cls', 'loss_rpn_bbox'}
    for key in untouched & without.logged.keys():
        assert steps[0.0].logged[key] == without.logged[key], key


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_the_parts_of_the_own_loss_are_those_of_its_rows(name, by, models):
    """Cross-entropy, L1 and binary cross-entropy of simple rows, by hand."""
    model = fit(models(name), by, 1.0)
    weights = dict(bbox_2=0.25, mask_1=0.5)  # of a cascade's stages
    boxes = [x for x in HEADS[name] if 'bbox' in x]
    paths = {
        x: f'roi_head.{x.replace("bbox", "bbox_head").replace("_head_", "_head.")}' for x in boxes
    }
    teacher = model.distillation.teacher.model
    try:
        for path in paths.values():  # it sees nothing but dogs: those are simple
            teacher.get_submodule(path).fc_cls.bias[2] += 50
        with Taps(model, {key: f'{path}.loss' for key, path in paths.items()}) as taps:
            found = tiny_zoo.step(model, tiny_zoo.batch(model))
            calls = {key: taps[key].args for key in paths}
    finally:
        for path in paths.values():
            teacher.get_submodule(path).fc_cls.bias[2] -= 50
    done = set()
    for term, units in zip(model.distillation.terms, found.units, strict=True):
        key = term.pair.prefix
        if units.own is None:
            continue
        done.add(key)
        if 'mask' in key:
            logits, truth = units.student[:, 0].double(), units.labels.double()
            rows = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction='none')
            simple = (rows * units.simple).sum() / rows.numel()
            whole = rows.mean()
        else:
            scores, deltas, rois, labels, _, targets = calls[key][:6]
            rows = nn.functional.cross_entropy(scores.double(), labels, reduction='none')
            counts = [(rois[:, 0] == image).sum() for image in range(3)]
            flags = torch.cat([x[:n] for x, n in zip(units.simple, counts, strict=True)])
            positive = labels < 3
            if by == 'unit':
                assert flags[positive].any()
                assert flags[positive].tolist() != flags[positive].flip(0).tolist()
            deltas = deltas.view(len(deltas), -1, 4)
            kinds = labels.clamp(max=deltas.shape[1] - 1)
            errors = (deltas[range(len(deltas)), kinds] - targets).abs()
            module = model.get_submodule(paths[key]).loss_bbox
            if type(module).__name__ == 'SmoothL1Loss':
                errors = torch.where(errors < 1, errors**2 / 2, errors - 0.5)
            rows = rows + errors.sum(1) * positive
            simple, whole = ((rows * part).sum() / len(rows) for part in (flags, 1))
        factor = weights.get(key, 1.0) if name == 'cascade' else 1.0
        parts = units.own.parts.tolist()
        assert parts[0] == pytest.approx(factor * simple.item(), rel=1e-3)
        assert sum(parts) == pytest.approx(factor * whole.item(), rel=1e-3)
    assert done == set(HEADS[name])


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_the_recorded_sums_are_the_heads_own_loss(name, by, models):
    """Of the box head that the student predicts with, the stage's weight included."""
    model = fit(models(name), by, 0.25)
    data = tiny_zoo.batch(model)
    expected = tiny_zoo.step(plain(model), data).logged
    stage = 's2.' if name == 'cascade' else ''
    own = expected[f'{stage}loss_cls'] + expected[f'{stage}loss_bbox']
    found = tiny_zoo.step(model, data)
    (sums,) = model.distillation.fit.pop_records()
    place = [term.pair.predicts for term in model.distillation.terms].index(True)
    units = found.units[place]
    valid = units.labels != -1
    simple = (units.simple & valid).sum() if by == 'unit' else units.simple[:, 0].sum()
    assert sums[:2].tolist() == pytest.approx([3 * own, 3], rel=1e-4)
    assert sums[2:].tolist() == [simple, valid.sum() if by == 'unit' else 3]


@pytest.mark.parametrize('name', NAMES)
def test_the_second_gt_loss_is_the_first_and_changes_nothing(name, models):
    model = models(name)
    pair = model.distillation.main_term.pair
    data = tiny_zoo.raw()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with isolated_rng(7), eval_mode(model):
        inside = [module.training for module in model.modules()]
        torch.manual_seed(5)
        total, images = pair.gt_loss(model, copy.deepcopy(data))
        assert inside == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not total.requires_grad
    assert images == 3
    found = tiny_zoo.step(plain(model), tiny_zoo.batch(model)).logged
    stage = 's2.' if name == 'cascade' else ''
    own = found[f'{stage}loss_cls'] + found[f'{stage}loss_bbox']
    assert total.item() == pytest.approx(3 * own, rel=0.01)


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_autocast_is_near_full_precision(name, by, models):
    """But for the proposals and the RoI extractors, which have no bfloat16 on CPUs."""
    model = models(name)
    if by:
        fit(model, by, 0.5)
    data = tiny_zoo.batch(model)

    def in_float(forward):
        def run(features, *args, **kwargs):
            with torch.autocast('cpu', enabled=False):
                return forward(tuple(x.float() for x in features), *args, **kwargs)

        return run

    with ExitStack() as stack:
        stack.enter_context(wrapped(model.rpn_head, 'loss_and_predict', in_float))
        for module in (*model.modules(), *model.distillation.teacher.modules()):
            if type(module).__name__ == 'SingleRoIExtractor':
                stack.enter_context(wrapped(module, 'forward', in_float))
        torch.manual_seed(5)
        stack.enter_context(torch.autocast('cpu', torch.bfloat16))
        half = model(data[0], copy.deepcopy(data[1]), mode='loss')
    full = tiny_zoo.step(model, data).logged
    total, logged = model.parse_losses(half)
    for key, value in half.items():
        if key.split('.')[0] in HEADS[name]:
            assert value.dtype == torch.float32, key
            assert value.isfinite()
    model.zero_grad()
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    prefix = HEADS[name][0]
    key = f'{prefix}.loss_kd' + ('0' if name == 'cascade' else '')
    assert logged[key].item() == pytest.approx(full[key], rel=0.3)


@pytest.mark.parametrize('name', NAMES)
def test_copies_of_the_student_do_as_it_does(name, models):
    model = models(name)
    data = tiny_zoo.batch(model)
    copied = copy.deepcopy(model)
    assert copied.distillation is model.distillation
    assert tiny_zoo.step(model, data).logged == tiny_zoo.step(copied, data).logged
    for by in ('unit', 'image'):
        own = tiny_zoo.step(fit(model, by, 0.25), data)
        assert own.logged == tiny_zoo.step(copied, data).logged
    model.distillation.fit = None


def test_two_stages_of_one_teacher_are_two_terms(tmp_path):
    """On the same head of the student."""
    losses = {str(i): dict(KD, teacher_head=f'roi_head.bbox_head.{i}') for i in (0, 2)}
    values = []
    for key, loss in losses.items():
        one = tiny_zoo.distil(tmp_path, 'faster', {key: loss}, 'cascade')
        found = tiny_zoo.step(one, tiny_zoo.batch(one)).logged
        values.append([found[f'bbox.loss_{key}'], found[f'bbox.loss_{key}_box']])
    assert values[0] != pytest.approx(values[1], rel=0.01)
    both = tiny_zoo.distil(tmp_path, 'faster', losses, 'cascade')
    for by in (None, 'unit', 'image'):
        if by:
            fit(both, by, 1.0)
        found = tiny_zoo.step(both, tiny_zoo.batch(both)).logged
        for key, expected in zip(losses, values, strict=True):
            got = [found[f'bbox.loss_{key}'], found[f'bbox.loss_{key}_box']]
            assert got == pytest.approx(expected, rel=1e-4), by


@pytest.mark.parametrize(
    ('name', 'losses', 'fitted', 'message'),
    [
        ('faster', dict(a=dict(KD, class_weight=[1.0] * 3)), False, 'hold 4 weights'),
        ('faster', dict(a=dict(KD, box=dict(distance='distribution'))), False, 'one of iou, l1 '),
        ('mask', dict(a=dict(KD, head='roi_head.mask_head')), False, '`box` is for heads with'),
        (
            'mask',
            dict(a=dict(SEL, box=None, head='roi_head.mask_head')),
            False,
            "`average='positive'` is for detectors",
        ),
        ('cascade', dict(a=KD), False, '`losses.a.head` should name one stage'),
        ('mask', dict(a=dict(MASK, head='roi_head.mask_head')), True, '`fit` needs one of the'),
        ('cascade', dict(a=dict(KD, head='roi_head.bbox_head.0')), True, '`fit` needs one of'),
    ],
)
def test_losses_that_do_not_fit_are_refused(name, losses, fitted, message, tmp_path):
    cfg = {'_scope_': 'mmdet', **tiny_zoo.config(name)}
    path = tiny_zoo.save_weights(tmp_path / 't.pth', cfg, 0)
    found = dict(function=dict(type='ConstantFit', c=1.0)) if fitted else None
    with pytest.raises(ValueError, match=message):
        build_teacher_student(cfg, dict(model=cfg, checkpoint=path), losses, fit=found)
