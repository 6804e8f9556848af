"""The generated data: repeatable, in both layouts, and what the configs expect."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules

ROOT = Path(__file__).resolve().parents[3]
demo = runpy.run_path(str(ROOT / 'tools/demo/digit_scenes.py'))
make_digit_scenes = demo['make_digit_scenes']
SMALL = dict(num_train=3, num_val=2, size=48)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digit_scenes(tmp_path_factory.mktemp('scenes') / 'data', **SMALL)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_same_seed_same_bytes(scenes: Path, tmp_path: Path):
    again = make_digit_scenes(tmp_path / 'again', **SMALL)
    assert contents(again) == contents(scenes)


def test_other_seed_other_scenes(scenes: Path, tmp_path: Path):
    other = make_digit_scenes(tmp_path / 'other', **SMALL, seed=1)
    name = 'images/train/000000.png'
    assert (read(other / name) != read(scenes / name)).any()


def test_a_scene_does_not_depend_on_how_many_there_are(scenes: Path, tmp_path: Path):
    fewer = make_digit_scenes(tmp_path / 'fewer', num_train=1, num_val=1, size=48)
    for split in ('train', 'val'):
        name = f'images/{split}/000000.png'
        assert (fewer / name).read_bytes() == (scenes / name).read_bytes()


def test_splits_use_different_digits():
    split = demo['_split_digits']
    train, val = (split(name, seed=0)[0] for name in ('train', 'val'))
    assert len(train) + len(val) == 1797
    train, val = ({glyph.tobytes() for glyph in glyphs} for glyphs in (train, val))
    assert not train & val


def test_labels_hold_the_classes_and_void(scenes: Path):
    labels = np.stack([read(path) for path in sorted(scenes.glob('annotations/*/*.png'))])
    found = set(np.unique(labels).tolist())
    assert {0, 255} < found <= {*range(11), 255}


def test_the_archive_mixes_up_two_digits_and_nothing_else(tmp_path: Path):
    root = make_digit_scenes(tmp_path / 'data', num_train=60, num_val=1, size=48, mixed_up=(3, 5))
    folders = [root / 'annotations' / name for name in ('train', 'train_archive')]
    right, archive = (np.stack([read(p) for p in sorted(f.glob('*'))]) for f in folders)
    pairs = set(zip(right.ravel().tolist(), archive.ravel().tolist(), strict=True))
    mixed = {(4, 4), (4, 6), (6, 4), (6, 6)}
    assert mixed < pairs
    assert all(before == after for before, after in pairs - mixed)


def test_the_archive_has_the_same_boxes_with_the_labels_of_its_maps(tmp_path: Path):
    root = make_digit_scenes(tmp_path / 'data', num_train=30, num_val=1, size=48)
    right, archive = (
        json.loads((root / f'annotations/instances_{name}.json').read_text())
        for name in ('train', 'train_archive')
    )
    assert archive['images'] == right['images']
    assert archive['categories'] == right['categories']
    renamed = 0
    for before, after in zip(right['annotations'], archive['annotations'], strict=True):
        label = read(root / f'annotations/train_archive/{after["image_id"]:06d}.png')
        counts = after['segmentation']['counts']
        flat = np.repeat(np.arange(len(counts)) % 2, counts)
        mask = flat.reshape(label.shape[::-1]).T.astype(bool)
        assert (label[mask] == after['category_id']).all()
        renamed += before['category_id'] != after['category_id']
        assert {**before, 'category_id': 0} == {**after, 'category_id': 0}
    assert renamed > 0


def test_coco_masks_and_boxes_match_the_label_maps(scenes: Path):
    coco = json.loads((scenes / 'annotations/instances_val.json').read_text())
    assert [entry['id'] for entry in coco['categories']] == list(range(1, 11))
    for image in coco['images']:
        label = read(scenes / 'annotations/val' / image['file_name'])
        covered = np.zeros(label.shape, bool)
        for entry in coco['annotations']:
            if entry['image_id'] != image['id']:
                continue
            counts = entry['segmentation']['counts']
            flat = np.repeat(np.arange(len(counts)) % 2, counts)
            mask = flat.reshape(label.shape[::-1]).T.astype(bool)
            assert mask.sum() == entry['area'] > 0
            assert (label[mask] == entry['category_id']).all()
            x, y, w, h = map(int, entry['bbox'])
            box = np.zeros_like(mask)
            box[y : y + h, x : x + w] = True
            assert (mask & ~box).sum() == 0
            assert mask[y].any()
            assert mask[y + h - 1].any()
            assert mask[:, x].any()
            assert mask[:, x + w - 1].any()
            assert not (covered & mask).any()
            covered |= mask
        np.testing.assert_array_equal(covered, (label > 0) & (label < 255))


@pytest.mark.parametrize(('loader', 'count'), [('train_dataloader', 3), ('val_dataloader', 2)])
def test_mmseg_reads_them_as_configured(scenes: Path, loader: str, count: int):
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/digit_scenes.py')[loader].dataset
    dataset = DATASETS.build({**cfg, 'data_root': str(scenes), '_scope_': 'mmseg'})
    assert len(dataset) == count
    assert dataset.metainfo['classes'] == demo['CLASSES']
    sample = dataset[0]
    assert sample['inputs'].shape[1:] == sample['data_samples'].gt_sem_seg.shape


def test_mmdet_reads_them(scenes: Path):
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules as register_mmdet

    register_mmdet(init_default_scope=False)
    dataset = CocoDataset(
        data_root=str(scenes),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/train'),
        metainfo=dict(classes=demo['CLASSES'][1:]),
        pipeline=[
            dict(type='mmdet.LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
        ],
    )
    assert len(dataset) == 3
    sample = dataset[0]
    assert len(sample['gt_bboxes']) == len(sample['gt_masks'].masks) > 0
    label = read(scenes / 'annotations/train/000000.png')
    for digit, mask in zip(sample['gt_bboxes_labels'], sample['gt_masks'].masks, strict=True):
        assert (label[mask.astype(bool)] == digit + 1).all()


@pytest.mark.parametrize(('loader', 'count'), [('train_dataloader', 3), ('val_dataloader', 2)])
def test_mmdet_reads_them_as_configured(scenes: Path, loader: str, count: int):
    from mmdet.registry import DATASETS as MMDET_DATASETS
    from mmdet.utils import register_all_modules as register_mmdet

    register_mmdet(init_default_scope=False)
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/digit_scenes_det.py')[loader].dataset
    dataset = MMDET_DATASETS.build({**cfg, 'data_root': str(scenes), '_scope_': 'mmdet'})
    assert len(dataset) == count
    assert dataset.metainfo['classes'] == demo['CLASSES'][1:]
    sample = dataset[0]
    assert sample['inputs'].shape[1:] == sample['data_samples'].img_shape == (96, 96)
    assert len(sample['data_samples'].gt_instances.labels) > 0


def test_complete_scenes_are_kept(tmp_path: Path):
    root = make_digit_scenes(tmp_path / 'data', **SMALL)
    (root / 'images/val/000000.png').write_bytes(b'mark')
    make_digit_scenes(root, **SMALL)
    assert (root / 'images/val/000000.png').read_bytes() == b'mark'


def test_scenes_with_other_parameters_are_replaced(tmp_path: Path):
    root = make_digit_scenes(tmp_path / 'data', **SMALL)
    make_digit_scenes(root, **{**SMALL, 'num_train': 1})
    assert len(list(root.glob('images/train/*'))) == 1


def test_another_folder_is_not_touched(tmp_path: Path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='should be new or hold digit scenes'):
        make_digit_scenes(tmp_path, **SMALL)
    assert contents(tmp_path) == {'thesis.txt': b'mine'}


def test_nothing_is_left_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, calls = cv2.imwrite, []

    def break_down(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(cv2, 'imwrite', break_down)
    with pytest.raises(KeyboardInterrupt):
        make_digit_scenes(tmp_path / 'data', **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('num_train', 0),
        ('num_val', -1),
        ('size', 16),
        ('seed', -1),
        ('size', 48.0),
        ('mixed_up', (8, 8)),
    ],
)
def test_impossible_parameters(tmp_path: Path, name: str, value: object):
    with pytest.raises(ValueError, match=f'`{name}` should be .* Found'):
        make_digit_scenes(tmp_path / 'data', **{**SMALL, name: value})
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes: Path):
    options = ['--num-train', '3', '--num-val', '2', '--size', '48']
    monkeypatch.setattr(sys, 'argv', ['digit_scenes.py', str(tmp_path / 'data'), *options])
    demo['main']()
    assert contents(tmp_path / 'data') == contents(scenes)
