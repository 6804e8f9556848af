"""Queries of MaskFormers for the same segment, against a matching of the test's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData

from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.pairing import pair_heads
from mmdistill_ext.units.segment.mask_pair import SegmentMaskPair
from mmdistill_ext.units.segment.pair import SegmentPair
from tests import tiny_formers, tiny_zoo

NAMES = list(tiny_formers.FORMERS)
MASKS = 'panoptic_head.mask_embed'


def run(name, student_seed=0, teacher_seed=1, teacher=None, boxes=True, same_draws=False):
    """Both kinds of units of a step, and all that they come from."""
    student = tiny_formers.build(tiny_formers.config(name), student_seed).train()
    teacher = tiny_formers.build(teacher or tiny_formers.config(name), teacher_seed).eval()
    pairs = [pair_heads(student, teacher, head, None, 'a') for head in (None, MASKS)]
    inputs, samples = tiny_formers.batch(student, boxes)
    own = Taps(teacher, dict(head='panoptic_head'), stop_after=dict(head=1))
    with torch.no_grad(), own:
        teacher(inputs, samples, mode='tensor')
    paths = {path: path for path in pairs[0].student_taps}
    torch.manual_seed(3)
    with Taps(student, paths) as taps:
        losses = student(inputs, samples, mode='loss')
    steps = [pair.step(taps, own.all('head')[0], samples) for pair in pairs]
    units = [pair.build(step) for pair, step in zip(pairs, steps, strict=True)]
    return units, steps[0], taps, losses


def segments(taps):
    return taps['panoptic_head.loss_by_feat'].args[2]


@pytest.mark.parametrize('name', NAMES)
def test_units_are_the_segments_of_things_and_stuff(name):
    (classes, masks), step, taps, _ = run(name)
    truth = segments(taps)
    stuff = tiny_formers.STUFF[name]
    counts = [len(image.labels) for image in truth]
    assert counts == [3 + stuff, stuff, 1 + stuff]
    for image, own in enumerate(truth):
        assert torch.equal(classes.labels[image, : counts[image]], own.labels)
        assert (classes.labels[image, counts[image] :] == -1).all()
    assert classes.student.shape == (3, 3 + stuff + 1, max(counts))
    size = step.student_layer[1].shape[-2:]
    assert masks.student.shape == masks.teacher.shape == (sum(counts), 1, *size)
    expected = torch.cat([x.masks for x in truth if len(x.masks)]).float()[:, None]
    expected = F.interpolate(expected, size, mode='nearest')[:, 0].long()
    assert torch.equal(masks.labels, expected)


@pytest.mark.parametrize('name', NAMES)
def test_the_students_queries_are_those_that_its_own_loss_matched(name):
    (classes, masks), step, taps, losses = run(name)
    scores, all_masks = (x[-1] for x in taps['panoptic_head.loss_by_feat'].args[:2])
    weights = torch.ones(scores.shape[-1])
    weights[-1] = 0.1
    labels = torch.full(scores.shape[:2], scores.shape[-1] - 1)
    row = 0
    for image, own in enumerate(segments(taps)):
        queries = step.student_queries[image, : len(own.labels)]
        assert len(queries.unique()) == len(queries)
        labels[image, queries] = own.labels
        for segment, query in enumerate(queries.tolist()):
            assert torch.equal(classes.student[image, :, segment], scores[image, query])
            assert torch.equal(masks.student[row, 0], all_masks[image, query])
            row += 1
    own = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), weights)
    weight = 1.0 if name == 'maskformer' else 2.0
    torch.testing.assert_close(weight * own, losses['loss_cls'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_the_teachers_queries_are_matched_by_its_own_assigner(name):
    (classes, masks), step, taps, _ = run(name)
    scores, all_masks = step.teacher_layer
    row = 0
    for image, own in enumerate(segments(taps)):
        if not len(own.labels):
            continue
        small = F.interpolate(own.masks[:, None].float(), all_masks.shape[-2:], mode='nearest')
        found = step.teacher_head.assigner.assign(
            InstanceData(scores=scores[image], masks=all_masks[image]),
            InstanceData(labels=own.labels, masks=small[:, 0].long()),
            step.samples[image].metainfo,
        ).gt_inds
        for segment in range(len(own.labels)):
            (query,) = (found == segment + 1).nonzero().flatten().tolist()
            assert torch.equal(classes.teacher[image, :, segment], scores[image, query])
            assert torch.equal(masks.teacher[row, 0], all_masks[image, query])
            row += 1
    assert row == len(masks.teacher)


def test_equal_maskformers_have_equal_units():
    """Mask2Former's student matches by points that it draws."""
    for own in run('maskformer', 0, 0)[0]:
        torch.testing.assert_close(own.student, own.teacher, rtol=1e-4, atol=1e-4)
        assert own.student.requires_grad
        assert not own.teacher.requires_grad


@pytest.mark.parametrize('name', NAMES)
def test_losses_are_those_of_the_definition_and_leave_the_own_ones_and_draws_alone(name, tmp_path):
    losses = dict(
        kd=dict(type='KDLoss', average='positive'),
        sel=dict(type='SelectiveLoss', average='positive'),
        mask=dict(type='SelectiveLoss', head=MASKS),
    )
    cfg = tiny_formers.config(name)
    model = tiny_formers.distil(tmp_path, cfg, tiny_formers.config(name, 9), losses)
    data = tiny_formers.batch(model)
    found = tiny_zoo.step(model, data)
    names = [term.name for term in model.distillation.terms]
    for key, selective in (('kd', False), ('sel', True)):
        units = found.units[names.index(key)]
        expected = tiny_zoo.reference(units, selective)['classes'] / (units.labels >= 0).sum()
        got = found.logged[f'panoptic.loss_{key}']
        assert got == pytest.approx(expected.item(), rel=1e-3)
        assert got > 0
    assert found.logged['panoptic_mask_embed.loss_mask'] > 0
    own = tiny_zoo.step(tiny_zoo.plain(model), data)
    for key, value in own.logged.items():
        assert key == 'loss' or found.logged[key] == value, key
    after = torch.rand(3)
    tiny_zoo.step(model, data)
    assert torch.equal(torch.rand(3), after)
    for key in ('panoptic.loss_kd', 'panoptic_mask_embed.loss_mask'):
        model.zero_grad()
        model(*copy.deepcopy(data), mode='loss')[key].backward()
        head = model.panoptic_head
        part = head.mask_embed if 'mask' in key else head.cls_embed
        for module in (model.backbone, part):
            assert any(p.grad is not None and p.grad.any() for p in module.parameters())
    empty = tiny_zoo.step(model, tiny_formers.batch(model, boxes=False))
    nothing = tiny_formers.STUFF[name] == 0
    assert (empty.logged['panoptic.loss_kd'] == 0) == nothing
    assert (empty.logged['panoptic_mask_embed.loss_mask'] == 0) == nothing
    assert all(g.isfinite().all() for g in empty.gradients.values() if g is not None)


def test_a_mask2former_teaches_a_maskformer():
    units = run('maskformer', teacher=tiny_formers.config('panoptic'))[0]
    assert all(own.teacher.isfinite().all() for own in units)
    assert len(units[1].teacher) == len(units[1].labels) == 4 + 2 * 3


def test_maps_show_the_segments():
    (classes, masks), *_ = run('panoptic')
    valid = classes.labels != -1
    ((won, known),) = Contrast(classes.labels >= 3, valid, classes.paint).maps().values()
    assert won.shape == known.shape == (3, 64, 96)
    assert known[1, :64, :80].all()  # stuff is everywhere within the image
    assert not known[1, :, 80:].any()
    assert torch.equal(won[1], known[1])
    ((won, known),) = Contrast(masks.labels == 1, masks.labels >= 0, masks.paint).maps().values()
    assert known.all()
    assert won.any()


REFUSED = dict(
    things=(dict(num_things_classes=4), 'the same `num_things_classes`.*Found 3 in.*4 in'),
    stuff=(dict(num_stuff_classes=1), 'the same `num_stuff_classes`.*Found 2 in.*1 in'),
)


@pytest.mark.parametrize('case', REFUSED)
def test_heads_that_do_not_fit_are_refused(case):
    change, message = REFUSED[case]
    student, other = (tiny_formers.config('panoptic') for _ in range(2))
    other['panoptic_head'].update(change)
    classes = other['panoptic_head']['num_things_classes']
    classes += other['panoptic_head']['num_stuff_classes']
    other['panoptic_head']['loss_cls']['class_weight'] = [1.0] * classes + [0.1]
    models = tiny_formers.build(student, 0), tiny_formers.build(other, 0)
    for head in (None, MASKS):
        with pytest.raises(ValueError, match=message):
            pair_heads(*models, head, None, 'a')


def test_heads_are_found_by_their_paths():
    model = tiny_formers.build(tiny_formers.config('instance'), 0)
    assert type(pair_heads(model, model, None, None, 'a')) is SegmentPair
    assert type(pair_heads(model, model, MASKS, None, 'a')) is SegmentMaskPair
    with pytest.raises(ValueError, match='`a.head`.*MaskFormer or Mask2Former.*a ResNet'):
        pair_heads(model, model, 'backbone', None, 'a')
    untrained = {**tiny_formers.config('instance'), 'train_cfg': None}
    with pytest.raises(ValueError, match=r'`a.teacher_head`.*`train_cfg.assigner`'):
        pair_heads(model, tiny_formers.build(untrained, 0), None, None, 'a')


@pytest.mark.parametrize('head', [None, MASKS])
def test_fit_is_refused(head, tmp_path):
    cfg = tiny_formers.config('instance')
    path = tmp_path / 't.pth'
    torch.save(dict(state_dict=tiny_formers.build(cfg, 1).state_dict()), path)
    loss = dict(type='KDLoss') if head is None else dict(type='KDLoss', head=head)
    with pytest.raises(ValueError, match='`fit` cannot split the own loss of Mask2FormerHead'):
        build_teacher_student(
            cfg,
            dict(model=cfg, checkpoint=str(path)),
            dict(kd=loss),
            fit=dict(function=dict(type='ConstantFit')),
        )
