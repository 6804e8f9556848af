import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData

from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.functional import (
    error_correlation,
    min_logit,
    min_loss,
    unit_difference,
    unit_distillation,
)
from mmdistill_ext.taps import Taps
from tests import tiny_det
from tests.tiny_networks import (
    MIN_LOSS,
    WEIGHTED,
    WEIGHTS,
    alone,
    detectors,
    distiller,
    gradients,
    seg_batch,
    segmenters,
)


def flat(maps, channels):
    """``(B, A * C, H, W)`` of each level -> ``(B, C, units)`` as mmdet counts them."""
    return torch.cat(
        [m.permute(0, 2, 3, 1).reshape(len(m), -1, channels) for m in maps], 1
    ).transpose(1, 2)


def labels_of(name, targets):
    """Labels of the units, -1 where the network learns nothing, ``(B, units)``."""
    if name.startswith('fcos'):
        return torch.cat([labels.view(3, -1) for labels in targets[0]], 1)
    first = 0 if name == 'retina' else 1
    labels, weights = (torch.cat(targets[place], 1) for place in (first, first + 1))
    return labels.where(weights > 0, -1)


@pytest.mark.parametrize('boxes', [True, False])
@pytest.mark.parametrize(
    'names',
    ['retina retina', 'atss gfl', 'fcos atss', 'fcos_norm gfl', 'gfl fcos atss', 'rtmdet fcos'],
)
def test_losses_of_detectors_equal_those_of_the_networks_run_alone(names, boxes):
    model = distiller(detectors(names), second_weight=0.5, kl=dict(weight=0.3, temperature=2.0))
    networks = alone(model)
    data = model.data_preprocessor(tiny_det.raw(boxes), True)
    losses = model(**copy.deepcopy(data), mode='loss')
    logits, expected = [], {}
    for place, (key, network) in enumerate(networks.items()):
        paths = dict(scores='bbox_head.loss_by_feat', targets='bbox_head.get_targets')
        with Taps(network, paths) as taps:
            own = network(data['inputs'][key], data['data_samples'][key], mode='loss')
        expected |= {f'{key}/{name}': value for name, value in own.items()}
        logits.append(flat(taps['scores'].args[0], 3))
        if place == 0:
            target = labels_of(names.split()[0], taps['targets'].output)
    logits = torch.stack(logits)
    options = dict(difference='bce', ignore_index=-1, background=True)
    mixture = min_loss(logits, target, **options)
    valid = target != -1
    positive = max(int((valid & (target < 3)).sum()), 1)
    assert (positive > 1) == boxes
    second = unit_difference(mixture, target, 'bce', -1, True)[valid].sum()
    expected['ensemble/loss'] = 0.5 * second / positive
    for key, own in zip(networks, logits, strict=True):
        pull = unit_distillation(own, mixture.detach(), 'bce', 2.0)[valid].sum()
        expected[f'{key}/loss_kl'] = 0.3 * pull / positive
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-5)
    found = gradients(model, losses)
    total = sum(sum(v) if isinstance(v, list) else v for k, v in expected.items() if 'loss' in k)
    total.backward()
    for key, network in networks.items():
        for name, parameter in network.named_parameters():
            own, other = found[f'students.{key}.{name}'], parameter.grad
            assert (own is None) == (other is None), name
            if own is not None:
                torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-4)


def giou(first, second):
    """Of aligned boxes, by its definition."""
    inner = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    outer = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    inner, outer = inner.clamp(min=0).prod(1), outer.prod(1)
    union = sum((x[:, 2:] - x[:, :2]).prod(1) for x in (first, second)) - inner
    return inner / union, inner / union - (outer - union) / outer


@pytest.mark.parametrize('second', [MIN_LOSS, WEIGHTED], ids=lambda x: x['type'])
@pytest.mark.parametrize('distance', ['iou', 'l1'])
def test_boxes_have_a_second_prediction_too(distance, second, monkeypatch):
    students = dict(a=tiny_det.atss(), b=tiny_det.atss(12), c=tiny_det.fcos())
    box = dict(weight=2.0, distance=distance)
    model = distiller(students, second=second, second_weight=0.5, kl=dict(weight=0.3), box=box)
    model.has_hook = True
    model.weights.copy_(WEIGHTS)
    data = model.data_preprocessor(tiny_det.raw(), True)
    units = []
    build_units = type(model.joint).__call__

    def spy(*args, **kwargs):
        units.append(build_units(*args, **kwargs))
        return units[0]

    monkeypatch.setattr(type(model.joint), '__call__', spy)
    losses = model(**data, mode='loss')
    boxes = units[0].boxes
    stack = torch.stack(boxes.networks)
    if second is MIN_LOSS:
        best = torch.stack([giou(own, boxes.target)[0] for own in stack]).argmax(0)
        mixture = torch.stack([stack[n, i] for i, n in enumerate(best.tolist())])
        assert len(set(best.tolist())) > 1
    else:
        mixture = (WEIGHTS[:, None, None] * stack).sum(0)
    loss = (1 - giou(mixture, boxes.target)[1]).mean()
    torch.testing.assert_close(losses['ensemble/loss_box'], 0.5 * 2.0 * loss)
    wide = (mixture[:, 2:] - mixture[:, :2] >= 1).all(1)
    for name, own in zip('abc', stack, strict=True):
        if distance == 'iou':
            pull = (1 - giou(own, mixture)[1]).where(wide, 0)
        else:
            pull = (own - mixture).abs().mean(1) / boxes.scale
        torch.testing.assert_close(losses[f'{name}/loss_kl_box'], 0.3 * 2.0 * pull.mean())
    assert all(g.isfinite().all() for g in gradients(model, losses).values() if g is not None)


def test_boxes_without_an_object_cost_nothing():
    model = distiller(detectors('atss gfl'), box=dict(distance='iou'))
    losses = model(**model.data_preprocessor(tiny_det.raw(boxes=False), True), mode='loss')
    keys = 'ensemble/loss_box', 'n0/loss_kl_box', 'n1/loss_kl_box'
    assert [losses[key].item() for key in keys] == [0, 0, 0]
    assert all(g.isfinite().all() for g in gradients(model, losses).values() if g is not None)


@pytest.mark.parametrize(
    ('box', 'message'),
    [
        (dict(distance='l2'), "`box.distance` should be one of iou, l1.*'l2'"),
        (dict(distance='distribution'), '`box.distance` should be one of iou, l1'),
        (dict(weight=-1.0), '`box.weight` should be a finite number >= 0'),
        (dict(wieght=1.0), '`box.wieght` should be an argument of JointBoxTerm'),
    ],
)
def test_boxes_that_are_impossible(box, message):
    with pytest.raises(ValueError, match=message):
        CollaborativeDistiller(detectors('atss gfl'), MIN_LOSS, box=box)


def test_segmenters_have_no_boxes():
    with pytest.raises(ValueError, match='`box` is for detectors'):
        CollaborativeDistiller(segmenters(), MIN_LOSS, box=dict(distance='iou'))


@pytest.mark.parametrize(
    'second',
    [
        dict(type='Linear'),
        dict(type='Linear', per='image'),
        dict(type='MinLoss', per='image'),
        dict(type='MinLogit', shift=False),
        WEIGHTED,
        dict(type='General'),
    ],
    ids=str,
)
def test_every_second_prediction_trains_detectors(second):
    model = distiller(detectors('atss gfl fcos'), second=second)
    model.has_hook = True
    found = {}
    for boxes in (True, False):
        losses = model(**model.data_preprocessor(tiny_det.raw(boxes), True), mode='loss')
        assert 0 < losses['ensemble/loss'] < math.inf
        for value in gradients(model, losses).values():
            assert value is None or value.isfinite().all()
        found[boxes] = losses
    if second['type'] == 'Linear' and len(second) == 1:
        best = distiller(detectors('atss gfl fcos'))
        other = best(**best.data_preprocessor(tiny_det.raw(), True), mode='loss')
        assert found[True]['ensemble/loss'] < other['ensemble/loss']


def test_softmax_detectors_have_a_channel_for_background():
    students = {name: tiny_det.retina(softmax=True) for name in 'ab'}
    model = distiller(students, second=dict(type='MinLogit'))
    networks = alone(model)
    data = model.data_preprocessor(tiny_det.raw(), True)
    losses = model(**copy.deepcopy(data), mode='loss')
    logits = []
    for key, network in networks.items():
        paths = dict(scores='bbox_head.loss_by_feat', targets='bbox_head.get_targets')
        with Taps(network, paths) as taps:
            network(data['inputs'][key], data['data_samples'][key], mode='loss')
        logits.append(flat(taps['scores'].args[0], 4))
        if key == 'a':
            target = labels_of('retina', taps['targets'].output)
    mixture = min_logit(torch.stack(logits), target, ignore_index=-1)
    loss = F.cross_entropy(mixture, target, ignore_index=-1, reduction='sum')
    positive = ((target >= 0) & (target < 3)).sum()
    torch.testing.assert_close(losses['ensemble/loss'], loss / positive)


@pytest.mark.parametrize('boxes', [True, False])
def test_detectors_predict_by_all_boxes(boxes):
    model = distiller(detectors('atss gfl')).eval()
    for network in model.students.values():
        network.bbox_head.test_cfg.score_thr = 0.3 if boxes else 2.0
    data = tiny_det.raw()
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(0.5, 0.5)))
    expected = {
        name: network.test_step(copy.deepcopy(data)) for name, network in model.students.items()
    }
    for step in (model.val_step, model.test_step):
        found = step(copy.deepcopy(data))
        assert len(found) == 3
        for place, sample in enumerate(found):
            assert list(sample.networks) == model.names
            for name, own in sample.networks.items():
                other = expected[name][place].pred_instances
                assert len(own.pred_instances) == len(other)
                for key in ('bboxes', 'scores', 'labels'):
                    assert torch.equal(own.pred_instances[key], other[key])
                assert len(own.gt_instances) == len(data['data_samples'][place].gt_instances)
            both = [expected[name][place].pred_instances for name in model.names]
            merged = sample.pred_instances
            assert (len(merged) > 0) == boxes
            assert len(merged) <= sum(map(len, both))
            assert merged.bboxes.shape == (len(merged), 4)
            assert merged.labels.dtype == torch.int64
            if boxes:
                joined = torch.cat([x.bboxes for x in both]).tolist()
                assert all(box in joined for box in merged.bboxes.tolist())
                assert merged.scores.max() == torch.cat([x.scores for x in both]).max()
                assert set(merged.labels.tolist()) == set(
                    torch.cat([x.labels for x in both]).tolist()
                )


def test_the_evaluators_see_the_ensemble_and_the_networks():
    """A metric gets dicts of what the data samples hold."""
    model = distiller(detectors('atss gfl')).eval()
    sample = model.val_step(tiny_det.raw())[0].to_dict()
    assert {'pred_instances', 'gt_instances', 'networks'} <= sample.keys()
    assert isinstance(sample['networks'], dict)
    assert isinstance(sample['networks']['n1'].pred_instances, InstanceData)


def test_errors_of_segmenters_correlate_as_those_of_the_networks_alone():
    model = distiller(segmenters(3)).eval()
    torch.manual_seed(0)
    data = dict(
        inputs=[torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8) for _ in range(2)],
        data_samples=seg_batch()[1],
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = model.error_correlation(copy.deepcopy(data))
    assert not found.requires_grad
    assert found.dtype == torch.float64
    inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
    target = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    with torch.no_grad():
        logits = torch.stack(
            [
                F.interpolate(
                    network(inputs[name], mode='tensor'),
                    (32, 40),
                    mode='bilinear',
                    align_corners=network.decode_head.align_corners,
                )
                for name, network in model.students.items()
            ]
        )
    expected, _ = error_correlation(logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('names', ['atss gfl', 'retina retina', 'fcos_norm atss'])
@pytest.mark.parametrize('boxes', [True, False])
def test_errors_of_detectors_correlate_as_those_of_the_networks_alone(names, boxes):
    model = distiller(detectors(names)).eval()
    found = model.error_correlation(tiny_det.raw(boxes))
    inputs = model.data_preprocessor(tiny_det.raw(boxes), False)
    logits = []
    for place, (key, network) in enumerate(model.students.items()):
        paths = dict(scores='bbox_head.loss_by_feat', targets='bbox_head.get_targets')
        with Taps(network, paths) as taps:
            network(inputs['inputs'][key], inputs['data_samples'][key], mode='loss')
        logits.append(flat(taps['scores'].args[0], 3))
        if place == 0:
            target = labels_of(names.split()[0], taps['targets'].output)
    options = dict(difference='bce', ignore_index=-1, background=True)
    expected, _ = error_correlation(torch.stack(logits), target, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.linalg.eigvalsh(found).min() > 0
