"""Masks that locations predict, against what the heads' own losses compare."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.instance.step import first_of_each
from mmdistill_ext.units.pairing import pair_heads
from tests import tiny_heads, tiny_zoo

MASKS = dict(condinst='mask_head', yolact='mask_head', rtmdet_ins='bbox_head.mask_head')
NAMES = list(MASKS)
OBJECTS = [3, 0, 1]


def batch(model, boxes=True):
    """All images as large as the batch: RTMDet-Ins' own loss counts its points differently."""
    inputs, samples = tiny_heads.batch(model, boxes)
    size = tuple(inputs.shape[2:])
    for sample in samples:
        sample.set_metainfo(dict(img_shape=size, pad_shape=size))
    return inputs, samples


def run(name, student_seed=0, teacher_seed=1, boxes=True, **more):
    make = tiny_heads.HEADS[name]
    student = tiny_heads.build(make(), student_seed).train()
    teacher = tiny_heads.build(make(), teacher_seed).eval()
    pair = pair_heads(student, teacher, MASKS[name], None, 'losses.kd')
    inputs, samples = batch(student, boxes)
    paths = {path: path for path in (*pair.student_taps, *more.values())}
    own = Taps(teacher, dict(head=pair.teacher_tap), stop_after=dict(head=1))
    with torch.no_grad(), own:
        teacher(inputs, samples, mode='tensor')
    with Taps(student, paths) as taps:
        student(inputs, samples, mode='loss')
    step = pair.step(taps, own.all('head')[0], samples)
    return pair.build(step), step, taps, samples


def own_masks(name):
    """Of each image: class scores, objects, logits and targets of the positives' masks."""
    paths = dict(
        condinst=dict(target='mask_head._get_targets_single'),
        yolact=dict(target='mask_head._get_targets_single'),
        rtmdet_ins=dict(mask='bbox_head.loss_mask', target='bbox_head.get_targets'),
    )[name]
    units, _, taps, samples = run(name, **paths)
    maps = taps['bbox_head.loss_by_feat'].args[0]
    channels = 4 if name == 'yolact' else 3
    scores = torch.cat([x.permute(0, 2, 3, 1).reshape(3, -1, channels) for x in maps], 1)
    if name == 'rtmdet_ins':
        sampled = taps['bbox_head.get_targets'].output[5]
        inds = [(x.pos_inds, x.pos_assigned_gt_inds) for x in sampled]
        counts = [len(x) for x, _ in inds]
        logits, targets = (x.split(counts) for x in taps['bbox_head.loss_mask'].args)
    else:
        positive = taps['mask_head'].args[1]
        inds = [(x.pos_inds, x.pos_assigned_gt_inds) for x in positive]
        calls = taps.all('mask_head._get_targets_single')
        targets = [call.output[1] for call in calls]
        logits = [call.args[0] for call in calls]
        if name == 'yolact':  # masks within the box, as scores
            logits = [x.logit(1e-6) for x in logits]
    images = []
    for image, (units_of, objects) in enumerate(inds):
        labels = samples[image].gt_instances.labels[objects]
        of_class = scores[image, units_of, labels]
        images.append((of_class, objects, logits[image], targets[image]))
    return units, images


@pytest.mark.parametrize('name', NAMES)
def test_the_likeliest_location_of_each_object_is_compared_with_the_own_losss_target(name):
    units, images = own_masks(name)
    logits, labels = [], []
    for scores, objects, masks, targets in images:
        for number in objects.unique().tolist():
            rows = (objects == number).nonzero().flatten()
            best = rows[scores[rows].argmax()]
            logits.append(masks[best])
            labels.append(targets[best])
    expected, targets = torch.stack(logits), torch.stack(labels)
    found = F.interpolate(units.student, targets.shape[1:], mode='bilinear')[:, 0]
    known = units.labels != IGNORED
    assert torch.equal(units.labels[known], targets.long()[known])
    torch.testing.assert_close(found[known], expected[known], rtol=1e-4, atol=1e-4)
    assert known.all() == (name != 'yolact')
    assert (expected[~known] < -13).all()  # cropped to 0
    assert 0 < (units.labels == 1).sum() < known.sum()


@pytest.mark.parametrize('name', NAMES)
def test_equal_models_have_equal_masks(name):
    units, *_ = run(name, 0, 0)
    torch.testing.assert_close(units.student, units.teacher, rtol=1e-4, atol=1e-4)
    assert units.student.std() > 0.01
    assert units.student.requires_grad
    assert not units.teacher.requires_grad
    assert units.student.ndim == 4


@pytest.mark.parametrize('name', NAMES)
def test_every_object_with_a_location_has_a_mask_at_its_image(name):
    units, step, *_ = run(name)
    counts = torch.bincount(step.images, minlength=3).tolist()
    assert counts[1] == 0
    assert all(0 < n <= most for n, most in zip(counts[::2], OBJECTS[::2], strict=True))
    assert len(units.student) == sum(counts)


@pytest.mark.parametrize('name', NAMES)
def test_images_without_objects_give_nothing_to_compare(name):
    units, *_ = run(name, boxes=False)
    assert len(units.student) == len(units.teacher) == len(units.labels) == 0


def by_name(model, found):
    """Term -> its units."""
    terms = model.distillation.terms
    return {term.name: own for term, own in zip(terms, found.units, strict=True)}


LOSSES = {'sel': dict(type='SelectiveLoss'), 'kd': dict(type='KDLoss')}


@pytest.mark.parametrize('name', NAMES)
def test_losses_are_those_of_the_definition_and_leave_the_own_ones_alone(name, tmp_path):
    make = tiny_heads.HEADS[name]
    losses = {key: dict(cfg, head=MASKS[name]) for key, cfg in LOSSES.items()}
    losses['boxes'] = dict(type='KDLoss')
    model = tiny_heads.distil(tmp_path, make(), make(16), losses)
    data = batch(model)
    found = tiny_zoo.step(model, data)
    units = by_name(model, found)['sel']
    size = units.labels.shape[1:]
    student, teacher = (
        F.interpolate(x.detach().double(), size, mode='bilinear')[:, 0]
        for x in (units.student, units.teacher)
    )
    valid = units.labels != IGNORED
    truth = units.labels.clamp(min=0).double()
    bce = torch.nn.BCEWithLogitsLoss(reduction='none')
    wins = (bce(teacher, truth) < bce(student, truth)) & valid
    distance = bce(student, teacher.sigmoid()) - bce(teacher, teacher.sigmoid())
    expected = distance[valid].sum() / valid.sum()
    assert found.logged['mask.loss_kd'] == pytest.approx(expected.item(), rel=1e-3)
    expected = distance[wins].sum() / wins.sum()
    assert found.logged['mask.loss_sel'] == pytest.approx(expected.item(), rel=1e-3)
    assert 0 < found.logged['mask.teacher_better'] < 1
    own = tiny_zoo.step(tiny_zoo.plain(model), data)
    for key, value in own.logged.items():
        assert key == 'loss' or found.logged[key] == value, key
    model.zero_grad()
    losses = model(*copy.deepcopy(data), mode='loss')
    losses['mask.loss_kd'].backward()
    for part in (model.backbone, model.get_submodule(MASKS[name])):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())


def test_maps_show_the_pixels_of_the_objects():
    units, step, *_ = run('condinst')
    wins = units.labels == 1
    ((won, known),) = Contrast(wins, torch.ones_like(wins), units.paint).maps().values()
    assert won.shape == known.shape == (3, 64, 96)
    assert known.flatten(1).all(1).tolist() == [True, False, True]
    assert not won[1].any()
    last = units.labels[step.images == 2][0] == 1
    expected = last.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(won[2], expected)


def test_the_first_of_the_largest_of_each_group():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 5, (40,), generator=generator)
    values = torch.randint(0, 4, (40,), generator=generator).float()
    found = first_of_each(groups, values)
    assert groups[found].tolist() == groups.unique().tolist()
    for place in found.tolist():
        mine = (groups == groups[place]).nonzero().flatten()
        assert place == mine[values[mine].argmax()]
    assert len(first_of_each(groups[:0], values[:0])) == 0


def teacher_of(name, folder, change=None):
    cfg = tiny_heads.HEADS[name]()
    if change is not None:
        change(cfg)
    return dict(model=cfg, checkpoint=tiny_heads.save_weights(folder, cfg, 1))


def coarser(cfg):
    cfg['neck'].update(start_level=2)
    cfg['bbox_head']['strides'] = [16, 32, 64]


@pytest.mark.parametrize(
    ('name', 'head', 'teacher', 'change', 'message'),
    [
        ('boxinst', 'mask_head', 'boxinst', None, '`losses.kd.head`.*BoxInst.*boxes, no masks'),
        ('condinst', 'mask_head', 'condinst', coarser, 'all levels of the student'),
        ('condinst', 'mask_head', 'yolact', None, 'masks in the same way'),
        ('rtmdet_ins', 'bbox_head.mask_hea', 'rtmdet_ins', None, '`losses.kd.head`.*mask_hea'),
    ],
)
def test_masks_that_do_not_fit_are_refused(name, head, teacher, change, message, tmp_path):
    cfg = tiny_heads.HEADS[name]()
    teacher = teacher_of(teacher, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        build_teacher_student(cfg, teacher, dict(kd=dict(type='KDLoss', head=head)))


@pytest.mark.parametrize('name', NAMES)
def test_fit_is_refused(name, tmp_path):
    cfg = tiny_heads.HEADS[name]()
    losses = dict(kd=dict(type='KDLoss', head=MASKS[name]))
    fit = dict(function=dict(type='ConstantFit'))
    with pytest.raises(ValueError, match='`fit` cannot split the own loss of the masks of'):
        build_teacher_student(cfg, teacher_of(name, tmp_path), losses, fit=fit)
