import copy
import random

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor
from torch import nn

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.preprocessing import network_inputs
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


def with_views(names, channels=3):
    """Raw data with a view for each name, of as many channels or those named."""
    numbers = channels if isinstance(channels, dict) else dict.fromkeys(names, channels)
    views = {name: raw(numbers[name], seed=place)['inputs'] for place, name in enumerate(names)}
    return dict(raw(), inputs=views)


@pytest.mark.parametrize('order', ['bac', 'abc', 'cba'])
def test_views_go_to_the_networks_of_their_names(order):
    inputs, networks, runs = make(b=segmenter(), a=segmenter(), c=segmenter(**NORMALISATION))
    data = with_views(order)
    expected = {
        name: networks[name].data_preprocessor(
            copy.deepcopy(dict(data, inputs=data['inputs'][name])), True
        )
        for name in 'abc'
    }
    runs.update(dict.fromkeys(runs, 0))
    found = inputs(data, True)
    assert runs == dict(b=1, a=1, c=1)  # alike, but with a view each
    assert list(found['inputs']) == ['b', 'a', 'c']
    for name, plain in expected.items():
        assert torch.equal(found['inputs'][name], plain['inputs']), name
        for own, its in zip(found['data_samples'][name], plain['data_samples'], strict=True):
            assert torch.equal(own.gt_sem_seg.data, its.gt_sem_seg.data)
    samples = found['data_samples'].values()
    assert len({id(own[0]) for own in samples}) == 3


def test_stacked_batches_are_read_as_well():
    """As a default collate function gives them."""
    inputs, *_ = make(a=detector(), b=detector())
    data = dict(tiny_det.raw())
    sizes = {tuple(image.shape) for image in data['inputs']}
    images = [image[:, :32, :32] for image in data['inputs']]
    assert len(sizes) > 0
    views = dict(a=images, b=[image.flip(0) for image in images])
    expected = inputs(copy.deepcopy(dict(data, inputs=views)), True)
    stacked = {name: torch.stack(view) for name, view in views.items()}
    found = inputs(dict(data, inputs=stacked), True)
    for name in 'ab':
        assert torch.equal(found['inputs'][name], expected['inputs'][name])


PLAIN = dict(mean=None, std=None, bgr_to_rgb=False)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6, 12])
def test_images_have_any_number_of_channels(channels):
    """Six bands are no two views."""
    inputs, *_ = make(a=segmenter(**PLAIN), b=segmenter(**PLAIN, seg_pad_val=254))
    found = inputs(raw(channels), True)
    assert {x.shape for x in found['inputs'].values()} == {(2, channels, 32, 40)}
    assert torch.equal(found['inputs']['a'], found['inputs']['b'])


def test_views_may_have_other_numbers_of_channels():
    inputs, *_ = make(a=segmenter(**PLAIN), b=segmenter())
    found = inputs(with_views('ab', dict(a=1, b=3)), True)
    assert {name: x.shape[1] for name, x in found['inputs'].items()} == dict(a=1, b=3)


@pytest.mark.parametrize('names', [['a'], ['a', 'c'], ['a', 'b', 'c']])
def test_views_of_other_networks_are_refused(names):
    inputs, *_ = make(a=segmenter(), b=segmenter())
    with pytest.raises(ValueError, match=r"`MakeViews\.views`.*\['a', 'b'\]\. Found \['a'"):
        inputs(with_views(names), True)


def test_the_log_says_when_views_end(monkeypatch):
    said = []
    monkeypatch.setattr(network_inputs, 'print_log', lambda text, **_: said.append(text))
    inputs, *_ = make(a=segmenter(), b=segmenter())
    for data, training in (
        (raw(), True),
        (with_views('ab'), True),
        (raw(), False),  # a validation has none
        (with_views('ab'), True),
    ):
        inputs(data, training)
    assert not said
    inputs(raw(), True)
    inputs(raw(), True)
    assert len(said) == 1
    assert 'all networks see the same image' in said[0]


def test_images_without_samples_pass():
    """As someone calls who only wants to predict."""
    inputs, *_ = make(a=segmenter(), b=segmenter(**NORMALISATION))
    images = [torch.zeros(3, 32, 40, dtype=torch.uint8)]
    for given in (images, dict(b=images, a=images)):
        found = inputs(dict(inputs=given), False)
        assert found['data_samples'] == dict(a=None, b=None)
        assert {x.shape for x in found['inputs'].values()} == {(1, 3, 32, 40)}


def padding(kind, **change):
    """A preprocessor of a framework that pads in this way."""
    base = segmenter() if kind == 'mmseg' else detector()
    for key in ('size_divisor', 'pad_size_divisor', 'size'):
        base.pop(key, None)
    return {**base, **change}


@pytest.mark.parametrize(
    ('kind', 'paddings', 'expected'),
    [
        ('mmseg', [dict(size_divisor=16), dict(size_divisor=64)], (64, 64)),
        ('mmseg', [dict(size_divisor=16), dict(size_divisor=24)], (48, 48)),
        ('mmseg', [dict(size_divisor=1), dict(size=(50, 70))], (50, 70)),
        ('mmseg', [dict(size_divisor=32), dict(size=(50, 70))], (64, 96)),
        ('mmseg', [dict(size=(30, 80)), dict(size=(50, 70))], (50, 80)),
        ('mmdet', [dict(pad_size_divisor=32), dict(pad_size_divisor=64)], (64, 64)),
        ('mmdet', [dict(pad_size_divisor=16), dict(pad_size_divisor=24)], (48, 48)),
        ('mmdet', [{}, dict(pad_size_divisor=5)], (25, 40)),
    ],
)
@pytest.mark.parametrize('views', [False, True])
def test_networks_are_padded_to_a_size_that_suits_all(kind, paddings, expected, views):
    inputs, networks, _ = make(a=padding(kind, **paddings[0]), b=padding(kind, **paddings[1]))
    before = [dict(vars(one.data_preprocessor)) for one in networks.values()]
    data = raw() if kind == 'mmseg' else objects()
    if views:
        data['inputs'] = dict(b=data['inputs'], a=data['inputs'])
    found = inputs(data, True)
    for name, batch in found['inputs'].items():
        assert batch.shape[2:] == expected, name
        assert torch.equal(batch, found['inputs']['a'])
        for sample in found['data_samples'][name]:
            if kind == 'mmseg':
                assert sample.gt_sem_seg.data.shape[1:] == expected
                assert sample.padding_size == (0, expected[1] - 36, 0, expected[0] - 24)
            else:
                assert sample.batch_input_shape == expected
    assert [dict(vars(one.data_preprocessor)) for one in networks.values()] == before


def objects():
    """Images of one size, with boxes."""
    data = raw()
    samples = tiny_det.raw()['data_samples'][: len(data['inputs'])]
    for sample in samples:
        sample.set_metainfo(dict(img_shape=(24, 36)))
    return dict(data, data_samples=samples)


def test_each_is_padded_as_it_is_configured_when_it_predicts_alone():
    configs = [padding('mmdet', pad_size_divisor=divisor) for divisor in (32, 64)]
    inputs, *_ = make(a=configs[0], b=configs[1])
    data = objects()
    assert {n: x.shape[2:] for n, x in inputs(copy.deepcopy(data))['inputs'].items()} == dict(
        a=(32, 64), b=(64, 64)
    )
    compared = inputs(data, False, compared=True)['inputs']
    assert {x.shape[2:] for x in compared.values()} == {(64, 64)}


@pytest.mark.parametrize('tested', [None, dict(size_divisor=16), dict(size=(64, 64))])
def test_segmenters_are_compared_at_one_size_when_they_are_tested(tested):
    configs = [segmenter(test_cfg=test) for test in (dict(size_divisor=64), tested)]
    inputs, *_ = make(a=configs[0], b=configs[1])
    found = inputs(raw(), False, compared=True)
    assert {x.shape[2:] for x in found['inputs'].values()} == {(64, 64)}
    for samples in found['data_samples'].values():
        assert samples[0].img_padding_size == (0, 28, 0, 40)


def test_other_batch_augments_are_refused_at_the_start():
    with pytest.raises(ValueError, match=r'`data_preprocessor\.batch_augments`.*Found.*BatchSync'):
        make(a=detector(), b=resizing())


def test_images_of_other_sizes_are_refused():
    """Of a preprocessor that nobody knows."""
    inputs, networks, _ = make(a=segmenter(), b=segmenter(**NORMALISATION))

    def enlarge(module, args, output):
        return dict(output, inputs=output['inputs'].repeat(1, 1, 2, 2))

    networks['b'].data_preprocessor.register_forward_hook(enlarge)
    inputs(raw(), False)
    with pytest.raises(ValueError, match=r'images of one size.*agree in size, size_divisor.*80'):
        inputs(raw(), True)


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


def detection_views(names):
    data = tiny_det.raw()
    generator = torch.Generator().manual_seed(1)
    data['inputs'] = {
        name: [
            torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
            for x in data['inputs']
        ]
        for name in names
    }
    return data


def test_what_is_drawn_is_drawn_alike_for_all(iteration):
    inputs, _, runs = make(a=resizing(), b=resizing(**NORMALISATION), c=resizing())
    sizes = []
    random.seed(0)
    for _ in range(4):
        found = inputs(detection_views('abc'), True)
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
            inputs(detection_views('abc'[: len(configs)]), True)
        after.append(states())
        assert after[-1] != before
    assert after[0] == after[1]


def test_boxes_are_resized_once_each(iteration):
    """A preprocessor that resizes in place would do it again for the next network."""
    inputs, *_ = make(a=resizing(), b=resizing())
    alone = make(a=resizing())[0]
    size = []
    for seed in (0, 1):  # the first batch keeps its size and draws that of the next
        data = detection_views('ab')
        plain = dict(copy.deepcopy(data), inputs=data['inputs']['a'])
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
