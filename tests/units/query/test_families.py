"""Heads with queries of every family: units are the objects that both models matched."""

import math

import pytest
import torch

from mmdistill_ext.isolation import eval_mode
from mmdistill_ext.taps import Taps
from tests import tiny_zoo

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou'))
LOSSES = dict(kd=KD, sel=dict(KD, type='SelectiveLoss'))
NAMES = ('ddq', 'sparse', 'queryinst')
PAIRS = [
    *((name, None) for name in NAMES),
    ('sparse', 'dino'),
    ('deformable', 'queryinst'),
    ('dino', 'ddq'),
]
SEEDS = (2, 1)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Student, teacher -> a model; ``same``: equal to each other."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name, teacher=None, same=False):
        key = name, teacher, same
        if key not in made:
            seeds = SEEDS[1:] * 2 if same else SEEDS
            made[key] = tiny_zoo.distil(folder, name, LOSSES, teacher, seeds=seeds)
        made[key].distillation.fit = None
        return made[key]

    return get


def batch(model):
    return tiny_zoo.batch(model) if getattr(model, 'with_mask', False) else tiny_zoo.crowd(model)


def own_queries(model, calls, samples):
    """Object -> logits and box of its query, by mmdet's targets of the last layer."""
    found = []
    if hasattr(model, 'roi_head'):
        scores, boxes, results = calls['own'][0].args[:3]
        scores, boxes = (x.unflatten(0, (len(samples), -1)) for x in (scores, boxes))
        for image, result in enumerate(results):
            pairs = zip(result.pos_assigned_gt_inds.tolist(), result.pos_inds, strict=True)
            found.append({obj: (scores[image, q], boxes[image, q]) for obj, q in pairs})
        return found
    for call, sample in zip(calls['own'][len(samples) :][: len(samples)], samples, strict=True):
        (scores, boxes), (labels, _, targets, _, queries, _) = call.args[:2], call.output
        sizes, pairs = torch.tensor(sample.img_shape[::-1]).repeat(2), {}
        for query in queries:
            x, y, w, h = (targets[query] * sizes).tolist()
            box = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            near = (sample.gt_instances.bboxes - box).abs().amax(1)
            assert near.min() < 1e-2
            assert labels[query] == sample.gt_instances.labels[near.argmin()]
            x, y, w, h = (boxes[query] * sizes).unbind()
            corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
            pairs[int(near.argmin())] = scores[query], corners
        found.append(pairs)
    return found


@pytest.mark.parametrize(('name', 'teacher'), PAIRS)
def test_units_are_the_queries_that_the_own_loss_matched(name, teacher, models):
    model = models(name, teacher)
    data = batch(model)
    path = 'roi_head.bbox_head.1.loss_and_target'
    path = path if hasattr(model, 'roi_head') else 'bbox_head._get_targets_single'
    with Taps(model, dict(own=path)) as taps:
        units = tiny_zoo.step(model, data).units[0]
        own = own_queries(model, dict(own=taps.all('own')), data[1])
    boxes = iter(zip(units.boxes.student, units.boxes.target, strict=True))
    seen = 0
    for image, sample in enumerate(data[1]):
        assert set(own[image]) == set(range(len(sample.gt_instances)))
        for unit, label in enumerate(sample.gt_instances.labels):
            if units.labels[image, unit] == units.ignore_index:
                continue  # the teacher has no query for it
            seen += 1
            assert units.labels[image, unit] == label
            scores, box = own[image][unit]
            assert torch.equal(units.student[image, :, unit], scores)
            found, target = next(boxes)
            torch.testing.assert_close(found, box, rtol=1e-4, atol=1e-3)
            assert torch.equal(target, sample.gt_instances.bboxes[unit])
    assert seen > 3
    assert next(boxes, None) is None
    assert units.sigmoid
    assert units.background
    assert not units.teacher.requires_grad


@pytest.mark.parametrize(('name', 'teacher'), PAIRS)
def test_losses_are_the_sums_of_the_definition(name, teacher, models):
    model = models(name, teacher)
    found = tiny_zoo.step(model, batch(model))
    for term, units in zip(model.distillation.terms, found.units, strict=True):
        expected = tiny_zoo.reference(units, term.name == 'sel')
        key, objects = f'{term.pair.prefix}.loss_{term.name}', (units.labels >= 0).sum().item()
        got = expected['classes'] / objects, expected['boxes'] / objects
        assert found.logged[key] == pytest.approx(got[0], rel=1e-3, abs=1e-6)
        assert found.logged[f'{key}_box'] == pytest.approx(got[1], rel=1e-3, abs=1e-6)
        assert term.name == 'sel' or min(got) > 0


@pytest.mark.parametrize('name', NAMES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, models):
    model = models(name, same=True)
    found = tiny_zoo.step(model, batch(model))
    prefix = model.distillation.terms[0].pair.prefix
    for key in ('kd', 'kd_box', 'sel', 'sel_box'):
        assert abs(found.logged[f'{prefix}.loss_{key}']) < 1e-4, key


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_a_batch_without_any_object_is_finite(name, by, models):
    model = tiny_zoo.set_fit(models(name), by, 0.5)
    found = tiny_zoo.step(model, tiny_zoo.batch(model, boxes=False))
    assert all(math.isfinite(value) for value in found.logged.values())
    prefix = model.distillation.terms[0].pair.prefix
    assert found.logged[f'{prefix}.loss_kd'] == 0


@pytest.mark.parametrize('by', ['unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_own_losses_are_split_and_summed_up(name, by, models):
    model = models(name)
    data = batch(model)
    without = tiny_zoo.step(model, data)
    pair = model.distillation.terms[0].pair
    prefix, hard = pair.prefix, None
    assert pair.fused_loss('fit') is None
    for c in (1.0, 0.0, 0.5):
        found = tiny_zoo.step(tiny_zoo.set_fit(model, by, c, iou=0.05, score=0.99), data)
        if name == 'ddq':
            own = [k for k in found.losses if 'loss' in k and not k.startswith(f'{prefix}.')]
            own = [k for k in own if 'dn_' not in k and 'aux_' not in k]
        else:
            own = [f's1.loss_{part}' for part in ('cls', 'bbox', 'iou')]
        terms = [k for k in found.logged if k.startswith(f'{prefix}.loss_')]
        total = sum(found.logged[k] for k in (*own, *terms))
        soft, hard = (found.logged[f'{prefix}.l_{part}'] for part in ('soft', 'hard'))
        assert total == pytest.approx(soft + c * hard, rel=1e-3)
        if c == 1:
            for k in own:
                assert torch.equal(found.losses[k], without.losses[k]), k
    assert hard > 0


@pytest.mark.parametrize('name', NAMES)
def test_the_own_loss_is_measured_as_it_is_in_training(name, models):
    model = tiny_zoo.set_fit(models(name), 'image', 1.0, iou=0.05, score=0.99)
    own = tiny_zoo.step(model, tiny_zoo.batch(model)).units[0].own
    torch.manual_seed(5)
    with eval_mode(model):
        found = model.distillation.terms[0].pair.gt_loss(model, tiny_zoo.raw())
    torch.testing.assert_close(found, own.sums, rtol=1e-4, atol=1e-4)


MASK = dict(type='KDLoss', head='roi_head.mask_head')


def test_masks_are_compared_in_the_students_boxes(tmp_path):
    model = tiny_zoo.distil(tmp_path, 'queryinst', dict(m=MASK), seeds=SEEDS)
    data = batch(model)
    path = 'roi_head.mask_head.1'
    with Taps(model, dict(own=f'{path}.loss_and_target', targets=f'{path}.get_targets')) as taps:
        found = tiny_zoo.step(model, data)
        call, targets = taps['own'].kwargs, taps['targets'].output
    (units,) = found.units
    results = call['sampling_results']
    classes = torch.cat([result.pos_gt_labels for result in results])
    rows = torch.arange(len(classes))
    assert torch.equal(units.student[:, 0], call['mask_preds'][rows, classes])
    assert torch.equal(units.labels.float(), targets.round())
    assert len(classes) == 4
    student, teacher = units.student.detach().double(), units.teacher.double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    expected = loss(student, teacher.sigmoid()) - loss(teacher, teacher.sigmoid())
    assert found.logged['mask_1.loss_m'] == pytest.approx(expected.item(), rel=1e-3)
    assert any(g is not None and g.any() for k, g in found.gradients.items() if 'mask_head.1' in k)


def test_masks_of_a_student_that_is_its_teacher(tmp_path):
    losses = dict(LOSSES, m=MASK)
    model = tiny_zoo.distil(tmp_path, 'queryinst', losses, seeds=(1, 1))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    teacher = model.distillation.teacher.model
    with Taps(teacher, dict(run='roi_head._bbox_forward')) as taps:
        found = tiny_zoo.step(model, batch(model))
        assert len(taps.all('run')) == 2  # once per stage, for boxes and masks
    assert abs(found.logged['mask_1.loss_m']) < 1e-5
    (place,) = [i for i, term in enumerate(model.distillation.terms) if term.name == 'm']
    assert found.units[place].labels.ndim == 3
    assert not found.units[place].teacher.requires_grad
    empty = tiny_zoo.step(model, tiny_zoo.batch(model, boxes=False))
    assert empty.logged['mask_1.loss_m'] == 0
    with pytest.raises(ValueError, match='`fit` cannot split the loss of a DynamicMaskHead'):
        model.distillation.terms[place].pair.fused_loss('fit')


def test_masks_without_a_query_of_the_teacher_are_ignored(tmp_path):
    few = tiny_zoo.config('queryinst')
    few.rpn_head.num_proposals = 1
    model = tiny_zoo.distil(tmp_path, 'queryinst', dict(m=MASK), few, seeds=SEEDS)
    (units,) = tiny_zoo.step(model, batch(model)).units
    known = (units.labels >= 0).flatten(1).all(1)
    assert known.sum() == 2  # one of three objects, none, and one of one
    assert (units.labels[~known] == units.ignore_index).all()
