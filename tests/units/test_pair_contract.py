"""What a pair of any kind of detector heads keeps, from its units to the split of its own loss."""

import copy
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.isolation import eval_mode, isolated_rng
from mmdistill_ext.taps import wrapped
from tests import tiny_dense, tiny_det, tiny_heads, tiny_zoo
from tests.tiny_zoo import plain

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou', weight=0.5))
SEL = dict(KD, type='SelectiveLoss')
MASK = dict(type='SelectiveLoss', average='valid')
TERMS = dict(kd=KD, sel=SEL, joint=dict(SEL, together=True, weight=2.0))
STAGE = {
    f'{name}{stage}': dict(cfg, head=f'roi_head.bbox_head.{stage}')
    for stage in (0, 2)
    for name, cfg in TERMS.items()
}


@dataclass
class Case:
    """A kind of detector, and what is known of it.

    Args:
        name: In the zoo of tiny detectors.
        kind: ``'dense'``, ``'head'`` (dense too, with another sort of head), ``'roi'`` or
            ``'query'``.
        losses: The distiller's.
        own: Prefix of a pair -> names of its head's own losses; None for all of the model.
        fit: How FIT splits, so that some units are simple; None where the head's loss cannot be
            split.
        parts: Modules that the terms teach.
    """

    name: str
    kind: str
    losses: dict
    own: dict
    fit: dict | None
    parts: tuple
    main: str = 'bbox'  # prefix of the pair that the student predicts with
    seeds: tuple = (12, 11)
    atol: float = 1e-6
    near: dict = field(default_factory=dict)  # under autocast: loss -> relative difference

    def build(self, folder, same):
        seeds = self.seeds[1:] * 2 if same else self.seeds
        if self.kind == 'head':
            make = tiny_heads.HEADS[self.name]
            cfgs = make(), make(8 if same else 16)
            return tiny_heads.distil(folder, *cfgs, self.losses, seeds)
        if self.kind != 'dense':
            return tiny_zoo.distil(folder, self.name, self.losses, seeds=seeds)
        family = {**tiny_det.FAMILIES, **tiny_dense.FAMILIES}[self.name]
        cfg, teacher = family(), family(8 if same else 16)
        path = tiny_det.save_weights(folder / 'teacher.pth', teacher, seeds[1])
        model = build_teacher_student(cfg, dict(model=teacher, checkpoint=path), self.losses)
        model.distillation.start()  # the next model's teacher has the same file
        model.load_state_dict(tiny_det.build(cfg, seeds[0]).state_dict())
        return model.train()

    def raw(self):
        return tiny_zoo.raw() if self.kind == 'roi' else tiny_det.raw()

    def batch(self, model, boxes=True):
        if self.kind == 'query' and boxes:
            return tiny_zoo.crowd(model)
        sources = dict(dense=tiny_det, head=tiny_heads)
        return sources.get(self.kind, tiny_zoo).batch(model, boxes)

    def is_ours(self, key):
        """Whether an entry of the log is a term's."""
        return key.split('.')[0] in self.own

    def own_keys(self, prefix, logged):
        keys = self.own[prefix]
        if keys is None:
            keys = [key for key in logged if 'loss' in key and 'dn_' not in key and key != 'loss']
            keys = [key for key in keys if not self.is_ours(key)]
        return keys


def dense(name):
    return Case(
        name,
        'dense',
        TERMS,
        dict(bbox=None),
        dict(iou=0.2, score=0.5),
        ('backbone', 'neck', 'bbox_head'),
        seeds=(0, 1),
        atol=1e-5,
    )


def head(name):
    own = dict(condinst=[*BOXES, 'loss_centerness'], boxinst=[*BOXES, 'loss_centerness'])
    own |= dict(yolact=BOXES)
    splits = name in ('yolov3', 'rtmdet_ins', 'condinst', 'boxinst')
    boxless = name in tiny_heads.WITHOUT_BOXES
    losses = {key: dict(TERMS[key], box=None) for key in ('kd', 'sel')} if boxless else TERMS
    main, part = ('mask', 'mask_head') if name in tiny_heads.MASKED else ('bbox', 'bbox_head')
    return Case(
        name,
        'head',
        losses,
        {main: own.get(name)},
        dict(iou=0.2, score=0.5) if splits else None,
        ('backbone', 'neck', part),
        main=main,
        seeds=(0, 1),
        atol=1e-5,
    )


def roi(name, own, **changes):
    losses = dict(
        faster=TERMS,
        mask=dict(TERMS, mask=dict(MASK, head='roi_head.mask_head')),
        cascade=dict(STAGE, mask1=dict(MASK, head='roi_head.mask_head.1')),
    )[name]
    fit, parts = dict(iou=0.6, score=0.6, threshold=0.5), ('backbone', 'neck', 'roi_head')
    return Case(name, 'roi', losses, own, fit, parts, **changes)


def query(name):
    near = dict(kd=0.2) if name == 'detr' else {}  # elsewhere other queries are matched
    fit, parts = dict(iou=0.05, score=0.99), ('backbone', 'decoder', 'bbox_head')
    seeds = (2, 1)
    return Case(
        name, 'query', TERMS, dict(bbox=None), fit, parts, seeds=seeds, atol=1e-5, near=near
    )


BOXES = ['loss_cls', 'loss_bbox']
DENSE = [dense(name) for name in tiny_det.FAMILIES]
ROI = [
    roi('faster', dict(bbox=BOXES), near=dict(kd=0.3)),
    roi('mask', dict(bbox=BOXES, mask=['loss_mask']), near=dict(kd=0.3)),
    roi(
        'cascade',
        dict(
            bbox_0=[f's0.{key}' for key in BOXES],
            bbox_2=[f's2.{key}' for key in BOXES],
            mask_1=['s1.loss_mask'],
        ),
        main='bbox_2',
        near=dict(kd0=0.3),
    ),
]
QUERY = [query(name) for name in tiny_zoo.QUERY]
FURTHER = [dense(name) for name in tiny_dense.FAMILIES if name not in tiny_dense.VARIANTS]
HEADS = [head(name) for name in tiny_heads.HEADS]
WHOLE = [case for case in FURTHER if case.name in tiny_dense.WHOLE]  # FIT refuses these
CASES = [*DENSE, *FURTHER, *HEADS, *ROI, *QUERY]
SPLIT = [case for case in CASES if case not in WHOLE and case.fit is not None]
ZOO = [*ROI, *QUERY]
SPLIT_BY = ('unit', 'image')
SPLITS = pytest.mark.parametrize('by', SPLIT_BY)


def over(cases):
    return pytest.mark.parametrize('case', cases, ids=lambda case: f'{case.kind}-{case.name}')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Case -> student and teacher; ``same``: equal to each other."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(case, same=False):
        key = case.kind, case.name, same
        if key not in made:
            made[key] = case.build(folder, same)
        made[key].distillation.fit = None
        tiny_zoo.forget(made[key])
        return made[key]

    return get


def fit(case, model, by, c):
    """Let the model split by the teacher; None for not at all."""
    rule = dict(case.fit or {})
    if case.kind in ('dense', 'head') and by == 'image':
        rule['score'] = 0.999  # then nothing is seen in the image without objects
    return tiny_zoo.set_fit(model, by, c, **rule)


def as_list(value):
    return value if isinstance(value, list | tuple) else [value]


def same(own, other):
    return all(torch.equal(a, b) for a, b in zip(as_list(own), as_list(other), strict=True))


@over(CASES)
def test_losses_are_the_sums_of_the_definition(case, models):
    model = models(case)
    for loss in model.distillation.losses.values():
        loss.records.pop_counts()
    found = tiny_zoo.step(model, case.batch(model))
    for term, units in zip(model.distillation.terms, found.units, strict=True):
        key = f'{term.pair.prefix}.loss_{term.name}'
        joint, selective = 'joint' in term.name, 'kd' not in term.name
        classes = term.pair.num_classes + (not units.labels.ndim > 2)
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
            wins = expected['wins']
            positive = ((units.labels >= 0) & (units.labels < term.pair.num_classes)).sum().item()
            assert positive > 0
            weight = term.schedule.weight
            got = weight * expected['classes'] / positive
            assert found.logged[key] == pytest.approx(got, rel=1e-3, abs=1e-6)
            if units.boxes:
                got = weight * expected['boxes'] / len(units.boxes.target) / 2
                assert found.logged[f'{key}_box'] == pytest.approx(got, rel=1e-3, abs=1e-6)
        counts, valid = term.loss.records.pop_counts(), units.labels != -1
        assert torch.equal(counts[0], torch.bincount(units.labels[valid], minlength=classes))
        if selective:
            assert torch.equal(counts[1], torch.bincount(units.labels[wins], minlength=classes))
            assert 0 < wins.sum() < valid.sum()


@over(CASES)
def test_weight_0_is_the_plain_detector_bit_by_bit(case, models):
    model = models(case)
    schedules = [term.schedule for term in model.distillation.terms]
    data = case.batch(model)
    expected = tiny_zoo.step(plain(model), data)
    for term in model.distillation.terms:
        term.schedule = Schedule(weight=0.0)
    try:
        found = tiny_zoo.step(model, data)
    finally:
        for term, schedule in zip(model.distillation.terms, schedules, strict=True):
            term.schedule = schedule
    assert found.losses.keys() == expected.losses.keys()
    assert found.logged == expected.logged
    assert found.gradients.keys() == expected.gradients.keys()
    for key, gradient in found.gradients.items():
        assert (gradient is None) == (expected.gradients[key] is None), key
        assert gradient is None or torch.equal(gradient, expected.gradients[key]), key


@over(CASES)
def test_the_students_own_losses_and_draws_are_untouched(case, models):
    model = models(case)
    data = case.batch(model)
    found, expected = tiny_zoo.step(model, data), tiny_zoo.step(plain(model), data)
    for key, value in expected.losses.items():
        assert same(found.losses[key], value), key
    added = {key for key in found.losses if key not in expected.losses}
    named = set()
    for term in model.distillation.terms:
        key = f'{term.pair.prefix}.loss_{term.name}'
        named |= {key, f'{key}_box'} if term.loss.box else {key}
        if 'kd' not in term.name:
            named.add(f'{term.pair.prefix}.teacher_better')
    assert added == named
    assert {key.split('.')[0] for key in added} == set(case.own)
    total = sum(v for key, v in found.logged.items() if 'loss' in key and key != 'loss')
    assert found.logged['loss'] == pytest.approx(total, rel=1e-5)


@over([*FURTHER, *ZOO])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(case, models):
    """DINO's queries see the denoising ones while they train, behind a mask."""
    model = models(case, same=True)
    found = tiny_zoo.step(model, case.batch(model))
    for key, value in found.logged.items():
        if case.is_ours(key) and (case.kind == 'roi' or '.loss_kd' in key):
            bound = 0.05 if 'teacher_better' in key else 1e-4  # but for rounding
            assert abs(value) < bound, key
    for units in found.units:
        torch.testing.assert_close(units.student, units.teacher, rtol=1e-3, atol=1e-3)
        if units.boxes is not None:
            for boxes in units.boxes.student, units.boxes.teacher:
                assert boxes.isfinite().all()
    for loss in model.distillation.losses.values():
        loss.records.pop_counts()


@pytest.mark.parametrize(
    ('case', 'by'),
    [*((case, None) for case in CASES), *((case, by) for by in SPLIT_BY for case in SPLIT)],
    ids=lambda value: f'{value.kind}-{value.name}' if isinstance(value, Case) else str(value),
)
def test_a_batch_without_any_object_is_finite(case, by, models):
    model = fit(case, models(case), by, 0.5)
    found = tiny_zoo.step(model, case.batch(model, boxes=False))
    assert all(math.isfinite(value) for value in found.logged.values())
    assert all(g.isfinite().all() for g in found.gradients.values() if g is not None)
    for key, value in found.logged.items():
        if case.is_ours(key) and (key.endswith('_box') or '.loss_mask' in key):
            assert value == 0, key
    if case.kind == 'query':
        ours = [key for key in found.logged if case.is_ours(key) and '.l_' not in key]
        assert len(ours) == 7
        assert all(found.logged[key] == 0 for key in ours)
        return
    prefix = next(iter(case.own))
    name = 'kd' + prefix.removeprefix('bbox_').replace(case.main, '')
    taught = case.name != 'yolox'  # its background has no class
    assert (found.logged[f'{prefix}.loss_{name}'] > 0) == taught


@over(CASES)
def test_the_terms_alone_teach_the_student(case, models):
    model = models(case)
    losses = model(*case.batch(model), mode='loss')
    model.zero_grad()
    sum(v for key, v in losses.items() if case.is_ours(key) and '.loss_' in key).backward()
    for part in case.parts:
        parameters = getattr(model, part).parameters()
        assert any(p.grad is not None and p.grad.any() for p in parameters), part
    if case.kind == 'roi':
        assert all(p.grad is None or not p.grad.any() for p in model.rpn_head.parameters())
    assert all(p.grad is None for p in model.distillation.teacher.parameters())


@SPLITS
@over(SPLIT)
def test_fit_is_linear_in_f_and_1_changes_no_bit(case, by, models):
    model = models(case)
    data = case.batch(model)
    without = tiny_zoo.step(model, data)
    steps = {c: tiny_zoo.step(fit(case, model, by, c), data) for c in (0.0, 0.25, 1.0)}
    for key, gradient in without.gradients.items():
        for c, found in steps.items():
            if gradient is None or case.kind != 'roi':
                assert (found.gradients[key] is None) == (gradient is None), (key, c)
        if gradient is None:
            continue
        assert torch.equal(steps[1.0].gradients[key], gradient), key
        none, some = (steps[c].gradients[key] for c in (0.0, 0.25))
        none = torch.zeros_like(gradient) if none is None else none
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            some, none + 0.25 * (gradient - none), rtol=1e-3, atol=case.atol + 1e-4 * scale
        )
    touched = {key for prefix in case.own for key in case.own_keys(prefix, without.logged)}
    for key, value in without.losses.items():
        assert same(steps[1.0].losses[key], value), key
        if key not in touched and not case.is_ours(key):
            assert same(steps[0.0].losses[key], value), key
    assert steps[1.0].logged['loss'] == without.logged['loss']
    for c, found in steps.items():
        for prefix in case.own:
            keys = [key for key in found.logged if key.startswith(f'{prefix}.loss_')]
            own = case.own_keys(prefix, found.logged)
            split = sum(found.logged[key] for key in (*own, *keys))
            soft, hard = (found.logged[f'{prefix}.l_{part}'] for part in ('soft', 'hard'))
            assert split == pytest.approx(soft + c * hard, rel=1e-3, abs=1e-6), (prefix, c)
            assert soft == pytest.approx(steps[1.0].logged[f'{prefix}.l_soft'], rel=1e-4)
            assert hard == pytest.approx(steps[1.0].logged[f'{prefix}.l_hard'], rel=1e-4)
    assert steps[1.0].logged[f'{case.main}.l_hard'] > 0
    if case.kind != 'roi':
        assert steps[1.0].logged['bbox.l_soft'] > 0
    assert steps[0.0].logged['loss'] < steps[1.0].logged['loss']


@SPLITS
@over(SPLIT)
def test_the_recorded_sums_are_the_heads_own_loss(case, by, models):
    """Of the head that the student predicts with, the weight of a cascade's stage included."""
    model = fit(case, models(case), by, 0.25)
    data = case.batch(model)
    expected = tiny_zoo.step(plain(model), data).logged
    own = sum(expected[key] for key in case.own_keys(case.main, expected))
    found = tiny_zoo.step(model, data)
    (sums,) = model.distillation.fit.pop_records()
    units = found.units[[term.pair.predicts for term in model.distillation.terms].index(True)]
    valid = units.labels != -1
    assert case.kind != 'query' or valid.sum() == 8  # all objects have two queries
    assert units.simple.any()
    assert not units.simple.all()
    simple = (units.simple & valid).sum() if by == 'unit' else units.simple[:, 0].sum()
    assert sums[:2].tolist() == pytest.approx([3 * own, 3], rel=1e-4)
    if case.name != 'yolox' or by == 'image':  # all of its points count, few have a class
        assert sums[2:].tolist() == [simple, valid.sum() if by == 'unit' else 3]


@over(ZOO)
def test_the_second_gt_loss_is_the_first_and_changes_nothing(case, models):
    """No layer of these differs between the modes (no dropout, fixed statistics)."""
    model = models(case)
    pair = model.distillation.main_term.pair
    data = case.raw()
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
    batch = model.data_preprocessor(data, False)
    found = tiny_zoo.step(plain(model), (batch['inputs'], batch['data_samples'])).logged
    own = sum(found[key] for key in case.own_keys(case.main, found))
    assert total.item() == pytest.approx(3 * own, rel=0.01 if case.kind == 'roi' else 1e-3)


@contextmanager
def float_islands(model):
    """Keep proposals and RoI extractors, which have no bfloat16 on CPUs, in float32."""

    def in_float(forward):
        def run(features, *args, **kwargs):
            with torch.autocast('cpu', enabled=False):
                return forward(tuple(x.float() for x in features), *args, **kwargs)

        return run

    with ExitStack() as stack:
        if hasattr(model, 'rpn_head'):
            stack.enter_context(wrapped(model.rpn_head, 'loss_and_predict', in_float))
        for module in (*model.modules(), *model.distillation.teacher.modules()):
            if type(module).__name__ == 'SingleRoIExtractor':
                stack.enter_context(wrapped(module, 'forward', in_float))
        yield


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@over(ZOO)
def test_autocast_is_near_full_precision(case, by, models):
    model = fit(case, models(case), by, 0.5)
    data = case.batch(model)
    torch.manual_seed(5)
    with float_islands(model), torch.autocast('cpu', torch.bfloat16):
        half = model(data[0], copy.deepcopy(data[1]), mode='loss')
    full = tiny_zoo.step(model, data).logged
    for key, value in half.items():
        assert all(x.isfinite().all() for x in as_list(value)), key
        if case.is_ours(key):
            assert value.dtype == torch.float32, key
    total, logged = model.parse_losses(half)
    model.zero_grad()
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for name, near in case.near.items():
        key = f'{next(iter(case.own))}.loss_{name}'
        assert logged[key].item() == pytest.approx(full[key], rel=near)


@over(CASES)
def test_copies_of_the_student_do_as_it_does(case, models):
    model = models(case)
    data = case.batch(model)
    copied = copy.deepcopy(model)
    assert copied.distillation is model.distillation
    for by in (None, *(SPLIT_BY if case in SPLIT else ())):
        own = tiny_zoo.step(fit(case, model, by, 0.25), data)
        assert own.logged == tiny_zoo.step(copied, data).logged
    model.distillation.fit = None
