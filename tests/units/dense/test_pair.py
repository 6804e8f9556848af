from dataclasses import replace

import pytest
import torch
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.structures.bbox import bbox_overlaps, distance2bbox
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.boxes import box_ious
from mmdistill_ext.units.dense.pair import DensePair
from mmdistill_ext.units.detector_pair import IGNORED
from tests import tiny_det
from tests.tiny_zoo import in_one

FAMILIES = list(tiny_det.FAMILIES)
LOCATIONS = [8 * 12, 4 * 6, 2 * 3]  # of 64 x 96 at the three strides


def pair_up(student, teacher, head='bbox_head', teacher_head='bbox_head'):
    return DensePair(student, teacher, head, teacher_head, 'losses.kd')


def run(student, teacher, boxes=True, autocast=False):
    """One training step of the student beside the teacher: units, calls of both, losses."""
    pair = pair_up(student, teacher)
    inputs, samples = tiny_det.batch(student, boxes)
    paths = {path: path for path in pair.student_taps}
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        with torch.no_grad(), Taps(teacher, dict(head='bbox_head')) as teacher_taps:
            teacher(inputs, mode='tensor')
        with Taps(student, paths) as taps:
            losses = student(inputs, samples, mode='loss')
        units = pair(taps, teacher_taps['head'], samples)
    return units, taps, teacher_taps['head'], samples, losses


def models(name, student_seed=0, teacher_seed=1, **head):
    build = tiny_det.FAMILIES[name]
    student = tiny_det.build(build(**head), student_seed).train()
    return student, tiny_det.build(build(**head), teacher_seed).eval()


def is_positive(units):
    """``(B, N)``."""
    return spread(units, torch.ones_like(units.boxes.scale, dtype=torch.bool))


def spread(units, values):
    """Values of the positive units ``(P, ...)`` at their places, zeros elsewhere."""
    zeros = values.new_zeros(*units.labels.shape, *values.shape[1:])
    return zeros.index_put(units.boxes.index, values)


def decode_all(student, teacher):
    """Boxes ``(B, N, 4)`` of all units of a step, of both."""
    _, taps, call, samples, _ = run(student, teacher)
    found = pair_up(student, teacher).step(taps, call, samples)
    shape = found.targets.assigned.labels.shape
    places = torch.ones(shape).nonzero(as_tuple=True)
    boxes, others = found.student.decode(*places), found.teacher.decode(*places)
    return boxes.view(*shape, 4), others.view(*shape, 4), call, samples


def assign_with_mmdet(head, samples, scores, boxes, objectness=None):
    """mmdet's assigner, image by image: number of the box (from 1), 0 background, -1 ignored."""
    sizes = [level.shape[-2:] for level in scores]
    kind = type(head).__name__
    rtmdet, yolox = kind.startswith('RTMDet'), kind == 'YOLOXHead'
    extra = dict(with_stride=True) if rtmdet or yolox else {}
    levels = head.prior_generator.grid_priors(sizes, device='cpu', **extra)
    found = []
    for image, sample in enumerate(samples):
        flags = head.prior_generator.valid_flags(sizes, sample.pad_shape, 'cpu')
        inside = anchor_inside_flags(torch.cat(levels), torch.cat(flags), sample.img_shape, -1)
        inside |= torch.tensor(yolox)  # it takes all
        predictions = InstanceData(priors=torch.cat(levels)[inside])
        arguments = [sample.gt_instances, sample.ignored_instances]
        if rtmdet:
            flat = [s[image].permute(1, 2, 0).flatten(0, 1) for s in scores]
            distances = [b[image].permute(1, 2, 0).flatten(0, 1) for b in boxes]
            predictions.scores = torch.cat(flat).detach()[inside]
            decoded = distance2bbox(torch.cat(levels)[:, :2], torch.cat(distances).detach())
            predictions.bboxes = decoded[inside]
        elif yolox:
            flat = [
                torch.cat([x[image].permute(1, 2, 0).flatten(0, 1) for x in output]).detach()
                for output in (scores, boxes, objectness)
            ]
            points = predictions.priors
            predictions.bboxes = yolox_boxes(points, flat[1])
            predictions.scores = (flat[0].sigmoid() * flat[2].sigmoid()).sqrt()
            predictions.priors = torch.cat((points[:, :2] + points[:, 2:] / 2, points[:, 2:]), 1)
        elif not kind.startswith('Retina'):
            per_level = inside.split([len(level) for level in levels])
            arguments.insert(0, [int(flags.sum()) for flags in per_level])
        numbers = torch.full((len(inside),), -1)
        numbers[inside] = head.assigner.assign(predictions, *arguments).gt_inds
        found.append(numbers)
    return torch.stack(found)


def yolox_boxes(points, predicted):
    """Centre in strides from the point, logarithm of the size in strides."""
    center = points[:, :2] + predicted[:, :2] * points[:, 2:]
    half = predicted[:, 2:].exp() * points[:, 2:] / 2
    return torch.cat((center - half, center + half), 1)


def assign_fcos(head, samples):
    """FCOS's rule, point by point: the smallest box around it whose sides fit the level."""
    found = []
    for sample in samples:
        numbers = []
        for level, (height, width) in enumerate(((8, 12), (4, 6), (2, 3))):
            stride, (low, high) = tiny_det.STRIDES[level], head.regress_ranges[level]
            for row in range(height):
                for column in range(width):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    best, best_area = 0, float('inf')
                    for number, box in enumerate(sample.gt_instances.bboxes.tolist(), 1):
                        sides = (x - box[0], y - box[1], box[2] - x, box[3] - y)
                        area = (box[2] - box[0]) * (box[3] - box[1])
                        if min(sides) > 0 and low <= max(sides) <= high and area < best_area:
                            best, best_area = number, area
                    numbers.append(best)
        found.append(torch.tensor(numbers))
    return torch.stack(found)


@pytest.mark.parametrize('name', [*FAMILIES, 'retina_softmax', 'retina_decoded'])
def test_labels_validity_and_target_boxes_equal_another_reading(name):
    family, _, variant = name.partition('_')
    arguments = {}
    if name in FAMILIES:
        family = name
    if variant == 'softmax':
        arguments = dict(softmax=True)
    if variant == 'decoded':
        arguments = dict(reg_decoded_bbox=True, loss_bbox=tiny_det.GIOU)
    student, teacher = models(family, **arguments)
    units, taps, _, samples, _ = run(student, teacher)
    head = student.bbox_head
    positive = is_positive(units)
    if family.startswith('fcos'):
        numbers = assign_fcos(head, samples)
    else:
        outputs = taps['bbox_head.loss_by_feat'].args
        numbers = assign_with_mmdet(head, samples, *outputs[: 3 if name == 'yolox' else 2])
    labels = torch.full_like(numbers, 3)
    labels[numbers < (name == 'yolox')] = IGNORED  # whose background has no class
    for image, sample in enumerate(samples):
        for number, label in enumerate(sample.gt_instances.labels.tolist(), 1):
            labels[image, numbers[image] == number] = label
    assert torch.equal(units.labels, labels)
    assert torch.equal(positive, numbers > 0)
    assert positive.sum(1).gt(0).tolist() == [True, False, True]
    for image, sample in enumerate(samples):
        expected = sample.gt_instances.bboxes[numbers[image][numbers[image] > 0] - 1]
        found = units.boxes.target[units.boxes.index[0] == image]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    priors = 3 if family == 'retina' else 1
    expected = [
        s for s, n in zip(tiny_det.STRIDES, LOCATIONS, strict=True) for _ in range(n * priors)
    ]
    assert units.boxes.scale.tolist() == [expected[i] for i in units.boxes.index[1]]
    shape = (3, head.cls_out_channels, len(expected))
    assert in_one(units.student).shape == in_one(units.teacher).shape == shape


@pytest.mark.parametrize('name', ['retina', 'atss', 'gfl'])
def test_what_is_outside_an_image_is_not_valid(name):
    """The last image ends at column 64; the others fill the batch."""
    ignored = run(*models(name))[0].labels == IGNORED
    anchors = 3 if name == 'retina' else 1
    outside = torch.cat(
        [
            (torch.arange(96 // s) * s >= 64).repeat(64 // s).repeat_interleave(anchors)
            for s in tiny_det.STRIDES
        ]
    )
    assert ignored[2][outside].all()
    assert not ignored[:, ~outside].all()


def test_what_lies_in_an_ignored_box_is_not_valid():
    student, teacher = models('retina')
    units, *_, samples, _ = run(student, teacher)
    priors = torch.cat(
        student.bbox_head.prior_generator.grid_priors([(8, 12), (4, 6), (2, 3)], device='cpu')
    )
    (box,) = samples[0].ignored_instances.bboxes
    center = (priors[:, :2] + priors[:, 2:]) / 2
    small = (priors[:, 2:] - priors[:, :2]).prod(1) < 40**2
    inside = ((center - (box[:2] + box[2:]) / 2).abs() < 8).all(1) & small
    assert inside.sum() > 3
    assert (units.labels[0][inside] == IGNORED).all()
    assert not is_positive(units)[units.labels == IGNORED].any()


def test_yolox_learns_the_class_of_its_positive_units_alone():
    student, teacher = models('yolox')
    with Taps(student, dict(cls='bbox_head.loss_cls', box='bbox_head.loss_bbox')) as taps:
        units, *_ = run(student, teacher)
    logits, targets = taps['cls'].args
    quality, labels = targets.max(1)
    assert torch.equal(in_one(units.student).transpose(1, 2)[units.boxes.index], logits)
    assert torch.equal(units.labels[units.boxes.index], labels)
    torch.testing.assert_close(box_ious(units.boxes)[0], quality, rtol=1e-4, atol=1e-5)
    own, target = taps['box'].args
    torch.testing.assert_close(units.boxes.student, own)
    torch.testing.assert_close(units.boxes.target, target)
    assert len(own) > 3
    assert (units.labels[~is_positive(units)] == IGNORED).all()


@pytest.mark.parametrize('name', [name for name in FAMILIES if name != 'yolox'])
def test_units_are_what_the_heads_own_loss_compares(name):
    """Its classification loss gets these logits, labels, weights and IoUs in this order."""
    student, teacher = models(name)
    seen = []
    handle = student.bbox_head.loss_cls.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    units, *_ = run(student, teacher)
    handle.remove()
    priors = 3 if name == 'retina' else 1
    levels = [n * priors for n in LOCATIONS]
    ious = spread(units, box_ious(units.boxes)[0])
    by_level = [
        [part.reshape(-1, *part.shape[2:]) for part in x.split(levels, 1)]
        for x in (in_one(units.student).transpose(1, 2), units.labels, ious)
    ]
    logits, labels, ious = (torch.cat(parts) for parts in by_level)
    assert torch.equal(torch.cat([args[0] for args, _ in seen]), logits)
    targets = [args[1] for args, _ in seen]
    if name in ('gfl', 'rtmdet'):
        quality = torch.cat([target[1] for target in targets])
        torch.testing.assert_close(ious, quality, rtol=1e-4, atol=1e-5)
        assert (quality > 0).any()
        targets = [target[0] for target in targets]
    targets = torch.cat([target.reshape(-1) for target in targets])
    weights = [args[2] if len(args) > 2 else kwargs.get('weight') for args, kwargs in seen]
    if weights[0] is None:
        weights = [torch.ones_like(targets)]
    weights = torch.cat([weight.reshape(-1) for weight in weights])
    assert torch.equal(labels, targets.where(weights > 0, IGNORED))
    assert units.sigmoid
    assert units.background


@pytest.mark.parametrize('name', ['atss', 'gfl', 'rtmdet', 'fcos'])
def test_boxes_of_positives_are_what_the_heads_own_box_loss_compares(name):
    student, teacher = models(name)
    seen = []
    handle = student.bbox_head.loss_bbox.register_forward_pre_hook(
        lambda module, args: seen.append(args[:2])
    )
    units = run(student, teacher)[0]
    handle.remove()
    values = (getattr(units.boxes, name) for name in ('student', 'target', 'scale'))
    *order, scale = (
        x.split(LOCATIONS, 1) for x in (is_positive(units), *(spread(units, x) for x in values))
    )
    own, target = (
        torch.cat(
            [
                x[p] / (s[p][:, None] if name == 'gfl' else 1)
                for p, x, s in zip(order[0], order[place], scale, strict=True)
            ]
        )
        for place in (1, 2)
    )
    torch.testing.assert_close(torch.cat([a for a, _ in seen]), own, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.cat([b for _, b in seen]), target, rtol=1e-5, atol=1e-4)
    assert len(own) > 3


@pytest.mark.parametrize('name', [name for name in FAMILIES if name != 'yolox'])
def test_boxes_equal_those_that_mmdet_predicts(name):
    """Scores that fall from unit to unit let mmdet's own prediction keep the order."""
    student, teacher = models(name)
    _, decoded, call, _ = decode_all(student, teacher)
    scores, predicted, *factors = call.output
    places = [level.shape[1] // 3 for level in scores]
    ordered = []
    for level, anchors in zip(scores, places, strict=True):
        height, width = level.shape[-2:]
        fake = torch.full((1, height, width, anchors, 3), -50.0)
        fake[..., 0] = torch.linspace(3, -3, height * width * anchors).view(
            1, height, width, anchors
        )
        ordered.append(fake.reshape(1, height, width, -1).permute(0, 3, 1, 2))
    cfg = ConfigDict(nms_pre=10**6, score_thr=0.01)
    meta = dict(img_shape=(10**6, 10**6), scale_factor=(1.0, 1.0))
    factors = [[factor[:1] for factor in factors[0]]] if factors else []
    for image in range(3):
        result = teacher.bbox_head.predict_by_feat(
            ordered,
            [level[image : image + 1] for level in predicted],
            *factors,
            batch_img_metas=[meta],
            cfg=cfg,
            with_nms=False,
        )[0]
        expected = decoded[image].clamp(min=0)
        torch.testing.assert_close(result.bboxes, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_teacher_in_eval_mode_decodes_to_the_training_students_boxes(name):
    student, teacher = models(name, teacher_seed=0)
    assert student.bbox_head.training
    assert not teacher.bbox_head.training
    own, other, *_ = decode_all(student, teacher)
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-4)
    assert (own.detach().flatten(0, 1).std(0) > 5).all()
    units = run(student, teacher)[0]
    torch.testing.assert_close(units.boxes.student, units.boxes.teacher, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(in_one(units.student), in_one(units.teacher), rtol=1e-5, atol=1e-5)
    assert units.boxes.student.requires_grad
    assert not units.boxes.teacher.requires_grad


@pytest.mark.parametrize('name', FAMILIES)
def test_boxes_of_units_are_those_of_their_places(name):
    student, teacher = models(name)
    boxes = run(student, teacher)[0].boxes
    own, other, *_ = decode_all(student, teacher)
    assert torch.equal(boxes.student, own[boxes.index])
    assert torch.equal(boxes.teacher, other[boxes.index])


def test_boxes_of_yolox_follow_the_formula():
    student, teacher = models('yolox')
    _, decoded, call, _ = decode_all(student, teacher)
    points = torch.cat(
        teacher.bbox_head.prior_generator.grid_priors(
            [level.shape[-2:] for level in call.output[0]], device='cpu', with_stride=True
        )
    )
    for image in range(3):
        flat = [level[image].permute(1, 2, 0).flatten(0, 1) for level in call.output[1]]
        torch.testing.assert_close(decoded[image], yolox_boxes(points, torch.cat(flat)))


@pytest.mark.parametrize('name', FAMILIES)
def test_a_student_in_eval_mode_has_the_same_target_boxes(name):
    student, teacher = models(name)
    expected = run(student, teacher)[0].boxes
    found = run(student.eval(), teacher)[0].boxes
    for own, other in zip(found.index, expected.index, strict=True):
        assert torch.equal(own, other)
    torch.testing.assert_close(found.target, expected.target, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_autocast_keeps_the_target_boxes(name):
    student, teacher = models(name)
    units, *_, samples, _ = run(student, teacher, autocast=True)
    for image, sample in enumerate(samples):
        found = units.boxes.target[units.boxes.index[0] == image]
        distance = (found[:, None] - sample.gt_instances.bboxes[None]).abs().amax(-1)
        assert len(found) == 0 or distance.amin(1).max() < 0.01


@pytest.mark.parametrize('name', FAMILIES)
def test_autocast_does_not_round_the_priors(name):
    """Decoded in float32 from what the head gave, whatever its type."""
    student, teacher = models(name)
    _, taps, call, samples, _ = run(student, teacher, autocast=True)
    pair = pair_up(student, teacher)
    full = pair(taps, replace(call, output=_float(call.output)), samples)
    mixed = pair(taps, call, samples)
    torch.testing.assert_close(
        mixed.boxes.teacher.float(), full.boxes.teacher, rtol=1e-3, atol=0.01
    )


def _float(output):
    return tuple([level.float() for level in levels] for levels in output)


@pytest.mark.parametrize('name', FAMILIES)
def test_targets_are_assigned_once_per_step(name):
    student, teacher = models(name)
    method = '_get_targets_single' if name == 'yolox' else 'get_targets'
    paths = dict(assigned=f'bbox_head.{method}')
    with Taps(student, paths) as own, Taps(teacher, paths) as other:
        run(student, teacher)
    images = 3 if name == 'yolox' else 1
    assert [len(taps.all('assigned')) for taps in (own, other)] == [images, 0]


def test_gfl_gives_distributions_whose_mean_is_the_box():
    units = run(*models('gfl'))[0]
    boxes = units.boxes
    for decoded, logits in (
        (boxes.student, boxes.student_distribution),
        (boxes.teacher, boxes.teacher_distribution),
    ):
        assert logits.shape == (len(boxes.scale), 4, 8)
        distances = (logits.softmax(-1) * torch.arange(8.0)).sum(-1) * boxes.scale[:, None]
        width = distances[..., 0] + distances[..., 2]
        torch.testing.assert_close(width, decoded[..., 2] - decoded[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ('gfl', 'atss'),
        ('atss', 'gfl'),
        ('fcos_norm', 'gfl'),
        ('rtmdet', 'fcos_norm'),
        ('yolox', 'atss'),
        ('fcos', 'yolox'),
    ],
)
def test_families_pair_with_each_other(student, teacher):
    own = tiny_det.build(tiny_det.FAMILIES[student](), 0).train()
    other = tiny_det.build(tiny_det.FAMILIES[teacher](), 1).eval()
    boxes = run(own, other)[0].boxes
    mixed = decode_all(own, other)[1]
    alike = decode_all(other.train(), other)[0]
    torch.testing.assert_close(mixed, alike, rtol=1e-5, atol=1e-4)
    overlaps = bbox_overlaps(mixed[boxes.index], boxes.target, is_aligned=True)
    torch.testing.assert_close(box_ious(boxes)[1], overlaps)
    assert pair_up(own, other).box_distances == ('iou', 'l1')


def test_distribution_distance_needs_the_same_number_of_distances():
    same = models('gfl')
    assert pair_up(*same).box_distances == ('iou', 'l1', 'distribution')
    other = tiny_det.build(tiny_det.gfl(reg_max=9), 0).eval()
    assert pair_up(same[0], other).box_distances == ('iou', 'l1')


def test_contrast_maps_show_every_location_at_its_place():
    units = run(*models('retina'))[0]
    generator = torch.Generator().manual_seed(0)
    wins, valid = (torch.rand(units.labels.shape, generator=generator) < p for p in (0.5, 0.8))
    wins &= valid
    maps = Contrast(wins, valid, units.paint).maps()
    assert list(maps) == ['_stride8', '_stride16', '_stride32']
    start = 0
    for (won, known), stride in zip(maps.values(), tiny_det.STRIDES, strict=True):
        assert won.shape == known.shape == (3, 64, 96)
        for row in range(64 // stride):
            for column in range(96 // stride):
                place = slice(start, start + 3)
                y, x = (row + 1) * stride - 1, column * stride
                own = wins[:, place].sum(1), valid[:, place].sum(1)
                assert torch.equal(won[:, y, x], 2 * own[0] > own[1])
                assert torch.equal(known[:, y, x], own[1] > 0)
                start += 3
    assert start == wins.shape[1]


def test_no_box_at_all_gives_only_background():
    for name in FAMILIES:
        units = run(*models(name), boxes=False)[0]
        assert len(units.boxes.scale) == len(units.boxes.target) == 0
        assert set(units.labels.unique().tolist()) <= {3, IGNORED}


def classes(cfg, count):
    cfg['bbox_head']['num_classes'] = count
    return cfg


def anchors(**kwargs):
    return {**tiny_det.ANCHOR, 'ratios': [0.5, 1.0, 2.0], **kwargs}


def strided(strides):
    return {**tiny_det.ANCHOR, 'strides': strides}


REFUSED = {
    'classes': (
        lambda: classes(tiny_det.atss(), 4),
        r'the same `num_classes` \(`losses.kd`\)\. Found 3 .*ATSSHead, 4 .*ATSSHead',
    ),
    'strides': (
        lambda: tiny_det.atss(anchor_generator=strided([4, 64, 128])),
        r'one level of the same stride.*Found \[8, 16, 32\].*ATSSHead, \[4, 64, 128\].*ATSSHead',
    ),
    'priors': (tiny_det.retina, r'as many priors per location.*Found \[1, 1, 1\].*\[3, 3, 3\]'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_heads_that_do_not_fit_are_refused(case):
    build, message = REFUSED[case]
    student = tiny_det.build(tiny_det.atss(), 0)
    with pytest.raises(ValueError, match=message):
        pair_up(student, tiny_det.build(build(), 0))


def test_softmax_and_sigmoid_are_refused():
    student = tiny_det.build(tiny_det.retina(), 0)
    with pytest.raises(ValueError, match='both sigmoid or both softmax.*Found True .* False'):
        pair_up(student, tiny_det.build(tiny_det.retina(softmax=True), 0))


@pytest.mark.parametrize(
    'kwargs', [dict(octave_base_scale=5), dict(ratios=[0.5, 1.0, 3.0])], ids=['scale', 'ratio']
)
def test_other_anchors_are_refused_and_the_message_shows_how_they_differ(kwargs):
    student = tiny_det.build(tiny_det.retina(), 0)
    teacher = tiny_det.build(tiny_det.retina(anchor_generator=anchors(**kwargs)), 0)
    with pytest.raises(ValueError, match='the same anchors') as error:
        pair_up(student, teacher)
    own, _, other = str(error.value).partition('Found ')[2].partition("in the student's")
    assert own.strip() not in other


def test_a_last_level_of_other_anchors_is_refused_and_shown():
    own = anchors(scales=[4], octave_base_scale=None, scales_per_octave=None)
    other = {**own, 'base_sizes': [8, 16, 40]}
    student = tiny_det.build(tiny_det.retina(anchor_generator=own), 0)
    teacher = tiny_det.build(tiny_det.retina(anchor_generator=other), 0)
    with pytest.raises(ValueError, match='the same anchors') as error:
        pair_up(student, teacher)
    own, _, other = str(error.value).partition('Found ')[2].partition("in the student's")
    assert own.strip() not in other


def test_heads_with_another_loss_are_refused():
    """LAD's head is PAA's with another loss."""
    cfg = tiny_det.atss()
    cfg['bbox_head']['type'] = 'LADHead'
    lad, student = tiny_det.build(cfg, 0), tiny_det.build(tiny_det.atss(), 0)
    names = '.*'.join(('ATSSHead', 'FCOSHead', 'GFLHead', 'PAAHead', 'RetinaHead', 'YOLOXHead'))
    for models, key in (((lad, student), 'head'), ((student, lad), 'teacher_head')):
        with pytest.raises(ValueError, match=rf"`losses.kd.{key}` .*{names}.*a LADHead.*'neck'"):
            pair_up(*models)


def test_unknown_paths_and_what_is_no_head_are_refused():
    student, teacher = models('atss')
    with pytest.raises(ValueError, match=r"`losses.kd.head` .*'roi_head'"):
        pair_up(student, teacher, head='roi_head')
    with pytest.raises(ValueError, match=r"`losses.kd.teacher_head` .*'nothing'"):
        pair_up(student, teacher, teacher_head='bbox_head.nothing')
    with pytest.raises(ValueError, match=r"`losses.kd.head` .*'neck', a FPN"):
        pair_up(student, teacher, head='neck')


def test_maps_of_other_sizes_are_refused():
    student, teacher = models('atss')
    _, taps, call, samples, _ = run(student, teacher)
    cut = [[level[..., :-1] for level in levels] for levels in call.output]
    with pytest.raises(ValueError, match=r'same sizes.*\(8, 12\).*\(8, 11\)'):
        pair_up(student, teacher)(taps, replace(call, output=cut), samples)


def coarser(build, **head):
    """A detector whose levels have the strides 16, 32 and 64."""
    cfg = build(**head)
    cfg['neck']['start_level'] = 2
    if 'strides' in cfg['bbox_head']:
        cfg['bbox_head']['strides'] = [16, 32, 64]
    else:
        generator = cfg['bbox_head']['anchor_generator']
        cfg['bbox_head']['anchor_generator'] = {**generator, 'strides': [16, 32, 64]}
    return cfg


@pytest.mark.parametrize(
    ('name', 'other'), [*((name, name) for name in FAMILIES), ('yolox', 'gfl'), ('gfl', 'fcos')]
)
def test_levels_of_equal_stride_are_paired_and_others_left_out(name, other):
    student, teacher = models(name)
    whole, *_ = run(student, teacher)
    coarse = tiny_det.build(coarser(tiny_det.FAMILIES[other]), 1).eval()
    units, _, call, _, _ = run(student, coarse)
    priors = 3 if name == 'retina' else 1
    start, count = LOCATIONS[0] * priors, sum(LOCATIONS[1:]) * priors
    assert torch.equal(in_one(units.student), in_one(whole.student)[..., start:])
    assert torch.equal(units.labels, whole.labels[:, start:])
    assert torch.equal(is_positive(units), is_positive(whole)[:, start:])
    kept = whole.boxes.index[1] >= start
    for part in ('student', 'target', 'scale'):
        assert torch.equal(getattr(units.boxes, part), getattr(whole.boxes, part)[kept]), part
    flat = [
        level.permute(0, 2, 3, 1).reshape(3, -1, in_one(units.student).shape[1])
        for level in call.output[0][:2]
    ]
    assert torch.equal(in_one(units.teacher).transpose(1, 2), torch.cat(flat, 1))
    assert units.labels.shape[1] == count
    maps = units.paint(units.labels > 0, units.labels >= 0)
    assert list(maps) == ['_stride16', '_stride32']


def test_the_teacher_may_have_more_levels_and_the_student_coarser_ones():
    student = tiny_det.build(coarser(tiny_det.fcos), 0).train()
    teacher = tiny_det.build(tiny_det.atss(), 1).eval()
    units, *_ = run(student, teacher)
    boxes = units.boxes
    _, decoded, *_ = decode_all(tiny_det.build(tiny_det.atss(), 0).train(), teacher)
    assert torch.equal(boxes.teacher, decoded[:, LOCATIONS[0] :][boxes.index])
    assert set(boxes.scale.tolist()) <= {16.0, 32.0}
    assert len(boxes.scale) > 0


def test_the_heads_own_loss_stays_its_own():
    pair = pair_up(*models('atss'))
    assert pair.fused_loss('fit') is None
    with pytest.raises(ValueError, match=r'`fuse_task_loss=True` needs a head .*Found ATSSHead'):
        pair.fused_loss('fuse_task_loss=True')


def test_what_yolox_says_of_background_is_not_taught():
    """Its classes are trained on positive points alone."""
    student = tiny_det.build(tiny_det.rtmdet(), 0).train()
    teacher = tiny_det.build(tiny_det.yolox(), 1).eval()
    units, *_ = run(student, teacher)
    assert torch.equal(units.labels != IGNORED, is_positive(units))
    plain, *_ = run(student, tiny_det.build(tiny_det.rtmdet(), 1).eval())
    assert torch.equal(is_positive(plain), is_positive(units))
    assert (plain.labels == tiny_det.rtmdet()['bbox_head']['num_classes']).any()


@pytest.mark.parametrize('name', ['gfl', 'atss'])
def test_autocast_does_not_round_the_boxes(name):
    student, teacher = models(name)
    plain, cast = run(student, teacher)[0], run(student, teacher, autocast=True)[0]
    for side in ('student', 'teacher'):  # what is left is the heads' own rounding
        whole, found = getattr(plain.boxes, side), getattr(cast.boxes, side)
        assert found.dtype == torch.float32
        assert len(found) == 0 or (found * 8).frac().abs().max() > 0
        torch.testing.assert_close(found, whole, atol=4.0, rtol=0.05)


@pytest.mark.parametrize('head', ['bbox_head.loss_by_feat', 'neck', 'bbox_head.loss_cls'])
def test_a_path_to_something_else_is_refused(head):
    student, teacher = models('gfl')
    with pytest.raises(ValueError, match=r'losses.kd.head. should lead to one of'):
        pair_up(student, teacher, head)


def test_a_student_that_cannot_be_trained_is_refused():
    cfg = {**tiny_det.retina(), 'train_cfg': None}
    with pytest.raises(ValueError, match=r'should have an assigner.*train_cfg'):
        pair_up(tiny_det.build(cfg, 0), models('retina')[1])
