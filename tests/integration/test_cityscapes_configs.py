"""The Cityscapes configs are ready to run: built with real models, stepped on tiny tensors."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmdistill_ext.distillers.build import build_model
from tests import tiny_seg

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(
    'name',
    [
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
        model.distillation.fit.watched = True  # as that hook says
    labels = torch.randint(0, 19, (2, 64, 64))
    losses = model(torch.randn(2, 3, 64, 64), tiny_seg.samples(labels), mode='loss')
    total, log = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert {'decode.loss_ce', 'aux.loss_ce'} < log.keys()
    assert {'decode.loss_kd', 'decode.loss_sel'} & log.keys()
    assert all(p.grad is not None for p in model.parameters())
