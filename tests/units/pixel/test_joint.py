import copy

import pytest
import torch
from mmengine.structures import PixelData

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.joint import shallow_copy, with_networks
from mmdistill_ext.units.pixel.joint import JointPixels
from tests import tiny_seg


def build(channels=8, seed=0, strides=(1, 2, 1, 1), **head):
    cfg = tiny_seg.model(channels)
    cfg['backbone']['strides'] = strides
    cfg['decode_head'].update(head)
    torch.manual_seed(seed)
    model = build_model(cfg)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, 0, 0.5)
    return model.train()


@pytest.fixture
def networks():
    return dict(a=build(), b=build(4, 1, (1, 2, 2, 2), align_corners=True), c=build(6, 2))


def batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 32, 40))
    labels[:, :4] = 255
    return torch.randn(2, 3, 32, 40), tiny_seg.samples(labels)


def tapped(joint, networks, inputs, samples):
    """Calls of one step of every network."""
    found = {}
    for name, network in networks.items():
        with Taps(network, {path: path for path in joint.taps(name)}) as found[name]:
            network(inputs, samples, mode='loss')
    return found


def test_units_are_the_networks_logits_at_their_strides(networks):
    joint = JointPixels(networks)
    inputs, samples = batch()
    before = copy.deepcopy(networks)
    units = joint(tapped(joint, networks, inputs, samples), dict.fromkeys(networks, samples))
    assert [tuple(x.shape) for x in units.logits] == [(2, 3, 4, 5), (2, 3, 1, 2), (2, 3, 4, 5)]
    for own, network in zip(units.logits, before.values(), strict=True):
        torch.testing.assert_close(own, network(inputs, mode='tensor'))
        assert own.requires_grad
    assert torch.equal(units.labels, torch.cat([x.gt_sem_seg.data for x in samples]))
    assert units.align_corners == (False, True, False)
    assert units.boxes is None
    assert (joint.num_classes, joint.ignore_index, joint.sigmoid) == (3, 255, False)
    assert joint.taps('a') == joint.taps('c') == ('decode_head.loss_by_feat',)


def test_labels_are_those_of_the_first_network(networks):
    """Which may have padded them with another void label only if all ignore the same."""
    joint = JointPixels(networks)
    inputs, samples = batch()
    others = copy.deepcopy(samples)
    others[0].gt_sem_seg.data.fill_(1)
    data_samples = dict(a=samples, b=others, c=others)
    units = joint(tapped(joint, networks, inputs, samples), data_samples)
    assert torch.equal(units.labels[0], samples[0].gt_sem_seg.data[0])


def test_labels_of_different_sizes_are_refused(networks):
    joint = JointPixels(networks)
    inputs, samples = batch()
    taps = tapped(joint, networks, inputs, samples)
    others = tiny_seg.samples(torch.zeros(2, 32, 48, dtype=torch.long))
    message = r"Found labels \(2, 32, 40\) for 'a', \(2, 32, 48\) for 'c'"
    with pytest.raises(ValueError, match=message):
        joint(taps, dict(a=samples, b=samples, c=others))


def test_a_binary_head_has_two_labels():
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    head = dict(num_classes=2, out_channels=1, loss_decode=loss)
    joint = JointPixels(dict(a=build(**head), b=build(**head)))
    assert joint.sigmoid
    assert joint.num_classes == 2


SIGMOID = dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))


@pytest.mark.parametrize(
    ('one', 'other', 'message'),
    [
        ({}, dict(num_classes=4), "same `num_classes`. Found 3 in 'one', 4 in 'other'"),
        (
            dict(num_classes=2),
            dict(num_classes=2, out_channels=1, **SIGMOID),
            "same `out_channels`. Found 2 in 'one', 1 in 'other'",
        ),
        ({}, dict(ignore_index=0), "same `ignore_index`. Found 255 in 'one', 0 in 'other'"),
        (SIGMOID, {}, "same `use_sigmoid`. Found True in 'one', False in 'other'"),
    ],
)
def test_heads_that_differ_are_refused(one, other, message):
    with pytest.raises(ValueError, match=f'`students` should have heads of the {message}'):
        JointPixels(dict(one=build(**one), same=build(**one), other=build(**other)))


def test_a_cascade_is_joined_by_its_last_stage():
    cfg = tiny_seg.model(8)
    head = cfg['decode_head']
    cfg.update(type='CascadeEncoderDecoder', num_stages=2)
    cfg['decode_head'] = [
        head,
        dict(head, type='OCRHead', ocr_channels=8),
    ]
    cfg['decode_head'][1].pop('num_convs')
    networks = dict(a=build(), b=build_model(cfg).train())
    joint = JointPixels(networks)
    inputs, samples = batch()
    assert joint.taps('b') == ('decode_head.1.loss_by_feat',)
    units = joint(tapped(joint, networks, inputs, samples), dict.fromkeys(networks, samples))
    for part in networks['b'].modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.0
    expected = networks['b'](inputs, mode='tensor')
    torch.testing.assert_close(units.logits[1], expected)


@pytest.mark.parametrize('weights', [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, 1.5, -1.0]])
def test_the_ensemble_is_the_weighted_mean_and_holds_the_networks(networks, weights):
    joint = JointPixels(networks)
    inputs, samples = batch()
    for network in networks.values():
        network.eval()
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
        own = {name: other[place] for name, other in expected.items()}
        mean = sum(w * x.seg_logits.data for w, x in zip(weights, own.values(), strict=True))
        torch.testing.assert_close(sample.seg_logits.data, mean, rtol=1e-4, atol=1e-4)
        assert torch.equal(sample.pred_sem_seg.data, sample.seg_logits.data.argmax(0)[None])
        for name, other in own.items():
            assert torch.equal(sample.networks[name].seg_logits.data, other.seg_logits.data)
            assert torch.equal(sample.networks[name].pred_sem_seg.data, other.pred_sem_seg.data)


def test_padding_is_cut_off_the_ensemble_as_off_the_networks(networks):
    joint = JointPixels(networks)
    inputs, samples = batch()
    for sample in samples:
        meta = dict(img_padding_size=(0, 4, 0, 8), ori_shape=(48, 72), img_shape=(24, 36))
        sample.set_metainfo(meta)
    with torch.no_grad():
        found = joint.predict(
            {name: network.eval() for name, network in networks.items()},
            dict.fromkeys(networks, inputs),
            dict.fromkeys(networks, samples),
            torch.full((3,), 1 / 3),
        )
    for sample in found:
        assert sample.pred_sem_seg.data.shape == (1, 48, 72)
        mean = sum(own.seg_logits.data for own in sample.networks.values()) / 3
        torch.testing.assert_close(sample.seg_logits.data, mean, rtol=1e-4, atol=1e-4)


def divisor(cfg, size):
    if size:
        cfg['data_preprocessor']['test_cfg'] = dict(size_divisor=size)
    return cfg


@pytest.mark.parametrize('divisors', [(32, 0), (0, 32), (16, 32), (32, 32)])
@pytest.mark.parametrize('shape', [(24, 36), (32, 32)])
def test_networks_that_pad_differently_predict_together(divisors, shape):
    networks = {}
    for place, size in enumerate(divisors):
        torch.manual_seed(place)
        network = build_model(divisor(tiny_seg.model(8), size)).eval()
        torch.nn.init.normal_(network.decode_head.conv_seg.weight, 0, 0.5)
        networks[f'n{place}'] = network
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    samples = tiny_seg.samples(torch.zeros(1, *shape, dtype=torch.long))
    samples[0].set_metainfo(dict(img_shape=shape))  # a tuple, as the pipelines give it
    data = {
        name: network.data_preprocessor(
            dict(inputs=[image], data_samples=copy.deepcopy(samples)), False
        )
        for name, network in networks.items()
    }
    with torch.no_grad():
        (found,) = JointPixels(networks).predict(
            networks,
            {name: own['inputs'] for name, own in data.items()},
            {name: own['data_samples'] for name, own in data.items()},
            torch.tensor([0.25, 0.75]),
        )
    one, two = (own.seg_logits.data for own in found.networks.values())
    assert one.shape == (3, *shape)
    torch.testing.assert_close(found.seg_logits.data, 0.25 * one + 0.75 * two)


def test_labels_are_padded_where_the_preprocessor_pads_images_alone():
    """As it does in eval mode: else the logits would be squeezed into the unpadded labels."""
    cfg = divisor(tiny_seg.model(8), 32)
    networks = {name: build_model(cfg).eval() for name in 'ab'}
    labels = torch.randint(0, 3, (2, 24, 36))
    raw = dict(
        inputs=[torch.randint(0, 256, (3, 24, 36), dtype=torch.uint8) for _ in range(2)],
        data_samples=tiny_seg.samples(labels),
    )
    data = networks['a'].data_preprocessor(raw, False)
    joint = JointPixels(networks)
    taps = tapped(joint, networks, data['inputs'], data['data_samples'])
    found = joint(taps, dict.fromkeys(networks, data['data_samples'])).labels
    assert data['inputs'].shape == (2, 3, 32, 64)
    assert found.shape == (2, 32, 64)
    assert torch.equal(found[:, :24, :36], labels)
    assert (found == 255).sum() == 2 * (32 * 64 - 24 * 36)
    assert torch.equal(data['data_samples'][0].gt_sem_seg.data[0], labels[0])  # theirs stays
    for sample in data['data_samples']:  # labels at the size that the image had at first
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, 48, 72, dtype=torch.long))
    found = joint(taps, dict.fromkeys(networks, data['data_samples'])).labels
    assert found.shape == (2, 48, 72)


def test_a_binary_ensemble_is_thresholded():
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    head = dict(num_classes=2, out_channels=1, loss_decode=loss, threshold=0.3)
    networks = {name: build(seed=i, **head).eval() for i, name in enumerate('ab')}
    inputs, samples = batch()
    with torch.no_grad():
        found = JointPixels(networks).predict(
            networks,
            dict.fromkeys(networks, inputs),
            dict.fromkeys(networks, samples),
            torch.tensor([0.25, 0.75]),
        )
        logits = [
            network.inference(inputs, [sample.metainfo for sample in samples])
            for network in networks.values()
        ]
    mean = (0.25 * logits[0] + 0.75 * logits[1]).sigmoid()
    for place, sample in enumerate(found):
        assert torch.equal(sample.pred_sem_seg.data, (mean[place] > 0.3).to(torch.int64))


def test_a_shallow_copy_shares_what_it_holds_and_takes_its_own_fields():
    sample = batch()[1][0]
    copied = shallow_copy(sample)
    assert type(copied) is type(sample)
    assert copied.metainfo == sample.metainfo
    assert copied.gt_sem_seg is sample.gt_sem_seg
    copied.set_metainfo(dict(img_path='x.png'))
    copied.set_data(dict(pred_sem_seg=copied.gt_sem_seg))
    assert 'pred_sem_seg' not in sample
    assert 'img_path' not in sample.metainfo
    (together,) = with_networks([sample], dict(a=[copied]))
    assert together is sample
    assert sample.networks == dict(a=copied)
    assert sample.cpu().networks['a'].gt_sem_seg is copied.gt_sem_seg
