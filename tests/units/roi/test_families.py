"""RoI heads of every family: units are what their own losses compare, and they learn from them."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.isolation import eval_mode
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.pairing import pair_heads
from tests import tiny_zoo
from tests.stock import detectors  # noqa: F401  (registers StockBackbone)

BOX, MASK = 'roi_head.bbox_head', 'roi_head.mask_head'
KD = dict(type='KDLoss', average='positive', box=dict(distance='iou'))
LOSSES = dict(kd=KD, sel=dict(KD, type='SelectiveLoss'))
MASKS = dict(mask=dict(type='KDLoss', head=MASK))
WITH_MASKS = ('pisa', 'seesaw', 'scoring', 'pointrend', 'panoptic', 'htc_plain', 'htc', 'scnet')
UNSPLIT = dict(
    dynamic='DynamicRoIHead: its RoI head adapts',
    pisa='PISARoIHead: PISA weighs',
    seesaw='SeesawLoss in `loss_cls`',
    grid='needs a teacher whose box head predicts boxes',
)
NAMES = ('double', 'dynamic', 'grid', 'sabl', 'sabl_cascade', *WITH_MASKS)
SPLITS = [name for name in NAMES if name not in UNSPLIT]
OTHERS = [  # another family teaches
    ('faster', 'cascade'),
    ('cascade', 'faster'),
    ('faster', 'seesaw'),
    ('seesaw', 'faster'),
    ('sabl', 'double'),
    ('htc', 'scnet'),
    ('scnet', 'mask'),
]


def losses_of(name, teacher=None):
    boxes = 'grid' not in (name, teacher)
    losses = {key: cfg if boxes else dict(cfg, box=None) for key, cfg in LOSSES.items()}
    masks = name in WITH_MASKS and (teacher is None or teacher in (*WITH_MASKS, 'mask'))
    return {**losses, **MASKS} if masks else losses


def plain_norms(model):
    """The model with its BatchNorms in eval mode: those of Double-Head train."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Student, teacher -> a model; ``same``: equal to each other."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name, teacher=None, same=False):
        key = name, teacher, same
        if key not in made:
            seeds = (11, 11) if same else (12, 11)
            losses = losses_of(name, teacher)
            made[key] = tiny_zoo.distil(folder, name, losses, teacher, seeds=seeds)
        made[key].distillation.fit = None
        return made[key]

    return get


@pytest.mark.parametrize(('name', 'teacher'), [*((name, None) for name in NAMES), *OTHERS])
def test_units_are_what_the_heads_own_loss_compared(name, teacher, models):
    model = models(name, teacher)
    pair = model.distillation.terms[0].pair
    with Taps(model, dict(own=f'{pair.heads[0]}.loss')) as taps:
        found = tiny_zoo.step(model, tiny_zoo.batch(model))
        scores, predicted, rois, labels, weights, targets = taps.all('own')[-1].args[:6]
    units, head = found.units[0], model.get_submodule(pair.heads[0])
    valid = units.labels != -1
    assert valid.sum() == len(rois)
    assert torch.equal(units.labels[valid], labels)
    got = units.student.transpose(1, 2)[valid]
    if getattr(head, 'custom_activation', False):
        torch.testing.assert_close(got.softmax(-1), head.loss_cls.get_activation(scores))
    else:
        assert torch.equal(got, scores)
        expected = F.cross_entropy(got, labels) * head.loss_cls.loss_weight
        expected = expected * pair.student.loss_weight
        if name != 'pisa':  # which weighs them
            own = [v.item() for k, v in found.losses.items() if k.endswith('loss_cls')]
            assert expected.item() == pytest.approx(own[-1], rel=1e-4)
    assert (weights > 0).all()
    positive = labels < 3
    assert positive.sum() > 3
    if name == 'grid':
        assert units.boxes is None
        return
    boxes, priors = units.boxes, rois[positive, 1:]
    assert len(boxes.target) == positive.sum()
    if 'sabl' in name:
        own = head.bbox_coder.decode(priors, [x[positive] for x in predicted])[0]
    else:
        far = dict(img_shape=(10**6, 10**6))
        own = head.regress_by_class(priors, labels[positive], predicted[positive], far)
        goal = head.bbox_coder.decode(priors, targets[positive])
        torch.testing.assert_close(boxes.target, goal, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(boxes.student.clamp(min=0), own.clamp(min=0), rtol=1e-4, atol=1e-3)
    assert boxes.student.requires_grad
    assert not boxes.teacher.requires_grad


@pytest.mark.parametrize('name', NAMES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, models):
    model = plain_norms(models(name, same=True))
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    for key, value in found.logged.items():
        if key.split('.')[0] in {term.pair.prefix for term in model.distillation.terms}:
            assert abs(value) < (0.06 if 'teacher_better' in key else 1e-4), key
    for units in found.units:
        torch.testing.assert_close(units.student, units.teacher, rtol=1e-3, atol=1e-3)
        if units.boxes is not None:
            boxes = units.boxes
            torch.testing.assert_close(boxes.student, boxes.teacher, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(('name', 'teacher'), [*((name, None) for name in NAMES), *OTHERS])
def test_losses_are_the_sums_of_the_definition(name, teacher, models):
    """The side whose difference is smaller teaches."""
    model = models(name, teacher)
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    for term, units in zip(model.distillation.terms, found.units, strict=True):
        if term.name == 'mask':
            continue
        expected = tiny_zoo.reference(units, term.name == 'sel')
        positive = ((units.labels >= 0) & (units.labels < 3)).sum().item()
        key = f'{term.pair.prefix}.loss_{term.name}'
        assert found.logged[key] == pytest.approx(expected['classes'] / positive, rel=1e-3)
        if units.boxes:
            got = found.logged[f'{key}_box']
            assert got == pytest.approx(expected['boxes'] / positive, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_the_terms_alone_teach_the_student(name, models):
    model = models(name)
    losses = model(*tiny_zoo.batch(model), mode='loss')
    prefixes = {term.pair.prefix for term in model.distillation.terms}
    assert len(prefixes) == 1 + (name in WITH_MASKS)
    model.zero_grad()
    sum(v for k, v in losses.items() if k.split('.')[0] in prefixes and '.loss_' in k).backward()
    parts = ['backbone', 'neck', *{term.pair.heads[0] for term in model.distillation.terms}]
    for part in parts:
        parameters = model.get_submodule(part).parameters()
        assert any(p.grad is not None and p.grad.any() for p in parameters), part
    assert all(p.grad is None for p in model.distillation.teacher.parameters())


@pytest.mark.parametrize('name', [name for name in NAMES if name not in ('grid', 'pointrend')])
def test_a_batch_without_any_object_is_finite(name, models):
    """But for Grid R-CNN's and PointRend's own losses, which mmdet cannot form then."""
    model = models(name)
    found = tiny_zoo.step(model, tiny_zoo.batch(model, boxes=False))
    prefixes = {term.pair.prefix for term in model.distillation.terms}
    for key, value in found.logged.items():
        assert math.isfinite(value) or key.split('.')[0] not in prefixes, key
        if key.endswith(('_kd_box', '_sel_box')) or '.loss_mask' in key:
            assert value == 0 or key.split('.')[0] not in prefixes


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', SPLITS)
def test_own_losses_are_split_and_summed_up(name, by, models):
    model = models(name)
    data = tiny_zoo.batch(model)
    without = tiny_zoo.step(model, data)
    rule = dict(iou=0.6, score=0.6, threshold=0.5)
    steps = {
        c: tiny_zoo.step(tiny_zoo.set_fit(model, by, c, **rule), data) for c in (0.0, 0.5, 1.0)
    }
    terms = {term.pair.student_tap: term for term in model.distillation.terms}
    assert all(term.pair.fused_loss('fit') is None for term in terms.values())
    for term in terms.values():
        prefix, head = term.pair.prefix, term.pair.head
        own = 'loss_mask' if 'mask' in prefix else None
        names = [n for n, _ in head.named_children() if n.startswith('loss_')]
        stage = f's{prefix[-1]}.' if prefix[-1].isdigit() else ''
        keys = [f'{stage}{own}'] if own else [f'{stage}{n}' for n in names]
        for c, found in steps.items():
            terms_of = [k for k in found.logged if k.startswith(f'{prefix}.loss_')]
            soft, hard = (found.logged[f'{prefix}.l_{part}'] for part in ('soft', 'hard'))
            total = sum(found.logged[k] for k in (*keys, *terms_of))
            assert total == pytest.approx(soft + c * hard, rel=1e-3, abs=1e-6), (prefix, c)
        for k in keys:
            assert torch.equal(steps[1.0].losses[k], without.losses[k])
        assert hard > 0 or by == 'image'
    for key, value in without.gradients.items():
        assert value is None or torch.equal(steps[1.0].gradients[key], value), key


def trident(test_branch=1):
    """A TridentNet whose branches are equal."""
    cfg = tiny_zoo.config('faster')
    backbone = dict(type='StockBackbone', channels=(8, 16, 32, 64), strides=(4, 8, 16, 32))
    cfg.type, cfg.backbone = 'TridentFasterRCNN', dict(backbone, repeat=3)
    cfg.roi_head.update(type='TridentRoIHead', num_branch=3, test_branch_idx=test_branch)
    return cfg


def test_all_branches_of_trident_learn_from_one_look_of_the_teacher(tmp_path):
    cfg = trident()
    model = tiny_zoo.distil(tmp_path, cfg, LOSSES, cfg, seeds=(11, 11))
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    units = found.units[0]
    assert len(units.labels) == 9
    assert (units.labels >= 0).any(1).all()
    assert abs(found.logged['bbox.loss_kd']) < 1e-5
    assert abs(found.logged['bbox.loss_kd_box']) < 1e-5
    assert len(units.boxes.target) > 9
    won, known = units.paint(units.labels >= 0, units.labels >= 0)['']
    assert won.shape == known.shape == (3, 64, 96)
    for image in (0, 2):
        assert torch.equal(won[image], known[image])
        assert won[image].any()
    with pytest.raises(ValueError, match='`fit` cannot split the losses of a TridentRoIHead'):
        model.distillation.terms[0].pair.fused_loss('fit')


def test_a_trident_teacher_looks_once():
    student, teacher = (tiny_zoo.build(x, 0) for x in (tiny_zoo.config('faster'), trident()))
    assert pair_heads(student, teacher, None, None, 'a').heads == (BOX, BOX)
    teacher.roi_head.test_branch_idx = -1
    with pytest.raises(ValueError, match='`a` needs a teacher that looks at each image once'):
        pair_heads(student, teacher, None, None, 'a')


@pytest.mark.parametrize('name', SPLITS)
def test_the_own_loss_is_measured_as_it_is_in_training(name, models):
    """Outside of training mmdet's preprocessor leaves semantic maps without padding."""
    model = tiny_zoo.set_fit(models(name), 'image', 1.0, iou=0.3, score=0.9)
    own = tiny_zoo.step(plain_norms(model), tiny_zoo.batch(model)).units[0].own
    torch.manual_seed(5)
    with eval_mode(model):
        found = model.distillation.terms[0].pair.gt_loss(model, tiny_zoo.raw())
    torch.testing.assert_close(found, own.sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', UNSPLIT)
def test_losses_that_cannot_be_split_are_refused(name, models):
    pair = models(name).distillation.terms[0].pair
    with pytest.raises(ValueError, match=f'`fit`.*{UNSPLIT[name]}'):
        pair.fused_loss('fit')


@pytest.mark.parametrize(
    ('name', 'teacher', 'head', 'paths'),
    [
        ('cascade', 'cascade', None, (f'{BOX}.2', f'{BOX}.2')),
        ('cascade', 'faster', f'{BOX}.1', (f'{BOX}.1', BOX)),
        ('faster', 'cascade', None, (BOX, f'{BOX}.2')),
        ('cascade', 'cascade', f'{BOX}.0', (f'{BOX}.0', f'{BOX}.0')),
        ('cascade', 'cascade', MASK, (f'{MASK}.2', f'{MASK}.2')),
        ('cascade', 'mask', f'{MASK}.0', (f'{MASK}.0', MASK)),
        ('mask', 'cascade', MASK, (MASK, f'{MASK}.2')),
        ('scnet', 'htc', MASK, (MASK, f'{MASK}.2')),
    ],
)
def test_the_last_stage_predicts(name, teacher, head, paths):
    student, other = (tiny_zoo.build(tiny_zoo.config(x), 0) for x in (name, teacher))
    assert pair_heads(student, other, head, None, 'a').heads == paths
