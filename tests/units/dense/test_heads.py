"""Units of heads of other kinds, against what the heads' own losses compare."""

import pytest
import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_overlaps
from mmengine.logging import MessageHub

from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.boxes import box_ious
from mmdistill_ext.units.dense.families.yolov3 import logit_of_product
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.pairing import pair_heads
from tests import tiny_det, tiny_heads
from tests.tiny_zoo import in_one

HEADS = list(tiny_heads.HEADS)
BOXES = [name for name in HEADS if name not in tiny_heads.WITHOUT_BOXES]
SOFT = ('pisa', 'yolov3', 'centernet', 'cornernet', 'centripetal')
LABELLED = [name for name in HEADS if name not in SOFT]
"""Their own loss is a function of the units' logits and labels alone."""
C = 3


def models(name, student_seed=0, teacher_seed=1):
    make = tiny_heads.HEADS[name]
    student = tiny_heads.train(tiny_heads.build(make(), student_seed))
    return student, tiny_heads.build(make(), teacher_seed).eval()


def run(student, teacher, boxes=True, **more):
    """One training step of the student beside the teacher: units, calls, losses, samples."""
    pair = pair_heads(student, teacher, None, None, 'losses.kd')
    inputs, samples = tiny_heads.batch(student, boxes)
    MessageHub.get_current_instance().update_info('iter', 0)
    paths = {path: path for path in (*pair.student_taps, *more.values())}
    own = Taps(teacher, dict(head=pair.teacher_tap), stop_after=dict(head=1))
    modules = [teacher.get_submodule(path) for path in pair.teacher_training]
    with torch.no_grad(), training_flags(modules), own:
        teacher(inputs, samples, mode='tensor')
    with Taps(student, paths) as taps:
        losses = student(inputs, samples, mode='loss')
    return pair(taps, own.all('head')[0], samples), taps, losses, samples


def flat(units):
    """Logits ``(B, N, C)`` and labels ``(B, N)``."""
    return in_one(units.student).transpose(1, 2), units.labels


def focal(logits, labels, divisor):
    """The focal loss with its usual numbers, by its definition."""
    truth = F.one_hot(labels, C + 1)[..., :C].float()
    p = logits.sigmoid()
    wrong = torch.where(truth > 0, 1 - p, p)
    alpha = torch.where(truth > 0, 0.25, 0.75)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction='none')
    return (alpha * wrong**2 * bce).sum() / divisor


def hard_negatives(units, all_without):
    """Cross-entropy of the positives and of three times as many of the worst others, by image.

    Where nothing is positive, of all others or of none.
    """
    total = 0
    for logits, labels in zip(*flat(units), strict=True):
        loss = F.cross_entropy(logits, labels.clamp(min=0), reduction='none')
        positive = (labels >= 0) & (labels < C)
        count = 3 * int(positive.sum())
        others = loss[labels == C].sort(descending=True).values
        if count == 0 and all_without:
            count = len(others)
        total = total + loss[positive].sum() + others[:count].sum()
    return total


def own_class_loss(name, units):
    """What the head's own classification loss should be, from the units alone."""
    logits, labels = flat(units)
    positive = (labels >= 0) & (labels < C)
    count = positive.sum()
    by_image = positive.sum(1).clamp(min=1).sum()  # as mmdet's samplers count
    if name in ('ssd', 'yolact'):
        return hard_negatives(units, all_without=name == 'yolact') / by_image
    valid = labels != IGNORED
    if name == 'rtmdet_ins':
        truth = torch.zeros_like(logits)
        ious = box_ious(units.boxes)[0].detach()
        truth[(*units.boxes.index, labels[units.boxes.index])] = ious
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction='none')
        loss = (bce * (truth - logits.sigmoid()).abs() ** 2)[valid].sum()
        return loss / max(ious.sum().item(), 1)
    if name in tiny_heads.MASKED:
        count = count + 1
    if name == 'yolof':
        count = by_image
    return focal(logits[valid], labels[valid], count)


@pytest.mark.parametrize('name', LABELLED)
def test_the_units_give_the_heads_own_classification_loss(name):
    units, _, losses, _ = run(*models(name))
    own = losses['loss_cls']
    own = torch.stack([x.sum() for x in own]).sum() if isinstance(own, list | tuple) else own
    torch.testing.assert_close(own_class_loss(name, units), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', BOXES)
def test_target_boxes_are_those_of_objects_of_the_class(name):
    units, _, _, samples = run(*models(name))
    images, places = units.boxes.index
    assert len(images) >= 3
    assert (units.labels[images, places] < C).all()
    for image, sample in enumerate(samples):
        mine = images == image
        labels = units.labels[image, places[mine]]
        truth = sample.gt_instances
        same = bbox_overlaps(units.boxes.target[mine], truth.bboxes) > 0.999
        same &= labels[:, None] == truth.labels
        assert same.any(1).all()
    positive = torch.zeros(units.labels.shape, dtype=torch.bool)
    positive[units.boxes.index] = True
    assert torch.equal(positive, (units.labels >= 0) & (units.labels < C))


def deltas(priors, predicted, stds, most):
    """Boxes from offsets of the centre and logarithms of the size, of anchors."""
    size = priors[:, 2:] - priors[:, :2]
    predicted = predicted * torch.tensor(stds)
    center = (priors[:, :2] + priors[:, 2:]) / 2 + (predicted[:, :2] * size).clamp(-most, most)
    half = size * predicted[:, 2:].exp() / 2
    return torch.cat((center - half, center + half), 1)


def decoded(name, head, outputs, strides, image, units):
    """Boxes that a head predicts for some units of an image, by the formula of its paper."""

    def numbers(levels, channels):
        levels = [x[image].permute(1, 2, 0).reshape(-1, channels) for x in levels]
        return torch.cat(levels)[units]

    sizes = [x.shape[-2:] for x in outputs[0]]
    if name == 'centernet':
        width = sizes[0][1]
        places = torch.stack((units % width, units // width), 1)
        center = places + numbers(outputs[2], 2)
        half = numbers(outputs[1], 2) / 2
        return 4 * torch.cat((center - half, center + half), 1)
    priors = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))[units]
    if name == 'yolov3':
        predicted = numbers(outputs[0], 5 + C)
        size = priors[:, 2:] - priors[:, :2]
        center = (priors[:, :2] + priors[:, 2:]) / 2
        center = center + (predicted[:, :2].sigmoid() - 0.5) * strides[:, None]
        half = size * predicted[:, 2:4].exp() / 2
        return torch.cat((center - half, center + half), 1)
    predicted = numbers(outputs[1], 4)
    if name in ('rtmdet_ins', 'condinst', 'boxinst'):
        if name != 'rtmdet_ins' and head.training:
            predicted = predicted * strides[:, None]
        x, y = priors[:, :2].unbind(1)
        left, top, right, bottom = predicted.unbind(1)
        return torch.stack((x - left, y - top, x + right, y + bottom), 1)
    if name == 'yolof':
        return deltas(priors, predicted, (1.0,) * 4, 16)
    return deltas(priors, predicted, (0.1, 0.1, 0.2, 0.2), 1e9)


@pytest.mark.parametrize('name', BOXES)
def test_boxes_follow_the_formula(name):
    student, teacher = models(name)
    units, taps, _, samples = run(student, teacher)
    inputs, _ = tiny_heads.batch(student)
    own = Taps(teacher, dict(head='bbox_head'), stop_after=dict(head=1))
    with torch.no_grad(), own:
        teacher(inputs, samples, mode='tensor')
    outputs = taps['bbox_head.loss_by_feat'].args, own.all('head')[0].output
    strides = units.boxes.scale
    for image in range(3):
        mine = units.boxes.index[0] == image
        places = units.boxes.index[1][mine]
        for boxes, head, output in zip(
            (units.boxes.student, units.boxes.teacher),
            (student.bbox_head, teacher.bbox_head),
            outputs,
            strict=True,
        ):
            expected = decoded(name, head, output, strides[mine], image, places)
            torch.testing.assert_close(boxes[mine], expected, rtol=1e-4, atol=1e-3)


def test_scores_of_yolov3_are_those_that_it_predicts_with():
    student, teacher = models('yolov3')
    modules = dict(cls='bbox_head.loss_cls', conf='bbox_head.loss_conf')
    units, taps, *_ = run(student, teacher, **modules)
    maps = taps['bbox_head.loss_by_feat'].args[0]
    flat_maps = torch.cat([x.permute(0, 2, 3, 1).reshape(3, -1, 5 + C) for x in maps], 1)
    scores = flat_maps[..., 4:5].sigmoid() * flat_maps[..., 5:].sigmoid()
    torch.testing.assert_close(flat(units)[0].sigmoid(), scores, rtol=1e-4, atol=1e-6)
    classes = torch.cat([call.args[1] for call in taps.all('bbox_head.loss_cls')], 1)
    weights = torch.cat([c.kwargs['weight'] for c in taps.all('bbox_head.loss_cls')], 1)[..., 0]
    conf = torch.cat([c.args[1] for c in taps.all('bbox_head.loss_conf')], 1)
    counted = torch.cat([c.kwargs['weight'] for c in taps.all('bbox_head.loss_conf')], 1)
    labels = torch.where(weights > 0, classes.argmax(-1), C).where(counted > 0, IGNORED)
    assert torch.equal(units.labels, labels)
    assert torch.equal((labels >= 0) & (labels < C), conf > 0)
    assert {IGNORED, C} < set(labels.unique().tolist())


def test_a_product_of_scores_has_no_overflow():
    x = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0], dtype=torch.float64)
    first, second = torch.meshgrid(x, x, indexing='ij')
    found = logit_of_product(first, second)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sigmoid(), first.sigmoid() * second.sigmoid())
    torch.testing.assert_close(found, found.T)


def test_units_of_centernet_are_pixels_of_its_heatmaps():
    student, teacher = models('centernet')
    units, taps, *_ = run(student, teacher, heat='bbox_head.loss_center_heatmap')
    scores, target = taps['bbox_head.loss_center_heatmap'].args
    torch.testing.assert_close(flat(units)[0].sigmoid(), scores.flatten(2).transpose(1, 2))
    target = target.flatten(2).transpose(1, 2)
    centre = (target == 1).any(-1)
    assert torch.equal(units.labels, target.argmax(-1).where(centre, C))
    assert centre.sum() == 4


@pytest.mark.parametrize('name', ['cornernet', 'centripetal'])
def test_units_of_corners_are_pixels_of_the_last_heatmaps(name):
    student, teacher = models(name)
    units, taps, *_ = run(student, teacher, heat='bbox_head.loss_heatmap')
    calls = taps.all('bbox_head.loss_heatmap')
    assert len(calls) == 4
    both = [torch.stack([call.args[place] for call in calls[-2:]], 1) for place in (0, 1)]
    scores, target = (x.permute(0, 3, 4, 1, 2).flatten(1, 3) for x in both)  # corners last
    torch.testing.assert_close(flat(units)[0].sigmoid(), scores, rtol=1e-4, atol=1e-5)
    corner = (target == 1).any(-1)
    assert torch.equal(units.labels, target.argmax(-1).where(corner, C))
    assert corner.sum() == 8
    assert units.boxes is None


def test_heatmaps_of_another_size_are_refused():
    cfg = tiny_heads.HEADS['centernet']()
    cfg['neck'].update(start_level=1, end_level=1)
    student = tiny_heads.build(cfg, 0).train()
    with pytest.raises(ValueError, match=r'1 / 4 of the image. Found \(8, 12\).*\(64, 96\)'):
        run(student, student)


@pytest.mark.parametrize('name', HEADS)
def test_a_teacher_in_eval_mode_gives_the_training_students_logits_and_boxes(name):
    student, teacher = models(name, teacher_seed=0)
    units, *_ = run(student, teacher)
    torch.testing.assert_close(in_one(units.student), in_one(units.teacher), rtol=1e-4, atol=1e-4)
    assert flat(units)[0].std() > 0.01
    if units.boxes is not None:
        torch.testing.assert_close(units.boxes.student, units.boxes.teacher, rtol=1e-4, atol=1e-3)
        assert units.boxes.student.requires_grad
        assert not units.boxes.teacher.requires_grad
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize('name', HEADS)
def test_equal_models_have_nothing_to_learn_and_another_teacher_teaches_the_head(name, tmp_path):
    make = tiny_heads.HEADS[name]
    box = None if name in tiny_heads.WITHOUT_BOXES else dict(distance='l1')
    losses = dict(kd=dict(type='KDLoss', average='positive', box=box))
    for seed in (0, 1):
        model = tiny_heads.distil(tmp_path, make(), make(), losses, seeds=(0, seed))
        found = model(*tiny_heads.batch(model), mode='loss')
        ours = [value for key, value in found.items() if '.loss_kd' in key]
        assert len(ours) == 1 + (box is not None)
        if seed == 0:
            assert all(abs(value.item()) < 1e-3 for value in ours)
            continue
        assert all(value > 1e-3 for value in ours)
        sum(ours).backward()
        head = model.mask_head if name in tiny_heads.MASKED else model.bbox_head
        assert any(p.grad is not None and p.grad.any() for p in head.parameters())


@pytest.mark.parametrize('name', HEADS)
def test_maps_of_the_contrast_cover_the_batch(name):
    units, *_ = run(*models(name))
    generator = torch.Generator().manual_seed(0)
    wins = torch.rand(units.labels.shape, generator=generator) < 0.5
    valid = units.labels != IGNORED
    maps = Contrast(wins & valid, valid, units.paint).maps()
    assert len(maps) == len(units.student)
    for won, known in maps.values():
        assert won.shape == known.shape == (3, 64, 96)
        assert known.any()
        assert not (won & ~known).any()


FIT = dict(function=dict(type='ConstantFit'))
NO_FIT = [name for name in HEADS if name not in ('yolov3', 'rtmdet_ins', 'condinst', 'boxinst')]


@pytest.mark.parametrize('name', NO_FIT)
def test_a_loss_that_is_no_sum_over_units_is_not_split(name, tmp_path):
    cfg = tiny_heads.HEADS[name]()
    teacher = dict(model=cfg, checkpoint=tiny_heads.save_weights(tmp_path, cfg, 1))
    with pytest.raises(ValueError, match=r'`fit` needs a head whose loss is a sum over units: '):
        build_teacher_student(cfg, teacher, dict(kd=dict(type='KDLoss')), fit=FIT)


def other(name, **head):
    cfg = tiny_heads.HEADS[name]()
    part = 'mask_head' if name in tiny_heads.MASKED else 'bbox_head'
    cfg[part].update(head)
    return tiny_heads.build(cfg, 1)


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        ('solo', lambda: other('solo', num_grids=[40, 20, 12, 3]), 'at least one level'),
        ('solo', lambda: other('condinst'), '`losses.kd.teacher_head`.*a CondInstMaskHead'),
        ('condinst', lambda: other('yolact'), 'sigmoid or both softmax'),
        ('condinst', lambda: other('solo'), "`losses.kd.teacher_head`.*no 'bbox_head'"),
        ('ssd', lambda: tiny_det.build(tiny_det.retina(softmax=True), 1), 'as many priors per loc'),
        ('yolov3', lambda: tiny_det.build(tiny_det.retina(), 1), 'the same anchors'),
        ('yolov3', lambda: tiny_det.build(tiny_det.atss(), 1), 'as many priors per location'),
    ],
)
def test_heads_that_do_not_fit_are_refused(student, teacher, message):
    model = tiny_heads.build(tiny_heads.HEADS[student](), 0)
    with pytest.raises(ValueError, match=message):
        pair_heads(model, teacher(), None, None, 'losses.kd')


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ('solo', 'solov2'),
        ('solov2', 'decoupled'),
        ('decoupled_light', 'solo'),
        ('condinst', 'boxinst'),
        ('pisa', 'ssd'),
    ],
)
def test_heads_of_the_same_locations_pair_with_each_other(student, teacher):
    own = tiny_heads.build(tiny_heads.HEADS[student](), 0).train()
    there = tiny_heads.build(tiny_heads.HEADS[teacher](), 1).eval()
    mixed = run(own, there)[0]
    alike = run(*models(teacher, 1, 1))[0]
    torch.testing.assert_close(in_one(mixed.teacher), in_one(alike.student), rtol=1e-4, atol=1e-4)


def test_points_of_rtmdet_ins_pair_with_those_of_rtmdet():
    student = tiny_heads.build(tiny_heads.HEADS['rtmdet_ins'](), 0).train()
    teacher = tiny_det.build(tiny_det.rtmdet(), 1).eval()
    units, *_ = run(student, teacher)
    assert units.boxes.teacher.isfinite().all()
    assert in_one(units.teacher).shape == in_one(units.student).shape


def networks(name):
    make = tiny_heads.HEADS[name]
    cfgs = {key: {'_scope_': 'mmdet', **make(channels)} for key, channels in (('a', 8), ('b', 12))}
    for cfg in cfgs.values():
        cfg['test_cfg'].update(max_per_img=20)
    return cfgs


@pytest.mark.parametrize('sequential', [False, True])
@pytest.mark.parametrize('name', BOXES)
def test_networks_learn_together_and_predict_together(name, sequential):
    torch.manual_seed(0)
    box = dict(distance='l1')
    model = CollaborativeDistiller(
        networks(name), second=dict(type='MinLoss'), box=box, sequential_backward=sequential
    )
    for seed, network in enumerate(model.students.values()):
        network.load_state_dict(tiny_heads.build(network_cfg(name, seed), seed).state_dict())
    batches = [tiny_heads.batch(network) for network in model.students.values()]
    inputs, samples = (dict(zip('ab', part, strict=True)) for part in zip(*batches, strict=True))
    samples = dict.fromkeys('ab', samples['a'])  # as a run shares them
    MessageHub.get_current_instance().update_info('iter', 0)
    losses = model.train()(inputs, samples, mode='loss')
    for key in ('a/loss_kl', 'b/loss_kl', 'a/loss_kl_box'):
        assert losses[key] > 0, sorted(losses)
    model.parse_losses(losses)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def network_cfg(name, place):
    return tiny_heads.HEADS[name]((8, 12)[place])


@pytest.mark.parametrize('name', tiny_heads.MASKED)
def test_masks_without_boxes_are_not_merged(name):
    with pytest.raises(ValueError, match=r'`students.a` should be a detector with a `bbox_head`'):
        CollaborativeDistiller(networks(name), second=dict(type='MinLoss'))


PREDICT = dict(
    condinst=dict(mask_thr=0.5),
    rtmdet_ins=dict(mask_thr_binary=0.5),
    yolact=dict(mask_thr=0.5, iou_thr=0.5, top_k=20, mask_thr_binary=0.5),
    yolov3=dict(conf_thr=0.0),
)


@pytest.mark.parametrize('name', PREDICT)
def test_the_ensemble_has_boxes_and_masks_of_all_networks(name):
    cfgs = networks(name)
    for cfg in cfgs.values():
        cfg['test_cfg'].update(score_thr=0.001, min_bbox_size=0, **PREDICT[name])
    model = CollaborativeDistiller(cfgs, second=dict(type='MinLoss')).eval()
    for place, network in enumerate(model.students.values()):
        network.load_state_dict(tiny_heads.build(network_cfg(name, place), place).state_dict())
    inputs, samples = tiny_heads.batch(model.students['a'])
    for sample in samples:
        sample.set_metainfo(dict(ori_shape=sample.img_shape, scale_factor=(1.0, 1.0)))
    model.weights.copy_(torch.tensor([0.7, 0.3]))
    with torch.no_grad():
        found = model(dict.fromkeys('ab', inputs), dict.fromkeys('ab', samples), mode='predict')
    for sample in found:
        merged, own = sample.pred_instances, sample.networks
        assert 0 < len(merged) <= 20
        with_masks = [merged.masks] if 'masks' in merged else []
        parts = zip(merged.bboxes, merged.scores, *with_masks, strict=True)
        for box, score, *mask in parts:
            factors = dict(a=1.0, b=0.3 / 0.7)
            sources = [
                (network.pred_instances, place)
                for key, network in own.items()
                for place in range(len(network.pred_instances))
                if torch.equal(network.pred_instances.bboxes[place], box)
                and torch.isclose(network.pred_instances.scores[place] * factors[key], score)
            ]
            assert sources
            masks = [x.masks[place] for x, place in sources if mask]
            assert not mask or any(torch.equal(x, mask[0]) for x in masks)
        assert ('masks' in merged) == ('masks' in own['a'].pred_instances)
