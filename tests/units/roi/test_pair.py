import copy

import pytest
import torch
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData

from mmdistill_ext.distillers.fit import build_fit
from mmdistill_ext.taps import Taps, wrapped
from tests import tiny_zoo
from tests.tiny_zoo import overlap

SEL = dict(type='SelectiveLoss', average='positive', box=dict(distance='iou'))
MASK = dict(type='SelectiveLoss')
LOSSES = dict(
    faster=dict(a=SEL),
    mask=dict(a=SEL, m=dict(MASK, head='roi_head.mask_head')),
    cascade={
        **{str(i): dict(SEL, head=f'roi_head.bbox_head.{i}') for i in range(3)},
        **{f'm{i}': dict(MASK, head=f'roi_head.mask_head.{i}') for i in (0, 2)},
    },
    faster_cascade=dict(a=dict(SEL, teacher_head='roi_head.bbox_head.2')),
    cascade_faster=dict(
        a=dict(SEL, head='roi_head.bbox_head.1', teacher_head='roi_head.bbox_head')
    ),
)
CASES = [
    ('faster', 'bbox_head', 'bbox_head'),
    ('mask', 'bbox_head', 'bbox_head'),
    *[('cascade', f'bbox_head.{i}', f'bbox_head.{i}') for i in range(3)],
    ('faster_cascade', 'bbox_head', 'bbox_head.2'),
    ('cascade_faster', 'bbox_head.1', 'bbox_head'),
]
MASKS = [('mask', 'mask_head'), ('cascade', 'mask_head.0'), ('cascade', 'mask_head.2')]


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Name -> student and teacher, named after both."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name):
        if name not in made:
            student, _, teacher = name.partition('_')
            made[name] = tiny_zoo.distil(folder, student, LOSSES[name], teacher or None)
        made[name].distillation.fit = None
        return made[name]

    return get


def step(model, head, **methods):
    """The units of a head, what its own methods were called with, and its teacher's features.

    One step for all that ask for it.
    """
    fit, known = model.distillation.fit, model.__dict__.setdefault('steps', {})
    key = None if fit is None else (fit.by, fit.iou, fit.score, fit.threshold)
    if key not in known:
        taps = [term.pair.student_tap for term in model.distillation.terms]
        heads = [tap.removesuffix('.loss_and_target') for tap in taps]
        losses = [f'{path}.loss_mask' if 'mask' in path else f'{path}.loss' for path in heads]
        losses = [path for path in losses if fit is None or 'mask' not in path]
        data = tiny_zoo.batch(model)
        with Taps(model, {path: path for path in (*taps, *losses)}) as tapped:
            found = tiny_zoo.step(model, data)
            calls = {path: tapped[path] for path in (*taps, *losses)}
        teacher = model.distillation.teacher
        with torch.no_grad():
            features = teacher.model.extract_feat(teacher.input.convert(*data))
        known[key] = dict(zip(heads, found.units, strict=True)), calls, features
    units, calls, features = known[key]
    path = f'roi_head.{head}'
    found = {name: calls[f'{path}.{method}'] for name, method in methods.items()}
    return units[path], found, features


def split(values, rois):
    """By image."""
    return [values[rois[:, 0] == image] for image in range(3)]


def teacher_heads(model, head):
    """RoI extractor and head of the teacher."""
    roi_head = model.distillation.teacher.model.roi_head
    kind, _, stage = head.partition('.')
    extractor = getattr(roi_head, kind.replace('head', 'roi_extractor'))
    return (extractor[int(stage)] if stage else extractor), roi_head.get_submodule(head)


@pytest.mark.parametrize(('name', 'head', 'teacher_head'), CASES)
def test_units_are_what_the_heads_own_loss_compared(name, head, teacher_head, models):
    model = models(name)
    units, calls, _ = step(model, head, own='loss')
    scores, deltas, rois, labels, weights, targets = calls['own'].args[:6]
    own = model.roi_head.get_submodule(head)
    assert (weights > 0).all()
    counts = [len(part) for part in split(rois, rois)]
    assert len(set(counts)) > 1
    assert units.labels.shape == (3, max(counts))
    for image, (label, score) in enumerate(
        zip(split(labels, rois), split(scores, rois), strict=True)
    ):
        assert torch.equal(units.labels[image, : len(label)], label)
        assert (units.labels[image, len(label) :] == units.ignore_index).all()
        assert torch.equal(units.student[image, :, : len(label)].T, score)
    assert not units.sigmoid
    positive = labels < 3
    assert units.boxes.index[0].tolist() == rois[positive, 0].tolist()
    places = torch.cat([part.nonzero().squeeze(1) for part in split(positive, rois)])
    assert torch.equal(units.boxes.index[1], places)
    far = dict(img_shape=(10**6, 10**6))
    assert positive.sum() > 3
    chosen = rois[positive, 1:], labels[positive], deltas[positive]
    inside = own.regress_by_class(*chosen, far)
    torch.testing.assert_close(units.boxes.student.clamp(min=0), inside.clamp(min=0))
    assert units.boxes.student.requires_grad
    goal = own.bbox_coder.decode(rois[positive, 1:], targets[positive])
    torch.testing.assert_close(units.boxes.target, goal, rtol=1e-3, atol=1e-3)
    sides = rois[positive, 3:] - rois[positive, 1:3]
    torch.testing.assert_close(units.boxes.scale**2, sides[:, 0] * sides[:, 1])


@pytest.mark.parametrize(('name', 'head', 'teacher_head'), CASES)
@torch.no_grad()
def test_the_teacher_predicts_on_the_students_proposals(name, head, teacher_head, models):
    """As its own prediction does it, from features to scores and boxes."""
    model = models(name)
    with torch.enable_grad():
        units, calls, features = step(model, head, own='loss')
    _, _, rois, labels = calls['own'].args[:4]
    extractor, own = teacher_heads(model, teacher_head)
    found = own.predict_by_feat(
        rois=(rois,),
        cls_scores=(scores := own(extractor(features[: extractor.num_inputs], rois)))[:1],
        bbox_preds=scores[1:],
        batch_img_metas=[dict(img_shape=(10**6, 10**6), scale_factor=(1.0, 1.0))],
        rcnn_test_cfg=None,
        rescale=False,
    )[0]
    for image, scores in enumerate(split(found.scores, rois)):
        got = units.teacher[image, :, : len(scores)].softmax(0).T
        torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-5)
    boxes = found.bboxes.view(len(rois), -1, 4)
    kinds = labels.clamp(max=boxes.shape[1] - 1)
    boxes = boxes[range(len(rois)), kinds][labels < 3]
    torch.testing.assert_close(units.boxes.teacher.clamp(min=0), boxes, rtol=1e-4, atol=1e-3)
    assert not units.teacher.requires_grad
    assert not units.boxes.teacher.requires_grad


@pytest.mark.parametrize(('name', 'head'), MASKS)
def test_mask_units_are_what_the_heads_own_loss_compared(name, head, models):
    model = models(name)
    units, calls, features = step(model, head, own='loss_mask', all='loss_and_target')
    masks, targets, classes = calls['own'].args
    assert len(masks) == len(classes) > 3
    chosen = torch.stack([mask[kind] for mask, kind in zip(masks, classes, strict=True)])
    assert torch.equal(units.student[:, 0], chosen)
    assert torch.equal(units.labels.float(), targets)
    assert 0 < units.labels.float().mean() < 1
    assert units.sigmoid
    assert units.boxes is None
    results = calls['all'].kwargs['sampling_results']
    rois = bbox2roi([result.pos_priors for result in results])
    extractor, own = teacher_heads(model, head)
    with torch.no_grad():
        expected = own(extractor(features[: extractor.num_inputs], rois))
    expected = torch.stack([mask[kind] for mask, kind in zip(expected, classes, strict=True)])
    torch.testing.assert_close(units.teacher[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert not units.teacher.requires_grad


def fitted(model, by, iou=0.5, score=0.3, threshold=0.6):
    """Let the model split by the teacher."""
    function = dict(type='ConstantFit', c=0.5)
    model.distillation.fit = build_fit(
        dict(function=function, split=by, iou=iou, score=score, threshold=threshold)
    )


@pytest.mark.parametrize('iou', [0.3, 0.8])
@pytest.mark.parametrize(('name', 'head', 'teacher_head'), CASES)
def test_a_simple_roi_is_right_in_class_and_box(name, head, teacher_head, iou, models):
    model = models(name)
    fitted(model, 'unit', iou)
    units, *_ = step(model, head)
    index = zip(*(x.tolist() for x in units.boxes.index), strict=True)
    place = {at: box for box, at in enumerate(index)}
    found = []
    for image, unit in (units.labels != -1).nonzero().tolist():
        label = units.labels[image, unit]
        right = units.teacher[image, :, unit].argmax() == label
        if label < 3:
            box = place[image, unit]
            boxes = units.boxes.teacher[box].tolist(), units.boxes.target[box].tolist()
            right = right and overlap(*boxes)[0] >= iou
        assert units.simple[image, unit] == right
        found.append(bool(right))
    assert not units.simple[units.labels == -1].any()
    assert 0 < sum(found) < len(found)
    assert units.own.samples.tolist() == [sum(found), len(found)]


@pytest.mark.parametrize('score', [0.3, 0.6, 0.99])
@pytest.mark.parametrize(('name', 'head', 'teacher_head'), CASES)
@torch.no_grad()
def test_a_simple_image_has_every_object_found_and_nothing_else(
    name, head, teacher_head, score, models
):
    """What is found is what the teacher predicts when it is used by itself."""
    model = models(name)
    fitted(model, 'image', 0.3, score)
    inputs, samples = tiny_zoo.batch(model)
    with torch.enable_grad():
        units, *_ = step(model, head)
    predicted = model.distillation.teacher.model.predict(inputs, copy.deepcopy(samples), False)
    simple = []
    for sample, prediction in zip(samples, predicted, strict=True):
        truth, own = sample.gt_instances, prediction.pred_instances
        own = own[own.scores > score]
        missed = set(range(len(truth)))
        spurious = False
        for box, kind in zip(own.bboxes.tolist(), own.labels.tolist(), strict=True):
            hits = {
                i
                for i in range(len(truth))
                if truth.labels[i] == kind and overlap(box, truth.bboxes[i].tolist())[0] >= 0.3
            }
            missed -= hits
            spurious |= not hits and not tiny_zoo.in_a_crowd(box, sample, 0.3)
        simple.append(not missed and not spurious)
    assert [part.all().item() for part in units.simple] == simple
    assert torch.equal(units.simple.all(1), units.simple.any(1))
    assert units.own.samples.tolist() == [sum(simple), 3]
    if score == 0.99:
        assert simple == [False, True, False]


@pytest.mark.parametrize('proposes', [False, True])
def test_the_teacher_has_to_find_the_objects_by_itself(proposes, models, monkeypatch):
    """The student's proposals hold the labels' boxes; a teacher that is right on them is not."""
    model = models('faster')
    fitted(model, 'image', 0.51 if proposes else 0.52)  # a step of its own
    teacher = model.distillation.teacher.model
    _, samples = tiny_zoo.batch(model)
    objects = [sample.gt_instances for sample in samples]

    def propose(features, samples, rescale):
        return [InstanceData(bboxes=x.bboxes + 1.0 if proposes else x.bboxes[:0]) for x in objects]

    def classify(features, metas, proposals, test_cfg):
        assert test_cfg.score_thr == 0.3
        return [
            InstanceData(bboxes=own.bboxes, labels=truth.labels[: len(own)])
            for own, truth in zip(proposals, objects, strict=True)
        ]

    monkeypatch.setattr(teacher.rpn_head, 'predict', propose)
    monkeypatch.setattr(teacher.roi_head, 'predict_bbox', classify)
    units, calls, _ = step(model, 'bbox_head', own='loss_and_target')
    results = calls['own'].kwargs['sampling_results']
    assert all(result.pos_is_gt.any() for result in results if result.num_gts)
    expected = [proposes or not len(truth) for truth in objects]
    assert units.simple.all(1).tolist() == units.simple.any(1).tolist() == expected


@pytest.mark.parametrize('threshold', [0.5, 0.6])
@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize(('name', 'head'), MASKS)
def test_simple_pixels_of_masks(name, head, by, threshold, models):
    model = models(name)
    fitted(model, by, threshold=threshold)
    units, calls, _ = step(model, head, all='loss_and_target')
    right = (units.teacher[:, 0].sigmoid() > 0.5) == (units.labels == 1)
    counts = [len(result.pos_priors) for result in calls['all'].kwargs['sampling_results']]
    images = right.split(counts)
    assert 0 < right.float().mean() < 1
    if by == 'unit':
        assert torch.equal(units.simple, right)
        assert units.own.samples.tolist() == [right.sum(), right.numel()]
        return
    simple = [not len(x) or x.float().mean().item() >= threshold for x in images]
    for part, expected in zip(units.simple.split(counts), simple, strict=True):
        assert (part == expected).all()
    assert units.own.samples.tolist() == [sum(simple), 3]


@pytest.mark.parametrize(('name', 'head', 'teacher_head'), CASES[:3])
def test_wins_are_painted_on_the_objects(name, head, teacher_head, models):
    units, *_ = step(models(name), head)
    generator = torch.Generator().manual_seed(0)
    wins = torch.rand(units.labels.shape, generator=generator) > 0.5
    (suffix, (won, known)), *others = units.paint(wins, units.labels != -1).items()
    assert suffix == ''
    assert not others
    votes = torch.zeros(2, 3, 64, 96)
    for image, unit, box in zip(*units.boxes.index, units.boxes.target.tolist(), strict=True):
        left, top, right, bottom = map(int, box)
        votes[int(wins[image, unit]), image, top:bottom, left:right] += 1
    assert torch.equal(known, votes.sum(0) > 0)
    assert torch.equal(won, votes[1] > votes[0])
    assert won.any()
    assert not known[1].any()


@pytest.mark.parametrize(('name', 'head'), MASKS[:2])
def test_wins_of_masks_are_painted_where_the_rois_lie(name, head, models):
    units, calls, _ = step(models(name), head, all='loss_and_target')
    wins = units.labels == 1
    won, known = units.paint(wins, torch.ones_like(wins))['']
    results = calls['all'].kwargs['sampling_results']
    rois = bbox2roi([result.pos_priors for result in results])
    votes = torch.zeros(2, 3, 64, 96)
    for (image, *box), mask in zip(rois.tolist(), wins, strict=True):
        left, top, right, bottom = (round(value) for value in box)
        for y in range(max(top, 0), min(bottom, 64)):
            for x in range(max(left, 0), min(right, 96)):
                row = (y - max(top, 0)) * 28 // (min(bottom, 64) - max(top, 0))
                column = (x - max(left, 0)) * 28 // (min(right, 96) - max(left, 0))
                votes[int(mask[row, column]), int(image), y, x] += 1
    assert torch.equal(known, votes.sum(0) > 0)
    assert torch.equal(won, votes[1] > votes[0])
    assert won.any()
    assert not won[known].all()


@pytest.mark.parametrize('name', ['faster', 'mask'])
@pytest.mark.parametrize('fit', [None, 'unit', 'image'])
def test_a_batch_without_any_roi_gives_exact_zeros(name, fit, models):
    model = models(name)
    if fit:
        fitted(model, fit)

    def none(forward):
        def loss_and_predict(*args, **kwargs):
            losses, results = forward(*args, **kwargs)
            return losses, [result[:0] for result in results]

        return loss_and_predict

    with wrapped(model.rpn_head, 'loss_and_predict', none):
        found = tiny_zoo.step(model, tiny_zoo.batch(model, boxes=False))
    assert found.units[0].labels.shape == (3, 0)
    ours = [key for key in found.logged if key.startswith(('bbox.', 'mask.'))]
    assert len(ours) > 2
    assert all(found.logged[key] == 0 for key in ours)
    assert all(g.isfinite().all() for g in found.gradients.values() if g is not None)


@pytest.mark.parametrize('size', [7, 28])
def test_the_teachers_masks_may_have_another_size(size, tmp_path):
    """They are brought to the size of the targets, 28 x 28, where they are compared."""
    cfg = tiny_zoo.config('mask')
    cfg.roi_head.mask_roi_extractor.roi_layer.output_size = size
    losses = dict(a=SEL, m=dict(type='SelectiveLoss', head='roi_head.mask_head'))
    model = tiny_zoo.distil(tmp_path, 'mask', losses, cfg)
    fitted(model, 'unit')
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    units = found.units[1]
    assert units.teacher.shape[2:] == (2 * size, 2 * size)
    teacher = torch.nn.functional.interpolate(units.teacher, (28, 28), mode='bilinear')
    assert torch.equal(units.simple, (teacher[:, 0] > 0) == (units.labels == 1))
    assert 0 < found.losses['mask.loss_m'] < 10


def test_one_mask_for_all_classes(tmp_path):
    cfg = tiny_zoo.config('mask')
    cfg.roi_head.mask_head.class_agnostic = True
    losses = dict(m=dict(type='KDLoss', head='roi_head.mask_head'))
    model = tiny_zoo.distil(tmp_path, 'mask', losses, cfg)
    units, calls, features = step(model, 'mask_head', all='loss_and_target')
    results = calls['all'].kwargs['sampling_results']
    rois = bbox2roi([result.pos_priors for result in results])
    extractor, own = teacher_heads(model, 'mask_head')
    with torch.no_grad():
        expected = own(extractor(features[: extractor.num_inputs], rois))
    assert expected.shape[1] == 1
    torch.testing.assert_close(units.teacher, expected, rtol=1e-4, atol=1e-4)


def test_masks_on_the_features_of_the_boxes(tmp_path):
    """Without a RoI extractor of its own the mask head takes the box head's features."""
    cfg = tiny_zoo.config('mask')
    losses = dict(m=dict(type='KDLoss', head='roi_head.mask_head'))
    cfg.roi_head.mask_roi_extractor = None
    cfg.train_cfg.rcnn.mask_size = 14
    changes = dict(roi_head=cfg.roi_head, train_cfg=cfg.train_cfg)
    model = tiny_zoo.distil(tmp_path, 'mask', losses, cfg, seeds=(11, 11), **changes)
    found = tiny_zoo.step(model, tiny_zoo.batch(model))
    assert found.units[0].student.shape[2:] == (14, 14)
    assert found.losses['mask.loss_m'].item() == pytest.approx(0, abs=1e-5)


def test_hard_example_mining_sees_the_plain_losses(tmp_path):
    """The sampler asks the head for losses before there are targets; those are not split."""
    cfg = tiny_zoo.config('faster')
    cfg.train_cfg.rcnn.sampler.update(type='OHEMSampler', num=6)
    model = tiny_zoo.distil(tmp_path, 'faster', dict(a=SEL), train_cfg=cfg.train_cfg)
    data = tiny_zoo.batch(model)
    path = 'roi_head.bbox_head.loss'
    chosen = []
    for fit in (None, 'unit', 'image'):
        if fit:
            fitted(model, fit)
        with Taps(model, dict(own=path)) as taps:
            found = tiny_zoo.step(model, data)
            calls = taps.all('own')
        assert len(calls) > 1
        chosen.append(calls[-1].args[2])
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])
    assert found.units[0].own.samples[1] == 3


def test_the_batch_has_the_labels_that_the_loss_needs(models):
    empty = InstanceData()
    boxes = InstanceData(bboxes=torch.zeros(0, 4))
    both = InstanceData(bboxes=torch.zeros(0, 4), masks=torch.zeros(0, 2, 2))
    expected = dict(faster=(False, True, True), mask=(False, False, True))
    for name, known in expected.items():
        pair = models(name).distillation.terms[0].pair
        for instances, enough in zip((empty, boxes, both), known, strict=True):
            assert pair.has_labels(dict(data_samples=dict(gt_instances=instances))) == enough
        assert ('masks' in pair.label_kinds) == (name == 'mask')
