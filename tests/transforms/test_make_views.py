"""Views of one image: what they may change, and what reaches the networks."""

import copy
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.datasets.transforms import AdjustGamma, PackSegInputs

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.transforms import MakeViews
from tests import tiny_seg
from tests.runs import assert_identical, state_of, train
from tests.tiny_collaboration import add_views, detectors
from tests.tiny_collaboration import config as segmentation

for framework in ('mmdet', 'mmseg'):  # to register their transforms
    import_module(f'{framework}.datasets')
DISTORTION = dict(type='mmseg.PhotoMetricDistortion')


def pack(results):
    """The views, and what else is packed."""
    return dict(inputs=results['img'], labels=results.get('gt_seg_map'), keys=set(results))


def make(**views):
    return MakeViews(views, pack=pack)


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


def test_each_network_gets_its_own_view():
    before, given = results(), results()
    views = make(a=[DISTORTION], b=[], c=[DISTORTION])
    np.random.seed(1)
    packed = views(given)
    images = packed['inputs']
    assert views.names == list(images) == ['a', 'b', 'c']
    assert all(image.shape == (24, 32, 3) for image in images.values())
    assert np.array_equal(images['b'], before['img'])
    assert not np.array_equal(images['a'], before['img'])
    assert not np.array_equal(images['a'], images['c'])
    assert np.array_equal(packed['labels'], before['gt_seg_map'])
    assert packed['keys'] == set(before)
    assert "'b'" in repr(views)
    assert 'pack' in repr(views)


@pytest.mark.parametrize('kind', ['mmseg', 'mmdet'])
def test_the_frameworks_pack_views(kind):
    packer = dict(type=dict(mmseg='mmseg.PackSegInputs', mmdet='mmdet.PackDetInputs')[kind])
    grey = dict(type='mmseg.RGB2Gray', out_channels=1)
    packed = MakeViews(dict(b=[grey], a=[]), packer)(results(kind))
    plain = Compose([packer])(results(kind))
    batch = pseudo_collate([packed, packed])
    assert {name: [len(x) for x in views] for name, views in batch['inputs'].items()} == dict(
        a=[3, 3], b=[1, 1]
    )
    assert torch.equal(packed['inputs']['a'], plain['inputs'])
    assert str(packed['data_samples'].to_dict()) == str(plain['data_samples'].to_dict())


def test_a_transform_that_works_in_place_changes_its_own_view():
    def darken(results):
        results['img'] //= 2
        results['remark'] = 'dark'
        return results

    packed = make(a=[darken], b=[])(results())
    before = results()['img']
    assert np.array_equal(packed['inputs']['a'], before // 2)
    assert np.array_equal(packed['inputs']['b'], before)
    assert 'remark' not in packed['keys']


FLIP = dict(type='mmcv.RandomFlip', prob=1.0)
LOOKS = [
    DISTORTION,
    dict(type='mmseg.AdjustGamma', gamma=2.0),
    dict(type='mmseg.AdjustGamma', gamma=0.01),  # all but black
    dict(type='mmseg.CLAHE'),
    dict(type='mmseg.RGB2Gray'),
    dict(type='mmseg.RGB2Gray', out_channels=1),
    dict(type='mmseg.Rerange'),
    dict(type='mmseg.RandomCutOut', prob=1.0, n_holes=2, cutout_ratio=(0.2, 0.2)),
    dict(type='mmseg.BioMedicalGaussianNoise'),
    dict(type='mmseg.BioMedicalGaussianBlur'),
    dict(type='mmseg.BioMedicalRandomGamma'),
    dict(type='mmcv.Normalize', mean=[1.0] * 3, std=[2.0] * 3),
    dict(type='mmcv.RandomGrayscale', prob=0.5),
    dict(type='mmcv.RandomGrayscale', prob=1.0, keep_channels=True),
    *(
        dict(type=f'mmdet.{name}')
        for name in (
            *('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'Color', 'Brightness', 'Contrast'),
            *('Sharpness', 'Solarize', 'SolarizeAdd', 'Posterize', 'Equalize', 'AutoContrast'),
            'Invert',
        )
    ),
    dict(type='mmdet.CutOut', n_holes=3, cutout_ratio=(0.3, 0.3)),
    dict(type='mmcv.RandomApply', transforms=[dict(type='mmdet.Color')]),
    dict(type='mmcv.RandomChoice', transforms=[[dict(type='mmdet.Color')], [DISTORTION]]),
    dict(type='mmdet.RandomOrder', transforms=[dict(type='mmdet.Color'), DISTORTION]),
    dict(type='mmdet.RandAugment', aug_space=[[dict(type='mmdet.Color')], [DISTORTION]]),
    dict(type='mmdet.AutoAugment', policies=[[dict(type='mmdet.Color')], [DISTORTION]]),
]
GEOMETRY = [
    dict(type='mmcv.RandomFlip', prob=0.0),
    dict(type='mmcv.RandomFlip', prob=0.01),
    dict(type='mmcv.Resize', scale=(96, 72)),  # the size of the probe
    dict(type='mmcv.Resize', scale=(48, 36)),
    dict(type='mmcv.CenterCrop', crop_size=32),
    dict(type='mmcv.Pad', size_divisor=50),
    dict(type='mmcv.RandomResize', scale=(48, 40), ratio_range=(0.5, 2.0)),
    dict(type='mmcv.RandomChoiceResize', scales=[(40, 40)]),
    dict(type='mmcv.KeyMapper', mapping=dict(img='img'), transforms=[FLIP]),  # not the labels
    dict(type='mmcv.RandomApply', prob=0.01, transforms=[FLIP]),
    dict(type='mmcv.RandomChoice', transforms=[[FLIP], []], prob=[0.01, 0.99]),
    dict(type='mmdet.RandomOrder', transforms=[DISTORTION, FLIP]),
    dict(type='mmseg.RandomFlip', prob=0.3),
    dict(type='mmseg.Resize', scale=(16, 12)),
    dict(type='mmseg.RandomRotate', prob=0.01, degree=5),
    dict(type='mmseg.RandomRotFlip', rotate_prob=0.0, flip_prob=0.02),
    dict(type='mmseg.RandomCrop', crop_size=(8, 8)),
    dict(type='mmseg.ResizeToMultiple', size_divisor=50),
    dict(type='mmseg.ResizeShortestEdge', scale=30, max_size=50),
    dict(type='mmseg.SegRescale', scale_factor=0.5),
    dict(type='mmseg.GenerateEdge'),
    dict(type='mmseg.RandomCutOut', prob=0.1, n_holes=2, cutout_ratio=(0.2, 0.2), seg_fill_in=255),
    dict(type='mmseg.BioMedical3DRandomFlip', prob=0.2, axes=(0, 1)),
    *(
        dict(type=f'mmdet.{name}')
        for name in (
            *('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'RandomShift', 'Expand'),
            *('RandomAffine', 'MinIoURandomCrop', 'GTBoxSubOne_GLIP', 'CachedMosaic'),
        )
    ),
    dict(type='mmdet.RandAugment', aug_space=[[DISTORTION], [dict(type='mmdet.Rotate', prob=0.1)]]),
    dict(type='mmdet.RandomErasing', n_patches=2, ratio=0.2),
    dict(type='mmdet.RandomFlip', prob=0.1),
    dict(type='mmdet.RandomFlip_GLIP', prob=0.1),
    dict(type='mmdet.Resize', scale=(16, 12)),
    dict(type='mmdet.FixShapeResize', width=20, height=20),
    dict(type='mmdet.FixScaleResize', scale=(40, 40)),
    dict(type='mmdet.ResizeShortestEdge', scale=20),
    dict(type='mmdet.Pad', size=(100, 100)),
    dict(type='mmdet.RandomCrop', crop_size=(8, 8)),
    dict(
        type='mmdet.RandomCenterCropPad',
        **dict(crop_size=(32, 32), mean=[0, 0, 0], std=[1, 1, 1], to_rgb=True, test_pad_mode=None),
    ),
    dict(type='mmdet.FilterAnnotations', min_gt_bbox_wh=(50, 50)),
    dict(type='mmdet.SegRescale', scale_factor=0.5),
]


def names_of(transform):
    return transform['type']


@pytest.mark.parametrize('transform', LOOKS, ids=names_of)
def test_looks_are_taken(transform):
    views = make(a=[], b=[transform])
    given = results()
    image = views(given)['inputs']['b']
    assert image.shape[:2] == (24, 32)
    assert np.array_equal(given['img'], results()['img'])


@pytest.mark.parametrize('transform', GEOMETRY, ids=names_of)
def test_geometry_is_refused_at_the_start(transform):
    """One that may flip is refused whether it does or not."""
    with pytest.raises(ValueError, match=r'`MakeViews\.views\.b` should change the look.*Found a'):
        make(a=[], b=[transform])


def test_the_tables_name_all_that_take_one_image():
    """A transform that a release adds has to be put into one of the tables."""
    known = {name for one in (*LOOKS, *GEOMETRY) for name in names_in(one)}
    others = (
        'Load|Pack|ToTensor|ImageToTensor|Transpose|Base|Compose|Multi|TestTimeAug|InferencerLoader|'
        'ProposalBroadcaster|UniformRef|RandomSamplingNegPos|LinesToArray|ConcatCDInput|ImageAug|'
        'LineDet|TransformBroadcaster|GeomTransform|ColorTransform|'  # no transforms of one image
        'Mosaic|MixUp|CachedMixUp|RandomMosaic|CopyPaste|RandomDepthMix|'  # need other images
        'Albu|InstaBoost|BioMedical3D'  # need other packages, or volumes
    )
    for module in ('mmcv.transforms', 'mmdet.datasets.transforms', 'mmseg.datasets.transforms'):
        shipped = {name for name in import_module(module).__all__ if not re.match(others, name)}
        shipped = {name for name in shipped if name[0].isupper() and name != 'TRANSFORMS'}
        assert shipped - known == set(), module


def names_in(node):
    if isinstance(node, dict):
        return {node.get('type', '').rpartition('.')[2]}.union(*map(names_in, node.values()))
    return set().union(*map(names_in, node)) if isinstance(node, list) else set()


def test_probing_uses_no_random_number_and_keeps_no_image():
    class Keeps:
        def __init__(self):
            self.kept = []

        def __call__(self, results):
            self.kept.append(np.random.rand())
            return results

    keeper = Keeps()
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    make(a=[keeper], b=[])
    assert np.random.rand() == expected
    assert keeper.kept == []


@pytest.mark.parametrize('kind', ['mmseg', 'mmdet'])
def test_a_move_is_seen_whatever_the_labels(kind):
    """Of a transform that cannot run on a probe: a constant label map does not show a rotation."""

    def rotate(results):
        assert results['mine']
        return Compose([dict(type='mmseg.RandomRotate', prob=1.0, degree=20)])(results)

    given = dict(results(kind), mine=True)
    if kind == 'mmseg':
        given['gt_seg_map'][:] = 255
    else:
        given['gt_bboxes'] = given['gt_bboxes'][:0]
    with pytest.raises(ValueError, match=r'views\.b` should change the look.*of gt_seg_map'):
        make(a=[], b=[rotate])(given)


def test_a_view_that_cannot_be_formed_is_named():
    views = make(a=[], b=[dict(type='mmdet.MixUp')])
    with pytest.raises(
        ValueError, match=r'`MakeViews\.views\.b` should be transforms of one image'
    ):
        views(results('mmdet'))


@pytest.mark.parametrize('kind', ['mmseg', 'mmdet'])
def test_a_second_flip_is_refused(kind):
    """A flip of a flipped image leaves ``flip`` as it was, mmdet's the boxes' object too."""
    flip = dict(type=f'{kind}.RandomFlip', prob=1.0, direction='horizontal')

    def late(results):
        """A flip that cannot run on a probe."""
        assert results['flip']
        return again(results)

    again = Compose([flip])
    pipeline = Compose([flip, make(a=[], b=[late])])
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
        results[name] = copy.deepcopy(results.get(name))
        results['img'] //= 2
        return results

    views = make(a=[anew], b=[])(every_label())['inputs']
    assert np.array_equal(views['a'], views['b'] // 2)


def test_equal_bitmaps_are_the_same():
    masks = [BitmapMasks(BITS.copy(), 24, 32) for _ in range(2)]

    def change(results):
        return dict(results, gt_masks=masks[1]) if 'gt_masks' in results else results

    views = make(a=[change], b=[])
    assert views(dict(every_label(), gt_masks=masks[0]))['inputs']['a'].shape == (24, 32, 3)
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
        return dict(results, **{name: value}) if results['img'].shape[0] == 24 else results

    views = make(a=[], b=[change])  # a probe has another size
    with pytest.raises(ValueError, match=f'should change the look.*Found a change of {name}\\.'):
        views(every_label())


@pytest.mark.parametrize('name', ['gt_seg_map', 'gt_bboxes', 'gt_ignore_flags'])
def test_labels_that_are_changed_in_place_are_refused(name):
    def change(results):
        values = results[name]
        values = values.tensor if name == 'gt_bboxes' else values
        values[...] = 1
        return results

    with pytest.raises(ValueError, match=f'should change the look.*Found a change of {name}'):
        make(a=[], b=[change])


def test_a_view_that_drops_the_image_is_refused():
    with pytest.raises(
        ValueError, match=r'`MakeViews\.views\.a` should change the look.*it is dropped'
    ):
        make(a=[lambda results: None], b=[])


@pytest.mark.parametrize('views', [{}, dict(a=[]), [[], []], None])
def test_fewer_than_two_views_are_refused(views):
    with pytest.raises(ValueError, match=r'`MakeViews\.views` should '):
        MakeViews(views, pack)


@pytest.mark.parametrize('pack', [None, 'PackSegInputs', []])
def test_something_has_to_pack(pack):
    with pytest.raises(ValueError, match=r'`MakeViews\.pack` should be '):
        MakeViews(dict(a=[], b=[]), pack)


@pytest.mark.parametrize('workers', [0, 2])
def test_workers_make_the_same_views_as_the_process_itself(root, workers):
    loader = tiny_seg.dataloader(root, 'train')
    add_views(loader['dataset']['pipeline'], dict(a=[dict(type='mmseg.CLAHE')], b=[]))
    loader['num_workers'] = workers
    with DefaultScope.overwrite_default_scope('mmseg'):
        batches = list(Runner.build_dataloader(loader, seed=0))
        plain = list(Runner.build_dataloader(tiny_seg.dataloader(root, 'train'), seed=0))
    assert len(batches) == 2
    for batch, other in zip(batches, plain, strict=True):
        assert list(batch['inputs']) == ['a', 'b']
        for first, second, image in zip(*batch['inputs'].values(), other['inputs'], strict=True):
            assert torch.equal(second, image)
            assert first.shape == image.shape
            assert not torch.equal(first, image)


def test_random_looks_come_back_with_the_seed(root):
    def images(seed):
        loader = tiny_seg.dataloader(root, 'train')
        add_views(loader['dataset']['pipeline'], dict(a=[DISTORTION], b=[DISTORTION]))
        loader['num_workers'] = 2
        torch.manual_seed(seed)
        with DefaultScope.overwrite_default_scope('mmseg'):
            loader = Runner.build_dataloader(loader, seed=seed)
        return [batch['inputs'] for batch in loader]

    first, again, other = images(3), images(3), images(4)
    for one, same, unlike in zip(first, again, other, strict=True):
        assert torch.equal(one['a'][0], same['a'][0])
        assert not torch.equal(one['a'][0], unlike['a'][0])
        assert not torch.equal(one['a'][0], one['b'][0])


def test_repeated_images_train_segmenters_as_one(root, tmp_path):
    """Also when the views stand in another order than the networks."""
    for name in ('one', 'repeated'):
        cfg = segmentation(root, tmp_path / name, dict(type='MinLoss'), iterations=2)
        if name == 'repeated':
            add_views(cfg.train_dataloader.dataset.pipeline, dict(b=[], a=[]))
        train(cfg)
    states = [state_of(tmp_path / name / 'iter_2.pth') for name in ('one', 'repeated')]
    for part in ('state_dict', 'optimizer'):
        assert_identical(*(state[part] for state in states))


def test_repeated_images_train_detectors_as_one(coco, tmp_path):
    for name in ('one', 'repeated'):
        cfg = detectors(coco, tmp_path / name)
        pipeline = cfg.train_dataloader.dataset.pipeline
        assert pipeline[-1]['type'] == 'mmdistill_ext.MakeViews'
        pipeline[-1] = pipeline[-1]['pack']
        if name == 'repeated':
            add_views(pipeline, dict(a=[], b=[]))
        cfg.train_cfg.max_epochs = 1
        train(cfg)
    states = [state_of(tmp_path / name / 'epoch_1.pth') for name in ('one', 'repeated')]
    for part in ('state_dict', 'optimizer'):
        assert_identical(*(state[part] for state in states))


@pytest.mark.parametrize('lazy', [False, True])
@pytest.mark.parametrize('names', ['ab', 'ba'])
def test_networks_get_their_own_views(root, tmp_path, names, lazy):
    """A black view leaves network a nothing to learn from: its first feature map is flat."""
    cfg = Config(segmentation(root, tmp_path, dict(type='MinLoss'), iterations=1).to_dict())
    black = dict(type=AdjustGamma if lazy else 'mmseg.AdjustGamma', gamma=0.01)  # all but black
    views = {name: dict(a=[black], b=[])[name] for name in names}
    pipeline = cfg.train_dataloader.dataset.pipeline
    add_views(pipeline, views)
    if lazy:
        pipeline[-1]['type'], pipeline[-1]['pack']['type'] = MakeViews, PackSegInputs
    with DefaultScope.overwrite_default_scope('mmseg'):
        batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
        model = build_model(cfg.model)
    seen = model.data_preprocessor(batch, training=True)['inputs']
    plain = seen['b'].std()
    assert seen['a'].std() < 0.5 * plain
