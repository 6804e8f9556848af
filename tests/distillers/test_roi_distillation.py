import math
from functools import partial

import pytest
import torch
from torch import nn

from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.distillers.teacher_student import build_teacher_student
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
fit = partial(tiny_zoo.set_fit, iou=0.6, score=0.6, threshold=0.5)


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
    detects = by == 'image'  # an image is judged by what the teacher finds in it by itself
    assert runs.pop('rpn_head') == detects
    for path in (*stages, *silent):
        looks = detects and path.startswith('bbox_head')
        assert runs.pop(f'roi_head.{path}') == (path in stages) + looks, path
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
        ('crowd', dict(a=KD), False, '`losses.a.head` should lead to one of BBoxHead, .*features'),
        ('dynamic', dict(a=KD), True, '`fit` cannot split the losses of a DynamicRoIHead'),
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
