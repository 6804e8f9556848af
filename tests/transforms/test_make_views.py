"""Views of one image: what they may change, and what reaches the networks."""

import copy
from importlib import import_module

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmdistill_ext.transforms import MakeViews
from tests import tiny_seg
from tests.runs import assert_identical, state_of, train
from tests.tiny_collaboration import config as segmentation
from tests.tiny_collaboration import detectors

for framework in ('mmdet', 'mmseg'):  # to register their transforms
    import_module(f'{framework}.datasets')
DISTORTION = dict(type='mmseg.PhotoMetricDistortion')
REPEATED = dict(type='mmdistill_ext.MakeViews', views=dict(a=[], b=[]))


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


def results(kind: str = 'mmseg') -> dict:
    """As the framework's pipelines have them before the image is packed."""
    rng = np.random.default_rng(0)
    common = dict(img=rng.integers(0, 256, (24, 32, 3), np.uint8), img_shape=(24, 32))
    if kind == 'mmseg':
        labels = rng.integers(0, 3, (24, 32), np.uint8)
        return dict(**common, gt_seg_map=labels, seg_fields=['gt_seg_map'])
    return dict(
        **common,
        gt_bboxes=HorizontalBoxes(torch.tensor([[2.0, 3.0, 12.0, 20.0]])),
        gt_bboxes_labels=np.array([1]),
        gt_ignore_flags=np.array([False]),
    )


def test_views_are_stacked_in_order():
    before, found = results(), results()
    views = MakeViews(dict(a=[DISTORTION], b=[], c=[DISTORTION]))
    np.random.seed(1)
    image = views(found)['img']
    assert views.names == ['a', 'b', 'c']
    assert image.shape == (24, 32, 9)
    first, second, third = np.split(image, 3, axis=2)
    assert np.array_equal(second, before['img'])
    assert not np.array_equal(first, before['img'])
    assert not np.array_equal(first, third)
    assert np.array_equal(found['gt_seg_map'], before['gt_seg_map'])
    assert found['img_shape'] == (24, 32)
    assert "'b'" in repr(views)


def test_a_transform_that_works_in_place_changes_its_own_view():
    def darken(results):
        results['img'] //= 2
        results['remark'] = 'dark'
        return results

    found = MakeViews(dict(a=[darken], b=[]))(results())
    before = results()['img']
    assert np.array_equal(found['img'], np.concatenate([before // 2, before], axis=2))
    assert 'remark' not in found


@pytest.mark.parametrize(
    'transform',
    [
        dict(type='mmseg.RandomFlip', prob=1.0),
        dict(type='mmseg.RandomFlip', prob=0.0),
        dict(type='mmseg.Resize', scale=(16, 12)),
        dict(type='mmseg.RandomCrop', crop_size=(8, 8)),
        dict(type='mmseg.RandomRotate', prob=1.0, degree=20),
        dict(type='mmdet.RandomFlip', prob=1.0),
        dict(type='mmdet.Resize', scale=(16, 12)),
        dict(type='mmdet.RandomCrop', crop_size=(8, 8), allow_negative_crop=True),
        dict(type='mmdet.RandomAffine'),
        dict(type='mmengine.RandomGrayscale', keep_channels=False, prob=1.0),
    ],
    ids=lambda transform: f'{transform["type"]}-{transform.get("prob")}',
)
def test_geometry_is_refused(transform):
    """One that may flip is refused whether it does or not."""
    with pytest.raises(ValueError, match=r'`MakeViews\.views\.b` should change the look.*Found a'):
        MakeViews(dict(a=[], b=[transform]))(results(transform['type'].partition('.')[0]))


@pytest.mark.parametrize('kind', ['mmseg', 'mmdet'])
def test_a_second_flip_is_refused(kind):
    """A flip of a flipped image leaves ``flip`` as it was, mmdet's the boxes' object too."""
    flip = dict(type=f'{kind}.RandomFlip', prob=1.0, direction='horizontal')
    pipeline = Compose([flip, MakeViews(dict(a=[], b=[flip]))])
    with pytest.raises(ValueError, match='should change the look'):
        pipeline(results(kind))


def every_label() -> dict:
    """What the transforms of the geometry may move, one of each kind."""
    found = {**results(), **results('mmdet')}
    corners = np.array([2.0, 3.0, 12.0, 3.0, 12.0, 20.0])
    return dict(found, gt_masks=PolygonMasks([[corners]], 24, 32), homography_matrix=np.eye(3))


NAMES = ['gt_seg_map', 'gt_bboxes', 'gt_bboxes_labels', 'gt_masks', 'gt_ignore_flags']


@pytest.mark.parametrize('name', NAMES)
def test_equal_labels_in_new_objects_are_the_same(name):
    """mmdet's Albu makes new boxes and masks, whatever it does."""

    def anew(results):
        results[name] = copy.deepcopy(results[name])
        results['img'] //= 2
        return results

    found = MakeViews(dict(a=[anew], b=[]))(every_label())
    assert np.array_equal(found['img'][..., :3], found['img'][..., 3:] // 2)


def test_equal_bitmaps_are_the_same():
    masks = [BitmapMasks(BITS.copy(), 24, 32) for _ in range(2)]
    views = MakeViews(dict(a=[lambda results: dict(results, gt_masks=masks[1])], b=[]))
    assert views(dict(every_label(), gt_masks=masks[0]))['img'].shape == (24, 32, 6)
    masks[1].masks[0, 0, 0] = 1
    with pytest.raises(ValueError, match='Found a change of gt_masks'):
        views(dict(every_label(), gt_masks=masks[0]))


BITS = np.zeros((1, 24, 32), np.uint8)
BITS[0, 3:20, 2:12] = 1


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('gt_seg_map', np.zeros((24, 32), np.uint8)),
        ('gt_seg_map', None),
        ('gt_bboxes', HorizontalBoxes(torch.tensor([[2.0, 3.1, 12.0, 20.0]]))),
        ('gt_bboxes', HorizontalBoxes(torch.zeros(0, 4))),
        ('gt_bboxes_labels', np.array([2])),
        ('gt_masks', PolygonMasks([], 24, 32)),
        ('gt_masks', PolygonMasks([[np.array([2.0, 3.0, 12.0, 3.0, 12.0, 18.0])]], 24, 32)),
        ('gt_masks', BitmapMasks(BITS, 24, 32)),
        ('gt_ignore_flags', np.array([True])),
        ('homography_matrix', np.eye(3, 3, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_labels_are_refused(name, value):
    def change(results):
        return dict(results, **{name: value})

    with pytest.raises(ValueError, match=f'should change the look.*Found a change of {name}\\.'):
        MakeViews(dict(a=[], b=[change]))(every_label())


@pytest.mark.parametrize('name', ['gt_seg_map', 'gt_bboxes', 'gt_ignore_flags'])
def test_labels_that_are_changed_in_place_are_refused(name):
    def change(results):
        values = results[name]
        values = values.tensor if name == 'gt_bboxes' else values
        values[...] = 1
        return results

    with pytest.raises(ValueError, match=f'should change the look.*Found a change of {name}\\.'):
        MakeViews(dict(a=[], b=[change]))(every_label())


def test_a_view_that_drops_the_image_is_refused():
    with pytest.raises(ValueError, match=r'`MakeViews\.views\.a` should not drop an image'):
        MakeViews(dict(a=[lambda results: None], b=[]))(results())


@pytest.mark.parametrize('views', [{}, dict(a=[]), [[], []], None])
def test_fewer_than_two_views_are_refused(views):
    with pytest.raises(ValueError, match=r'`MakeViews\.views` should name.*two networks or more'):
        MakeViews(views)


@pytest.mark.parametrize('workers', [0, 2])
def test_workers_make_the_same_views_as_the_process_itself(root, workers):
    loader = tiny_seg.dataloader(root, 'train')
    grey = dict(type='mmseg.CLAHE')
    loader['dataset']['pipeline'].insert(2, {**REPEATED, 'views': dict(a=[grey], b=[])})
    loader['num_workers'] = workers
    with DefaultScope.overwrite_default_scope('mmseg'):
        batches = list(Runner.build_dataloader(loader, seed=0))
        plain = list(Runner.build_dataloader(tiny_seg.dataloader(root, 'train'), seed=0))
    assert len(batches) == 2
    for batch, other in zip(batches, plain, strict=True):
        for found, image in zip(batch['inputs'], other['inputs'], strict=True):
            assert found.shape == (6, *image.shape[1:])
            assert torch.equal(found[3:], image)
            assert not torch.equal(found[:3], image)


def test_random_looks_come_back_with_the_seed(root):
    def images(seed):
        loader = tiny_seg.dataloader(root, 'train')
        views = dict(a=[DISTORTION], b=[DISTORTION])
        loader['dataset']['pipeline'].insert(2, {**REPEATED, 'views': views})
        loader['num_workers'] = 2
        torch.manual_seed(seed)
        with DefaultScope.overwrite_default_scope('mmseg'):
            loader = Runner.build_dataloader(loader, seed=seed)
        return [batch['inputs'][0] for batch in loader]

    first, again, other = images(3), images(3), images(4)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not any(torch.equal(image[:3], image[3:]) for image in first)


def test_repeated_images_train_segmenters_as_one(root, tmp_path):
    for name in ('one', 'repeated'):
        cfg = segmentation(root, tmp_path / name, dict(type='MinLoss'), iterations=2)
        if name == 'repeated':
            cfg.train_dataloader.dataset.pipeline.insert(2, REPEATED)
        train(cfg)
    states = [state_of(tmp_path / name / 'iter_2.pth') for name in ('one', 'repeated')]
    for part in ('state_dict', 'optimizer'):
        assert_identical(*(state[part] for state in states))


def test_repeated_images_train_detectors_as_one(coco, tmp_path):
    for name in ('one', 'repeated'):
        cfg = detectors(coco, tmp_path / name)
        pipeline = cfg.train_dataloader.dataset.pipeline
        assert pipeline[-2]['type'] == REPEATED['type']
        pipeline[-2:-1] = [REPEATED] if name == 'repeated' else []
        cfg.train_cfg.max_epochs = 1
        train(cfg)
    states = [state_of(tmp_path / name / 'epoch_1.pth') for name in ('one', 'repeated')]
    for part in ('state_dict', 'optimizer'):
        assert_identical(*(state[part] for state in states))


def test_networks_get_their_own_views(root, tmp_path):
    """A black view leaves network a nothing to learn from: its first feature map is flat."""
    cfg = Config(segmentation(root, tmp_path, dict(type='MinLoss'), iterations=1).to_dict())
    black = dict(type='mmseg.AdjustGamma', gamma=0.01)  # all but black
    views = {**REPEATED, 'views': dict(a=[black], b=[])}
    cfg.train_dataloader.dataset.pipeline.insert(2, views)
    tiny_seg.forget_runs()
    runner = Runner.from_cfg(cfg)
    batch = next(iter(runner.train_dataloader))
    seen = runner.model.data_preprocessor(batch, training=True)['inputs']
    plain = seen['b'].std()
    assert seen['a'].std() < 0.5 * plain
