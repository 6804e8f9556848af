"""Masks of the cells of SOLO's grids, against what the heads' own losses compare."""

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.instance.grid_pair import GridMaskPair
from mmdistill_ext.units.pairing import pair_heads
from tests import tiny_heads, tiny_zoo

NAMES = tiny_heads.MASKED
LOSS = 'mask_head.loss_mask'


def run(name, student_seed=0, teacher_seed=1, teacher=None, boxes=True):
    make = tiny_heads.HEADS[name]
    student = tiny_heads.build(make(), student_seed).train()
    teacher = tiny_heads.build(tiny_heads.HEADS[teacher or name](), teacher_seed).eval()
    pair = pair_heads(student, teacher, LOSS, None, 'losses.kd')
    assert isinstance(pair, GridMaskPair)
    inputs, samples = tiny_heads.batch(student, boxes)
    own = Taps(teacher, dict(head=pair.teacher_tap), stop_after=dict(head=1))
    modules = [teacher.get_submodule(path) for path in pair.teacher_training]
    with torch.no_grad(), training_flags(modules), own:
        teacher(inputs, samples, mode='tensor')
    paths = {path: path for path in (*pair.student_taps, LOSS)}
    with Taps(student, paths) as taps:
        student(inputs, samples, mode='loss')
    return pair(taps, own.all('head')[0], samples), taps


@pytest.mark.parametrize('name', NAMES)
def test_units_are_the_masks_that_the_own_loss_compares(name):
    units, taps = run(name)
    targets = [call.output[0] for call in taps.all('mask_head._get_targets_single')]
    calls = iter(taps.all(LOSS))  # one per level that has masks, with all images
    found = {}
    for level in range(4):
        counts = [len(image[level]) for image in targets]
        if not sum(counts):
            continue
        logits, truth = (x.split(counts) for x in next(calls).args)
        for image, rows in enumerate(zip(logits, truth, strict=True)):
            found[image, level] = rows
    rows = [found[place] for place in sorted(found)]  # image by image
    expected, truth = [], []
    for logits, target in rows:
        if not len(logits):
            continue
        logits = logits.logit() if name.startswith('decoupled') else logits
        expected.append(F.interpolate(logits[:, None], (16, 24), mode='bilinear'))
        truth.append(F.interpolate(target[:, None].float(), (16, 24))[:, 0])
    torch.testing.assert_close(units.student, torch.cat(expected), rtol=1e-3, atol=1e-3)
    assert torch.equal(units.labels, torch.cat(truth).long())
    assert len(units.labels) > 10
    assert 0 < (units.labels == 1).sum() < units.labels.numel()


@pytest.mark.parametrize('name', NAMES)
def test_equal_models_have_equal_masks(name):
    units, _ = run(name, 0, 0)
    torch.testing.assert_close(units.student, units.teacher, rtol=1e-4, atol=1e-4)
    assert units.student.std() > 0.01
    assert units.student.requires_grad
    assert not units.teacher.requires_grad


@pytest.mark.parametrize(('student', 'teacher'), [('solo', 'solov2'), ('solov2', 'decoupled')])
def test_masks_of_other_heads_are_those_of_the_same_cells(student, teacher):
    mixed, _ = run(student, teacher=teacher)
    alike, _ = run(teacher, 1, 1)
    counts = [len(x.labels) for x in (mixed, alike)]
    assert mixed.teacher.shape == mixed.student.shape
    if counts[0] == counts[1]:  # SOLOv2 has a mask for each object of a cell
        torch.testing.assert_close(mixed.teacher, alike.student, rtol=1e-3, atol=1e-3)
    assert mixed.teacher.isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_losses_teach_the_masks_and_leave_the_own_ones_alone(name, tmp_path):
    make = tiny_heads.HEADS[name]
    losses = dict(
        classes=dict(type='KDLoss'),
        kd=dict(type='KDLoss', head=LOSS),
        sel=dict(type='SelectiveLoss', head=LOSS),
    )
    model = tiny_heads.distil(tmp_path, make(), make(16), losses)
    data = tiny_heads.batch(model)
    found = tiny_zoo.step(model, data)
    names = [term.name for term in model.distillation.terms]
    units = found.units[names.index('kd')]
    student, teacher = (x[:, 0].detach().double() for x in (units.student, units.teacher))
    bce, truth = torch.nn.BCEWithLogitsLoss(reduction='none'), units.labels.double()
    distance = bce(student, teacher.sigmoid()) - bce(teacher, teacher.sigmoid())
    wins = bce(teacher, truth) < bce(student, truth)
    kd, sel = (found.logged[f'mask_pixels.loss_{key}'] for key in ('kd', 'sel'))
    assert kd == pytest.approx(distance.mean().item(), rel=1e-3)
    assert sel == pytest.approx(distance[wins].mean().item(), rel=1e-3)
    own = tiny_zoo.step(tiny_zoo.plain(model), data)
    for key, value in own.logged.items():
        assert key == 'loss' or found.logged[key] == value, key
    model.zero_grad()
    model(*data, mode='loss')['mask_pixels.loss_kd'].backward()
    for part in (model.backbone, model.mask_head):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    empty = tiny_zoo.step(model, tiny_heads.batch(model, boxes=False))
    assert empty.logged['mask_pixels.loss_kd'] == 0
    assert all(g.isfinite().all() for g in empty.gradients.values() if g is not None)


def test_maps_show_the_pixels_of_the_images():
    units, _ = run('solo')
    wins = units.labels == 1
    ((won, known),) = Contrast(wins, torch.ones_like(wins), units.paint).maps().values()
    assert won.shape == (3, 64, 96)
    assert known.flatten(1).all(1).tolist() == [True, False, True]
    assert won.flatten(1).any(1).tolist() == [True, False, True]


def test_grids_that_the_teacher_lacks_are_refused():
    student = tiny_heads.build(tiny_heads.HEADS['solo'](), 0)
    other = tiny_heads.HEADS['solo']()
    other['mask_head']['num_grids'] = [10, 8, 6, 4]
    with pytest.raises(ValueError, match=r'all levels of the student \(`a`\).*10, 8, 6, 5.*6, 4'):
        pair_heads(student, tiny_heads.build(other, 0), LOSS, None, 'a')


def test_fit_is_refused(tmp_path):
    cfg = tiny_heads.HEADS['solo']()
    teacher = dict(model=cfg, checkpoint=tiny_heads.save_weights(tmp_path, cfg, 1))
    fit = dict(function=dict(type='ConstantFit'))
    with pytest.raises(ValueError, match='`fit` cannot split the own loss of the masks of'):
        build_teacher_student(cfg, teacher, dict(kd=dict(type='KDLoss', head=LOSS)), fit=fit)
