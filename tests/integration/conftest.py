"""Data and teachers that several files train on."""

import pytest
import torch
from mmengine.config import Config

from mmdistill_ext.distillers.build import build_model
from tests import tiny_seg
from tests.tiny_bccd import CONFIGS, write_coco


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Return the file of a segmenter's weights."""
    return tiny_seg.save_weights(tmp_path_factory.mktemp('t') / 't.pth', tiny_seg.model(16), seed=1)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    for split in ('train', 'val'):
        write_coco(folder, split)
    for name in ('retinanet_r18_16e', 'gfl_r18_24e'):
        cfg = Config.fromfile(CONFIGS / f'plain/{name}_bccd-320x240.py')
        torch.manual_seed(1)
        teacher = build_model({'_scope_': 'mmdet', **cfg.model})
        torch.save(dict(state_dict=teacher.state_dict()), folder / f'{name[:3]}.pth')
    return folder
