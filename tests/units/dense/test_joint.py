import copy

import pytest
import torch
from mmengine.structures import InstanceData

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.dense.joint import JointDense
from mmdistill_ext.units.dense.outputs import DenseOutputs, DenseTargets
from mmdistill_ext.units.joint_detectors import merge
from tests import tiny_det

POINTS = (8, 16, 32)


def build(names):
    """Networks in training mode, each with weights of its own."""
    made = {}
    for place, name in enumerate(names.split()):
        cfg = tiny_det.FAMILIES[name](8 if place else 12)
        made[f'n{place}'] = tiny_det.build(cfg, place).train()
    return made


def tapped(joint, networks, data):
    """Calls of one step of every network."""
    found = {}
    for name, network in networks.items():
        with Taps(network, {path: path for path in joint.taps(name)}) as found[name]:
            network(*copy.deepcopy(data), mode='loss')
    return found


def units_of(networks, boxes=True):
    """The networks' units, and the tapped calls."""
    joint = JointDense(networks)
    data = tiny_det.batch(next(iter(networks.values())), boxes)
    taps = tapped(joint, networks, data)
    return joint, joint(taps, dict.fromkeys(networks, data[1])), taps, data


def labels_of(name, targets, images=3):
    """Labels of the units, -1 where nothing is learnt, ``(B, units)``."""
    if name.startswith('fcos'):
        return torch.cat([labels.view(images, -1) for labels in targets[0]], 1)
    first = 0 if name == 'retina' else 1
    labels, weights = (torch.cat(targets[place], 1) for place in (first, first + 1))
    return labels.where(weights > 0, -1)


PAIRS = ['retina retina', 'atss gfl', 'gfl fcos_norm', 'fcos atss', 'rtmdet atss', 'atss gfl fcos']


@pytest.mark.parametrize('boxes', [True, False])
@pytest.mark.parametrize('names', PAIRS)
def test_units_are_those_of_the_networks(names, boxes):
    networks = build(names)
    joint, units, taps, data = units_of(networks, boxes)
    priors = 3 if names.startswith('retina') else 1
    shapes = [(3, priors, 3, n) for n in (96, 24, 6)]
    assert len(units.logits) == len(networks)
    for own, network in zip(units.logits, networks.values(), strict=True):
        assert [tuple(level.shape) for level in own] == shapes
        for level, scores in zip(own, network(data[0], mode='tensor')[0], strict=True):
            maps = scores.view(3, priors, 3, -1)
            torch.testing.assert_close(level, maps)
            assert level.requires_grad
    lead = names.split()[0]
    first = taps['n0'].all('bbox_head.get_targets')
    assert torch.equal(units.labels, labels_of(lead, first[-1].output))
    assert units.align_corners == (False,) * len(networks)
    assert (joint.num_classes, joint.sigmoid, joint.background) == (3, True, True)
    assert joint.taps('n1') == ('bbox_head.loss_by_feat',)


def test_boxes_that_nobody_wants_are_not_decoded(monkeypatch):
    networks = build('atss gfl')
    joint, whole, taps, data = units_of(networks)
    for owner, name in ((DenseTargets, 'index'), (DenseOutputs, 'flat_boxes')):
        monkeypatch.setattr(owner, name, property(lambda _: pytest.fail('looked for boxes')))
    units = joint(taps, dict.fromkeys(networks, data[1]), boxes=False)
    assert units.boxes is None
    assert torch.equal(units.labels, whole.labels)


def test_crowds_padding_and_empty_images():
    networks = build('atss gfl')
    _, units, _, data = units_of(networks)
    head = networks['n0'].bbox_head
    generator = head.prior_generator
    anchors = torch.cat(generator.grid_priors([(8, 12), (4, 6), (2, 3)], device='cpu'))
    (crowd,) = data[1][0].ignored_instances.bboxes
    corners = torch.maximum(anchors[:, :2], crowd[:2]), torch.minimum(anchors[:, 2:], crowd[2:])
    area = (anchors[:, 2:] - anchors[:, :2]).prod(1)
    inside = (corners[1] - corners[0]).clamp(min=0).prod(1) / area > 0.5
    assert inside.any()
    assert torch.equal(units.labels[0] == -1, inside)
    assert set(units.labels[1].tolist()) == {3}  # no object: background
    columns = torch.cat([torch.arange(w).repeat(h) for h, w in ((8, 12), (4, 6), (2, 3))])
    stride = torch.cat([torch.full((n,), s) for n, s in zip((96, 24, 6), POINTS, strict=True)])
    beyond = columns * stride >= 64  # where the third image's own padding ends
    assert torch.equal(units.labels[2] == -1, beyond)


@pytest.mark.parametrize('names', ['atss gfl', 'gfl fcos_norm', 'fcos rtmdet', 'retina retina'])
def test_boxes_are_those_of_the_positive_units(names):
    networks = build(names)
    _, units, _, data = units_of(networks)
    positive = (units.labels >= 0) & (units.labels < 3)
    assert len(units.boxes.target) == positive.sum() > 0
    truth = torch.cat([sample.gt_instances.bboxes for sample in data[1]])
    distances = torch.cdist(units.boxes.target, truth)
    torch.testing.assert_close(distances.amin(1), torch.zeros(len(distances)), atol=1e-2, rtol=0)
    classes = torch.cat([sample.gt_instances.labels for sample in data[1]])
    assert torch.equal(classes[distances.argmin(1)], units.labels[positive])
    scale = torch.cat([torch.full((n,), s) for n, s in zip((96, 24, 6), POINTS, strict=True)])
    if not names.startswith('retina'):
        assert torch.equal(units.boxes.scale, scale.expand(3, -1)[positive].float())
    for own in units.boxes.networks:
        assert own.shape == units.boxes.target.shape
        assert own.requires_grad
    assert not units.boxes.target.requires_grad


def test_boxes_of_a_network_are_what_it_would_predict():
    networks = build('gfl atss')
    _, units, _, data = units_of(networks)
    positive = ((units.labels >= 0) & (units.labels < 3)).nonzero(as_tuple=True)
    head = networks['n1'].bbox_head
    deltas = networks['n1'](data[0], mode='tensor')[1]
    flat = torch.cat([x.permute(0, 2, 3, 1).reshape(3, -1, 4) for x in deltas], 1)
    sizes = [x.shape[-2:] for x in deltas]
    anchors = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))
    expected = head.bbox_coder.decode(anchors[positive[1]], flat[positive])
    torch.testing.assert_close(units.boxes.networks[1], expected)


def test_every_network_is_compared_by_the_firsts_labels():
    networks = build('fcos atss gfl')
    _, units, *_ = units_of(networks)
    turned = dict(reversed(networks.items()))
    _, others, *_ = units_of(turned)
    assert not torch.equal(units.labels, others.labels)
    for own, other in zip(units.logits, reversed(others.logits), strict=True):
        for level, same in zip(own, other, strict=True):
            torch.testing.assert_close(level, same)


@pytest.mark.parametrize('names', ['yolox atss', 'atss yolox', 'atss gfl yolox'])
def test_where_a_network_has_no_background_only_the_positive_units_count(names):
    """YOLOX learns the classes of its positive units alone."""
    _, units, taps, _ = units_of(build(names))
    valid = units.labels != -1
    assert valid.any()
    assert (units.labels[valid] < 3).all()
    if names.startswith('atss'):
        expected = labels_of('atss', taps['n0'].all('bbox_head.get_targets')[-1].output)
        assert torch.equal(units.labels, expected.where(expected < 3, -1))


def with_levels(seed, strides, start=1, channels=8):
    """ATSS with levels of such strides."""
    generator = {**tiny_det.ANCHOR, 'strides': list(strides)}
    cfg = tiny_det.atss(channels, anchor_generator=generator)
    cfg['neck'].update(start_level=start, num_outs=len(strides))
    return tiny_det.build(cfg, seed).train()


CHOICES = {
    'the first has more': (((8, 16, 32, 64), 1), ((8, 16, 32), 1)),
    'the first has less': (((16, 32), 2), ((8, 16, 32), 1)),
    'each has its own': (((8, 16, 32, 64), 1), ((16, 32, 64, 128), 2), ((4, 8, 16, 32), 0)),
}


@pytest.mark.parametrize('boxes', [True, False])
@pytest.mark.parametrize('choice', CHOICES)
def test_levels_that_not_all_have_are_left_to_the_labels(choice, boxes):
    networks = {
        f'n{place}': with_levels(place, strides, start)
        for place, (strides, start) in enumerate(CHOICES[choice])
    }
    _, units, taps, data = units_of(networks, boxes)
    kept = sorted(set.intersection(*(set(strides) for strides, _ in CHOICES[choice])))
    assert kept in ([8, 16, 32], [16, 32])
    sizes = {4: 384, 8: 96, 16: 24, 32: 6, 64: 2, 128: 1}
    for own, (network, (strides, _)) in zip(
        units.logits, zip(networks.values(), CHOICES[choice], strict=True), strict=True
    ):
        assert [level.shape[3] for level in own] == [sizes[stride] for stride in kept]
        scores = network(data[0], mode='tensor')[0]
        chosen = [scores[strides.index(stride)] for stride in kept]
        for level, maps in zip(own, chosen, strict=True):
            torch.testing.assert_close(level[:, 0], maps.flatten(2))
    strides = CHOICES[choice][0][0]
    every = labels_of('atss', taps['n0'].all('bbox_head.get_targets')[-1].output)
    parts = every.split([sizes[stride] for stride in strides], 1)
    expected = torch.cat([parts[strides.index(stride)] for stride in kept], 1)
    assert torch.equal(units.labels, expected)
    positive = (expected >= 0) & (expected < 3)
    assert len(units.boxes.target) == positive.sum()
    scale = torch.cat([torch.full((sizes[s],), float(s)) for s in kept])
    assert torch.equal(units.boxes.scale, scale.expand(3, -1)[positive])


def test_without_a_common_level_they_are_refused():
    networks = dict(a=with_levels(0, (8, 16, 32)), b=with_levels(1, (64, 128), 3))
    with pytest.raises(ValueError, match=r'same stride.*`students`.* in .a. .*\[64, 128\] in .b.'):
        JointDense(networks)
    networks = dict(
        a=with_levels(0, (8, 16, 32, 64)),
        b=with_levels(1, (8, 16, 32)),
        c=with_levels(2, (64, 128), 3),
    )
    with pytest.raises(ValueError, match=r'same stride.*in .a. .*in .b. .* in .c. '):
        JointDense(networks)


def test_maps_of_different_sizes_are_refused():
    networks = build('atss gfl')
    joint = JointDense(networks)
    data = tiny_det.batch(networks['n0'])
    taps = tapped(joint, dict(n0=networks['n0']), data)
    larger = torch.nn.functional.pad(data[0], (0, 32))
    samples = copy.deepcopy(data[1])
    taps |= tapped(joint, dict(n1=networks['n1']), (larger, samples))
    message = r'feature maps of the same sizes.*\(8, 12\).* in n0, .*\(8, 16\).* in n1'
    with pytest.raises(ValueError, match=message):
        joint(taps, dict(n0=data[1], n1=samples))


def test_other_anchors_are_refused():
    others = {**tiny_det.ANCHOR, 'ratios': [0.5, 1.0, 2.0], 'octave_base_scale': 5}
    networks = dict(
        a=tiny_det.build(tiny_det.retina(), 0),
        b=tiny_det.build(tiny_det.retina(anchor_generator=others), 1),
    )
    with pytest.raises(ValueError, match=r'the same anchors \(`students`\).*in .a. .*in .b. '):
        JointDense(networks)


def proposals():
    """A single-stage detector without classes."""
    cfg = tiny_det.retina()
    cfg['bbox_head'] = dict(
        type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=tiny_det.ANCHOR
    )
    cfg.update(type='SingleStageDetector')
    return cfg


@pytest.mark.parametrize('wrong', ['a', 'b', 'c'])
def test_the_network_with_another_head_is_named(wrong):
    networks = {
        name: build_model({'_scope_': 'mmdet', **(proposals() if name == wrong else made)})
        for name, made in (('a', tiny_det.atss()), ('b', tiny_det.gfl()), ('c', tiny_det.fcos()))
    }
    with pytest.raises(ValueError, match=f'`students.{wrong}` .*RetinaHead.*a RPNHead'):
        JointDense(networks)


def test_both_networks_that_do_not_pair_are_named():
    networks = dict(a=tiny_det.atss(), b=tiny_det.gfl(), c=tiny_det.retina())
    networks = {name: tiny_det.build(cfg, 0) for name, cfg in networks.items()}
    message = r'priors per location.*\(`students`\). Found \[1, .* in .a. .*\[3, .* in .c. '
    with pytest.raises(ValueError, match=message):
        JointDense(networks)


def test_the_first_network_assigns_the_labels():
    cfg = tiny_det.atss()
    cfg['train_cfg'] = None
    networks = dict(a=tiny_det.build(cfg, 0), b=tiny_det.build(tiny_det.gfl(), 0))
    with pytest.raises(ValueError, match="'a' .*assigner .`students`.*`train_cfg`. Found"):
        JointDense(networks)


# -- predictions


def instances(boxes, scores, labels):
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.long),
    )


NOTHING = instances([], [], [])


TEST_CFG = dict(nms=dict(type='nms', iou_threshold=0.6), max_per_img=3)


def listed(found):
    return found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist()


def test_of_boxes_that_overlap_the_surest_stays():
    one = instances([[0, 0, 10, 10], [50, 50, 60, 70]], [0.8, 0.5], [1, 0])
    two = instances([[0, 0, 10, 12]], [0.9], [1])
    found = merge([one, two], [0.5, 0.5], TEST_CFG)
    assert listed(found)[0] == [[0, 0, 10, 12], [50, 50, 60, 70]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5])
    assert found.labels.tolist() == [1, 0]
    found = merge([one, two], [0.75, 0.25], TEST_CFG)  # the second counts a third
    assert found.bboxes.tolist() == one.bboxes.tolist()
    assert found.scores.tolist() == pytest.approx([0.8, 0.5])


def test_boxes_of_different_classes_stay():
    one, two = instances([[0, 0, 10, 10]], [0.8], [1]), instances([[0, 0, 10, 10]], [0.6], [2])
    found = merge([one, two], [0.5, 0.5], TEST_CFG)
    assert found.labels.tolist() == [1, 2]
    assert found.scores.tolist() == pytest.approx([0.8, 0.6])


def test_there_are_no_more_boxes_than_one_network_gives():
    rows = [[20 * i, 0, 20 * i + 10, 10] for i in range(5)]
    many = instances(rows, [0.1, 0.9, 0.3, 0.7, 0.5], [0] * 5)
    found = merge([many, NOTHING], [0.5, 0.5], TEST_CFG)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert len(merge([many, NOTHING], [0.5, 0.5], dict(nms=TEST_CFG['nms']))) == 5


def test_images_without_any_box():
    one = instances([[0, 0, 10, 10]], [0.8], [1])
    for predictions in ([NOTHING, NOTHING], [NOTHING, NOTHING, NOTHING]):
        found = merge(predictions, [0.5] * len(predictions), TEST_CFG)
        assert found.bboxes.shape == (0, 4)
        assert found.scores.shape == found.labels.shape == (0,)
        assert found.labels.dtype == torch.int64
    for predictions in ([one, NOTHING], [NOTHING, one]):
        assert listed(merge(predictions, [0.5, 0.5], TEST_CFG)) == listed(one)


def test_a_network_of_weight_0_is_not_heard():
    """As one whose weight is negative."""
    heard = instances([[0, 0, 10, 10]], [0.8], [1])
    other = instances([[40, 40, 50, 50]], [0.9], [0])
    for predictions, weights in (([heard, other], [1.0, 0.0]), ([other, heard], [-0.2, 1.2])):
        assert listed(merge(predictions, weights, TEST_CFG)) == listed(heard)


@pytest.mark.parametrize('weights', [[0.5, 0.5], [1.4, -0.4]])
def test_the_ensemble_holds_the_networks(weights):
    networks = {name: network.eval() for name, network in build('atss gfl').items()}
    for network in networks.values():
        network.bbox_head.test_cfg.update(score_thr=0.3, max_per_img=20)
    joint = JointDense(networks)
    inputs, samples = tiny_det.batch(networks['n0'])
    with torch.no_grad():
        expected = {
            name: network.predict(inputs, copy.deepcopy(samples))
            for name, network in networks.items()
        }
        found = joint.predict(
            networks,
            dict.fromkeys(networks, inputs),
            dict.fromkeys(networks, samples),
            torch.tensor(weights),
        )
    for place, sample in enumerate(found):
        assert sample is samples[place]
        own = [expected[name][place].pred_instances for name in networks]
        assert all(len(x) for x in own)
        other = merge(own, weights, networks['n0'].bbox_head.test_cfg)
        assert torch.equal(sample.pred_instances.bboxes, other.bboxes)
        assert torch.equal(sample.pred_instances.scores, other.scores)
        assert sample.pred_instances.bboxes.isfinite().all()
        assert sample.pred_instances.scores.max() <= 1
        for name, mine in zip(networks, own, strict=True):
            assert torch.equal(sample.networks[name].pred_instances.bboxes, mine.bboxes)
            shared = sample.networks[name].gt_instances.bboxes
            assert shared is sample.gt_instances.bboxes
        if weights[1] < 0:
            assert set(sample.pred_instances.labels.tolist()) <= set(own[0].labels.tolist())
