import pytest
import torch
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.structures.bbox import bbox_overlaps, distance2bbox
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mmdistill_ext.losses.box import box_ious
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.dense_detection import IGNORED, DenseDetectionUnits
from tests import tiny_det

FAMILIES = list(tiny_det.FAMILIES)
LOCATIONS = [8 * 12, 4 * 6, 2 * 3]  # of 64 x 96 at the three strides


def pair_up(student, teacher, head='bbox_head', teacher_head='bbox_head'):
    return DenseDetectionUnits(student, teacher, head, teacher_head, 'losses.kd')


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
        calls = {path: taps[path] for path in pair.student_taps}
        units = pair(calls, teacher_taps['head'], samples)
    return units, calls, teacher_taps['head'], samples, losses


def models(name, student_seed=0, teacher_seed=1, **head):
    build = tiny_det.FAMILIES[name]
    student = tiny_det.build(build(**head), student_seed).train()
    return student, tiny_det.build(build(**head), teacher_seed).eval()


def assign_with_mmdet(head, scores, boxes, samples):
    """mmdet's assigner, image by image: number of the box (from 1), 0 background, -1 ignored."""
    sizes = [level.shape[-2:] for level in scores]
    rtmdet = type(head).__name__.startswith('RTMDet')
    extra = dict(with_stride=True) if rtmdet else {}
    levels = head.prior_generator.grid_priors(sizes, device='cpu', **extra)
    found = []
    for image, sample in enumerate(samples):
        flags = head.prior_generator.valid_flags(sizes, sample.pad_shape, 'cpu')
        inside = anchor_inside_flags(torch.cat(levels), torch.cat(flags), sample.img_shape, -1)
        predictions = InstanceData(priors=torch.cat(levels)[inside])
        arguments = [sample.gt_instances, sample.ignored_instances]
        if rtmdet:
            flat = [s[image].permute(1, 2, 0).flatten(0, 1) for s in scores]
            distances = [b[image].permute(1, 2, 0).flatten(0, 1) for b in boxes]
            predictions.scores = torch.cat(flat).detach()[inside]
            decoded = distance2bbox(torch.cat(levels)[:, :2], torch.cat(distances).detach())
            predictions.bboxes = decoded[inside]
        elif not type(head).__name__.startswith('Retina'):
            per_level = inside.split([len(level) for level in levels])
            arguments.insert(0, [int(flags.sum()) for flags in per_level])
        numbers = torch.full((len(inside),), -1)
        numbers[inside] = head.assigner.assign(predictions, *arguments).gt_inds
        found.append(numbers)
    return torch.stack(found)


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
    units, calls, _, samples, _ = run(student, teacher)
    head = student.bbox_head
    if family.startswith('fcos'):
        numbers = assign_fcos(head, samples)
    else:
        numbers = assign_with_mmdet(head, *calls['bbox_head.loss_by_feat'].args[:2], samples)
    labels = torch.full_like(numbers, 3)
    labels[numbers < 0] = IGNORED
    for image, sample in enumerate(samples):
        for number, label in enumerate(sample.gt_instances.labels.tolist(), 1):
            labels[image, numbers[image] == number] = label
    assert torch.equal(units.labels, labels)
    assert torch.equal(units.boxes.positive, numbers > 0)
    assert units.boxes.positive.sum(1).gt(0).tolist() == [True, False, True]
    for image, sample in enumerate(samples):
        expected = sample.gt_instances.bboxes[numbers[image][numbers[image] > 0] - 1]
        found = units.boxes.target[image][units.boxes.positive[image]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    priors = 3 if family == 'retina' else 1
    expected = [
        s for s, n in zip(tiny_det.STRIDES, LOCATIONS, strict=True) for _ in range(n * priors)
    ]
    assert units.boxes.scale.tolist() == expected
    assert units.student.shape == units.teacher.shape == (3, head.cls_out_channels, len(expected))


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
    assert not units.boxes.positive[units.labels == IGNORED].any()


@pytest.mark.parametrize('name', FAMILIES)
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
    by_level = [
        [part.reshape(-1, *part.shape[2:]) for part in x.split(levels, 1)]
        for x in (units.student.transpose(1, 2), units.labels, box_ious(units.boxes)[0])
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
    boxes = run(student, teacher)[0].boxes
    handle.remove()
    order = [x.split(LOCATIONS, 1) for x in (boxes.positive, boxes.student, boxes.target)]
    scale = boxes.scale.expand_as(boxes.positive).split(LOCATIONS, 1)
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


@pytest.mark.parametrize('name', FAMILIES)
def test_boxes_equal_those_that_mmdet_predicts(name):
    """Scores that fall from unit to unit let mmdet's own prediction keep the order."""
    student, teacher = models(name)
    units, _, call, _, _ = run(student, teacher)
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
        expected = units.boxes.teacher[image].clamp(min=0)
        torch.testing.assert_close(result.bboxes, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_teacher_in_eval_mode_decodes_to_the_training_students_boxes(name):
    student, teacher = models(name, teacher_seed=0)
    assert student.bbox_head.training
    assert not teacher.bbox_head.training
    units = run(student, teacher)[0]
    torch.testing.assert_close(units.boxes.student, units.boxes.teacher, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(units.student, units.teacher, rtol=1e-5, atol=1e-5)
    assert units.boxes.student.requires_grad
    assert not units.boxes.teacher.requires_grad
    spread = units.boxes.student.detach().flatten(0, 1).std(0)
    assert (spread > 5).all()


@pytest.mark.parametrize('name', FAMILIES)
def test_a_student_in_eval_mode_has_the_same_target_boxes(name):
    student, teacher = models(name)
    expected = run(student, teacher)[0].boxes
    found = run(student.eval(), teacher)[0].boxes
    assert torch.equal(found.positive, expected.positive)
    torch.testing.assert_close(
        found.target[found.positive], expected.target[expected.positive], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize('name', FAMILIES)
def test_autocast_keeps_the_target_boxes(name):
    student, teacher = models(name)
    units, *_, samples, _ = run(student, teacher, autocast=True)
    for image, sample in enumerate(samples):
        found = units.boxes.target[image][units.boxes.positive[image]]
        distance = (found[:, None] - sample.gt_instances.bboxes[None]).abs().amax(-1)
        assert len(found) == 0 or distance.amin(1).max() < 0.01


@pytest.mark.parametrize('name', FAMILIES)
def test_autocast_does_not_round_the_priors(name):
    """Decoded in float32 from what the head gave, whatever its type."""
    student, teacher = models(name)
    _, calls, call, samples, _ = run(student, teacher, autocast=True)
    pair = pair_up(student, teacher)
    full = pair(calls, call._replace(output=_float(call.output)), samples)
    mixed = pair(calls, call, samples)
    torch.testing.assert_close(
        mixed.boxes.teacher.float(), full.boxes.teacher, rtol=1e-3, atol=0.01
    )


def _float(output):
    return tuple([level.float() for level in levels] for levels in output)


@pytest.mark.parametrize('name', FAMILIES)
def test_targets_are_assigned_once_per_step(name, monkeypatch):
    student, teacher = models(name)
    counts = []
    for model in (student, teacher):
        original = model.bbox_head.get_targets
        calls = []
        monkeypatch.setattr(
            model.bbox_head,
            'get_targets',
            lambda *args, original=original, calls=calls, **kwargs: (
                calls.append(1) or original(*args, **kwargs)
            ),
        )
        counts.append(calls)
    run(student, teacher)
    assert [len(calls) for calls in counts] == [1, 0]


def test_gfl_gives_distributions_whose_mean_is_the_box():
    units = run(*models('gfl'))[0]
    boxes = units.boxes
    for decoded, logits in (
        (boxes.student, boxes.student_distribution),
        (boxes.teacher, boxes.teacher_distribution),
    ):
        assert logits.shape == (3, sum(LOCATIONS), 4, 8)
        distances = (logits.softmax(-1) * torch.arange(8.0)).sum(-1) * boxes.scale[:, None]
        width = distances[..., 0] + distances[..., 2]
        torch.testing.assert_close(width, decoded[..., 2] - decoded[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [('gfl', 'atss'), ('atss', 'gfl'), ('fcos_norm', 'gfl'), ('rtmdet', 'fcos_norm')],
)
def test_families_pair_with_each_other(student, teacher):
    own = tiny_det.build(tiny_det.FAMILIES[student](), 0).train()
    other = tiny_det.build(tiny_det.FAMILIES[teacher](), 1).eval()
    mixed, *_ = run(own, other)
    alike = run(other.train(), other)[0].boxes.student
    torch.testing.assert_close(mixed.boxes.teacher, alike.detach(), rtol=1e-5, atol=1e-4)
    overlaps = bbox_overlaps(mixed.boxes.teacher[0], mixed.boxes.target[0], is_aligned=True)
    positive = mixed.boxes.positive[0]
    torch.testing.assert_close(box_ious(mixed.boxes)[1][0][positive], overlaps[positive])
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
    maps = Contrast(wins, valid, units.boxes.levels).maps()
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
        assert not units.boxes.positive.any()
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
        lambda: tiny_det.atss(anchor_generator=strided([4, 8, 16])),
        r'the same strides.*Found \[\(8, 8\).*\[\(4, 4\)',
    ),
    'levels': (
        lambda: tiny_det.atss(anchor_generator=strided([8, 16, 32, 64])),
        r'the same strides, level by level.*\(64, 64\)',
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
    cfg = tiny_det.atss()
    cfg['bbox_head']['type'] = 'PAAHead'
    paa, student = tiny_det.build(cfg, 0), tiny_det.build(tiny_det.atss(), 0)
    names = 'RTMDetHead, GFLHead, ATSSHead, FCOSHead, RetinaHead'
    for models, key in (((paa, student), 'head'), ((student, paa), 'teacher_head')):
        with pytest.raises(ValueError, match=rf'`losses.kd.{key}` .*{names}.*a PAAHead'):
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
    _, calls, call, samples, _ = run(student, teacher)
    cut = [[level[..., :-1] for level in levels] for levels in call.output]
    with pytest.raises(ValueError, match=r'same sizes.*\(8, 12\).*\(8, 11\)'):
        pair_up(student, teacher)(calls, call._replace(output=cut), samples)


def test_the_task_loss_is_not_formed():
    with pytest.raises(ValueError, match=r'`fit` needs a head whose loss.*Found ATSSHead'):
        pair_up(*models('atss')).task_loss('fit')
