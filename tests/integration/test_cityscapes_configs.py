"""The Cityscapes configs are ready to run: built with real models, stepped on tiny tensors."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.hooks.collaboration_hook import check_views
from tests import tiny_seg

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(
    'name',
    [
        'features/cwd_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py',
        'fit/fit-kd_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py',
        'kd/kd_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py',
        'selective/sel_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py',
    ],
)
def test_built_and_stepped(tmp_path, name):
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    teacher = build_model(cfg.model.teacher.model)
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / 'teacher.pth')
    cfg.model.teacher.checkpoint = str(tmp_path / 'teacher.pth')
    cfg.model.student.pretrained = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    if model.distillation.fit is not None:
        assert {'FitHook'} < {hook.type.split('.')[-1] for hook in cfg.custom_hooks}
        model.distillation.fit.has_hook = True  # as that hook says
    labels = torch.randint(0, 19, (2, 64, 64))
    losses = model(torch.randn(2, 3, 64, 64), tiny_seg.samples(labels), mode='loss')
    total, log = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert {'decode.loss_ce', 'aux.loss_ce'} < log.keys()
    assert {'decode.loss_kd', 'decode.loss_sel', 'loss_logits'} & log.keys()
    assert all(p.grad is not None for p in model.parameters())


def test_networks_that_learn_together_are_built_and_stepped():
    name = 'col_pspnet-deeplabv3plus_r18_80k_cityscapes-512x1024.py'
    cfg = Config.fromfile(CONFIGS / 'collaborative' / name)
    init_default_scope(cfg.default_scope)
    assert cfg.model.students.psp.type == 'EncoderDecoder'
    cfg.model.students.psp.pretrained = None
    deeplab = resolve_model_cfg(cfg.model.students.deeplab)
    deeplab.pretrained = None
    cfg.model.students.deeplab = deeplab
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    pipeline = Compose(cfg.train_dataloader.dataset.pipeline[-1:])
    check_views(SimpleNamespace(pipeline=pipeline), model.names)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.float32)
    label = rng.integers(0, 19, (64, 64), np.uint8)
    info = dict(ori_shape=(64, 64), img_shape=(64, 64), img_path='', seg_map_path='')
    samples = [
        pipeline(dict(img=image.copy(), gt_seg_map=label, seg_fields=['gt_seg_map'], **info))
        for _ in range(2)
    ]
    for network in model.students.values():
        network.data_preprocessor.size = (64, 64)
    data = model.data_preprocessor(pseudo_collate(samples), True)
    assert not torch.equal(data['inputs']['psp'], data['inputs']['deeplab'])
    total, log = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert torch.isfinite(total)
    assert {f'{name}/{loss}' for name in model.names for loss in ('loss_ce', 'loss_kl')} < set(log)
    assert all(p.grad is not None for p in model.parameters())
