"""The configs of networks that learn together are ready to run: built, and stepped on noise."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import EVALUATOR, HOOKS, MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmdistill_ext.plain_config import plain_config
from tests import tiny_det

CONFIGS = Path(__file__).parents[2] / 'configs' / 'collaborative'
SMALL = {
    'col_fpn-fcn_600_digit-scenes-96x96.py': ('fcn', 'fpn'),
    'col_fpn-fcn_r18-w16_1200_camvid-192x256.py': ('fcn', 'fpn'),
    'col_fpn-fcn-pspnet_r18-w16_1200_camvid-192x256.py': ('fcn', 'fpn', 'psp'),
    'col_gfl-atss_r18-w16_8e_bccd-320x240.py': ('atss', 'gfl'),
}
LARGE = {  # tried with the others of their data
    'col_gfl-atss_r18_1x_coco.py',
    'col_pspnet-deeplabv3plus_r18_80k_cityscapes-512x1024.py',
}


def segmentation_batch(size):
    generator = torch.Generator().manual_seed(0)
    images, samples = [], []
    for _ in range(2):
        images.append(torch.randint(0, 256, (3, *size), generator=generator).byte())
        label = torch.randint(0, 11, (1, *size), generator=generator)
        shape = dict(img_shape=size, ori_shape=size)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=shape))
    return dict(inputs=images, data_samples=samples)


def test_every_config_is_tried():
    assert {path.name for path in CONFIGS.glob('*.py')} == {*SMALL, *LARGE}


@pytest.mark.parametrize('name', SMALL)
def test_built_and_stepped(name):
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).train()
    model.init_weights()
    assert tuple(model.names) == SMALL[name]
    if cfg.default_scope == 'mmdet':
        data = tiny_det.raw()
    else:
        data = segmentation_batch(model.students.fpn.data_preprocessor.size)
    total, log = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    total.backward()
    assert torch.isfinite(total)
    assert {f'{network}/loss_kl' for network in model.names} | {'ensemble/loss'} < log.keys()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('name', SMALL)
def test_validated_by_network_and_shipped_alone(name):
    cfg = Config.fromfile(CONFIGS / name)
    assert EVALUATOR.get(cfg.val_evaluator.type).__name__ == 'NetworksEvaluator'
    assert cfg.test_evaluator == cfg.val_evaluator
    assert [HOOKS.get(hook.type).__name__ for hook in cfg.custom_hooks] == ['CollaborationHook']
    for network in SMALL[name]:
        plain = plain_config(cfg, network)
        assert 'mmdistill_ext' not in plain.pretty_text
        assert plain.val_evaluator == cfg.val_evaluator.metrics
