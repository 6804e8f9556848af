import pytest
import torch

from mmdistill_ext.distillers.fit import build_fit
from mmdistill_ext.taps import Taps
from tests import tiny_zoo
from tests.tiny_zoo import overlap

SEL = dict(type='SelectiveLoss', average='positive', box=dict(distance='iou'))
PAIRS = {
    **{name: (name, None, {}) for name in tiny_zoo.QUERY},
    'conditional of dab': ('conditional', 'dab', {}),
    'dab of deformable': ('dab', 'deformable', {}),
    'deformable of dino': ('deformable', 'dino', {}),
    'dino of deformable': ('dino', 'deformable', {}),
    'many of few': ('detr', 'few', {}),
    'few of many': ('detr', 'detr', dict(num_queries=2)),
    'few dinos of many': ('dino', 'dino', dict(num_queries=2)),
}


@pytest.fixture(scope='module')
def step(tmp_path_factory):
    """Name, split -> units, the student's own outputs, the teacher's, both models, the batch."""
    folder, models, steps = tmp_path_factory.mktemp('teachers'), {}, {}

    def get(name, by=None, score=0.3):
        if name not in models:
            student, teacher, changes = PAIRS[name]
            teacher = tiny_zoo.config('detr', num_queries=2) if teacher == 'few' else teacher
            models[name] = tiny_zoo.distil(
                folder, student, dict(a=SEL), teacher, seeds=(2, 1), **changes
            )
        model, key = models[name], (name, by, score)
        if key not in steps:
            fit = dict(function=dict(type='ConstantFit', c=0.5), split=by, iou=0.05, score=score)
            model.distillation.fit = build_fit(fit) if by else None
            data = tiny_zoo.crowd(model)
            teacher = model.distillation.teacher.model
            with Taps(model, dict(own='bbox_head.loss_by_feat_single')) as taps:
                units = tiny_zoo.step(model, data).units[0]
                layers = [call.args[:2] for call in taps.all('own') if len(call.args) > 1]
            with torch.no_grad():
                found = teacher(data[0], data[1], mode='tensor')
            steps[key] = units, layers, [x[-1] for x in found[:2]], model, teacher, data[1]
        return steps[key]

    return get


def matched(head, scores, boxes, sample):
    """Object -> query, by the targets that the head forms for its loss."""
    truth = sample.gt_instances
    found = head._get_targets_single(scores, boxes, truth, sample.metainfo)
    labels, targets, queries = found[0], found[2], found[4]
    sizes = torch.tensor(sample.img_shape[::-1]).repeat(2)
    pairs = {}
    for query in queries.tolist():
        x, y, w, h = targets[query] * sizes
        box = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        near = (truth.bboxes - box).abs().amax(1)
        assert near.min() < 1e-3
        assert labels[query] == truth.labels[near.argmin()]
        pairs[int(near.argmin())] = query
    return pairs


def pixels(box, sample):
    """Corners in the image of a box as the heads predict it."""
    (x, y, w, h), (height, width) = box.tolist(), sample.img_shape
    return [
        (x - w / 2) * width,
        (y - h / 2) * height,
        (x + w / 2) * width,
        (y + h / 2) * height,
    ]


@pytest.mark.parametrize('name', PAIRS)
def test_units_are_the_queries_of_the_same_object(name, step):
    units, layers, teacher_layer, model, teacher, samples = step(name)
    scores, boxes = layers[1]
    assert len(layers) == 2 + model.bbox_head.__dict__.get('as_two_stage', False)
    assert units.labels.shape == (3, 5)
    seen = []
    for image, sample in enumerate(samples):
        own = matched(model.bbox_head, scores[image], boxes[image], sample)
        other = matched(teacher.bbox_head, *(x[image] for x in teacher_layer), sample)
        objects = len(sample.gt_instances)
        assert len(own) == min(objects, scores.shape[1])
        assert len(other) == min(objects, teacher_layer[0].shape[1])
        for unit in range(5):
            if unit not in own or unit not in other:
                assert units.labels[image, unit] == units.ignore_index
                continue
            seen.append((image, unit))
            assert units.labels[image, unit] == sample.gt_instances.labels[unit]
            assert torch.equal(units.student[image, :, unit], scores[image, own[unit]])
            torch.testing.assert_close(
                units.teacher[image, :, unit], teacher_layer[0][image, other[unit]]
            )
            place = len(seen) - 1
            found = units.boxes
            for got, expected in (
                (found.student, pixels(boxes[image, own[unit]], sample)),
                (found.teacher, pixels(teacher_layer[1][image, other[unit]], sample)),
                (found.target, sample.gt_instances.bboxes[unit].tolist()),
            ):
                assert got[place].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)
            height, width = sample.img_shape
            assert found.scale[place] ** 2 == pytest.approx(height * width)
    assert list(zip(*(x.tolist() for x in units.boxes.index), strict=True)) == seen
    assert len(units.boxes.student) == len(seen) > 0
    assert units.sigmoid == units.background == (name not in ('detr', 'many of few', 'few of many'))
    assert units.student.shape[1] == (3 if units.sigmoid else 4)
    assert units.student.requires_grad
    assert units.boxes.student.requires_grad
    assert not units.teacher.requires_grad
    assert not units.boxes.teacher.requires_grad


@pytest.mark.parametrize('name', PAIRS)
def test_a_simple_object_has_a_query_of_the_teacher_right_in_class_and_box(name, step):
    units, _, (scores, boxes), _, teacher, samples = step(name, 'unit')
    simple = torch.zeros(3, 5, dtype=torch.bool)
    for image, sample in enumerate(samples):
        pairs = matched(teacher.bbox_head, scores[image], boxes[image], sample)
        for unit, query in pairs.items():
            truth = sample.gt_instances[unit]
            iou = overlap(pixels(boxes[image, query], sample), truth.bboxes[0].tolist())[0]
            likeliest = scores[image, query].argmax()
            simple[image, unit] = likeliest == truth.labels[0] and iou >= 0.05
    assert torch.equal(units.simple, simple)
    assert units.own.samples.tolist() == [simple.sum(), 8]
    assert name.startswith(('many', 'few')) or simple.any()
    assert not simple.all()


@pytest.mark.parametrize('score', [0.3, 0.6, 0.99])
@pytest.mark.parametrize('name', PAIRS)
def test_a_simple_image_has_every_object_found_and_nothing_else(name, score, step):
    units, _, (logits, boxes), _, _, samples = step(name, 'image', score)
    scores = logits.sigmoid() if units.sigmoid else logits.softmax(-1)[..., :-1]
    simple = []
    for image, sample in enumerate(samples):
        truth = sample.gt_instances
        found, spurious = set(), False
        for query, (best, kind) in enumerate(zip(*scores[image].max(-1), strict=True)):
            if best <= score:
                continue
            box = pixels(boxes[image, query], sample)
            hits = {
                i
                for i in range(len(truth))
                if kind == truth.labels[i] and overlap(box, truth.bboxes[i].tolist())[0] >= 0.05
            }
            found |= hits
            crowd = tiny_zoo.in_a_crowd(box, sample, 0.05)
            spurious |= not hits and not crowd
        simple.append(len(found) == len(truth) and not spurious)
    assert units.simple.all(1).tolist() == units.simple.any(1).tolist() == simple
    assert units.own.samples.tolist() == [sum(simple), 3]
    if score == 0.99 and name != 'two_stage':
        assert simple == [False, True, False]


def test_wins_are_painted_on_the_objects(step):
    units, *_ = step('deformable')
    wins = (torch.arange(5) % 2 == 0).expand(3, 5)
    won, known = units.paint(wins, units.labels != -1)['']
    votes = torch.zeros(2, 3, 64, 90)
    for image, unit, box in zip(*units.boxes.index, units.boxes.target.tolist(), strict=True):
        left, top, right, bottom = map(int, box)
        votes[int(wins[image, unit]), image, top:bottom, left:right] += 1
    assert torch.equal(known, votes.sum(0) > 0)
    assert torch.equal(won, votes[1] > votes[0])
    assert won.any()
    assert (known & ~won).any()
    assert not known[1].any()


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', tiny_zoo.QUERY)
def test_each_layer_is_split_by_the_objects_that_it_matched(name, by, tmp_path):
    """The parts of the own loss, by mmdet's own losses of hand-picked rows."""
    model = tiny_zoo.distil(tmp_path, name, dict(a=SEL), seeds=(2, 1))
    fit = dict(function=dict(type='ConstantFit', c=1.0), split=by, iou=0.05, score=0.99)
    model.distillation.fit = build_fit(fit)
    data = tiny_zoo.crowd(model)
    paths = {path: f'bbox_head.{path}' for path in ('loss_cls', 'loss_bbox', 'loss_iou')}
    single = 'loss_by_feat_single'
    with Taps(
        model, {**paths, single: f'bbox_head.{single}', 'all': 'bbox_head.loss_by_feat'}
    ) as t:
        units = tiny_zoo.step(model, data).units[0]
        layers = t.all(single)
        # Each is asked for its rows, too.
        sums = ([c for c in t.all(path) if 'reduction_override' not in c.kwargs] for path in paths)
        calls = list(zip(*sums, strict=True))
        losses = t['all'].output.items()  # the distiller's have been added
        whole = sum(v.item() for k, v in losses if 'dn_' not in k and 'bbox.' not in k)
    simple_part = 0.0
    own = model.bbox_head
    # DINO's denoising queries go through the same modules; they come last.
    for layer, parts in zip(layers, calls, strict=False):
        bound = {
            **dict(zip(('cls_scores', 'bbox_preds'), layer.args, strict=False)),
            **layer.kwargs,
        }
        scores, boxes = (x for x in list(bound.values())[:2])
        truths = bound['batch_gt_instances']
        rows = []
        for image, sample in enumerate(data[1]):
            sample = sample.new()
            sample.set_metainfo(data[1][image].metainfo)
            sample.gt_instances = truths[image]
            right = torch.ones(scores.shape[1], dtype=torch.bool)
            if by == 'image':
                right[:] = units.simple[image, 0]
            else:
                for unit, query in matched_objects(own, scores[image], boxes[image], sample):
                    right[query] = units.simple[image, unit]
            rows.append(right)
        rows = torch.cat(rows)
        for call, module in zip(parts, (own.loss_cls, own.loss_bbox, own.loss_iou), strict=True):
            weight = call.args[2].clone()
            weight[~rows] = 0
            simple_part += module(
                call.args[0], call.args[1], weight, avg_factor=call.kwargs['avg_factor']
            ).item()
    parts = units.own.parts.tolist()
    assert parts[0] == pytest.approx(simple_part, rel=1e-3)
    assert sum(parts) == pytest.approx(whole, rel=1e-4)
    assert 0 < parts[0] < whole
    assert units.own.sums.tolist() == pytest.approx([3 * whole, 3], rel=1e-4)


def matched_objects(head, scores, boxes, sample):
    """Objects and their queries, by the assigner (the encoder's classes are all 0)."""
    sizes = torch.tensor(sample.img_shape[::-1]).repeat(2)
    x, y, w, h = boxes.detach().unbind(-1)
    corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1) * sizes
    truth = sample.gt_instances
    predicted = type(truth)(scores=scores.detach(), bboxes=corners)
    found = head.assigner.assign(
        pred_instances=predicted, gt_instances=truth, img_meta=sample.metainfo
    )
    queries = (found.gt_inds > 0).nonzero().squeeze(1).tolist()
    return [(int(found.gt_inds[query]) - 1, query) for query in queries]
