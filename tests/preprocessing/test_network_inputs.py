import copy
import random

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor
from torch import nn

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.preprocessing.network_inputs import NetworkInputs
from tests import tiny_det, tiny_seg

NORMALISATION = dict(mean=[0.0] * 3, std=[1.0] * 3)


def network(cfg):
    """Nothing but a data preprocessor."""
    made = nn.Module()
    made.data_preprocessor = build_model(cfg, 'data_preprocessor')
    return made


def make(**configs):
    """Inputs of networks with these preprocessors, and how often each of them runs."""
    networks = {name: network(copy.deepcopy(cfg)) for name, cfg in configs.items()}
    runs = dict.fromkeys(configs, 0)
    for name, one in networks.items():

        def count(module, args, name=name):
            runs[name] += 1

        one.data_preprocessor.register_forward_pre_hook(count)
    return NetworkInputs(networks, configs), networks, runs


def segmenter(**change):
    return {'_scope_': 'mmseg', **tiny_seg.model(8)['data_preprocessor'], **change}


def detector(**change):
    return {'_scope_': 'mmdet', **tiny_det.atss()['data_preprocessor'], **change}


def raw(channels=3, images=2, seed=0):
    """Images and labels smaller than what they are padded to."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randint(0, 256, (channels, 24, 36), generator=generator, dtype=torch.uint8)
        for _ in range(images)
    ]
    labels = torch.randint(0, 3, (len(images), 24, 36), generator=generator)
    return dict(inputs=images, data_samples=tiny_seg.samples(labels))


@pytest.mark.parametrize('training', [True, False])
def test_networks_configured_alike_share_one_run(training):
    inputs, networks, runs = make(a=segmenter(), b=segmenter(), c=segmenter())
    data = raw()
    plain = networks['a'].data_preprocessor(copy.deepcopy(data), training)
    runs['a'] = 0
    found = inputs(data, training)
    assert runs == dict(a=1, b=0, c=0)
    assert list(found) == ['inputs', 'data_samples']
    assert list(found['inputs']) == list(found['data_samples']) == ['a', 'b', 'c']
    assert found['inputs']['a'] is found['inputs']['b'] is found['inputs']['c']
    assert found['data_samples']['a'] is found['data_samples']['c']
    assert torch.equal(found['inputs']['a'], plain['inputs'])
    labels = found['data_samples']['a'][0].gt_sem_seg.data
    assert torch.equal(labels, plain['data_samples'][0].gt_sem_seg.data)
    assert labels.shape == ((1, 32, 40) if training else (1, 24, 36))


def test_others_normalise_for_themselves_and_labels_are_padded_once_each():
    other = segmenter(**NORMALISATION, seg_pad_val=254)
    inputs, networks, runs = make(a=segmenter(), b=other, c=segmenter(), d=other)
    data = raw()
    expected = {
        name: one.data_preprocessor(copy.deepcopy(data), True) for name, one in networks.items()
    }
    runs.update(dict.fromkeys(runs, 0))
    found = inputs(data, True)
    assert runs == dict(a=1, b=1, c=0, d=0)
    for name, plain in expected.items():
        assert torch.equal(found['inputs'][name], plain['inputs']), name
        pairs = zip(found['data_samples'][name], plain['data_samples'], strict=True)
        for own, its in pairs:
            assert torch.equal(own.gt_sem_seg.data, its.gt_sem_seg.data)
            assert own.gt_sem_seg.data.shape == (1, 32, 40)
            assert own.metainfo == its.metainfo
    assert found['inputs']['a'] is found['inputs']['c']
    assert found['inputs']['b'] is found['inputs']['d']
    assert found['data_samples']['a'] is not found['data_samples']['b']
    assert found['data_samples']['b'][0].gt_sem_seg.data[0, -1, -1] == 254
    assert found['data_samples']['a'][0].gt_sem_seg.data[0, -1, -1] == 255


def test_views_go_to_their_networks_in_order():
    inputs, networks, runs = make(b=segmenter(), a=segmenter(), c=segmenter(**NORMALISATION))
    data = raw(channels=9)
    views = [
        dict(data, inputs=[image[3 * place : 3 * place + 3] for image in data['inputs']])
        for place in range(3)
    ]
    expected = [
        one.data_preprocessor(copy.deepcopy(view), True)
        for one, view in zip(networks.values(), views, strict=True)
    ]
    runs.update(dict.fromkeys(runs, 0))
    found = inputs(data, True)
    assert runs == dict(b=1, a=1, c=1)  # alike, but with a view each
    assert list(found['inputs']) == ['b', 'a', 'c']
    for name, plain in zip('bac', expected, strict=True):
        assert torch.equal(found['inputs'][name], plain['inputs']), name
        for own, its in zip(found['data_samples'][name], plain['data_samples'], strict=True):
            assert torch.equal(own.gt_sem_seg.data, its.gt_sem_seg.data)
    samples = found['data_samples'].values()
    assert len({id(own[0]) for own in samples}) == 3


def test_a_stacked_batch_is_read_as_well():
    """As a default collate function gives it."""
    inputs, *_ = make(a=segmenter(), b=segmenter())
    data = raw(channels=6)
    expected = inputs(copy.deepcopy(data), True)
    found = inputs(dict(data, inputs=torch.stack(data['inputs'])), True)
    for name in 'ab':
        assert torch.equal(found['inputs'][name], expected['inputs'][name])


@pytest.mark.parametrize('channels', [1, 4, 6, 12])
def test_other_numbers_of_channels_are_refused(channels):
    inputs, *_ = make(a=segmenter(), b=segmenter(), c=segmenter())
    message = rf'3 channels, or 9 .*MakeViews.*Found \{{{channels}\}}'
    with pytest.raises(ValueError, match=message):
        inputs(raw(channels), True)


def test_images_with_and_without_views_are_refused():
    inputs, *_ = make(a=segmenter(), b=segmenter())
    data = raw(channels=6)
    data['inputs'][0] = data['inputs'][0][:3]
    with pytest.raises(ValueError, match=r'or 6 .*Found \{(3, 6|6, 3)\}'):
        inputs(data, True)


@pytest.mark.parametrize('channels', [3, 6])
def test_images_without_samples_pass(channels):
    """As someone calls who only wants to predict."""
    inputs, *_ = make(a=segmenter(), b=segmenter(**NORMALISATION))
    found = inputs(dict(inputs=[torch.zeros(channels, 32, 40, dtype=torch.uint8)]), False)
    assert found['data_samples'] == dict(a=None, b=None)
    assert {x.shape for x in found['inputs'].values()} == {(1, 3, 32, 40)}


@pytest.fixture
def iteration():
    """A preprocessor that draws a size asks for it."""
    hub = MessageHub.get_current_instance()
    before = hub.get_info('iter', 0)
    hub.update_info('iter', 0)
    yield
    hub.update_info('iter', before)


def resizing(**change):
    """A preprocessor that draws a size for each batch."""
    resize = dict(
        type='BatchSyncRandomResize', random_size_range=(64, 640), size_divisor=32, interval=1
    )
    return detector(batch_augments=[resize], pad_size_divisor=64, **change)


def detection_views(networks):
    data = tiny_det.raw()
    generator = torch.Generator().manual_seed(1)
    data['inputs'] = [
        torch.randint(0, 256, (3 * networks, *x.shape[1:]), generator=generator, dtype=torch.uint8)
        for x in data['inputs']
    ]
    return data


def test_what_is_drawn_is_drawn_alike_for_all(iteration):
    inputs, _, runs = make(a=resizing(), b=resizing(**NORMALISATION), c=resizing())
    sizes = []
    random.seed(0)
    for _ in range(4):
        found = inputs(detection_views(3), True)
        shapes = {x.shape for x in found['inputs'].values()}
        assert len(shapes) == 1
        sizes.append(next(iter(shapes))[2:])
        samples = found['data_samples']
        for own, other in zip(samples['a'], samples['c'], strict=True):
            assert torch.equal(own.gt_instances.bboxes, other.gt_instances.bboxes)
            assert own.img_shape == other.img_shape
    assert runs == dict(a=4, b=4, c=4)
    assert len(set(sizes)) > 1  # and something is drawn


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize('networks', [1, 3])
def test_random_numbers_are_used_once_however_many_draw(networks, iteration):
    """The runs of all but the last leave no trace, so that the next draw is another."""
    after = []
    for configs in ([resizing()], [resizing() for _ in range(networks)]):
        inputs, *_ = make(**dict(zip('abc', configs, strict=False)))
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        before = states()
        for _ in range(3):
            inputs(detection_views(len(configs)), True)
        after.append(states())
        assert after[-1] != before
    assert after[0] == after[1]


def test_boxes_are_resized_once_each(iteration):
    """A preprocessor that resizes in place would do it again for the next network."""
    inputs, *_ = make(a=resizing(), b=resizing())
    alone = make(a=resizing())[0]
    size = []
    for seed in (0, 1):  # the first batch keeps its size and draws that of the next
        data = detection_views(2)
        plain = dict(copy.deepcopy(data), inputs=[image[:3] for image in data['inputs']])
        random.seed(seed)
        expected = alone(plain, True)
        random.seed(seed)
        found = inputs(data, True)
        for name in 'ab':
            pairs = zip(found['data_samples'][name], expected['data_samples']['a'], strict=True)
            for own, its in pairs:
                assert torch.equal(own.gt_instances.bboxes, its.gt_instances.bboxes), name
        size.append(found['inputs']['a'].shape)
    assert size[0] != size[1]


def test_networks_without_a_preprocessor_config_share_the_default():
    networks = {name: nn.Module() for name in 'ab'}
    for one in networks.values():
        one.data_preprocessor = BaseDataPreprocessor()
    inputs = NetworkInputs(networks, dict(a=None, b=None))
    data = dict(inputs=torch.zeros(2, 3, 4, 4), data_samples=[])
    found = inputs(data)
    assert found['inputs']['a'] is found['inputs']['b']
    assert torch.equal(found['inputs']['a'], data['inputs'])


def test_preprocessors_stay_those_of_their_networks():
    """They are not registered twice: no key of a checkpoint, no second move to a device."""
    inputs, networks, _ = make(a=segmenter(), b=segmenter())
    assert list(inputs.children()) == []
    assert not inputs.state_dict()
    both = nn.ModuleDict(dict(inputs=inputs, networks=nn.ModuleDict(networks)))
    copied = copy.deepcopy(both)
    for name, own in copied['inputs'].preprocessors.items():
        assert own is copied['networks'][name].data_preprocessor
        assert own is not networks[name].data_preprocessor
