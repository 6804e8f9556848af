"""The labels that a check before the start sees are those of the training."""

import random
import time

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform, LoadAnnotations
from mmdet.registry import DATASETS as DET_DATASETS
from mmdet.structures import DetDataSample
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmseg.structures import SegDataSample

from mmdistill_ext.hooks import label_scan
from mmdistill_ext.hooks.label_scan import scan_labels, spread
from mmdistill_ext.registry import TRANSFORMS
from tests import tiny_boxes, tiny_seg


@TRANSFORMS.register_module(force=True)
class DividesLabels(BaseTransform):
    """Maps the values of a label map, after it is loaded."""

    def transform(self, results):
        labels = results['gt_seg_map']
        results['gt_seg_map'] = np.where(labels == 255, 255, labels // 10).astype(np.uint8)
        return results


@TRANSFORMS.register_module(force=True)
class ReadsMyLabels(LoadAnnotations):
    """A loader with a name of its own."""

    def transform(self, results):
        results['gt_seg_map'] = cv2.imread(results['seg_map_path'], 0)
        results['seg_fields'].append('gt_seg_map')
        return results


@TRANSFORMS.register_module(force=True)
class Remembers(BaseTransform):
    """Counts the images that it has seen, as mmdet's CachedMosaic keeps them."""

    def __init__(self):
        self.seen = 0

    def transform(self, results):
        self.seen += 1
        np.random.rand(), random.random(), torch.rand(1)
        return results


READER = dict(type='mmdistill_ext.ReadsMyLabels')
DIVIDED = dict(type='mmdistill_ext.DividesLabels')
REMEMBERS = dict(type='mmdistill_ext.Remembers')


@pytest.fixture(autouse=True)
def logs(monkeypatch):
    monkeypatch.setattr(label_scan, 'print_log', lambda *args: None)


@pytest.fixture
def pixels(tmp_path):
    """The config of a segmentation data set, in which only the third label map has a 7."""
    tiny_seg.write_data(tmp_path, 'train')
    label = np.full(tiny_seg.SIZES[2], 1, np.uint8)
    label[4, 5] = 7
    cv2.imwrite(str(tmp_path / 'ann/train/2.png'), label)
    return tiny_seg.dataloader(tmp_path, 'train')['dataset']


def built(cfg, scope):
    with DefaultScope.overwrite_default_scope(scope):
        return (DET_DATASETS if scope == 'mmdet' else DATASETS).build(cfg)


def wrapped(kind, cfg):
    """A data set inside of a wrapper."""
    if kind == 'RepeatDataset':
        return dict(type=kind, times=1000, dataset=cfg)
    if kind == 'ConcatDataset':
        return dict(type=kind, datasets=[cfg, cfg])
    if kind == 'ClassBalancedDataset':
        return dict(type=kind, oversample_thr=0.9, dataset=cfg)
    mosaic = 'RandomMosaic' if cfg['type'] == 'BaseSegDataset' else 'Mosaic'
    mixed = [dict(type=mosaic, prob=1.0, img_scale=(64, 64)), cfg['pipeline'][-1]]
    inner = dict(cfg, pipeline=cfg['pipeline'][:-1])
    return dict(type='MultiImageMixDataset', dataset=inner, pipeline=mixed)


@pytest.mark.parametrize(
    'wrapper', [None, 'RepeatDataset', 'ConcatDataset', 'MultiImageMixDataset']
)
def test_wrong_pixels_are_found_inside_of_any_wrapper(pixels, wrapper):
    cfg = wrapped(wrapper, pixels) if wrapper else pixels
    message = r'in \[0, 3\) or 255.*Found \[7\] in .*\.png.*`train_dataloader\.dataset`'
    with pytest.raises(ValueError, match=message):
        scan_labels(built(cfg, 'mmseg'), 500, 3, 255)
    scan_labels(built(cfg, 'mmseg'), 500, 8, 255)


@pytest.mark.parametrize(
    'wrapper',
    [None, 'RepeatDataset', 'ConcatDataset', 'ClassBalancedDataset', 'MultiImageMixDataset'],
)
def test_wrong_objects_are_found_inside_of_any_wrapper(tmp_path, wrapper):
    tiny_boxes.write_data(tmp_path / 'data')
    cfg = tiny_boxes.loader(tmp_path / 'data', training=True)['dataset']
    dataset = built(wrapped(wrapper, cfg) if wrapper else cfg, 'mmdet')
    scan_labels(dataset, 500, 3, -1)
    with pytest.raises(ValueError, match=r'\[0, 1\) or -1.*Found \[1\] in .*cells0\.png'):
        scan_labels(dataset, 500, 1, -1)


def test_labels_are_those_that_a_later_transform_gives(pixels):
    pixels['pipeline'].insert(2, DIVIDED)
    scan_labels(built(pixels, 'mmseg'), 500, 3, 255)
    with pytest.raises(ValueError, match=r'\[0, 0\) or 255.*Found \[0\]'):
        scan_labels(built(pixels, 'mmseg'), 500, 0, 255)


@pytest.mark.parametrize('lazy', [False, True])
def test_a_loader_has_any_name(pixels, lazy):
    pixels['pipeline'][1] = dict(type=ReadsMyLabels) if lazy else READER
    with pytest.raises(ValueError, match=r'Found \[7\] in .*train/2\.png'):
        scan_labels(built(pixels, 'mmseg'), 500, 3, 255)


@pytest.mark.parametrize('folder', ['ann', 'img'])
def test_a_missing_file_is_named(pixels, tmp_path, folder):
    dataset = built(pixels, 'mmseg')
    (tmp_path / folder / 'train/1.png').unlink()
    with pytest.raises(ValueError, match=rf'`x\.dataset` should have.*{folder}/train/1\.png'):
        scan_labels(dataset, 500, 8, 255, key='x')


def test_the_training_notices_nothing(pixels):
    pixels['pipeline'].insert(2, REMEMBERS)
    dataset = built(wrapped('ConcatDataset', pixels), 'mmseg')
    states = []
    for looks in (0, 500):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        scan_labels(dataset, looks, 8, 255)
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]
    assert [part.pipeline.transforms[2].seen for part in dataset.datasets] == [0, 0]


def test_it_takes_no_longer_than_it_may(pixels, monkeypatch):
    """However large the data set is and however slow its pipeline."""
    said = []
    monkeypatch.setattr(label_scan, 'print_log', lambda text, _: said.append(text))
    monkeypatch.setattr(label_scan, 'SECONDS', 0.2)

    class Slow:
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            time.sleep(0.05)
            return dict(data_samples=tiny_seg.sample(torch.zeros(2, 2)))

    start = time.perf_counter()
    scan_labels(Slow(), 500, 3, 255)
    assert time.perf_counter() - start < 2
    assert 'of 1000000000 samples' in said[0]


@pytest.mark.parametrize('length', [1, 2, 3, 10, 144, 1000, 2975])
def test_every_beginning_is_evenly_spread(length):
    order = list(spread(length))
    assert sorted(order) == list(range(length))
    for count in (5, 20, 100):
        if count < length // 2:
            seen = sorted(order[:count])
            gaps = np.diff([seen[-1] - length, *seen])
            assert gaps.max() <= 2.5 * length / count


def test_labels_are_checked_by_a_run_with_a_loader_of_its_own(pixels, tmp_path):
    """And a run whose transform maps the values is let start."""
    tiny_seg.write_data(tmp_path / 'other', 'val')
    weights = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)
    hook = dict(type='mmdistill_ext.StartCheckHook')
    for steps in ([READER], [READER, DIVIDED]):
        tiny_seg.forget_runs()
        cfg = tiny_seg.config(tmp_path, tmp_path / 'work')
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        cfg = tiny_seg.distil(cfg, weights, check=hook)
        cfg.train_dataloader.dataset.pipeline[1:2] = steps
        runner = Runner.from_cfg(cfg)
        if DIVIDED in steps:
            runner.train()
        else:
            with pytest.raises(ValueError, match=r'Found \[7\] in .*train/2\.png'):
                runner.train()


def test_samples_without_labels_have_no_values():
    assert label_scan.label_values(dict(a=1)).size == 0
    assert label_scan.label_values(SegDataSample()).size == 0
    assert label_scan.label_values(DetDataSample(gt_instances=InstanceData())).size == 0
    assert label_scan.label_values(tiny_seg.sample(torch.zeros(2, 2))).tolist() == [0]
