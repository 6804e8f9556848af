"""Networks whose images are not alike learn together: sizes of padding, channels, views."""

import copy

import pytest
import torch

from tests import tiny_det, tiny_seg
from tests.tiny_networks import detectors, distiller, segmenters

PLAIN = dict(mean=None, std=None, bgr_to_rgb=False)
GENERAL = dict(type='General')


def padded(cfg, **padding):
    """Another padding of a network's preprocessor."""
    cfg = copy.deepcopy(cfg)
    cfg['data_preprocessor'].pop('size', None)
    cfg['data_preprocessor'].update(padding)
    return cfg


def networks(kind):
    """Two networks that pad to other sizes."""
    if kind == 'mmseg':
        paddings = dict(size_divisor=16), dict(size_divisor=64)
        tests = [dict(test_cfg=padding) for padding in paddings]
        configs = segmenters(2).values()
    else:
        paddings, tests = (dict(pad_size_divisor=32), dict(pad_size_divisor=64)), ({}, {})
        configs = detectors('atss gfl').values()
    parts = zip(configs, paddings, tests, strict=True)
    return {n: padded(cfg, **own, **test) for n, (cfg, own, test) in zip('ab', parts, strict=True)}


def raw(kind, channels=3):
    if kind == 'mmdet':
        return tiny_det.raw()
    generator = torch.Generator().manual_seed(0)
    size = (2, channels, 24, 36)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (2, 24, 36), generator=generator)
    return dict(inputs=list(images), data_samples=tiny_seg.samples(labels))


def step(model, data):
    """The losses of one step; all networks get a gradient."""
    losses = model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
    total, log = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    for network in model.students.values():
        assert any(p.grad is not None and p.grad.any() for p in network.parameters())
    return log


@pytest.mark.parametrize('kind', ['mmseg', 'mmdet'])
def test_networks_that_pad_to_other_sizes_learn_together(kind):
    """As if each had been configured with the padding that suits both."""
    configs = networks(kind)
    key = 'size_divisor' if kind == 'mmseg' else 'pad_size_divisor'
    same = {name: padded(cfg, **{key: 64}) for name, cfg in configs.items()}
    logs = []
    for students in (configs, same):
        model = distiller(students, second=GENERAL)
        model.has_hook = True
        logs.append(step(model, raw(kind)))
    assert logs[0] == logs[1]
    assert logs[0]['a/loss_kl'] > 0


@pytest.mark.parametrize('kind', ['mmseg', 'mmdet'])
def test_their_errors_are_compared_and_they_predict(kind):
    model = distiller(networks(kind), second=GENERAL).eval()
    data = raw(kind)
    assert model.error_correlation(copy.deepcopy(data)).isfinite().all()
    for sample in data['data_samples']:
        size = tuple(sample.metainfo.get('img_shape', (24, 36)))
        sample.set_metainfo(dict(ori_shape=size, img_shape=size, flip=False))
        if kind == 'mmdet':
            sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    predicted = model.test_step(data)
    assert {frozenset(sample.networks) for sample in predicted} == {frozenset('ab')}


@pytest.mark.parametrize('channels', [1, 4, 6])
def test_images_have_any_number_of_channels(channels):
    configs = {name: padded(cfg, size=(32, 40), **PLAIN) for name, cfg in segmenters(2).items()}
    for cfg in configs.values():
        cfg['backbone']['in_channels'] = channels
    assert step(distiller(configs), raw('mmseg', channels))['a/loss_kl'] > 0
