"""Units of further single-stage heads are what the heads' own losses compare."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from torch import nn

from mmdistill_ext.distillers.tapped_forward import tapped_forward
from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.boxes import box_ious
from mmdistill_ext.units.dense.joint import JointDense
from mmdistill_ext.units.dense.pair import DensePair
from mmdistill_ext.units.detector_pair import IGNORED
from tests import tiny_dense, tiny_det
from tests.tiny_zoo import in_one

FAMILIES = {**tiny_det.FAMILIES, **tiny_dense.FAMILIES}
LOCATIONS = (8 * 12, 4 * 6, 2 * 3)  # of 64 x 96 at the three strides
SEVERAL = ('retina_sepbn', 'pisa', 'free_anchor')  # three anchors per location


@dataclass
class Step:
    """One training step of a student beside a teacher, and all that its loss modules saw."""

    name: str
    pair: DensePair
    units: Units
    calls: Taps
    seen: dict[str, list[Call]]
    losses: dict
    samples: list
    teacher_call: Call

    @property
    def head(self):
        return self.pair.head

    @property
    def sizes(self):
        return [count * (3 if self.name in SEVERAL else 1) for count in LOCATIONS]

    def rows(self, values, order):
        """``(B, N, ...)`` as rows of a loss module."""
        if order == 'image_first':
            return values.flatten(0, 1)
        return torch.cat([level.flatten(0, 1) for level in values.split(self.sizes, 1)])

    def spread(self, values, empty=0):
        """Values of units with a box ``(P, ...)`` at their places."""
        whole = values.new_full((*self.units.labels.shape, *values.shape[1:]), empty)
        return whole.index_put(self.units.boxes.index, values)

    def boxes(self, values, order):
        """Values of units with a box ``(P, ...)``, in the order of the rows."""
        chosen = self.spread(torch.ones_like(self.units.boxes.scale, dtype=torch.bool), False)
        return self.rows(self.spread(values), order)[self.rows(chosen, order)]


def run(student, teacher, boxes=True, autocast=False, name=''):
    pair = DensePair(student, teacher, 'bbox_head', 'bbox_head', 'losses.kd')
    modules = [n for n, _ in student.bbox_head.named_children() if 'loss_' in n]
    inputs, samples = tiny_det.batch(student, boxes)
    paths = {path: path for path in pair.student_taps}
    as_in_training = [teacher.get_submodule(path) for path in pair.teacher_training]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        with training_flags(as_in_training):
            taught = tapped_forward(teacher, inputs, samples, {'bbox_head': 1})
        with (
            Taps(student, paths) as taps,
            Taps(student, {n: f'bbox_head.{n}' for n in modules}) as seen,
        ):
            losses = student(inputs, samples, mode='loss')
        (call,) = taught['bbox_head']
        units = pair(taps, call, samples)
    calls = {
        n: [c for c in seen.all(n) if c.kwargs.get('reduction_override') != 'none'] for n in modules
    }
    return Step(name, pair, units, taps, calls, losses, samples, call)


def build(name, seed, **changes):
    return tiny_det.build(FAMILIES[name](**changes), seed)


@pytest.fixture(scope='module')
def steps():
    """Family -> a step with a teacher of other weights; ``same``: of the same."""
    made = {}

    def get(name, same=False):
        if (name, same) not in made:
            student, teacher = build(name, 0).train(), build(name, 0 if same else 1).eval()
            made[name, same] = run(student, teacher, name=name)
        return made[name, same]

    return get


@pytest.fixture(params=tiny_dense.FAMILIES)
def name(request):
    return request.param


ROWS = dict(
    retina_sepbn=('loss_cls', 'by_level'),
    pisa=('loss_cls', 'image_first'),
    tood=('loss_cls', 'by_level'),
    tood_initial=('initial_loss_cls', 'by_level'),
    vfnet=('loss_cls', 'by_level'),
    vfnet_plain=('loss_cls', 'by_level'),
    paa=('loss_cls', 'image_first'),
    ddod=('loss_cls', 'by_level'),
    fovea=('loss_cls', 'by_level'),
    reppoints=('loss_cls', 'by_level'),
    reppoints_minmax=('loss_cls', 'by_level'),
    sabl=('loss_cls', 'by_level'),
    guided=('loss_cls', 'by_level'),
)
"""Family -> loss module that has a row for every unit, and the order of the rows."""


@pytest.mark.parametrize('name', ROWS)
def test_classes_are_what_the_heads_own_loss_compares(name, steps):
    step = steps(name)
    module, order = ROWS[name]
    calls = step.seen[module]
    assert len(calls) == (1 if name in ('pisa', 'vfnet', 'vfnet_plain', 'paa', 'fovea') else 3)
    logits = step.rows(in_one(step.units.student).transpose(1, 2), order)
    labels = step.rows(step.units.labels, order)
    given = torch.cat([call.args[0] for call in calls])
    if name.startswith('tood'):
        torch.testing.assert_close(logits.sigmoid(), given, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(logits, given)
    targets = [call.args[1] for call in calls]
    if name == 'tood':
        metrics = torch.cat([metric for _, metric in targets])
        assert (metrics > 0).sum() == ((labels >= 0) & (labels < 3)).sum()
        targets = [target for target, _ in targets]
    targets = torch.cat(targets)
    if name == 'vfnet':  # IoU of the refined box at the class
        quality, classes = targets.max(1)
        ious = step.rows(step.spread(box_ious(step.units.boxes)[0]), order)
        torch.testing.assert_close(quality, ious, rtol=1e-4, atol=1e-5)
        targets = classes.where(quality > 0, 3)
    weights = [c.args[2] if len(c.args) > 2 else c.kwargs.get('weight') for c in calls]
    if weights[0] is not None:
        weights = torch.cat([weight.reshape(-1) for weight in weights])
        targets = targets.where(weights > 0, IGNORED)
    assert torch.equal(labels, targets.reshape(-1))
    positive = (step.units.labels >= 0) & (step.units.labels < 3)
    assert positive.sum(1).gt(0).tolist() == [True, False, True]


def strided(values, step, order):
    return values / step.boxes(step.units.boxes.scale, order)[:, None]


def as_given(step, order):
    boxes = step.units.boxes
    return step.boxes(boxes.student, order), step.boxes(boxes.target, order)


def as_strided(step, order):
    return tuple(strided(values, step, order) for values in as_given(step, order))


def as_fovea(step, order):
    """Logarithms of the distances in base edges, of a point in the middle of its cell."""
    boxes = step.units.boxes
    places = step.boxes(torch.stack(boxes.index, 1)[:, 1], order)
    starts = torch.tensor([0, *LOCATIONS]).cumsum(0)
    encoded = []
    for values in as_given(step, order):
        for place, box in zip(places.tolist(), values, strict=True):
            level = max(i for i in range(3) if place >= starts[i])
            stride, edge = tiny_det.STRIDES[level], step.head.base_edge_list[level]
            row, column = divmod(place - int(starts[level]), 96 // stride)
            point = torch.tensor([column + 0.5, row + 0.5]) * stride
            sides = torch.cat((point - box[:2], box[2:] - point)) / edge
            encoded.append(sides.log())
    return torch.stack(encoded).chunk(2)


BOXES = dict(
    tood=('loss_bbox', 'by_level', as_strided),
    tood_initial=('loss_bbox', 'by_level', as_strided),
    vfnet=('loss_bbox_refine', 'by_level', as_given),
    vfnet_plain=('loss_bbox_refine', 'by_level', as_given),
    paa=('loss_bbox', 'image_first', as_given),
    ddod=('loss_bbox', 'by_level', as_given),
    fovea=('loss_bbox', 'by_level', as_fovea),
    centernet=('loss_bbox', 'by_level', as_strided),
)
"""Family -> loss module with a row for every box, order of the rows, and what it compares."""


@pytest.mark.parametrize('name', BOXES)
def test_boxes_are_what_the_heads_own_loss_compares(name, steps):
    step = steps(name)
    module, order, encode = BOXES[name]
    own, target = encode(step, order)
    given = [torch.cat([call.args[i] for call in step.seen[module]]) for i in (0, 1)]
    if name == 'centernet':  # around points in pixels, while distances are in strides
        given = [box[:, 2:] - box[:, :2] for box in given]
        own, target = (box[:, 2:] - box[:, :2] for box in (own, target))
    torch.testing.assert_close(own, given[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target, given[1], rtol=1e-4, atol=1e-4)
    assert len(own) > 3


@pytest.mark.parametrize('name', ['reppoints', 'reppoints_minmax'])
def test_boxes_of_reppoints_are_those_of_the_refined_points(name, steps):
    step = steps(name)
    boxes = step.units.boxes
    scale = [c.args[0].new_full((len(c.args[0]), 1), 4.0) for c in step.seen['loss_bbox_refine']]
    scale = torch.cat([s * stride for s, stride in zip(scale, tiny_det.STRIDES, strict=True)])
    parts = zip(*(call.args for call in step.seen['loss_bbox_refine']), strict=True)
    own, target, weight = (torch.cat(part) for part in parts)
    chosen = weight[:, 0] > 0
    torch.testing.assert_close((own * scale)[chosen], step.boxes(boxes.student, 'by_level'))
    torch.testing.assert_close((target * scale)[chosen], step.boxes(boxes.target, 'by_level'))
    assert chosen.sum() > 3


def test_boxes_of_guided_anchors_are_deltas_of_them(steps):
    """The delta of a centre is in widths of the anchor, that of a width a logarithm."""
    step = steps('guided')
    boxes = step.units.boxes
    anchors = torch.stack(
        [torch.cat(x) for x in step.calls.all('bbox_head.get_targets')[-1].args[0]]
    )
    anchors = step.boxes(anchors[boxes.index], 'by_level')
    center, size = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    parts = zip(*(call.args for call in step.seen['loss_bbox']), strict=True)
    *given, weight = (torch.cat(part) for part in parts)
    for deltas, values in zip(given, (boxes.student, boxes.target), strict=True):
        deltas = deltas[weight[:, 0] > 0]
        middle, half = center + deltas[:, :2] * size, deltas[:, 2:].exp() * size / 2
        expected = torch.cat((middle - half, middle + half), 1)
        torch.testing.assert_close(expected, step.boxes(values, 'by_level'), rtol=1e-4, atol=1e-3)
    square = step.boxes(step.units.boxes.scale, 'by_level')[:, None] * 4
    assert ((size - square).abs() > 0.5).any()  # the anchors have been guided


def test_targets_are_labelled_boxes_of_the_class(name, steps):
    step = steps(name)
    boxes, units = step.units.boxes, step.units
    for image, place, target in zip(*boxes.index, boxes.target, strict=True):
        truth, label = step.samples[image].gt_instances, units.labels[image, place]
        near = (truth.bboxes - target).abs().amax(1) < (16 if name == 'fovea' else 1e-2)
        if name in ('ddod', 'centernet'):  # classes are assigned on their own
            assert near.any()
        else:
            assert label in truth.labels[near]
    found = {
        (image, tuple(target))
        for image, target in zip(
            boxes.index[0].tolist(), boxes.target.round().tolist(), strict=True
        )
    }
    assert len(found) >= (2 if name == 'fsaf' else 3)


def test_fsaf_learns_an_object_on_its_best_level(steps):
    step = steps('fsaf')
    boxes = step.units.boxes
    assert len(boxes.scale) == round(3 * step.losses['num_pos'].item())
    objects = {}
    places = (x.tolist() for x in (boxes.index[0], boxes.target, boxes.scale))
    for image, box, scale in zip(*places, strict=True):
        objects.setdefault((image, tuple(box)), set()).add(scale)
    assert all(len(strides) == 1 for strides in objects.values())
    labels = step.units.labels
    assert ((labels >= 0) & (labels < 3)).sum() == len(boxes.scale)
    # Its loss of classes, formed again: of ignored units some classes are trained.
    (call,) = step.calls.all('bbox_head.get_targets')
    trained = torch.cat(call.output[1], 1) > 0
    assigned = torch.cat([level.view(3, -1) for level in call.output[0]], 1)
    elsewhere = (assigned < 3) & (labels == IGNORED)
    assert elsewhere.any()
    trained &= ~(nn.functional.one_hot(assigned, 4)[..., :3] * elsewhere[..., None]).bool()
    truth = nn.functional.one_hot(labels.where(labels >= 0, 3), 4)[..., :3]
    losses = focal(in_one(step.units.student).transpose(1, 2), truth) * trained
    expected = losses.sum().item() / len(boxes.scale)
    assert sum(step.losses['loss_cls']).item() == pytest.approx(expected, rel=1e-4)
    assert trained[labels != IGNORED].all(-1).sum() > 3


def focal(logits, truth):
    """Of gamma 2 and alpha 0.25."""
    bce = nn.functional.binary_cross_entropy_with_logits(logits, truth.float(), reduction='none')
    p = logits.sigmoid()
    wrong = torch.where(truth > 0, 1 - p, p)
    return bce * wrong**2 * torch.where(truth > 0, 0.25, 0.75)


def test_autoassign_takes_the_heaviest_points_of_an_object(steps):
    """Weights by the definition: exp(3 p) times the centre's Gaussian of one stride."""
    step = steps('autoassign')
    (calls,) = (step.calls.all('bbox_head.get_pos_loss_single'),)
    scores = in_one(step.units.student).sigmoid().transpose(1, 2)
    places = [
        (s, c * s, r * s) for s in tiny_det.STRIDES for r in range(64 // s) for c in range(96 // s)
    ]
    for image, call in enumerate(calls):
        joint = call.args[0] * call.args[1]
        torch.testing.assert_close(scores[image], joint, rtol=1e-4, atol=1e-6)
        truth = step.samples[image].gt_instances
        shares = []
        for number, (box, label) in enumerate(
            zip(truth.bboxes.tolist(), truth.labels.tolist(), strict=True)
        ):
            weights = []
            for place, (stride, x, y) in enumerate(places):
                inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0
                gap = [(x - (box[0] + box[2]) / 2) / stride, (y - (box[1] + box[3]) / 2) / stride]
                mean = step.head.center_prior.mean[label].tolist()
                far = sum((g - m) ** 2 for g, m in zip(gap, mean, strict=True)) / 2
                p = joint[place, label].item() * math.exp(-call.args[2][place, number].item())
                weights.append(math.exp(3 * p - far) if inside else 0.0)
            shares.append([weight / max(weights) for weight in weights])
        expected = [3] * len(places)
        for place in range(len(places)) if shares else ():
            best = max(range(len(shares)), key=lambda number: shares[number][place])
            if shares[best][place] >= 0.5:
                expected[place] = truth.labels[best].item()
        assert step.units.labels[image].tolist() == expected


def test_free_anchor_takes_the_heaviest_anchors_of_a_bag(steps):
    """The bag by its definition gives the head's positive loss, and the labels."""
    step = steps('free_anchor')
    head, total = step.head, 0.0
    calls = step.calls.all('bbox_head.positive_loss_single')
    for image, call in enumerate(calls):
        anchors, truth = call.args[2], step.samples[image].gt_instances
        bags = bbox_overlaps(truth.bboxes, anchors).topk(head.pre_anchor_topk, 1)[1]
        anchors = anchors.double()
        scores = in_one(step.units.student)[image].T.double().sigmoid()
        shares = torch.zeros(len(truth), len(anchors), dtype=torch.float64)
        objects = zip(bags, truth.bboxes.double(), truth.labels, strict=True)
        for number, (bag, box, label) in enumerate(objects):
            size = anchors[bag, 2:] - anchors[bag, :2]
            shift = ((box[:2] + box[2:]) / 2 - (anchors[bag, :2] + anchors[bag, 2:]) / 2) / size
            deltas = torch.cat((shift, ((box[2:] - box[:2]) / size).log()), 1)
            deltas = deltas / torch.tensor([0.1, 0.1, 0.2, 0.2])
            distance = (call.args[1][bag].double() - deltas).abs()
            losses = torch.where(distance < 0.11, distance**2 / 0.22, distance - 0.055).sum(1)
            matching = scores[bag, label] * torch.exp(-losses)
            weights = 1 / (1 - matching)
            total -= 0.5 * ((weights * matching).sum() / weights.sum()).log()
            shares[number, bag] = weights / weights.max()
        expected = torch.full((len(anchors),), 3)
        if len(truth):
            share, owner = shares.max(0)
            expected = truth.labels[owner].where(share >= 0.5, 3)
        labels = step.units.labels[image]
        assert torch.equal(labels.where(labels != IGNORED, 3), expected)
    objects = sum(len(sample.gt_instances) for sample in step.samples)
    assert step.losses['positive_bag_loss'].item() == pytest.approx(
        total.item() / objects, rel=1e-3
    )


def test_free_anchor_ignores_boxes_that_are_no_background():
    """A box that lies on an object nearly all the way is hardly background to the head's loss."""
    student, teacher = build('free_anchor', 0).train(), build('free_anchor', 1).eval()
    with torch.no_grad():
        student.bbox_head.retina_reg.weight.zero_()
    student.bbox_head.bbox_thr = 0.01
    step = run(student, teacher, name='free_anchor')
    boxed = torch.stack([c.output[0] for c in step.calls.all('bbox_head.positive_loss_single')])
    ignored = step.units.labels == IGNORED
    assert ignored.any()
    assert not (ignored & (boxed.amax(-1) < 0.5)).any()
    assert ((boxed.amax(-1) < 0.5) | ignored | (step.units.labels < 3)).all()


def test_classes_of_centernet_are_positive_where_its_loss_has_them(steps):
    step = steps('centernet')
    (call,) = step.seen['loss_cls']
    logits = step.rows(in_one(step.units.student).transpose(1, 2), 'by_level')
    torch.testing.assert_close(logits.sigmoid().clamp(1e-4, 1 - 1e-4), call.args[0])
    labels = step.rows(step.units.labels, 'by_level')
    positive = (labels >= 0) & (labels < 3)
    places, classes = call.kwargs['pos_inds'], call.kwargs['pos_labels']
    assert set(positive.nonzero()[:, 0].tolist()) == set(places.tolist())
    assert torch.equal(labels[places], classes)
    heat = call.args[1].amax(1)
    image = step.rows(torch.arange(3)[:, None].expand_as(step.units.labels), 'by_level')
    warm = (heat > 0.5) & (image != 1) & ~positive  # the second has no object: its heat is 3
    assert warm.any()
    assert torch.equal(labels == IGNORED, warm)


@pytest.mark.parametrize('name', [n for n in tiny_dense.FAMILIES if n not in ('paa', 'guided')])
def test_boxes_equal_those_that_mmdet_predicts(name):
    """Scores that fall from unit to unit let mmdet's own prediction keep the order."""
    model = build(name, 1).eval()
    step = run(build(name, 0).train(), model, name=name)
    outputs = model.bbox_head(model.extract_feat(tiny_det.batch(model)[0]))
    scores, predicted, *factors = outputs
    ordered = []
    for level in scores:
        count, (height, width) = level.shape[1] // 3, level.shape[-2:]
        fake = torch.full((1, height, width, count, 3), 0.0 if 'tood' in name else -50.0)
        falling = torch.linspace(3, -3, height * width * count).view(1, height, width, count)
        fake[..., 0] = falling.sigmoid() if 'tood' in name else falling
        ordered.append(fake.reshape(1, height, width, -1).permute(0, 3, 1, 2))
    cfg = ConfigDict(nms_pre=10**6, score_thr=0.01)
    meta = dict(img_shape=(10**6, 10**6), scale_factor=(1.0, 1.0))
    for image, place, box in zip(*step.units.boxes.index, step.units.boxes.teacher, strict=True):
        part = slice(image, image + 1)
        own = [[x[part] for x in y] if isinstance(y, tuple) else y[part] for y in predicted]
        extra = [[factor[part] for factor in factors[0]]] if factors else []
        result = model.bbox_head.predict_by_feat(
            ordered, own, *extra, batch_img_metas=[meta], cfg=cfg, with_nms=False
        )[0]
        near = 0.02 if name == 'fsaf' else 1e-3  # its loss sees no box that is quite empty
        torch.testing.assert_close(result.bboxes[place], box.clamp(min=0), rtol=1e-4, atol=near)


def test_a_teacher_of_the_same_weights_predicts_the_same(name, steps):
    step = steps(name, same=True)
    units = step.units
    torch.testing.assert_close(units.boxes.student, units.boxes.teacher, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(in_one(units.student), in_one(units.teacher), rtol=1e-4, atol=1e-4)
    assert units.boxes.student.requires_grad
    assert in_one(units.student).requires_grad
    assert not units.boxes.teacher.requires_grad
    assert (units.boxes.student.std(0) > 1).all()


HALF = [n for n in tiny_dense.FAMILIES if not n.startswith(('tood', 'vfnet', 'reppoints'))]
HALF = [n for n in HALF if n not in ('guided', 'autoassign')]
"""Heads that can compute in bfloat16 on CPUs: deformable convolutions cannot."""


@pytest.mark.parametrize('name', HALF)
def test_autocast_keeps_the_assigned_boxes(name):
    step = run(build(name, 0).train(), build(name, 1).eval(), autocast=True, name=name)
    boxes = step.units.boxes
    assert boxes.student.dtype == boxes.teacher.dtype == torch.float32
    for image, target in zip(boxes.index[0], boxes.target, strict=True):
        distance = (step.samples[image].gt_instances.bboxes - target).abs().amax(1)
        assert distance.min() < (16 if name == 'fovea' else 0.05)


def test_outputs_in_half_precision_are_decoded_in_full(name, steps):
    step = steps(name)

    def rounded(value, kind):
        if isinstance(value, torch.Tensor):
            return value.bfloat16().to(kind)
        return [rounded(x, kind) for x in value]

    boxes, scores = [], []
    for kind in (torch.bfloat16, torch.float32):
        call = replace(step.teacher_call, output=rounded(step.teacher_call.output, kind))
        with torch.autocast('cpu', torch.bfloat16):
            units = step.pair(step.calls, call, step.samples)
        boxes.append(units.boxes.teacher)
        scores.append(in_one(units.teacher).float())
    assert boxes[0].dtype == torch.float32
    torch.testing.assert_close(boxes[0], boxes[1], rtol=1e-3, atol=0.01)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)


def test_targets_are_assigned_once(name):
    student, teacher = build(name, 0).train(), build(name, 1).eval()
    method, calls = dict(
        free_anchor=('positive_loss_single', 3),
        ddod=('_get_targets_single', 6),
        reppoints=('get_targets', 2),
        reppoints_minmax=('get_targets', 2),
        sabl=('_get_targets_single', 3),
    ).get(name, ('get_targets', 1))
    paths = dict(targets=f'bbox_head.{method}')
    with Taps(student, paths) as own, Taps(teacher, paths) as other:
        run(student, teacher, name=name)
    assert [len(taps.all('targets')) for taps in (own, other)] == [calls, 0]


MIXED = [
    ('tood', 'gfl'),
    ('gfl', 'tood'),
    ('vfnet', 'atss'),
    ('fcos_norm', 'vfnet'),
    ('paa', 'tood'),
    ('ddod', 'paa'),
    ('atss', 'ddod'),
    ('fsaf', 'fcos'),
    ('fovea', 'autoassign'),
    ('autoassign', 'yolox'),
    ('rtmdet', 'reppoints'),
    ('reppoints', 'fovea'),
    ('sabl', 'guided'),
    ('guided', 'sabl'),
    ('centernet', 'fcos'),
    ('retina_sepbn', 'retina'),
    ('retina', 'pisa'),
    ('pisa', 'free_anchor'),
    ('free_anchor', 'retina_sepbn'),
]


@pytest.mark.parametrize(('student', 'teacher'), MIXED)
def test_families_pair_with_each_other(student, teacher):
    """The teacher's boxes are those that it has beside a student of its own family."""
    other = build(teacher, 1).eval()
    step = run(build(student, 0).train(), other, name=student)
    alone = run(build(teacher, 0).train(), other, name=teacher)
    scores = in_one(step.units.teacher)
    assert torch.equal(scores, in_one(alone.units.teacher))
    index = step.units.boxes.index
    outputs = step.pair.step(step.calls, step.teacher_call, step.samples).teacher
    assert torch.equal(outputs.decode(*alone.units.boxes.index), alone.units.boxes.teacher)
    assert torch.equal(outputs.decode(*index), step.units.boxes.teacher)
    assert len(index[0]) > 0


def test_networks_that_learn_together_have_the_same_units(name, steps):
    """The first assigns as a student does; the other predicts as a teacher."""
    step = steps(name)
    networks = dict(a=build(name, 0).train(), b=build(name, 1).train())
    joint, data = JointDense(networks), tiny_det.batch(networks['a'])
    taps = {}
    for key, network in networks.items():
        with Taps(network, {path: path for path in joint.taps(key)}) as taps[key]:
            network(*data, mode='loss')
    units = joint(taps, dict.fromkeys(networks, data[1]))
    assert torch.equal(units.labels, step.units.labels)
    assert torch.equal(units.boxes.target, step.units.boxes.target)
    first, second = units.boxes.networks
    assert torch.equal(first, step.units.boxes.student)
    torch.testing.assert_close(second, step.units.boxes.teacher, rtol=1e-4, atol=1e-3)
    own, other = (in_one(logits) for logits in units.logits)
    assert torch.equal(own, in_one(step.units.student))
    torch.testing.assert_close(other, in_one(step.units.teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', tiny_dense.WHOLE)
def test_fit_refuses_a_loss_that_is_no_sum_over_units(name):
    model = build(name, 0)
    pair = DensePair(model, model, 'bbox_head', 'bbox_head', 'losses.kd')
    kind = type(model.bbox_head).__name__
    with pytest.raises(ValueError, match=f'`fit` needs a head whose loss is a sum .*Found {kind}'):
        pair.fused_loss('fit')


@pytest.mark.parametrize('name', tiny_dense.SPLIT)
def test_fit_splits_a_loss_that_is_a_sum_over_units(name):
    model = build(name, 0)
    pair = DensePair(model, model, 'bbox_head', 'bbox_head', 'losses.kd')
    assert pair.fused_loss('fit') is None


@pytest.mark.parametrize('name', ['retina_sepbn', 'tood', 'reppoints', 'sabl', 'guided', 'ddod'])
def test_a_student_that_cannot_be_trained_is_refused(name):
    cfg = {**FAMILIES[name](), 'train_cfg': None}
    with pytest.raises(ValueError, match=r'should have an assigner.*train_cfg'):
        student = tiny_det.build(cfg, 0)
        DensePair(student, student, 'bbox_head', 'bbox_head', 'losses.kd')


def test_no_object_at_all_gives_only_background(name):
    step = run(build(name, 0).train(), build(name, 1).eval(), boxes=False, name=name)
    assert len(step.units.boxes.scale) == len(step.units.boxes.target) == 0
    assert set(step.units.labels.unique().tolist()) <= {3, IGNORED}
    assert (step.units.labels == 3).any()
