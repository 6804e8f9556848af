import copy
from types import SimpleNamespace

import pytest
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.registry import DefaultScope

from mmdistill_ext.dataset_configs import (
    find_pipeline,
    innermost_config,
    labels_first,
    plain_datasets,
    walk_datasets,
    with_pipeline,
)
from mmdistill_ext.registry import TRANSFORMS

PLAIN = dict(type='BaseSegDataset', data_root='a', pipeline=['train'])
OTHER = dict(type='BaseSegDataset', data_root='b', pipeline=['other'])


@pytest.mark.parametrize(
    ('dataset', 'expected'),
    [
        (PLAIN, dict(PLAIN, pipeline=['val'])),
        (dict(type='A', data_root='a'), dict(type='A', data_root='a', pipeline=['val'])),
        (dict(type='RepeatDataset', times=9, dataset=PLAIN), dict(PLAIN, pipeline=['val'])),
        (
            dict(
                type='MultiImageMixDataset',
                dataset=dict(type='RepeatDataset', times=9, dataset=PLAIN),
                pipeline=['mosaic'],
            ),
            dict(PLAIN, pipeline=['val']),
        ),
        (
            dict(
                type='RepeatDataset',
                times=2,
                dataset=dict(
                    type='ConcatDataset',
                    datasets=[PLAIN, dict(type='RepeatDataset', times=3, dataset=OTHER)],
                ),
            ),
            dict(
                type='ConcatDataset',
                datasets=[dict(PLAIN, pipeline=['val']), dict(OTHER, pipeline=['val'])],
            ),
        ),
    ],
    ids=['plain', 'without', 'repeat', 'mix', 'concat'],
)
def test_a_data_set_gets_another_pipeline_inside_its_wrappers(dataset, expected):
    before = copy.deepcopy(dataset)
    assert with_pipeline(dataset, ['val']) == expected
    assert dataset == before


@pytest.mark.parametrize(
    ('dataset', 'expected'),
    [
        (PLAIN, ['train']),
        (dict(type='RepeatDataset', dataset=PLAIN), ['train']),
        (dict(type='ConcatDataset', datasets=[OTHER, PLAIN]), ['other']),
        (
            dict(type='R', dataset=dict(datasets=[dict(type='R', dataset=OTHER), PLAIN])),
            ['other'],
        ),
        (dict(type='MultiImageMixDataset', dataset=PLAIN, pipeline=['mosaic']), ['mosaic']),
    ],
    ids=['plain', 'repeat', 'concat', 'nested', 'mix'],
)
def test_the_pipeline_is_found_inside_the_wrappers(dataset, expected):
    assert find_pipeline(dataset) == expected


IMAGE, RESIZE = dict(type='mmdet.LoadImageFromFile'), dict(type='Resize', scale=(32, 32))
LABELS = dict(type='LoadAnnotations', with_bbox=True)
PACK = dict(type='PackDetInputs')


@pytest.mark.parametrize(
    ('pipeline', 'expected'),
    [
        ([IMAGE, RESIZE, LABELS, PACK], [IMAGE, LABELS, RESIZE, PACK]),
        ([IMAGE, LABELS, RESIZE, PACK], [IMAGE, LABELS, RESIZE, PACK]),
        ([IMAGE, RESIZE, PACK], [IMAGE, RESIZE, PACK]),
        ([RESIZE, LABELS], [LABELS, RESIZE]),
    ],
    ids=['after', 'before', 'without', 'no image'],
)
@pytest.mark.parametrize('wrap', ['plain', 'repeat', 'concat'])
def test_labels_are_loaded_right_after_the_image(pipeline, expected, wrap):
    def wrapped(steps):
        plain = dict(type='CocoDataset', pipeline=steps)
        if wrap == 'repeat':
            return dict(type='RepeatDataset', times=2, dataset=plain)
        return dict(type='ConcatDataset', datasets=[plain]) if wrap == 'concat' else plain

    dataset = wrapped(pipeline)
    before = copy.deepcopy(dataset)
    found = labels_first(dataset)
    assert find_pipeline(found) == expected
    assert dataset == before


@TRANSFORMS.register_module(force=True)
class ReadsMyBoxes(LoadAnnotations):
    """Loads labels, whatever its name says."""


@TRANSFORMS.register_module(force=True)
class ReadsMyPicture(LoadImageFromFile):
    """Loads an image."""


@pytest.mark.parametrize('labels', ['ReadsMyBoxes', 'mmdistill_ext.ReadsMyBoxes', ReadsMyBoxes])
@pytest.mark.parametrize('image', ['mmdistill_ext.ReadsMyPicture', ReadsMyPicture])
def test_loaders_have_any_name_and_lazy_configs_hold_classes(labels, image):
    labels, image = dict(type=labels), dict(type=image)
    resize = dict(type='unknown.Resize')
    with DefaultScope.overwrite_default_scope('mmdistill_ext'):
        found = labels_first(dict(type='A', pipeline=[image, resize, labels]))
    assert found.pipeline == [image, labels, resize]


def built(config):
    """Objects with the config's values as attributes, as data sets have them."""
    made = SimpleNamespace(**config)
    if 'dataset' in config:
        made.dataset = built(config['dataset'])
    if 'datasets' in config:
        made.datasets = [built(part) for part in config['datasets']]
    return made


NESTED = dict(
    type='Repeat',
    dataset=dict(
        type='Concat',
        datasets=[dict(type='A'), dict(type='Mix', dataset=dict(type='B'), pipeline=[])],
    ),
)


@pytest.mark.parametrize('make', [copy.deepcopy, built], ids=['config', 'built'])
def test_wrappers_are_walked_as_configs_and_as_data_sets(make):
    def types(datasets):
        return [x['type'] if isinstance(x, dict) else x.type for x in datasets]

    assert types(walk_datasets(make(NESTED))) == ['Repeat', 'Concat', 'A', 'Mix', 'B']
    assert types(plain_datasets(make(NESTED))) == ['A', 'B']
    assert types(plain_datasets(make(PLAIN))) == ['BaseSegDataset']


def test_the_innermost_config_is_the_one_in_the_config():
    inner = dict(PLAIN)
    wrapped = dict(type='Repeat', dataset=dict(type='Repeat', dataset=inner))
    assert innermost_config(wrapped) is inner
    assert innermost_config(inner) is inner
    assert innermost_config({}) == {}


def test_a_data_set_without_a_pipeline_is_refused():
    with pytest.raises(ValueError, match='should have a `pipeline`. Found none in'):
        find_pipeline(NESTED)
